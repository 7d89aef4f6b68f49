"""finetune: LoRA (or every weight) at a short window with skip-wise positions, through Transformers' Trainer and PEFT."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_longctx import checkpoint, files, hub, passing
from hf_longctx.callbacks import Coverage, Interrupt, Progress
from hf_longctx.cuda_graph import RecordedStep
from hf_longctx.data import collate
from hf_longctx.distillation import Teacher
from hf_longctx.integration import rope
from hf_longctx.integration.attention import Rows, expect_full_rows
from hf_longctx.lanes import collate_rows
from hf_longctx.lora import add_lora, base_model, is_quantised
from hf_longctx.loss import BlockLoss, check_block_loss
from hf_longctx.passing import Passing
from hf_longctx.planning import Plan, as_recipe, plan
from hf_longctx.probe import SECONDS, Probe
from hf_longctx.provenance import provenance
from hf_longctx.recipe import Recipe, dump_recipe, read_recipe

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after its state was saved; `finetune(..., resume=True)` goes on from there."""


def finetune(recipe: Recipe | Mapping[str, Any] | str | Path, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as a recipe says and save an adapter (or a whole model, with `lora: null`) to `out`.

    Under `torchrun` or `accelerate launch` it trains on every process it is given, on the same windows as one process.

    Args:
        recipe: a Recipe, its values, a file, or the name of a shipped one.
        out: the folder for checkpoints and the result.
        resume: go on from the last complete checkpoint in `out`; on one device whose kernels add in a fixed order, as a CPU's do,
            the weights come out equal to those of an uninterrupted run.
        overwrite: throw away what `out` holds.

    Raises:
        ValueError: a recipe that cannot work, an `out` in use, or nothing to resume; with `train: {push_to_hub: true}`, as `push`.
        ConnectionError: only with `push_to_hub`: the result is saved, and `push` goes on.
        Interrupted: SIGINT; the state was saved.
    """
    recipe = as_recipe(recipe)
    folder = Path(out).expanduser()
    if resume:
        _check_resumable(folder, recipe)
    else:
        _check_free(folder, recipe, overwrite)
    push = hub.trainer_options(recipe, folder)
    arguments = _arguments(recipe, folder)
    with arguments.main_process_first(desc="tokenising"):  # one process fills the caches, the others read them
        what = plan(recipe)
    _check_arguments(arguments, what)
    if push and arguments.process_index == 0:  # what is wrong with it shows now, not after the training
        hub.open_repository(**push)
    set_seed(recipe.seed)
    model, mark = _build_model(what)
    trainer = _trainer(what, model, arguments)
    last = last_checkpoint(folder, what.passing is not None) if resume else None
    if last is not None and trainer.passing is not None:
        trainer.passing.load(last)
    main = trainer.is_world_process_zero()
    if main and not resume:
        _start_folder(folder, recipe)
    guard = Interrupt()
    trainer.add_callback(guard)
    with guard:
        trainer.train(resume_from_checkpoint=last)
    if guard.asked:
        raise Interrupted(f"interrupted at step {trainer.state.global_step}; add --resume to go on")
    trainer.save_state()  # the log of the run, to its end
    if main:
        _save_result(what, model, folder, mark, trainer.state.global_step)
        if push:
            hub.push(folder, **push)
    return folder


def _arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """What the recipe says, but for the length: that is one epoch of the plan's dataset, which holds every example of the run."""
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported() and not recipe.train.get("fp16")
    defaults: dict[str, Any] = {
        "bf16": bf16, "logging_steps": 10, "save_total_limit": 2, "dataloader_num_workers": 2 if cuda else 0, "dataloader_pin_memory": cuda,
        "report_to": "none", "ddp_find_unused_parameters": False,  # every parameter that is trained is used in every step
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


def _check_arguments(arguments: TrainingArguments, what: Plan) -> None:
    """Raises ValueError for what takes rows of a model with a state out of their order, or its layers apart."""
    if what.passing is None:
        return
    dealing: Any = arguments.accelerator_config
    changed = {
        "fsdp": arguments.fsdp, "deepspeed": arguments.deepspeed, "torch_compile": arguments.torch_compile, "auto_find_batch_size": arguments.auto_find_batch_size,
        "ignore_data_skip": arguments.ignore_data_skip, "dataloader_in_order": not arguments.dataloader_in_order,
        "accelerator_config": dealing.split_batches or dealing.dispatch_batches,
    }  # fmt: skip
    for key, given in changed.items():
        if given:
            raise ValueError(f"train: {key} does not go with passing states ({what.passing.name}), where every row has its place; leave it out")


def _check_free(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    """Raises ValueError if `folder` is in use, or holds what the run reads. Nothing is touched before the recipe is known to work."""
    whole = any((folder / name).exists() for name in (files.ADAPTER, "config.json"))
    if not overwrite and not whole and (folder / files.RECIPE).exists():
        raise ValueError(f"{folder} holds a run that was stopped; add --resume to go on with it, --overwrite to begin anew, or choose another --out")
    files.check_output(folder, overwrite)
    measured = [spec.data for spec in (recipe.eval, recipe.probe) if spec is not None]
    for given in (recipe.model.name, recipe.model.tokenizer, *measured, *(source.path for source in recipe.data)):
        path = Path(given or "").expanduser()
        if given and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder} holds {given}, which this run reads; choose another --out")


def _check_resumable(folder: Path, recipe: Recipe) -> None:
    """Raises ValueError unless `folder` holds a run of this recipe."""
    if not (folder / files.RECIPE).exists():
        raise ValueError(f"{folder} holds no run to resume: there is no {files.RECIPE} in it")
    if read_recipe(folder / files.RECIPE) != recipe:
        raise ValueError(f"the recipe differs from the one in {folder / files.RECIPE}; resume with that one, or choose another --out")


def _start_folder(folder: Path, recipe: Recipe) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    dump_recipe(recipe, folder / files.RECIPE)


def last_checkpoint(folder: Path, states: bool = False) -> str | None:
    """The newest complete checkpoint; trainer_state.json is written last, so one without it was cut short.

    None if the run was stopped before its first. With `states`, it has to hold those of every process.
    """
    found = [p for p in folder.glob("checkpoint-*") if _readable(p / "trainer_state.json") and list(p.glob("optimizer*"))]
    found = [p for p in found if passing.is_whole(p)] if states else found
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def _readable(path: Path) -> bool:
    try:
        return bool(files.read_json(path))
    except (OSError, ValueError):
        return False


def _build_model(what: Plan) -> tuple[nn.Module, str]:
    """The model to train and the fingerprint of its base. One that is not loaded is made on the CPU, so that a seed gives the same everywhere."""
    recipe, spec = what.recipe, what.recipe.model
    if spec.config is not None:
        model = AutoModelForCausalLM.from_config(what.config, attn_implementation=spec.attn_implementation, dtype=torch.float32)
        model.to(checkpoint.chosen_device())  # before anything runs it: the kernels of state-space models refuse tensors on the CPU
    else:
        # Full training needs float32 weights: updates are smaller than what bfloat16 can add.
        dtype = "float32" if recipe.lora is None and spec.dtype == "auto" else None if spec.dtype == "auto" else spec.dtype
        assert spec.name is not None
        packing = None if spec.quantization is None else checkpoint.bitsandbytes_config(spec.quantization)
        model = checkpoint.load(
            spec.name, methods=what.methods, revision=spec.revision, dtype=dtype, attn_implementation=spec.attn_implementation, quantization_config=packing
        ).model
        if packing is not None:  # the adapter will be loaded on the base as it is stored
            return add_lora(model.train(), recipe), checkpoint.fingerprint_of(spec.name, spec.revision)
    mark = checkpoint.fingerprint(model)
    model.train()
    return (model if recipe.lora is None else add_lora(model, recipe)), mark


class _Trainer(Trainer):
    """Trainer with the speed in its logs, so that the history, any tracker and our line show the same numbers; with steps as a CUDA
    graph, or steps that start from states."""

    progress: "Progress"
    recorded: RecordedStep | None = None
    passing: Passing | None = None

    def record_steps(self, model: nn.Module) -> None:
        """From now on replay the training step of `model` as a CUDA graph."""
        step = super().training_step
        self.recorded = RecordedStep(lambda inputs, items: step(model, inputs, items), model.parameters())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.recorded is not None:
            return self.recorded(self._prepare_inputs(inputs), num_items_in_batch)
        # The model's own loss divides by it: without a label in the batch the loss is 0, not NaN.
        items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.passing is None:
            return super().training_step(model, inputs, items)
        with self.passing.window(inputs) as window:
            return super().training_step(model, window, items)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The first thing of a checkpoint that is written."""
        super().save_model(output_dir, _internal_call)
        if self.passing is not None:
            self.passing.save(output_dir or str(self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.progress.speed(self.state.global_step))
        self.progress.leave_out(logs.get(SECONDS, 0.0))
        super().log(logs, start_time)


def _trainer(what: Plan, model: nn.Module, arguments: TrainingArguments) -> _Trainer:
    recipe = what.recipe
    blocks = recipe.loss == "blocks"
    if blocks:
        check_block_loss(model)
    full_rows = expect_full_rows(base_model(model), Rows(what.sampler.runs(recipe.window), max(what.target or 0, recipe.window)))
    compiled = _compiles(what, model)
    if compiled:
        compile_layers(model)
    recorded = compiled and blocks and full_rows and _recordable(what, model, arguments)
    if arguments.n_gpu > 1:  # Trainer would take nn.DataParallel, which multiplies the batch and tears the forward pass from its loss
        logger.warning("%d GPUs are here, and one is used; --num-gpus or torchrun takes more", arguments.n_gpu)
        arguments._n_gpu = 1
    trainer = _Trainer(
        model=model, args=arguments, train_dataset=what.dataset, processing_class=None,
        data_collator=_Collator(blocks, what.passing is not None), compute_loss_func=_block_loss(recipe, model, recorded) if blocks else None,
    )  # fmt: skip
    if recorded:
        trainer.record_steps(model)
    if what.passing is not None:
        trainer.passing = Passing(
            model, what.passing, micro_batches=arguments.gradient_accumulation_steps, seed=recipe.seed,
            process=arguments.process_index, processes=arguments.world_size,
        )  # fmt: skip
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.progress = Progress(what.batch * recipe.window)
    trainer.add_callback(trainer.progress)
    trainer.add_callback(Coverage(what, trainer.log))
    if recipe.probe is not None:
        trainer.add_callback(Probe(what.probed, recipe.probe.every, recipe.probe.stop_at, what.tokenizer, trainer.log, trainer.accelerator.autocast))
    return trainer


def _block_loss(recipe: Recipe, model: nn.Module, compiled: bool) -> BlockLoss:
    return BlockLoss(model, compiled, Teacher(model) if recipe.distill else None, recipe.distill)


def _compiles(what: Plan, model: nn.Module) -> bool:
    """Whether compiling pays: `compile: auto` needs a GPU, enough steps, and layers that compile well."""
    if what.recipe.compile != "auto":
        return what.recipe.compile == "on"
    special = is_quantised(base_model(model)) or what.passing is not None  # states come from outside the graph
    return torch.cuda.is_available() and what.steps >= 50 and not special


def _recordable(what: Plan, model: nn.Module, arguments: TrainingArguments) -> bool:
    """Whether a step on this model is the same kernels every time, launched by one process, with nothing read back in between."""
    config = what.config.get_text_config()
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or getattr(config, "attention_dropout", 0) > 0
    return (
        torch.cuda.is_available() and arguments.world_size == 1 and not (arguments.fp16 or arguments.deepspeed or arguments.fsdp)
        and not (draws or is_quantised(base_model(model)) or arguments.gradient_checkpointing or arguments.neftune_noise_alpha)
        and not rope.reads_lengths(config) and not any(source.packs for source in what.sources)
    )  # fmt: skip


@dataclass(frozen=True)
class _Collator:
    """`collate`, or for a model with a state `collate_rows`; with the block loss the logits of a single token."""

    blocks: bool
    states: bool = False

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = collate_rows(rows) if self.states else collate(rows)
        if self.blocks:
            return batch | {"logits_to_keep": 1}
        if not self.states:
            return batch
        labels = batch["labels"]  # a model takes as many as tokens, unless they are shifted already
        return batch | {"labels": labels[:, :-1], "shift_labels": labels[:, 1:].contiguous()}


def compile_layers(model: nn.Module) -> None:
    """torch.compile each decoder layer by itself: layers share one graph, so compilation takes seconds, and the mask is made
    outside, where Transformers sees that ones need none and keeps the causal flash kernel."""
    layers = next(part for part in base_model(model).get_decoder().children() if isinstance(part, nn.ModuleList))
    for layer in layers:
        layer.compile(dynamic=False)


def _save_result(what: Plan, model: Any, out: Path, mark: str, steps: int) -> None:
    """The adapter with its sidecar and patched configuration, or the whole model; not there before it is whole."""
    with files.add_files(out, (files.ADAPTER, "config.json")) as folder:
        files.write_json(folder / files.TRAINING, _run(what, steps))
        if what.recipe.lora is not None:
            _save_adapter(what, model, folder, mark)
            return
        if what.target is not None:
            what.tokenizer.model_max_length = what.target
        checkpoint.save(_as_stored(what, model), what.tokenizer, folder)


def _as_stored(what: Plan, model: Any) -> Any:
    """A whole model in its checkpoint's dtype, unless the recipe names one: float32 was for training, and would be read at twice the memory.

    State-space models stay: what half precision rounds off a decay is raised to the power of the tokens that have passed.
    """
    keeps = what.recipe.model.name is None or what.recipe.model.dtype != "auto" or what.passing is not None
    return model if keeps or what.config.dtype is None else model.to(what.config.dtype)


def _run(what: Plan, steps: int) -> dict[str, Any]:
    """What a model card says of the run beside its recipe; `revision` is the commit of a base from the hub."""
    name = what.recipe.model.name
    source = None if name is None or checkpoint.is_gguf(name) else files.local_folder(name, what.recipe.model.revision)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "revision": source and files.commit_of(source), "steps": steps, "tokens": steps * what.batch * what.recipe.window, "processes": processes,
    } | provenance()  # fmt: skip


def _save_adapter(what: Plan, model: Any, folder: Path, mark: str) -> None:
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
                files.place(path, folder)
        checkpoint.finish_folder(folder, what.config, {}, files.read_json(source / "config.json"))
    name, revision = (str(local.resolve()), None) if local.exists() else (spec.name, revision)
    checkpoint.write_sidecar(folder, name, revision, what.methods, mark, what.target)
    path = folder / files.ADAPTER  # PEFT names the folder that was loaded, which for a model from the hub is one of this machine's cache
    files.write_json(path, files.read_json(path) | {"base_model_name_or_path": name, "revision": revision})
