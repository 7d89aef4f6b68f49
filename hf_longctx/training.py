"""finetune: LoRA (or every weight) at a short window with skip-wise positions, through Transformers' Trainer and PEFT."""

import logging
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_longctx import checkpoint, files
from hf_longctx.data import Documents, Mixture, Windows, collate, coverage, first_token, load_documents
from hf_longctx.integration import rope
from hf_longctx.loss import BlockLoss, check_block_loss
from hf_longctx.method import Method, in_slot, method
from hf_longctx.patching import MODEL_SLOTS, patch_config, window_of
from hf_longctx.recipe import Recipe, dump_recipe, parse_recipe, read_recipe

logger = logging.getLogger(__name__)
RECIPE_FILE = "recipe.yaml"


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after its state was saved; `finetune(..., resume=True)` goes on from there."""


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

    @property
    def dataset(self) -> Mixture:
        """The examples of the whole run, in order."""
        weights = [source.weight for source in self.recipe.data]
        return Mixture(self.sources, weights, self.steps * self.batch, self.recipe.seed)

    @property
    def target(self) -> int:
        """The window of the model after training."""
        return window_of(self.config)


def plan(recipe: Recipe) -> Plan:
    """Resolve a recipe: configuration, patched window, sampler, data, number of steps. No weights are loaded.

    Raises:
        ValueError: anything in the recipe that cannot work, named.
    """
    config, tokenizer = _config_and_tokenizer(recipe)
    chosen = recipe.load_methods()
    model_side = tuple(item for item in chosen if set(item.slots) & set(MODEL_SLOTS))
    patch_config(config, model_side)
    sampler = _sampler(chosen, recipe.window, window_of(config), config)
    opening = first_token(tokenizer)
    sources = tuple(
        Windows(load_documents(source, tokenizer), recipe.window, sampler, [recipe.seed, number], source.short, opening, recipe.mask_seams)
        for number, source in enumerate(recipe.data)
    )
    for source, windows in zip(recipe.data, sources, strict=True):
        if len(windows) == 0:
            longest = int(max(windows.documents.lengths, default=0))
            raise ValueError(f"{source.path} has no document of {recipe.window} tokens (the longest has {longest}); set a smaller window or short: pack")
    batch = _batch(recipe.train)
    return Plan(recipe, model_side, sampler, config, tokenizer, sources, batch, _steps(recipe.train, sum(map(len, sources)), batch))


def finetune(recipe: Recipe | Mapping[str, Any] | str | Path, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as a recipe says and save an adapter (or a whole model, with `lora: null`) to `out`.

    Under `torchrun` or `accelerate launch` it trains on every process it is given, on the same windows as one process.

    Args:
        recipe: a Recipe, its values, a file, or the name of a shipped one.
        out: the folder for checkpoints and the result.
        resume: go on from the last complete checkpoint in `out`; on one device the weights come out equal to those of an
            uninterrupted run.
        overwrite: throw away what `out` holds.

    Raises:
        ValueError: a recipe that cannot work, an `out` in use, or nothing to resume.
        Interrupted: SIGINT; the state was saved.
    """
    recipe = as_recipe(recipe)
    folder = Path(out)
    last = _prepare_output(folder, recipe, resume, overwrite)
    arguments = _arguments(recipe, folder)
    with arguments.main_process_first(desc="tokenising"):
        what = plan(recipe)
    set_seed(recipe.seed)
    model, mark = _build_model(what)
    if recipe.loss == "blocks":
        check_block_loss(model)
    trainer = _trainer(what, model, arguments)
    guard = _Interrupt()
    trainer.add_callback(guard)
    with guard:
        trainer.train(resume_from_checkpoint=last)
    if guard.asked:
        raise Interrupted(f"interrupted at step {trainer.state.global_step}; add --resume to go on")
    if trainer.is_world_process_zero():
        _save_result(what, model, folder, mark)
    return folder


def dry_run(recipe: Recipe | Mapping[str, Any] | str | Path, samples: int = 3) -> dict[str, Any]:
    """Everything about a run that is known before it: what is trained on what, samples, coverage, a memory estimate.

    Raises:
        ValueError: as `finetune`.
    """
    what = plan(as_recipe(recipe))
    recipe = what.recipe
    shown = [what.dataset[i] for i in range(min(samples, len(what.dataset)))]
    return {
        "model": recipe.model.name or recipe.model.config, "family": what.config.model_type, "trained_window": rope.trained_window(what.config),
        "methods": [item.to_dict() for item in what.methods], "sampler": what.sampler.to_dict(), "window": recipe.window, "target": what.target,
        "documents": sum(len(s.documents) for s in what.sources), "windows": sum(map(len, what.sources)), "dropped": sum(s.dropped for s in what.sources),
        "steps": what.steps, "batch": what.batch, "tokens": what.steps * what.batch * recipe.window,
        "epochs": what.steps * what.batch / sum(map(len, what.sources)),
        "samples": [_show(row, what.tokenizer) for row in shown],
        "coverage": coverage(what.sampler, recipe.window, max(what.target, recipe.window)), "memory": estimate_memory(what),
    }  # fmt: skip


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A Recipe from any of the forms that users have it in."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)


def _config_and_tokenizer(recipe: Recipe) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    spec = recipe.model
    if spec.config is not None:
        keys = dict(spec.config)
        if "model_type" not in keys or not spec.tokenizer:
            raise ValueError("model: training from scratch needs config.model_type and a tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(files.local_folder(spec.tokenizer, weights=False) if not Path(spec.tokenizer).exists() else spec.tokenizer)
        return AutoConfig.for_model(keys.pop("model_type"), **keys), tokenizer
    assert spec.name is not None
    if checkpoint.is_gguf(spec.name):
        path = Path(spec.name)
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    folder = files.local_folder(spec.name, spec.revision)
    if (folder / files.ADAPTER).exists():
        raise ValueError(f"{spec.name} is an adapter; merge it first (`longctx merge`), then train the result")
    return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _sampler(chosen: tuple[Method, ...], window: int, target: int, config: PretrainedConfig) -> Method:
    """The recipe's sampler with its target filled in, or plain positions."""
    sampler = in_slot(chosen, "positions") or method("plain")
    if not hasattr(sampler, "target"):
        return sampler
    changer = in_slot(chosen, "rope")
    if changer is not None and not changer.static:
        raise ValueError(f"{sampler.name} skips positions, but the frequencies of {changer.name} depend on the length seen; use a static method such as yarn")
    wanted = sampler.target or target
    if wanted != target:
        raise ValueError(
            f"{sampler.name}: target {wanted} is not the patched model's window {target} (trained window {rope.trained_window(config)} x factor); "
            "set the factor, or leave target out"
        )
    if wanted < window:
        raise ValueError(f"{sampler.name}: target {wanted} is below the training window {window}")
    return replace(sampler, target=wanted)  # type: ignore[call-arg]


def _batch(train: Mapping[str, Any]) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return int(train.get("per_device_train_batch_size", 8)) * world * int(train.get("gradient_accumulation_steps", 1))


def _steps(train: Mapping[str, Any], windows: int, batch: int) -> int:
    steps = int(train.get("max_steps", -1))
    return steps if steps > 0 else max(1, round(float(train.get("num_train_epochs", 1)) * windows / batch))


def _arguments(recipe: Recipe, out: Path, steps: int | None = None) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    ours = {
        "output_dir": str(out), "seed": recipe.seed, "data_seed": recipe.seed, "train_sampling_strategy": "sequential",
        "remove_unused_columns": False, "num_train_epochs": 1,
    }  # fmt: skip
    defaults = {"bf16": cuda and torch.cuda.is_bf16_supported(), "logging_steps": 10, "save_total_limit": 2, "dataloader_num_workers": 2 if cuda else 0}
    try:
        return TrainingArguments(**(defaults | recipe.train | ours | ({} if steps is None else {"max_steps": steps})))
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {error}") from None


def _prepare_output(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to resume from, if any. Every process decides alike; only the first touches the folder."""
    main = int(os.environ.get("RANK", "0")) == 0
    if resume:
        if not (folder / RECIPE_FILE).exists():
            raise ValueError(f"{folder} holds no run to resume: there is no {RECIPE_FILE} in it")
        if read_recipe(folder / RECIPE_FILE) != recipe:
            raise ValueError(f"the recipe differs from the one in {folder / RECIPE_FILE}; resume with that one, or choose another --out")
        return last_checkpoint(folder)
    files.check_output(folder, overwrite)
    if main:
        if folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        dump_recipe(recipe, folder / RECIPE_FILE)
    return None


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; trainer_state.json is written last, so one without it was cut short."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    whole = [p for p in found if _readable(p / "trainer_state.json")]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _readable(path: Path) -> bool:
    try:
        files.read_json(path)
    except ValueError:
        return False
    return True


def _build_model(what: Plan) -> tuple[nn.Module, str]:
    """The model to train and the fingerprint of its base."""
    recipe, spec = what.recipe, what.recipe.model
    if spec.config is not None:
        model = AutoModelForCausalLM.from_config(what.config, attn_implementation=spec.attn_implementation, dtype=torch.float32)
    else:
        # Full training needs float32 weights: updates are smaller than what bfloat16 can add.
        dtype = "float32" if recipe.lora is None and spec.dtype == "auto" else None if spec.dtype == "auto" else spec.dtype
        assert spec.name is not None
        model = checkpoint.load(spec.name, methods=what.methods, revision=spec.revision, dtype=dtype, attn_implementation=spec.attn_implementation).model
    model.train()
    mark = checkpoint.fingerprint(model)
    if recipe.lora is None:
        return model, mark
    return _add_lora(model, recipe), mark


def _add_lora(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    keys = dict(recipe.lora or {})
    keys.setdefault("task_type", TaskType.CAUSAL_LM)
    also = list(keys.pop("modules_to_save", None) or [])
    if "norms" in recipe.also_train:
        also += sorted({name.rpartition(".")[2] for name, module in model.named_modules() if "Norm" in type(module).__name__})
    if "embeddings" in recipe.also_train:
        also += [name.rpartition(".")[2] for name, module in model.named_modules() if module is model.get_input_embeddings()]
        keys.setdefault("ensure_weight_tying", bool(model.config.tie_word_embeddings))
    try:
        return get_peft_model(model, LoraConfig(**keys, modules_to_save=also or None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from None


def _trainer(what: Plan, model: nn.Module, arguments: TrainingArguments) -> Trainer:
    recipe = what.recipe
    arguments.max_steps = what.steps
    if recipe.compile == "on" or (recipe.compile == "auto" and torch.cuda.is_available() and what.steps >= 50):
        compile_layers(model)
    blocks = recipe.loss == "blocks"
    trainer = Trainer(
        model=model, args=arguments, train_dataset=what.dataset, processing_class=None,
        data_collator=_Collator(blocks), compute_loss_func=BlockLoss(model) if blocks else None,
    )  # fmt: skip
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(Progress(what.batch * recipe.window))
    return trainer


@dataclass(frozen=True)
class _Collator:
    """`collate`, and with the block loss the logits of a single token."""

    blocks: bool

    def __call__(self, rows: Any) -> dict[str, Any]:
        return collate(rows) | ({"logits_to_keep": 1} if self.blocks else {})


def compile_layers(model: nn.Module) -> None:
    """torch.compile each decoder layer by itself: layers share one graph, so compilation takes seconds, and the mask is made
    outside, where Transformers sees that ones need none and keeps the causal flash kernel."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.get_decoder().layers:
        layer.compile(dynamic=False)


def _save_result(what: Plan, model: nn.Module, folder: Path, mark: str) -> None:
    """The adapter with its sidecar and patched configuration, or the whole model."""
    recipe = what.recipe
    if recipe.lora is None:
        plain: Any = model
        tokenizer = what.tokenizer
        tokenizer.model_max_length = what.target
        checkpoint.save(plain, tokenizer, folder)
        return
    model.save_pretrained(str(folder))  # type: ignore[operator]
    for leftover in folder.glob("README.md"):  # PEFT's empty card
        leftover.unlink()
    spec = recipe.model
    if spec.name and not checkpoint.is_gguf(spec.name):
        source = files.local_folder(spec.name, spec.revision)
        for path in files.companions(source):
            if path.name != "generation_config.json":
                files.place(path, folder)
        checkpoint.finish_folder(folder, what.config, {}, files.read_json(source / "config.json"))
    else:
        what.config.save_pretrained(folder)
        what.tokenizer.save_pretrained(folder)
        files.set_tokenizer_limit(folder, what.target)
    name = str(Path(spec.name).resolve()) if spec.name and Path(spec.name).exists() else str(spec.name)
    revision = None if Path(str(spec.name)).exists() else files.commit_of(files.local_folder(str(spec.name), spec.revision))
    checkpoint.write_sidecar(folder, name, revision, what.methods, mark, what.target)


class Progress(TrainerCallback):
    """One line: steps, ETA, loss, tokens/s, peak memory. The same numbers go to Trainer's logs, hence to any tracker."""

    def __init__(self, tokens_per_step: int):
        self.tokens = tokens_per_step
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        self.since = (state.global_step, time.perf_counter())
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        step, before = self.since
        now = time.perf_counter()
        logs["tokens_per_second"] = round(self.tokens * (state.global_step - step) / max(now - before, 1e-9))
        logs["tokens_seen"] = state.global_step * self.tokens
        if torch.cuda.is_available():
            logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.since = (state.global_step, now)
        if self.bar is not None:
            memory = f", {logs['peak_memory_gib']} GiB" if "peak_memory_gib" in logs else ""
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,} tok/s{memory}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class _Interrupt(TrainerCallback):
    """First Ctrl-C: finish the step, save, stop. Second: stop at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_Interrupt":
        try:
            self.before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not in the main thread: leave signals alone
            self.before = None
        return self

    def __exit__(self, *exc: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("interrupted: saving after this step (press again to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        elif self.asked:
            self.asked = False  # it was the last step: there is nothing to resume


def estimate_memory(what: Plan) -> dict[str, float]:
    """Rough peak of a training step on one device in GiB, by component; measured runs lie within about 30 %."""
    recipe, config = what.recipe, what.config
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    trained = total
    if recipe.lora is not None:
        model = _add_lora(model, recipe)  # type: ignore[arg-type]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    half = recipe.lora is not None and torch.cuda.is_available()
    tokens = int(recipe.train.get("per_device_train_batch_size", 8)) * recipe.window
    width, inner, layers = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size), config.num_hidden_layers
    per_layer = tokens * 2 * (10 * width + 5 * inner)  # 16-bit activations kept for backward
    kept = tokens * 2 * width * layers + per_layer if recipe.train.get("gradient_checkpointing") else per_layer * layers
    logits = tokens * config.vocab_size * 8 if recipe.loss == "model" else 3 * 2**28
    parts = {"weights": total * (2 if half else 4), "gradients and optimizer": trained * 12, "activations": kept, "logits": logits}
    return {name: size / 2**30 for name, size in parts.items()} | {"total": sum(parts.values()) / 2**30}


def _show(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A training example for people: where its chunks lie, and how each begins."""
    positions, ids = row["position_ids"], row["input_ids"]
    breaks = [0, *((positions[1:] - positions[:-1] != 1).nonzero()[0] + 1).tolist(), len(ids)]
    chunks = [
        {"positions": [int(positions[a]), int(positions[b - 1])], "tokens": b - a, "text": tokenizer.decode(ids[a : min(a + 12, b)])}
        for a, b in zip(breaks[:4], breaks[1:5], strict=False)
    ]
    return {"chunks": chunks, "more": max(0, len(breaks) - 1 - len(chunks)), "labels": int((row["labels"] >= 0).sum())}


__all__ = ["Documents", "Interrupted", "Plan", "Progress", "as_recipe", "compile_layers", "dry_run", "estimate_memory", "finetune", "last_checkpoint", "plan"]
