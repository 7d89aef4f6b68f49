"""Training: attention across skips, the step itself, stopping and resuming, processes, what is saved and what is refused."""

import errno
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_longctx import callbacks, checkpoint, data, patch, planning, training
from tests.conftest import byte_tokenizer, forked, tiny_config, tiny_model


def trainer_for(recipe, out):
    """The Trainer that finetune would run, its model and the plan."""
    what = planning.plan(planning.as_recipe(recipe))
    torch.manual_seed(0)
    model, _ = training._build_model(what)
    return training._trainer(what, model, training._arguments(what.recipe, out)), model, what


def weights(folder) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_equal_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def logits(model, length=40):
    ids = torch.arange(5, 5 + length)[None]
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def adapted(recipe, out):
    """Train, and return the folder and the model as it was in memory at the end."""
    kept = []
    original = training._save_result

    def keep(what, model, *rest):
        kept.append(model)
        original(what, model, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "_save_result", keep)
        training.finetune(recipe, out)
    return out, kept[0].eval()


# --- the step


def gradient_before_skip(recipe, out, mask):
    """Through Trainer, with checkpointing: |d loss(labels behind the skip) / d embeddings before it|, for a PoSE batch."""
    recipe["train"] |= {"gradient_checkpointing": True, "per_device_train_batch_size": 1, "max_steps": 1}
    trainer, model, what = trainer_for(recipe, out)
    row = what.dataset[0]
    skip = int(np.flatnonzero(np.diff(row["position_ids"]) > 1)[0]) + 1
    row["labels"][: skip + 1] = data.IGNORE  # the first label counted is predicted from behind the skip
    collate, fed = trainer.data_collator, []

    def batch(rows):
        made = collate([row])
        return made if mask else {key: value for key, value in made.items() if key != "attention_mask"}

    trainer.data_collator = batch
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda module, args, output: fed.append(output.detach().requires_grad_()) or fed[-1])
    trainer.train()
    assert model.get_base_model().is_gradient_checkpointing
    assert not model.config.use_cache
    gradient = fed[0].grad[0]
    assert gradient[skip:].abs().max() > 0
    return float(gradient[:skip].abs().max())


@pytest.mark.floor
@pytest.mark.parametrize("loss", ["blocks", "model"])
def test_the_loss_behind_a_skip_reaches_the_tokens_before_it(recipe, tmp_path, loss):
    assert gradient_before_skip(recipe | {"loss": loss}, tmp_path, mask=True) > 1e-6


@pytest.mark.floor
def test_and_does_not_when_the_mask_is_dropped(recipe, tmp_path):
    """So the law above can fail: this is what Transformers does to a batch without a mask."""
    assert gradient_before_skip(recipe, tmp_path, mask=False) == 0


@pytest.mark.floor
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_equals_one_written_by_hand(recipe, tmp_path, accumulate):
    """Loss and gradients, on full logits, with a packed row among the others."""
    np.savez(tmp_path / "mixed.npz", *[np.random.default_rng(i).integers(3, 259, n) for i, n in enumerate((90, 12, 14, 40))])
    recipe["data"] = {"path": str(tmp_path / "mixed.npz")}
    recipe["train"] |= {"max_steps": 1, "per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
    trainer, model, what = trainer_for(recipe, tmp_path / "out")
    for name, parameter in model.named_parameters():  # LoRA's B starts at zero, which hides A's gradient
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    found = {}

    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})

    trainer.add_callback(Grab())
    trainer.train()

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in start:
                p.copy_(start[name])
    model.zero_grad()
    rows = data.collate([what.dataset[i] for i in range(4)])
    assert rows["attention_mask"].ndim == 4
    full = model(rows["input_ids"], attention_mask=rows["attention_mask"], position_ids=rows["position_ids"], use_cache=False).logits.float()
    log_p = full[:, :-1].log_softmax(-1)
    labels = rows["labels"][:, 1:]
    keep = labels != data.IGNORE
    wanted = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][keep].mean()
    wanted.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.abs().max() > 0
            assert torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max()), name


@pytest.mark.floor
def test_logs_hold_speed_and_tokens_seen(recipe, tmp_path):
    """To the last step, in the folder itself, also where no checkpoint is kept."""
    recipe["train"] |= {"logging_steps": 2, "save_strategy": "no"}
    training.finetune(recipe, tmp_path / "out")
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    history = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["tokens_seen"] for entry in history] == [step * 2 * 32 for step in (2, 4, 6)]
    assert all(entry["tokens_per_second"] > 0 for entry in history)


def test_the_learning_rate_follows_the_planned_steps(recipe, tmp_path):
    """Warm-up as a share, decay to the end, though max_steps comes from the number of epochs."""
    recipe["train"] |= {"num_train_epochs": 0.2, "warmup_steps": 0.5, "lr_scheduler_type": "linear"}
    del recipe["train"]["max_steps"]
    out = training.finetune(recipe, tmp_path / "out")
    steps = planning.plan(planning.as_recipe(recipe)).steps
    assert steps == round(0.2 * 12 * 6 / 2) == 7
    state = json.loads((out / f"checkpoint-{steps}/trainer_state.json").read_text())  # saved though 7 is no multiple of 2
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    # Trainer rounds the warm-up to 4 steps and logs the rate that the step was taken with.
    assert rates == pytest.approx([1e-3 * r for r in (0, 0.25, 0.5, 0.75, 1, 2 / 3, 1 / 3)])


@pytest.mark.parametrize(
    ("cuda", "steps", "compile", "methods", "wanted"),
    [
        (True, 60, "auto", ["yarn"], True), (False, 60, "auto", ["yarn"], False), (True, 6, "auto", ["yarn"], False),
        (True, 60, "auto", ["yarn", "alibi"], True), (False, 6, "on", ["yarn"], True), (True, 60, "off", ["yarn"], False),
    ],
)  # fmt: skip
def test_compilation_is_left_to_cuda_and_long_runs(recipe, monkeypatch, cuda, steps, compile, methods, wanted):
    recipe |= {"compile": compile, "methods": [{"name": name} | ({"factor": 4} if name == "yarn" else {}) for name in methods]}
    recipe["train"]["max_steps"] = steps
    what = planning.plan(planning.as_recipe(recipe))
    model, _ = training._build_model(what)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert training._compiles(what, model) is wanted


def test_a_model_from_scratch_is_on_its_device_before_anything_runs_it(recipe, monkeypatch):
    recipe |= {"model": {"config": tiny_config("llama").to_diff_dict(), "tokenizer": recipe["model"]["name"]}, "methods": [], "lora": None}
    monkeypatch.setattr(checkpoint, "chosen_device", lambda: torch.device("meta"))
    monkeypatch.setattr(checkpoint, "fingerprint", lambda model: "")  # it reads weights, which there are none of
    model, _ = training._build_model(planning.plan(planning.as_recipe(recipe)))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_layers_are_compiled_where_that_was_decided(recipe, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(training, "compile_layers", called.append)
    trainer_for(recipe, tmp_path)
    assert not called
    trainer_for(recipe | {"compile": "on"}, tmp_path)
    assert len(called) == 1


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_each_layer_is_compiled_by_itself(family, monkeypatch):
    model = tiny_model(family)
    layers = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: layers.append(self))
    training.compile_layers(model)
    assert len(layers) == model.config.num_hidden_layers


def captured(model, monkeypatch) -> tuple[int, int]:
    """Frames that training compiles, and operations in their graphs; gradients are what they are without."""
    made = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: made(self, backend="aot_eager", **kwargs))
    ids, found = torch.arange(3, 35).reshape(2, 16), []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        if compiled:
            training.compile_layers(model)
        model.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    monkeypatch.undo()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)
    return counters["frames"]["total"], counters["stats"]["calls_captured"]


@pytest.mark.parametrize("methods", [[{"name": "kerple"}, {"name": "log_n"}], [{"name": "alibi", "slopes": [0.1, 0.2, 0.3, 0.4]}]], ids=["learned", "fixed"])
def test_a_bias_stays_out_of_compiled_graphs(methods, monkeypatch):
    """It asks for its layer's number: compiled along, layers would not share their graphs."""
    of_one, of_four = (captured(patch(tiny_model(num_hidden_layers=layers), methods).train(), monkeypatch) for layers in (1, 4))
    assert of_one == of_four
    _, operations = captured(tiny_model().train(), monkeypatch)
    assert 0 < of_one[1] < operations  # attention itself is not among them


@pytest.mark.parametrize(
    ("methods", "rows"),
    [
        ([{"name": "alibi"}], (1, 64)), ([{"name": "alibi"}, {"name": "nope", "target": 256}, {"name": "pose", "chunks": 3}], (3, 256)),
        ([{"name": "alibi"}, {"name": "nope", "target": 256}, {"name": "random_positions"}], None), ([{"name": "yarn", "factor": 4}], (1, 256)),
    ],
)  # fmt: skip
def test_rows_are_promised_as_they_are_drawn(recipe, tmp_path, methods, rows):
    _, model, _ = trainer_for(recipe | {"methods": methods}, tmp_path)
    base = model.get_base_model()
    assert base.config._attn_implementation.endswith("full_rows") is (rows is not None)
    if rows is not None:
        assert base._longctx_rows == rows


# --- stop and resume


class Stop(TrainerCallback):
    """Do something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): run `action` after step n of the next finetune, before what is saved there."""
    original = training._trainer

    def arrange(step, action):
        def with_stop(*args):
            trainer = original(*args)
            trainer.callback_handler.callbacks.insert(0, Stop(step, action))
            return trainer

        monkeypatch.setattr(training, "_trainer", with_stop)

    return arrange


@pytest.fixture
def full_recipe(recipe):
    """LoRA with dropout, norms and embeddings: all that a checkpoint must hold, random state included."""
    recipe["lora"] |= {"lora_dropout": 0.1}
    return recipe | {"also_train": ["norms", "embeddings"]}


@pytest.fixture
def whole(full_recipe, tmp_path):
    """The uninterrupted run to compare with."""
    return training.finetune(full_recipe, tmp_path / "whole")


def test_a_killed_run_resumes_to_equal_weights(full_recipe, whole, tmp_path, at_step):
    """Killed in step 5, the last whole checkpoint being that of step 4."""
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(target=training.finetune, args=(full_recipe, tmp_path / "out"))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    at_step(-1, None)
    assert training.last_checkpoint(tmp_path / "out") == str(tmp_path / "out/checkpoint-4")
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    training.finetune(full_recipe, tmp_path / "out", resume=True)
    assert_equal_weights(whole, tmp_path / "out")


@pytest.mark.floor
def test_an_interrupt_saves_and_resumes_to_equal_weights(full_recipe, whole, tmp_path, at_step):
    before = signal.getsignal(signal.SIGINT)
    at_step(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(training.Interrupted, match="step 3; add --resume"):
        training.finetune(full_recipe, tmp_path / "out")
    assert training.last_checkpoint(tmp_path / "out").endswith("checkpoint-3")
    assert signal.getsignal(signal.SIGINT) is before
    at_step(-1, None)
    with pytest.raises(ValueError, match="holds a run that was stopped; add --resume"):
        training.finetune(full_recipe, tmp_path / "out")
    training.finetune(full_recipe, tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match="already holds something"):
        training.finetune(full_recipe, tmp_path / "out")
    assert_equal_weights(whole, tmp_path / "out")


def test_a_second_interrupt_stops_at_once_but_the_terminals_echo_does_not():
    guard = callbacks.Interrupt()
    with guard:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # within a second: torchrun passing on what the terminal sent
        assert guard.asked
        guard.when -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_in_the_last_step_ends_the_run_well(recipe, tmp_path, at_step):
    at_step(6, lambda: signal.raise_signal(signal.SIGINT))
    assert checkpoint.read_sidecar(training.finetune(recipe, tmp_path / "out"))


def test_a_checkpoint_cut_short_is_passed_over(full_recipe, whole, tmp_path, at_step):
    def die():
        raise RuntimeError("power cut")

    at_step(5, die)
    with pytest.raises(RuntimeError, match="power cut"):
        training.finetune(full_recipe, tmp_path / "out")
    out = tmp_path / "out"
    for number, state in ((7, None), (8, ""), (9, '{"global_step": 9'), (10, "{}")):
        (out / f"checkpoint-{number}").mkdir()
        (out / f"checkpoint-{number}/optimizer.pt").touch()
        if state is not None:
            (out / f"checkpoint-{number}/trainer_state.json").write_text(state)
    (out / "checkpoint-11").mkdir()  # without the optimizer (save_only_model) the run cannot go on as it would have
    (out / "checkpoint-11/trainer_state.json").write_text('{"global_step": 11}')
    assert training.last_checkpoint(out) == str(out / "checkpoint-4")
    at_step(-1, None)
    training.finetune(full_recipe, out, resume=True)
    assert_equal_weights(whole, out)


@pytest.mark.parametrize("victim", ["torch.save", "safetensors.torch.save_file", "transformers.TrainerState.save_to_json"])
def test_a_full_disk_surfaces_and_spares_the_checkpoint_before(full_recipe, whole, tmp_path, victim, at_step, monkeypatch):
    def fill_disk():
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(victim, full)
        if victim.startswith("safetensors"):
            monkeypatch.setattr("peft.peft_model.safe_save_file", full)

    at_step(4, fill_disk)  # before the second checkpoint is written
    with pytest.raises(OSError, match="No space left"):
        training.finetune(full_recipe, tmp_path / "out")
    assert training.last_checkpoint(tmp_path / "out") == str(tmp_path / "out/checkpoint-2")
    monkeypatch.undo()
    training.finetune(full_recipe, tmp_path / "out", resume=True)
    assert_equal_weights(whole, tmp_path / "out")


def test_resuming_before_the_first_checkpoint_begins_again_and_after_the_end_changes_nothing(recipe, tmp_path, at_step):
    def die():
        raise RuntimeError("early")

    at_step(1, die)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="early"):
        training.finetune(recipe, out)
    at_step(-1, None)
    first = weights(training.finetune(recipe, out, resume=True))
    at_step(-1, None)
    again = weights(training.finetune(recipe, out, resume=True))
    alone = weights(training.finetune(recipe, tmp_path / "alone"))
    assert all(torch.equal(first[n], again[n]) and torch.equal(first[n], alone[n]) for n in alone)


def test_two_processes_train_as_one_with_twice_the_batch(recipe, tmp_path, monkeypatch):
    """Also where one of them is interrupted: they stop at the same step, and go on from there."""
    recipe["train"] |= {"max_steps": 4, "save_steps": 100, "use_cpu": True}
    alone = training.finetune(recipe | {"train": recipe["train"] | {"per_device_train_batch_size": 4}}, tmp_path / "one")

    def interrupt(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    def interrupted():
        monkeypatch.setattr(training.Progress, "on_step_end", interrupt)
        with pytest.raises(training.Interrupted, match="interrupted at step 3"):
            training.finetune(recipe, tmp_path / "two")

    # Before 5.23 Transformers looks for the optimizer on a device "cpu:0" when several CPU processes resume; on GPUs it is right.
    able = Version(transformers.__version__) >= Version("5.23")
    if able:
        forked(interrupted, tmp_path)
    forked(lambda: training.finetune(recipe, tmp_path / "two", resume=able), tmp_path)
    one, two = weights(alone), weights(tmp_path / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name


# --- what is saved


@pytest.mark.floor
def test_the_adapter_loads_to_the_trained_model(recipe, base, tmp_path):
    out, model = adapted(recipe, tmp_path / "out")
    note = checkpoint.read_sidecar(out)
    assert (note["base"], note["revision"], note["window"]) == (str(base), None, 256)
    assert [m["name"] for m in note["methods"]] == ["yarn"]  # pose is for training only
    loaded = checkpoint.load(out)
    assert torch.allclose(logits(loaded.model), logits(model), atol=1e-5)
    assert (logits(loaded.model) - logits(checkpoint.load(base).model)).abs().max() > 1e-2
    assert loaded.model.config.max_position_embeddings == 256
    for name in ("tokenizer.json", "tokenizer_config.json"):
        a, b = ((folder / name).read_text() for folder in (base, out))
        assert a == b.replace('"model_max_length": 256', '"model_max_length": 64')
    assert not (out / "README.md").exists()


@pytest.mark.floor
@pytest.mark.parametrize("tied", [True, False])
def test_trained_embeddings_stay_tied_as_they_were(recipe, tmp_path, tied):
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    recipe["model"]["name"] = str(tmp_path / "base")
    out, model = adapted(recipe | {"also_train": ["norms", "embeddings"]}, tmp_path / "out")
    assert torch.allclose(logits(checkpoint.load(out).model), logits(model), atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(checkpoint.merge(out, tmp_path / "merged"))
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in ("model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"):
        assert not torch.equal(merged.get_submodule(name).weight, before.get_submodule(name).weight), name
    assert (len(weights(tmp_path / "merged")) == len(weights(tmp_path / "base"))) if tied else True


def test_tied_embeddings_are_trained_through_both_of_their_uses(recipe, tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    recipe["model"]["name"] = str(tmp_path / "base")
    trainer, model, what = trainer_for(recipe | {"also_train": ["embeddings"]}, tmp_path / "out")
    rows = data.collate([what.dataset[i] for i in range(2)])
    (table,) = [p for name, p in model.named_parameters() if p.requires_grad and p.shape == (300, 64)]

    def gradient(value):
        model.zero_grad()
        value.backward()
        return table.grad.clone()

    blocks = gradient(trainer.compute_loss(model, rows | {"logits_to_keep": 1}))
    full = gradient(model(**rows, use_cache=False).loss)
    assert torch.allclose(blocks, full, rtol=1e-3, atol=1e-5 * full.abs().max())
    unused = sorted(set(range(300)) - set(rows["input_ids"].flatten().tolist()))
    assert full[unused].abs().max() > 0  # only the output embedding reaches these


@pytest.mark.floor
def test_without_lora_every_weight_trains_and_stock_transformers_loads_it(recipe, base, tmp_path):
    out, model = adapted(recipe | {"lora": None}, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.config.rope_parameters["rope_type"] == "yarn"
    assert loaded.config.max_position_embeddings == 256
    assert loaded.config.use_cache  # Trainer switches it off
    assert torch.equal(logits(loaded), logits(model))
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(("asked", "saved"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_without_lora_the_result_has_the_dtype_of_its_base(asked, saved, recipe, base, tmp_path):
    half = checkpoint.load(base, dtype="bfloat16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    recipe |= {"lora": None, "model": {"name": str(tmp_path / "half"), "dtype": asked}, "methods": [{"name": "mkl_alibi", "learn_weights": True}]}
    assert trainer_for(recipe, tmp_path / "tried")[1].dtype is torch.float32
    out = training.finetune(recipe, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == str(saved).removeprefix("torch.")
    learned = {name for name in weights(out) if "longctx" in name}
    assert {name: value.dtype for name, value in weights(out).items()} == {name: torch.float32 if name in learned else saved for name in weights(out)}
    assert learned


def test_training_from_scratch_needs_no_checkpoint(recipe, base, tmp_path):
    config = {key: value for key, value in tiny_config().to_dict().items() if key in ("model_type", *TINY_KEYS)}
    recipe |= {"model": {"config": config, "tokenizer": str(base)}, "lora": None, "methods": [{"name": "nope"}]}
    out = training.finetune(recipe, tmp_path / "out")
    loaded = checkpoint.load(out)
    assert loaded.tokenizer.decode(loaded.tokenizer("abc").input_ids) == "abc"
    assert loaded.model.config.longctx["methods"][0]["name"] == "nope"
    again = training.finetune(recipe, tmp_path / "again")
    assert_equal_weights(out, again)  # the seed decides the first weights too


TINY_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


# --- what is refused


def test_a_folder_in_use_is_refused_and_overwrite_waits_for_a_recipe_that_works(recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="already holds something"):
        training.finetune(recipe, out)
    broken = recipe | {"window": 250, "data": recipe["data"] | {"short": "drop"}}
    with pytest.raises(ValueError, match="no document of 250 tokens"):
        training.finetune(broken, out, overwrite=True)
    assert (out / "thesis.tex").exists()
    training.finetune(recipe, out, overwrite=True)
    assert not (out / "thesis.tex").exists()


def test_a_recipe_that_fails_leaves_the_folder_free(recipe, tmp_path):
    with pytest.raises(ValueError, match="lora"):
        training.finetune(recipe | {"lora": {"target_modules": "no_such_layer"}}, tmp_path / "out")
    training.finetune(recipe, tmp_path / "out")


@pytest.mark.parametrize("what", ["model", "data"])
def test_overwriting_what_the_run_reads_is_refused(recipe, tmp_path, what):
    tiny_model().save_pretrained(tmp_path / "run/base")
    byte_tokenizer().save_pretrained(tmp_path / "run/base")
    np.savez(tmp_path / "run/t.npz", np.arange(3, 200))
    recipe |= {"model": {"name": str(tmp_path / "run/base")}} if what == "model" else {"data": {"path": str(tmp_path / "run/t.npz")}}
    with pytest.raises(ValueError, match="which this run reads"):
        training.finetune(recipe, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run/base/config.json").exists()


def test_resuming_needs_a_run_and_the_same_recipe(recipe, tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        training.finetune(recipe, tmp_path / "nothing", resume=True)
    training.finetune(recipe, tmp_path / "out")
    with pytest.raises(ValueError, match="the recipe differs"):
        training.finetune(recipe | {"seed": 1}, tmp_path / "out", resume=True)


def test_an_adapter_is_no_model_to_train(recipe, tmp_path):
    training.finetune(recipe, tmp_path / "out")
    recipe["model"] = {"name": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="is an adapter; merge it first"):
        planning.plan(planning.as_recipe(recipe))


SKIPPING = {"name": "pose"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [{"name": "dynamic_ntk", "factor": 4}, SKIPPING]}, "pose skips positions, but the frequencies of dynamic_ntk depend on the length"),
        ({"methods": [{"name": "yarn", "factor": 4}, SKIPPING | {"target": 512}]}, r"target 512 is not .* window 256 \(trained window 64"),
        ({"methods": [SKIPPING | {"target": 128}]}, "target 128 is not the patched model's window 64"),
        ({"methods": [SKIPPING], "window": 128}, "target 64 is below the training window 128"),
        ({"data": [{"path": "TOKENS", "short": "drop"}], "window": 201, "methods": []}, "no document of 201 tokens .the longest has 200."),
        ({"data": {"path": "BIG"}}, "token id 300, but the model's vocabulary has 300"),
        ({"train": {"max_steps": "many"}}, "train: max_steps must be a number, got 'many'"),
        ({"model": {"name": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ({"model": {"config": {"model_type": "llama"}}, "lora": None}, "needs config.model_type and a tokenizer"),
        ({"model": {"config": {"model_type": "lama"}, "tokenizer": "BASE"}, "lora": None}, "unknown model_type 'lama'; did you mean 'llama'"),
        ({"model": {"config": {"model_type": "llama", "hiden_size": 1}, "tokenizer": "BASE"}, "lora": None}, "'hiden_size'; did you mean 'hidden_size'"),
        ({"model": {"config": {"model_type": "llama", "vocab_size": 9}, "tokenizer": "BASE"}, "lora": None}, "vocab_size 9 is below the tokenizer's"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_weights_are_loaded(recipe, base, tokens, tmp_path, change, message):
    np.savez(tmp_path / "big.npz", np.arange(100) + 201)
    text = json.dumps(change).replace("TOKENS", str(tokens)).replace("BASE", str(base)).replace("BIG", str(tmp_path / "big.npz"))
    with pytest.raises(ValueError, match=message) as caught:
        planning.plan(planning.as_recipe(recipe | json.loads(text)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_packing_is_refused_where_layers_slide(recipe, tmp_path, family):
    """A mask per packed row takes the place of the sliding layers' own."""
    tiny_model(family, sliding_window=16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    np.savez(tmp_path / "t.npz", np.arange(3, 100), np.arange(3, 20))
    recipe |= {"model": {"name": str(tmp_path / "base")}, "methods": []}
    with pytest.raises(ValueError, match="set short: drop"):
        planning.plan(planning.as_recipe(recipe | {"data": {"path": str(tmp_path / "t.npz")}}))
    planning.plan(planning.as_recipe(recipe | {"data": {"path": str(tmp_path / "t.npz"), "short": "drop"}}))


def test_wrong_training_arguments_are_named(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"train: .*lr_scheduler|train: .*nonsense"):
        training.finetune(recipe | {"train": {"lr_scheduler_type": "nonsense"}}, tmp_path / "out")


# --- dry run


def test_a_dry_run_tells_everything_and_loads_no_weights(recipe, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(checkpoint, "load", fail)
    facts = planning.dry_run(recipe, samples=2)
    assert (facts["trained_window"], facts["window"], facts["target"]) == (64, 32, 256)
    assert (facts["steps"], facts["batch"], facts["tokens"]) == (6, 2, 6 * 2 * 32)
    assert (facts["documents"], facts["windows"], facts["dropped"]) == (12, 72, 0)
    assert facts["epochs"] == pytest.approx(12 / 72)
    assert facts["sampler"]["target"] == 256
    assert [len(sample["chunks"]) + sample["more"] for sample in facts["samples"]] == [2, 2]
    assert all(sample["chunks"][0]["positions"][0] == 0 and sample["labels"] == 31 for sample in facts["samples"])
    assert len(facts["coverage"]["probability"]) == 256
    assert set(facts["memory"]) == {"weights", "gradients and optimizer", "activations", "logits", "total"}
    assert facts["memory"]["total"] == pytest.approx(sum(v for k, v in facts["memory"].items() if k != "total"))
    assert facts["memory"]["weights"] > tiny_model().num_parameters() * 4 / 2**30  # the base and its adapter


def test_every_process_counts(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe["train"] |= {"gradient_accumulation_steps": 3}
    assert planning.plan(planning.as_recipe(recipe)).batch == 2 * 4 * 3
