"""A training run before it runs: everything that a recipe decides without weights, and what to expect of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import CONFIG_MAPPING

from hf_longctx import checkpoint, files
from hf_longctx.data import Mixture, Windows, check_source, coverage, fit_sampler, load_documents
from hf_longctx.integration import rope
from hf_longctx.integration.configs import family
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
    sampler: Method
    config: PretrainedConfig  # patched
    tokenizer: PreTrainedTokenizerBase
    sources: tuple[Windows, ...]
    batch: int  # examples of one optimizer step, over all processes
    steps: int
    probed: tuple[Probed, ...]

    @cached_property
    def dataset(self) -> Mixture:
        """The examples of the whole run, in order."""
        weights = [source.weight for source in self.recipe.data]
        return Mixture(self.sources, weights, self.steps * self.batch, self.recipe.seed)

    @property
    def target(self) -> int:
        """The window of the model after training."""
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
    passing = in_slot(chosen, "state")
    if passing is not None:
        raise ValueError(f"{passing.name} passes states between windows, which recipes cannot do yet; in Python there is hf_longctx.integration.state")
    model_side = tuple(item for item in chosen if set(item.slots) & set(MODEL_SLOTS))
    patch_config(config, model_side)
    if recipe.distill and recipe.window > rope.trained_window(config):
        raise ValueError(f"distill: the base knows {rope.trained_window(config)} tokens, so it cannot teach a window of {recipe.window}")
    embedding = in_slot(chosen, "embedding")
    if recipe.distill and embedding is not None:
        raise ValueError(f"distill: {embedding.name} adds to the token embeddings, where the teacher would read its tokens; leave one of the two out")
    sampler = fit_sampler(in_slot(chosen, "positions") or method("plain"), recipe.window, config)
    begins = opening(tokenizer)
    first = int(begins[0]) if len(begins) else None
    sources = tuple(
        Windows(load_documents(source, tokenizer), recipe.window, sampler, [recipe.seed, number], source.short, first, recipe.mask_seams)
        for number, source in enumerate(recipe.data)
    )
    for source, windows in zip(recipe.data, sources, strict=True):
        _check_windows(source, windows, config, model_side)
    if recipe.eval is not None and recipe.eval.data is not None:
        check_source(DataSource(recipe.eval.data))
    probed = make_cells(recipe.probe, tokenizer, config, recipe.seed) if recipe.probe is not None else ()
    batch = _batch(recipe.train)
    return Plan(recipe, model_side, sampler, config, tokenizer, sources, batch, _steps(recipe.train, sum(map(len, sources)), batch), probed)


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
        "methods": [item.to_dict() for item in what.methods], "sampler": what.sampler.to_dict(), "window": recipe.window, "target": what.target,
        "documents": sum(len(s.documents) for s in what.sources), "windows": sum(map(len, what.sources)), "dropped": sum(s.dropped for s in what.sources),
        "steps": what.steps, "batch": what.batch, "tokens": what.steps * what.batch * recipe.window,
        "epochs": what.steps * what.batch / sum(map(len, what.sources)),
        "samples": [_show(row, what.tokenizer) for row in shown],
        "coverage": coverage_of(what), "memory": estimate_memory(what),
    }  # fmt: skip


def coverage_of(what: Plan) -> dict[str, Any]:
    """`coverage` of the run's sampler."""
    return coverage(what.sampler, what.recipe.window, max(what.target, what.recipe.window))


def estimate_memory(what: Plan) -> dict[str, float]:
    """Rough peak of a training step on one device in GiB, by component; the runs in the README lie within 30 % of it."""
    recipe, config = what.recipe, what.config
    total, trained = _parameters(what)
    half = recipe.lora is not None and torch.cuda.is_available() and recipe.model.dtype != "float32"
    added = 0 if recipe.lora is None else trained * 4
    tokens = int(_count(recipe.train, "per_device_train_batch_size", 8)) * recipe.window
    width, inner, layers = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size), config.num_hidden_layers
    per_layer = tokens * 2 * (8 * width + 4 * inner)  # 16-bit activations kept for backward
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
    return {name: size / 2**30 for name, size in parts.items()} | {"total": sum(parts.values()) / 2**30}


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
    positions, ids = row["position_ids"], row["input_ids"]
    breaks = [0, *((positions[1:] - positions[:-1] != 1).nonzero()[0] + 1).tolist(), len(ids)]
    chunks = [
        {"positions": [int(positions[a]), int(positions[b - 1])], "tokens": b - a, "text": tokenizer.decode(ids[a : min(a + 12, b)])}
        for a, b in pairwise(breaks[:5])
    ]
    return {"chunks": chunks, "more": max(0, len(breaks) - 1 - len(chunks)), "labels": int((row["labels"] >= 0).sum())}
