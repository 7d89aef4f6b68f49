"""finetune: LoRA (or every weight) at a short window with skip-wise positions, through Transformers' Trainer and PEFT."""

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
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
from transformers.models.auto import CONFIG_MAPPING
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_longctx import checkpoint, files, hub
from hf_longctx.cuda_graph import RecordedStep
from hf_longctx.data import Documents, Mixture, Windows, check_source, collate, coverage, fit_sampler, load_documents
from hf_longctx.distillation import Teacher
from hf_longctx.integration import rope
from hf_longctx.integration.attention import expect_full_rows
from hf_longctx.loss import BlockLoss, check_block_loss
from hf_longctx.method import Method, in_slot, method
from hf_longctx.patching import MODEL_SLOTS, patch_config, window_of
from hf_longctx.probe import SECONDS, Probe, Probed, make_cells
from hf_longctx.recipe import DataSource, ModelSpec, Recipe, dump_recipe, parse_recipe, read_recipe
from hf_longctx.schema import nearest
from hf_longctx.task import opening

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
    model_side = tuple(item for item in chosen if set(item.slots) & set(MODEL_SLOTS))
    patch_config(config, model_side)
    if recipe.distill and recipe.window > rope.trained_window(config):
        raise ValueError(f"distill: the base knows {rope.trained_window(config)} tokens, so it cannot teach a window of {recipe.window}")
    sampler = fit_sampler(in_slot(chosen, "positions") or method("plain"), recipe.window, config)
    begins = opening(tokenizer)
    first = int(begins[0]) if len(begins) else None
    sources = tuple(
        Windows(load_documents(source, tokenizer), recipe.window, sampler, [recipe.seed, number], source.short, first, recipe.mask_seams)
        for number, source in enumerate(recipe.data)
    )
    for source, windows in zip(recipe.data, sources, strict=True):
        _check_windows(source, windows, config)
    if recipe.eval is not None and recipe.eval.data is not None:
        check_source(DataSource(recipe.eval.data))
    probed = make_cells(recipe.probe, tokenizer, config, recipe.seed) if recipe.probe is not None else ()
    batch = _batch(recipe.train)
    return Plan(recipe, model_side, sampler, config, tokenizer, sources, batch, _steps(recipe.train, sum(map(len, sources)), batch), probed)


def _check_windows(source: DataSource, windows: Windows, config: PretrainedConfig) -> None:
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
        ValueError: a recipe that cannot work, an `out` in use, or nothing to resume; with `train: {push_to_hub: true}`, as `push`.
        ConnectionError: only with `push_to_hub`: the result is saved, and `push` goes on.
        Interrupted: SIGINT; the state was saved.
    """
    recipe = as_recipe(recipe)
    folder = Path(out).expanduser()
    if not resume:
        _check_free(folder, recipe, overwrite)
    push = hub.trainer_options(recipe, folder)
    last = _resume_from(folder, recipe) if resume else None
    arguments = _arguments(recipe, folder)
    with arguments.main_process_first(desc="tokenising"):  # one process fills the caches, the others read them
        what = plan(recipe)
    if push and arguments.process_index == 0:  # what is wrong with it shows now, not after the training
        hub.open_repository(**push)
    set_seed(recipe.seed)
    model, mark = _build_model(what)
    trainer = _trainer(what, model, arguments)
    main = trainer.is_world_process_zero()
    if main and not resume:
        _start_folder(folder, recipe)
    guard = _Interrupt()
    trainer.add_callback(guard)
    with guard:
        trainer.train(resume_from_checkpoint=last)
    if guard.asked:
        raise Interrupted(f"interrupted at step {trainer.state.global_step}; add --resume to go on")
    if main:
        _save_result(what, model, folder, mark)
        if push:
            hub.push(folder, **push)
    return folder


def dry_run(recipe: Recipe | Mapping[str, Any] | str | Path, samples: int = 3) -> dict[str, Any]:
    """Everything about a run that is known before it: what is trained on what, samples, coverage, a memory estimate.

    Raises:
        ValueError: as `finetune`.
    """
    what = plan(as_recipe(recipe), weights=False)
    recipe = what.recipe
    shown = [what.dataset[i] for i in range(min(samples, len(what.dataset)))]
    return {
        "model": recipe.model.name or recipe.model.config, "family": what.config.model_type, "trained_window": rope.trained_window(what.config),
        "methods": [item.to_dict() for item in what.methods], "sampler": what.sampler.to_dict(), "window": recipe.window, "target": what.target,
        "documents": sum(len(s.documents) for s in what.sources), "windows": sum(map(len, what.sources)), "dropped": sum(s.dropped for s in what.sources),
        "steps": what.steps, "batch": what.batch, "tokens": what.steps * what.batch * recipe.window,
        "epochs": what.steps * what.batch / sum(map(len, what.sources)),
        "samples": [_show(row, what.tokenizer) for row in shown],
        "coverage": _coverage(what), "memory": estimate_memory(what),
    }  # fmt: skip


def _coverage(what: Plan) -> dict[str, Any]:
    return coverage(what.sampler, what.recipe.window, max(what.target, what.recipe.window))


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


def _arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """What the recipe says, but for the length: that is one epoch of the plan's dataset, which holds every example of the run."""
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported() and not recipe.train.get("fp16")
    defaults: dict[str, Any] = {
        "bf16": bf16, "logging_steps": 10, "save_total_limit": 2, "dataloader_num_workers": 2 if cuda else 0, "dataloader_pin_memory": cuda,
        "report_to": "none",
        "logging_nan_inf_filter": False,  # it waits for the GPU in every step, and hides a loss that is not a number
    }  # fmt: skip
    ours = {
        "output_dir": str(out), "seed": recipe.seed, "data_seed": recipe.seed, "train_sampling_strategy": "sequential",
        "remove_unused_columns": False, "num_train_epochs": 1, "max_steps": -1,
        "push_to_hub": False,  # Trainer would push checkpoints, and not the result; see hub.trainer_options
    }  # fmt: skip
    try:
        arguments = TrainingArguments(**(defaults | recipe.train | ours))
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {error}") from None
    if recipe.loss == "blocks" and (arguments.fsdp or arguments.deepspeed):
        raise ValueError("train: fsdp and deepspeed split the output embedding: set loss: model in the recipe")
    if recipe.probe is not None and (arguments.fsdp or arguments.deepspeed):
        raise ValueError("probe: fsdp and deepspeed split the weights, and a probe needs all of them in one process: leave probe out")
    return arguments


def _check_free(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    """Raises ValueError if `folder` is in use, or holds what the run reads. Nothing is touched before the recipe is known to work."""
    files.check_output(folder, overwrite)
    measured = [spec.data for spec in (recipe.eval, recipe.probe) if spec is not None]
    for given in (recipe.model.name, recipe.model.tokenizer, *measured, *(source.path for source in recipe.data)):
        path = Path(given or "").expanduser()
        if given and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder} holds {given}, which this run reads; choose another --out")


def _resume_from(folder: Path, recipe: Recipe) -> str | None:
    """The checkpoint to go on from; None if the run was stopped before its first."""
    if not (folder / RECIPE_FILE).exists():
        raise ValueError(f"{folder} holds no run to resume: there is no {RECIPE_FILE} in it")
    if read_recipe(folder / RECIPE_FILE) != recipe:
        raise ValueError(f"the recipe differs from the one in {folder / RECIPE_FILE}; resume with that one, or choose another --out")
    return last_checkpoint(folder)


def _start_folder(folder: Path, recipe: Recipe) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    dump_recipe(recipe, folder / RECIPE_FILE)


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; trainer_state.json is written last, so one without it was cut short."""
    found = [p for p in folder.glob("checkpoint-*") if _readable(p / "trainer_state.json") and list(p.glob("optimizer*"))]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def _readable(path: Path) -> bool:
    try:
        return bool(files.read_json(path))
    except (OSError, ValueError):
        return False


def _build_model(what: Plan) -> tuple[nn.Module, str]:
    """The model to train and the fingerprint of its base."""
    recipe, spec = what.recipe, what.recipe.model
    if spec.config is not None:
        model = AutoModelForCausalLM.from_config(what.config, attn_implementation=spec.attn_implementation, dtype=torch.float32)
    else:
        # Full training needs float32 weights: updates are smaller than what bfloat16 can add.
        dtype = "float32" if recipe.lora is None and spec.dtype == "auto" else None if spec.dtype == "auto" else spec.dtype
        assert spec.name is not None
        packing = None if spec.quantization is None else checkpoint.bitsandbytes_config(spec.quantization)
        model = checkpoint.load(
            spec.name, methods=what.methods, revision=spec.revision, dtype=dtype, attn_implementation=spec.attn_implementation, quantization_config=packing
        ).model
        if packing is not None:  # the adapter will be loaded on the base as it is stored
            return _add_lora(model.train(), recipe), checkpoint.fingerprint_of(spec.name, spec.revision)
    mark = checkpoint.fingerprint(model)
    model.train()
    return (model if recipe.lora is None else _add_lora(model, recipe)), mark


def _add_lora(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    if _quantised(model):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer sees to that, as `train` says
        layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
        for layer in layers:  # on such CPUs bitsandbytes repacks a layer in its first evaluation, and no gradient passes it then
            layer.support_avx512bf16_for_cpu = False
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


def _quantised(model: nn.Module) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


class _Trainer(Trainer):
    """Trainer with the speed in its logs, so that the history, any tracker and our line show the same numbers, and steps as a CUDA graph."""

    progress: "Progress"
    recorded: RecordedStep | None = None

    def record_steps(self, model: nn.Module) -> None:
        """From now on replay the training step of `model` as a CUDA graph."""
        step = super().training_step
        self.recorded = RecordedStep(lambda inputs, items: step(model, inputs, items), model.parameters())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.recorded is None:
            # The model's own loss divides by it: without a label in the batch the loss is 0, not NaN.
            items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).clamp(min=1)
            return super().training_step(model, inputs, items)
        return self.recorded(self._prepare_inputs(inputs), num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.progress.speed(self.state.global_step))
        self.progress.leave_out(logs.get(SECONDS, 0.0))
        super().log(logs, start_time)


def _trainer(what: Plan, model: nn.Module, arguments: TrainingArguments) -> Trainer:
    recipe = what.recipe
    blocks = recipe.loss == "blocks"
    if blocks:
        check_block_loss(model)
    full_rows = expect_full_rows(_base(model))
    compiled = recipe.compile == "on" or (recipe.compile == "auto" and torch.cuda.is_available() and what.steps >= 50 and not _quantised(_base(model)))
    if compiled:
        compile_layers(model)
    recorded = compiled and blocks and full_rows and _recordable(what, model, arguments)
    if arguments.n_gpu > 1:  # Trainer would take nn.DataParallel, which multiplies the batch and tears the forward pass from its loss
        logger.warning("%d GPUs are here, and one is used; --num-gpus or torchrun takes more", arguments.n_gpu)
        arguments._n_gpu = 1
    trainer = _Trainer(
        model=model, args=arguments, train_dataset=what.dataset, processing_class=None,
        data_collator=_Collator(blocks), compute_loss_func=_block_loss(recipe, model, recorded) if blocks else None,
    )  # fmt: skip
    if recorded:
        trainer.record_steps(model)
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.progress = Progress(what.batch * recipe.window)
    trainer.add_callback(trainer.progress)
    trainer.add_callback(_Coverage(what, trainer.log))
    if recipe.probe is not None:
        trainer.add_callback(Probe(what.probed, recipe.probe.every, recipe.probe.stop_at, what.tokenizer, trainer.log, trainer.accelerator.autocast))
    return trainer


def _block_loss(recipe: Recipe, model: nn.Module, compiled: bool) -> BlockLoss:
    return BlockLoss(model, compiled, Teacher(model) if recipe.distill else None, recipe.distill)


def _recordable(what: Plan, model: nn.Module, arguments: TrainingArguments) -> bool:
    """Whether a step on this model is the same kernels every time, launched by one process, with nothing read back in between."""
    config = what.config.get_text_config()
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or getattr(config, "attention_dropout", 0) > 0
    return (
        torch.cuda.is_available() and arguments.world_size == 1 and not (arguments.fp16 or arguments.deepspeed or arguments.fsdp)
        and not (draws or _quantised(_base(model)) or arguments.gradient_checkpointing or arguments.neftune_noise_alpha)
        and not rope.reads_lengths(config) and not any(source.packs for source in what.sources)
    )  # fmt: skip


@dataclass(frozen=True)
class _Collator:
    """`collate`, and with the block loss the logits of a single token."""

    blocks: bool

    def __call__(self, rows: Any) -> dict[str, Any]:
        return collate(rows) | ({"logits_to_keep": 1} if self.blocks else {})


def compile_layers(model: nn.Module) -> None:
    """torch.compile each decoder layer by itself: layers share one graph, so compilation takes seconds, and the mask is made
    outside, where Transformers sees that ones need none and keeps the causal flash kernel."""
    layers = next(part for part in _base(model).get_decoder().children() if isinstance(part, nn.ModuleList))
    for layer in layers:
        layer.compile(dynamic=False)


def _base(model: Any) -> Any:
    """The model itself, also when PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _save_result(what: Plan, model: Any, folder: Path, mark: str) -> None:
    """The adapter with its sidecar and patched configuration, or the whole model."""
    if what.recipe.lora is None:
        what.tokenizer.model_max_length = what.target
        checkpoint.save(model, what.tokenizer, folder)
        return
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    spec = what.recipe.model
    assert spec.name is not None  # LoRA has a base
    local = Path(spec.name).expanduser()
    revision = None
    if checkpoint.is_gguf(spec.name):
        what.config.save_pretrained(folder)
        what.tokenizer.save_pretrained(folder)
        files.set_tokenizer_limit(folder, what.target)
    else:
        source = files.local_folder(spec.name, spec.revision)
        revision = files.commit_of(source)
        for path in files.companions(source):
            if path.name != "generation_config.json":
                (folder / path.name).unlink(missing_ok=True)  # there already when a finished run is resumed
                files.place(path, folder)
        checkpoint.finish_folder(folder, what.config, {}, files.read_json(source / "config.json"))
    name = str(local.resolve()) if local.exists() else spec.name
    checkpoint.write_sidecar(folder, name, None if local.exists() else revision, what.methods, mark, what.target)


class Progress(TrainerCallback):
    """One line: steps, ETA, loss, tokens/s, peak memory."""

    def __init__(self, tokens_per_step: int):
        self.tokens = tokens_per_step
        self.bar: Any = None
        self.since = (0, time.perf_counter())

    def speed(self, step: int) -> dict[str, float]:
        """Tokens per second since the last call, tokens seen, peak memory."""
        before, then = self.since
        self.since = (step, time.perf_counter())
        values: dict[str, float] = {
            "tokens_per_second": round(self.tokens * (step - before) / max(self.since[1] - then, 1e-9)),
            "tokens_seen": step * self.tokens,
        }
        if torch.cuda.is_available():
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return values

    def leave_out(self, seconds: float) -> None:
        """Time that was not training."""
        self.since = (self.since[0], self.since[1] + seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        self.since = (state.global_step, time.perf_counter())
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs is not None and "loss" in logs:
            memory = f", {logs['peak_memory_gib']} GiB" if "peak_memory_gib" in logs else ""
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,} tok/s{memory}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class _Coverage(TrainerCallback):
    """Log once how well the positions cover the target, where a tracker listens; `--dry-run` shows the same numbers."""

    def __init__(self, what: Plan, log: Callable[[dict[str, float]], None]):
        self.what, self.log = what, log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.report_to and state.global_step == 0 and state.is_world_process_zero:
            found = _coverage(self.what)
            self.log({f"coverage/{key}": found[key] for key in ("last_window", "never", "far_pairs")})


class _Interrupt(TrainerCallback):
    """First Ctrl-C: finish the step, save, stop. Second: stop at once."""

    def __init__(self) -> None:
        self.asked = False
        self.when = 0.0

    def __enter__(self) -> "_Interrupt":
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody handle signals
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.when > 1:  # torchrun passes on the signal that the terminal has sent already
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.when = True, time.monotonic()
            logger.warning("interrupted: saving after this step (press again to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # the signal reaches the processes at different steps; they must stop at the same one
            flag = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(flag)
        if self.asked and state.global_step < state.max_steps and not control.should_training_stop:
            control.should_save = control.should_training_stop = True
        elif self.asked:
            self.asked = False  # it was the last step: there is nothing to resume


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
    return total, sum(p.numel() for p in _add_lora(model, what.recipe).parameters() if p.requires_grad)


def _show(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A training example for people: where its chunks lie, and how each begins."""
    positions, ids = row["position_ids"], row["input_ids"]
    breaks = [0, *((positions[1:] - positions[:-1] != 1).nonzero()[0] + 1).tolist(), len(ids)]
    chunks = [
        {"positions": [int(positions[a]), int(positions[b - 1])], "tokens": b - a, "text": tokenizer.decode(ids[a : min(a + 12, b)])}
        for a, b in pairwise(breaks[:5])
    ]
    return {"chunks": chunks, "more": max(0, len(breaks) - 1 - len(chunks)), "labels": int((row["labels"] >= 0).sum())}


__all__ = ["Documents", "Interrupted", "Plan", "Progress", "as_recipe", "compile_layers", "dry_run", "estimate_memory", "finetune", "last_checkpoint", "plan"]
