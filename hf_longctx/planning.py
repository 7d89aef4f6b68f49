"""A training run before it runs: everything that a recipe decides without weights, and what to expect of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import CONFIG_MAPPING

from hf_longctx import checkpoint, files
from hf_longctx.data import Mixture, Windows, check_source, coverage, fit_sampler, load_documents
from hf_longctx.integration import rope
from hf_longctx.integration.configs import family
from hf_longctx.integration.state import check_supported, has_state, zeros
from hf_longctx.lanes import Lanes, StateWindows, divide
from hf_longctx.lora import add_lora
from hf_longctx.method import Method, in_slot, method
from hf_longctx.patching import MODEL_SLOTS, patch_config, window_of
from hf_longctx.probe import Probed, make_cells
from hf_longctx.recipe import DataSource, ModelSpec, Recipe, parse_recipe, read_recipe
from hf_longctx.schema import nearest
from hf_longctx.task import opening


@dataclass(frozen=True)
class Plan:
    """A recipe with everything decided that can be decided without loading weights."""

    recipe: Recipe
    methods: tuple[Method, ...]  # those that change the model
    passing: Method | None  # where windows start from; None for a model without a state
    sampler: Method
    config: PretrainedConfig  # patched
    tokenizer: PreTrainedTokenizerBase
    sources: tuple[Windows, ...]
    batch: int  # examples of one optimizer step, over all processes
    steps: int
    probed: tuple[Probed, ...]

    @cached_property
    def dataset(self) -> Mixture | Lanes:
        """The examples of the whole run, in order."""
        weights = [source.weight for source in self.recipe.data]
        if self.passing is not None and self.passing.state().order == "stream":
            return Lanes([s for s in self.sources if isinstance(s, StateWindows)], weights, self.batch, self.steps * self.batch)
        return Mixture(self.sources, weights, self.steps * self.batch, self.recipe.seed)

    @property
    def target(self) -> int | None:
        """The window of the model after training; None if it has none."""
        return window_of(self.config)


def plan(recipe: Recipe, weights: bool = True) -> Plan:
    """Resolve a recipe: configuration, patched window, sampler, data, number of steps. No weights are loaded.

    Args:
        recipe: what to resolve.
        weights: fetch them too if the model is on the hub, and refuse a folder without any.

    Raises:
        ValueError: anything in the recipe that cannot work, named.
    """
    if recipe.model.quantization is not None:
        checkpoint.bitsandbytes_config(recipe.model.quantization)
    config, tokenizer = _config_and_tokenizer(recipe, weights)
    chosen = recipe.load_methods()
    model_side = tuple(item for item in chosen if set(item.slots) & set(MODEL_SLOTS))
    patch_config(config, model_side)
    passing = _passing(recipe, chosen, config)
    _check_distillation(recipe, chosen, config)
    sampler = fit_sampler(in_slot(chosen, "positions") or method("plain"), recipe.window, config)
    sources = tuple(_windows(recipe, number, tokenizer, sampler, passing) for number in range(len(recipe.data)))
    for source, windows in zip(recipe.data, sources, strict=True):
        _check_windows(source, windows, config, model_side)
    if recipe.eval is not None and recipe.eval.data is not None:
        check_source(DataSource(recipe.eval.data))
    far = window_of(config) or 16 * recipe.window
    probed = make_cells(recipe.probe, tokenizer, config, far, recipe.seed) if recipe.probe is not None else ()
    batch = _batch(recipe.train)
    if passing is not None and passing.state().order == "stream":
        _check_lanes(recipe, sources, batch)
    return Plan(recipe, model_side, passing, sampler, config, tokenizer, sources, batch, _steps(recipe.train, sum(map(len, sources)), batch), probed)


def _passing(recipe: Recipe, chosen: Sequence[Method], config: PretrainedConfig) -> Method | None:
    """The state method of a run: the one that is named, or `zero` for a model with a state. ValueError for what does not go with it."""
    passing = in_slot(chosen, "state")
    if passing is not None:
        check_supported(config)
    elif not has_state(config):
        return None
    sampler = in_slot(chosen, "positions")
    if sampler is not None:
        raise ValueError(f"{sampler.name} chooses tokens and their positions, but {family(config)} reads text in order into a state; leave {sampler.name} out")
    if recipe.distill:
        raise ValueError(f"distill: {family(config)} has a state, which the teacher would not start from; leave distill out")
    if recipe.compile == "on":
        raise ValueError(f"compile: layers of {family(config)} start from states, which a compiled graph does not; leave compile out")
    return passing or method("zero")


def _check_distillation(recipe: Recipe, chosen: Sequence[Method], config: PretrainedConfig) -> None:
    if not recipe.distill:
        return
    known = rope.trained_window(config)
    if known is not None and recipe.window > known:
        raise ValueError(f"distill: the base knows {known} tokens, so it cannot teach a window of {recipe.window}")
    embedding = in_slot(chosen, "embedding")
    if embedding is not None:
        raise ValueError(f"distill: {embedding.name} adds to the token embeddings, where the teacher would read its tokens; leave one of the two out")


def _windows(recipe: Recipe, number: int, tokenizer: PreTrainedTokenizerBase, sampler: Method, passing: Method | None) -> Windows:
    """The training examples of one source."""
    source, seed = recipe.data[number], [recipe.seed, number]
    documents = load_documents(source, tokenizer)
    begins = opening(tokenizer)
    first = int(begins[0]) if len(begins) else None
    if passing is not None:
        return StateWindows(documents, recipe.window, seed, source.short, first)
    return Windows(documents, recipe.window, sampler, seed, source.short, first, recipe.mask_seams)


def _check_lanes(recipe: Recipe, sources: Sequence[Windows], lanes: int) -> None:
    """Raises ValueError unless each source has lanes, and each lane a window."""
    for source, windows, own in zip(recipe.data, sources, divide(lanes, [source.weight for source in recipe.data]), strict=True):
        if own == 0:
            raise ValueError(f"{source.path}: its weight {source.weight:g} gives it none of the {lanes} rows of a step; raise it, or the batch")
        if len(windows) < own:
            raise ValueError(f"{source.path} has {len(windows)} windows of {windows.window} tokens for {own} rows that read on; set a smaller batch or window")


def _check_windows(source: DataSource, windows: Windows, config: PretrainedConfig, methods: Sequence[Method]) -> None:
    """Raises ValueError if a source has no example, or one that the model cannot read rightly."""
    if len(windows) == 0:
        longest = int(max(windows.documents.lengths, default=0))
        raise ValueError(f"{source.path} has no document of {windows.window} tokens (the longest has {longest}); set a smaller window or short: pack")
    if source.path.endswith(".npz") and int(windows.documents.ids.max()) >= config.vocab_size:
        raise ValueError(f"{source.path} holds token id {windows.documents.ids.max()}, but the model's vocabulary has {config.vocab_size}")
    # The mask of a packed row takes the place of every layer's own.
    reach = int(getattr(config, "sliding_window", None) or 0)
    slides = reach > 0 and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if windows.packs and slides and reach < windows.window:
        reason = f"whose layers slide over {reach} tokens"
        raise ValueError(f"{source.path}: documents cannot be packed for {config.model_type}, {reason}; set short: drop")
    if windows.packs and isinstance(windows, StateWindows):
        raise ValueError(f"{source.path}: documents cannot be packed for {config.model_type}, whose state runs on from one to the next; set short: drop")
    for item in methods:
        if windows.packs and not item.packs:
            raise ValueError(f"{source.path}: documents cannot be packed with {item.name}, which sums over all keys of a row; set short: drop")


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A Recipe from any of the forms that users have it in."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)


def _config_and_tokenizer(recipe: Recipe, weights: bool) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    spec = recipe.model
    if spec.config is not None:
        return _fresh_config_and_tokenizer(spec)
    assert spec.name is not None
    if checkpoint.is_gguf(spec.name):
        path = Path(spec.name)
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    folder = files.local_folder(spec.name, spec.revision, weights)
    if (folder / files.ADAPTER).exists():
        raise ValueError(f"{spec.name} is an adapter; merge it first (`longctx merge`), then train the result")
    return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _fresh_config_and_tokenizer(spec: ModelSpec) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    keys = dict(spec.config or {})
    if "model_type" not in keys or not spec.tokenizer:
        raise ValueError("model: training from scratch needs config.model_type and a tokenizer")
    kind = keys.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model.config: unknown model_type {kind!r}" + nearest(kind, CONFIG_MAPPING.keys()))
    known = {*AutoConfig.for_model(kind).to_dict(), *CONFIG_MAPPING[kind].attribute_map, "rope_theta", "rope_scaling"}
    for key in keys:
        if key not in known:  # Transformers would keep it and ignore it
            raise ValueError(f"model.config: unknown key {key!r}" + nearest(key, known))
    folder = spec.tokenizer if Path(spec.tokenizer).exists() else files.local_folder(spec.tokenizer, weights=False)
    config, tokenizer = AutoConfig.for_model(kind, **keys), AutoTokenizer.from_pretrained(folder)
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"model.config: vocab_size {config.vocab_size} is below the tokenizer's {len(tokenizer)}")
    return config, tokenizer


def _count(train: Mapping[str, Any], key: str, default: int) -> float:
    value = train.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"train: {key} must be a number, got {value!r}")
    return value


def _batch(train: Mapping[str, Any]) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate; a plan needs no process group
    return int(_count(train, "per_device_train_batch_size", 8)) * world * int(_count(train, "gradient_accumulation_steps", 1))


def _steps(train: Mapping[str, Any], windows: int, batch: int) -> int:
    steps = int(_count(train, "max_steps", -1))
    return steps if steps > 0 else max(1, round(_count(train, "num_train_epochs", 1) * windows / batch))


def dry_run(recipe: Recipe | Mapping[str, Any] | str | Path, samples: int = 3) -> dict[str, Any]:
    """Everything about a run that is known before it: what is trained on what, samples, coverage, a memory estimate.

    Raises:
        ValueError: as `finetune`.
    """
    what = plan(as_recipe(recipe), weights=False)
    recipe = what.recipe
    shown = [what.dataset[i] for i in range(min(samples, len(what.dataset)))]
    return {
        "model": recipe.model.name or recipe.model.config, "family": family(what.config), "trained_window": rope.trained_window(what.config),
        "methods": [item.to_dict() for item in what.methods], "sampler": None if what.passing else what.sampler.to_dict(),
        "state": state_of(what), "window": recipe.window, "target": what.target,
        "documents": sum(len(s.documents) for s in what.sources), "windows": sum(map(len, what.sources)), "dropped": sum(s.dropped for s in what.sources),
        "steps": what.steps, "batch": what.batch, "tokens": what.steps * what.batch * recipe.window,
        "epochs": what.steps * what.batch / sum(map(len, what.sources)),
        "samples": [_show(row, what.tokenizer) for row in shown],
        "coverage": coverage_of(what), "memory": estimate_memory(what),
    }  # fmt: skip


def coverage_of(what: Plan) -> dict[str, Any] | None:
    """`coverage` of the run's sampler; None where no positions are chosen."""
    if what.passing is not None or what.target is None:
        return None
    return coverage(what.sampler, what.recipe.window, max(what.target, what.recipe.window))


def state_of(what: Plan) -> dict[str, Any] | None:
    """How a run passes states: the method, the lanes and the windows of one in an epoch, and the share of rows that begin a text."""
    if what.passing is None:
        return None
    rows = what.dataset
    lanes = [len(source) / own for source, own in zip(rows.sources, rows.given, strict=True)] if isinstance(rows, Lanes) else None
    return {
        "method": what.passing.to_dict(), "lanes": what.batch if lanes else None, "windows_per_lane": min(lanes) if lanes else None,
        "fresh": rows.share_fresh if isinstance(rows, Lanes) else 1.0,
    }  # fmt: skip


def estimate_memory(what: Plan) -> dict[str, float]:
    """Rough peak of a training step on one device in GiB, by component; the runs in the README lie within 30 % of it."""
    recipe, config = what.recipe, what.config
    total, trained = _parameters(what)
    half = recipe.lora is not None and torch.cuda.is_available() and recipe.model.dtype != "float32"
    added = 0 if recipe.lora is None else trained * 4
    tokens = int(_count(recipe.train, "per_device_train_batch_size", 8)) * recipe.window
    width, layers = config.hidden_size, config.num_hidden_layers
    per_layer = tokens * _kept(config, what.passing is not None)
    recomputed = any(recipe.train.get(key) for key in ("gradient_checkpointing", "activation_checkpointing"))
    weights = total * (2 if half else 4)
    if recipe.model.quantization is not None:  # embeddings and output stay as they are, and PEFT makes them float32
        kept = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
        weights = kept * 4 + (total - kept) * (0.5 if recipe.model.quantization.get("load_in_4bit") else 1)
    parts = {
        "weights": weights + added,
        "gradients and optimizer": trained * 12,
        "activations": tokens * 2 * width * layers + per_layer if recomputed else per_layer * layers,
        "logits": tokens * config.vocab_size * 8 if recipe.loss == "model" else (6 if recipe.distill else 3) * 2**28,
    }
    if what.passing is not None:
        parts["states"] = _states(what)
    return {name: size / 2**30 for name, size in parts.items()} | {"total": sum(parts.values()) / 2**30}


def _kept(config: PretrainedConfig, states: bool) -> float:
    """Bytes that a layer keeps of a token for the backward pass."""
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if not states:
        return 2 * (8 * width + 4 * inner)  # 16-bit activations
    if family(config) in ("mamba", "falcon_mamba"):  # what autograd keeps of a mixer in torch, in 16 bits and 32; kernels keep less
        return 42 * inner
    return 100 * getattr(config, "expand", getattr(config, "mamba_expand", 2)) * width


def _states(what: Plan) -> float:
    """Bytes of the states that a process holds between windows: of every row of a step in lanes, of the last micro-batch otherwise."""
    train, lanes = what.recipe.train, isinstance(what.dataset, Lanes)
    rows = _count(train, "per_device_train_batch_size", 8) * (_count(train, "gradient_accumulation_steps", 1) if lanes else 1)
    with torch.device("meta"):
        one = zeros(AutoModelForCausalLM.from_config(what.config), 1)
    return rows * sum(part.numel() * part.element_size() for layer in one for part in layer)


def _parameters(what: Plan) -> tuple[int, int]:
    """How many the base has, and how many are trained; counted on a model without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(what.config)
    total = sum(p.numel() for p in model.parameters())
    if what.recipe.lora is None:
        return total, total
    return total, sum(p.numel() for p in add_lora(model, what.recipe).parameters() if p.requires_grad)


def _show(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A training example for people: where its chunks lie, and how each begins."""
    ids = row["input_ids"]
    positions = row.get("position_ids", np.arange(len(ids)))
    breaks = [0, *((positions[1:] - positions[:-1] != 1).nonzero()[0] + 1).tolist(), len(ids)]
    chunks = [
        {"positions": [int(positions[a]), int(positions[b - 1])], "tokens": b - a, "text": tokenizer.decode(ids[a : min(a + 12, b)])}
        for a, b in pairwise(breaks[:5])
    ]
    return {"chunks": chunks, "more": max(0, len(breaks) - 1 - len(chunks)), "labels": int((row["labels"] >= 0).sum())}
