"""The probe in training: it changes nothing, its numbers reach log and trackers, and it can stop a run."""

import json
import os

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from hf_longctx import evaluation, planning, probe, task, training
from hf_longctx.evals.passkey import Passkey
from hf_longctx.lora import base_model
from tests.conftest import byte_tokenizer, forked, tiny_model
from tests.test_training import assert_equal_weights, trainer_for

LENGTH = 450  # a passkey prompt takes some 420 of these one-byte tokens
SPEC = {"tasks": [{"name": "passkey", "n": 1, "depths": 2}, {"name": "perplexity", "documents": 1}], "lengths": [LENGTH], "every": 2}
NAMES = {f"probe/passkey_{LENGTH}", f"probe/perplexity_{LENGTH}", "probe/seconds"}


def history(out, step=6):
    return json.loads((out / f"checkpoint-{step}/trainer_state.json").read_text())["log_history"]


def result(value, metric="accuracy"):
    return [task.Result(metric, value, 2, 0.0, 1.0)]


@pytest.mark.parametrize(
    "change",
    [
        {"lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}},
        {"lora": None, "methods": [{"name": "dynamic_ntk", "factor": 4}], "window": 64},  # its frequencies remember the longest row, until they meet a short one
        {"distill": 0.5},  # whose loss reads the decoder's inputs
        {"loss": "model", "methods": []},
    ],
)
def test_weights_are_those_of_a_run_without_a_probe(recipe, tmp_path, monkeypatch, change):
    score = evaluation.score_cells

    def noisy(*args, **options):
        assert not args[0].training
        torch.rand(3)  # as a model that draws numbers would
        return score(*args, **options)

    monkeypatch.setattr(probe, "score_cells", noisy)
    plain = training.finetune(recipe | change, tmp_path / "plain")
    probed = training.finetune(recipe | change | {"probe": SPEC}, tmp_path / "probed")
    assert_equal_weights(plain, probed)
    found = [entry for entry in history(probed) if "probe/seconds" in entry]
    assert [entry["step"] for entry in found] == [2, 4, 6]
    assert all(entry.keys() >= NAMES for entry in found)
    losses = [[entry["loss"] for entry in history(out) if "loss" in entry] for out in (plain, probed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_the_model_is_left_as_it_was(recipe, tmp_path):
    trainer, model, _ = trainer_for(recipe | {"probe": SPEC}, tmp_path)
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, probe.Probe)]
    model.train()
    before = [id(module) for module in model.modules()]
    state = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "log", lambda logs: None)
        callback.log = lambda logs: None
        callback._measure(model)
    assert [id(module) for module in model.modules()] == before
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.compute_loss_func.hidden is None  # the hook of the loss keeps nothing of the long row
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


BIAS = [{"name": "mkl_alibi"}, {"name": "nope", "target": 256}]


@pytest.mark.parametrize(
    ("family", "methods"), [("llama", []), ("gemma3_text", []), ("llama", BIAS), ("llama", [*BIAS, {"name": "pose"}])], ids=["full", "sliding", "bias", "skips"]
)
def test_the_attention_of_training_gives_the_numbers_of_evaluation(recipe, tmp_path, family, methods):
    """In training SDPA, or a bias, is told that no row is padded: nor are those of a probe, also where layers slide."""
    tiny_model(family).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    recipe |= {"model": {"name": str(tmp_path / "base"), "attn_implementation": "sdpa"}, "probe": SPEC, "methods": methods or recipe["methods"]}
    _, model, what = trainer_for(recipe, tmp_path / "out")
    base = model.get_base_model()
    assert base.config._attn_implementation.endswith("sdpa_full_rows")
    with probe._aside(model):
        live = [evaluation.score_cells(model, each.cells, 1) for each in what.probed]
    base.set_attn_implementation("sdpa" if methods else "eager")
    model.eval()
    for each, found in zip(what.probed, live, strict=True):
        for a, b in zip(found, evaluation.score_cells(model, each.cells, 1), strict=True):
            torch.testing.assert_close(torch.tensor(a.nll), torch.tensor(b.nll), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_layers_are_not_compiled_for_its_lengths(recipe, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counts = []
    for spec in (None, SPEC):
        torch._dynamo.reset()
        counter = CompileCounter()

        def compile_layers(model, counter=counter):
            for layer in base_model(model).get_decoder().layers:
                layer.compile(dynamic=False, backend=counter)

        monkeypatch.setattr(training, "compile_layers", compile_layers)
        training.finetune(recipe | {"compile": "on", "probe": spec}, tmp_path / str(len(counts)))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


# --- stopping


def test_it_stops_once_every_accuracy_is_reached_and_resuming_changes_nothing(recipe, tmp_path, monkeypatch):
    """Perplexity has no say."""
    scores = iter([0.9, 1.0] * 2)
    monkeypatch.setattr(Passkey, "score", lambda self, cells, outputs, tokenizer: result(next(scores)))
    recipe["probe"] = SPEC | {"stop_at": 0.95}
    out = training.finetune(recipe, tmp_path / "out")
    assert (out / "adapter_model.safetensors").exists()
    assert training.last_checkpoint(out).endswith("checkpoint-2")  # resuming from one of step 4 would go on past it
    first = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    scores = iter([1.0])
    training.finetune(recipe, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == first
    assert training.last_checkpoint(out).endswith("checkpoint-2")


@pytest.mark.parametrize(("values", "stops"), [((1.0, 1.0), True), ((1.0, 0.5), False)])
def test_every_length_must_reach_it(recipe, tmp_path, monkeypatch, values, stops):
    given = iter(values * 3)
    monkeypatch.setattr(Passkey, "score", lambda self, cells, outputs, tokenizer: result(next(given)))
    recipe["probe"] = {"tasks": ["passkey"], "lengths": [440, 450], "every": 3, "stop_at": 1}
    monkeypatch.setattr(probe, "score_cells", lambda model, cells, batch_size: None)
    out = training.finetune(recipe, tmp_path / "out")
    assert (out / "checkpoint-6").exists() != stops


def test_too_little_memory_costs_the_probe_and_not_the_run(recipe, tmp_path, monkeypatch, caplog):
    def full(model, cells, batch_size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "score_cells", full)
    out = training.finetune(recipe | {"probe": SPEC | {"stop_at": 0.5}}, tmp_path / "out")
    assert "out of memory; not measured" in caplog.text
    assert [set(entry) for entry in history(out) if "probe/seconds" in entry] == [{"probe/seconds", "step", "epoch"}] * 3


def test_of_two_processes_one_probes_and_both_stop(recipe, tmp_path, monkeypatch):
    recipe["train"] |= {"use_cpu": True, "save_steps": 1, "save_total_limit": 5}
    recipe["probe"] = SPEC | {"tasks": ["perplexity"], "lengths": [64], "stop_at": 1}
    monkeypatch.setattr(probe.Probe, "_reached", lambda self, results: True)

    def train():
        if os.environ["RANK"] == "1":
            monkeypatch.setattr(probe.Probe, "_measure", None)  # only the first process probes
        training.finetune(recipe, tmp_path / "out")

    forked(train, tmp_path)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "out/adapter_model.safetensors").exists()


# --- trackers


class Tracker(TrainerCallback):
    """A tracker that needs no package."""

    seen: list

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.floor
def test_a_tracker_gets_our_numbers(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "seen", [], raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "notebook", Tracker)
    recipe["train"] |= {"report_to": "notebook"}
    training.finetune(recipe | {"probe": SPEC}, tmp_path / "out")
    coverage = planning.dry_run(recipe)["coverage"]
    step, first = Tracker.seen[0]
    assert (step, {key: first[key] for key in first if key != "epoch"}) == (0, {f"coverage/{key}": coverage[key] for key in ("last_window", "never", "far_pairs")})
    names = set().union(*(logs for _, logs in Tracker.seen))
    assert {"loss", "learning_rate", "tokens_seen", "tokens_per_second"} | NAMES <= names
    assert sum("coverage/never" in logs for _, logs in Tracker.seen) == 1


def test_no_tracker_is_on_by_default(recipe, tmp_path):
    assert training._arguments(planning.as_recipe(recipe), tmp_path).report_to == []
    training.finetune(recipe, tmp_path / "out")
    assert not any("coverage/never" in entry for entry in history(tmp_path / "out"))  # it takes seconds at long targets


def test_tensorboard_gets_our_numbers(recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    recipe["train"] |= {"report_to": "tensorboard"}
    training.finetune(recipe | {"probe": SPEC}, tmp_path / "out")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert {f"train/{name}" for name in ("tokens_seen", "coverage/never", *NAMES)} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars(f"train/probe/passkey_{LENGTH}")] == [2, 4, 6]


# --- what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"tasks": ["paskey"]}, "probe: unknown task 'paskey'; did you mean 'passkey'"),
        ({"tasks": [{"name": "passkey", "m": 1}]}, "unknown key 'm'"),
        ({"tasks": ["passkey", {"name": "passkey", "n": 2}]}, "holds passkey twice"),
        ({"stop_at": 98}, "above 0 and up to 1, got 98"),
        ({"every": 0}, "probe.every: .*greater than 0, got 0"),
        ({"lengths": [100]}, "probe: a prompt of 100 tokens is too short"),
        ({"tasks": ["perplexity"], "data": "none.txt"}, "none.txt"),
        ({"lengths": ["8q"]}, "probe.lengths.0: expected a number of tokens"),
    ],
)
def test_a_probe_that_cannot_work_is_refused_before_training(recipe, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        planning.dry_run(recipe | {"probe": spec})
    assert "\n" not in str(caught.value)


def test_split_weights_are_refused(recipe, tmp_path):
    found = planning.as_recipe(recipe | {"loss": "model", "probe": SPEC, "train": recipe["train"] | {"fsdp": "full_shard"}})
    with pytest.raises(ValueError, match="leave probe out"):
        training._arguments(found, tmp_path)
