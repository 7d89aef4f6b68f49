"""Recorded training steps equal those that are run, and the promise of full rows changes nothing but the cost.

The recording itself needs a GPU. Without one, a recorder that runs the step again in place of a replay checks all that is around it.
"""

import contextlib
import logging

import pytest
import torch

from hf_longctx import planning, training
from hf_longctx.cuda_graph import RecordedStep
from hf_longctx.integration.attention import FULL_ROWS, Rows, expect_full_rows
from tests.conftest import FAMILIES, tiny_model, write_tokens

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Recorder:
    """Stands for torch.cuda.CUDAGraph on a machine without a GPU: a replay runs the recorded step into the recorded tensors."""

    recorded: "RecordedStep"

    def replay(self):
        step = Recorder.recorded
        for p in step.parameters:
            p.grad = None
        step.loss.copy_(step.step(dict(step.inputs), step.items))
        for p, kept in zip(step.trained, step.grads, strict=True):
            kept.copy_(p.grad)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=cuda)])
def device(request, monkeypatch):
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **kwargs: contextlib.nullcontext())
    return "cpu"


def train(device: str, recorded: bool, accumulate: int, reads_back: bool = False) -> tuple[list[float], torch.Tensor, bool]:
    """Ten optimizer steps of a small network: losses, weights, and whether a recording was used."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(device)
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = torch.randn(10 * accumulate, 4, 8, generator=torch.Generator().manual_seed(1)).to(device)

    def step(inputs, items):
        loss = ((model(inputs["x"]) - inputs["shift"]) ** 2).sum() / items
        if reads_back:
            float(loss)
        loss.backward()
        return loss.detach()

    run = RecordedStep(step, model.parameters()) if recorded else step
    Recorder.recorded = run
    losses = []
    for i in range(10):
        for x in data[i * accumulate : (i + 1) * accumulate]:
            losses.append(run({"x": x, "shift": 1}, torch.tensor(float(4 + i), device=device)))
        optimizer.step()
        model.zero_grad()
    used = recorded and run.graph is not None
    return [float(loss) for loss in losses], torch.cat([p.detach().flatten() for p in model.parameters()]), used


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_a_recorded_step_trains_as_one_that_is_run(device, accumulate):
    losses, weights, _ = train(device, False, accumulate)
    got_losses, got_weights, used = train(device, True, accumulate)
    assert used
    torch.testing.assert_close(torch.tensor(got_losses), torch.tensor(losses))
    torch.testing.assert_close(got_weights, weights)


@cuda
def test_a_step_that_cannot_be_recorded_is_run(caplog):
    with caplog.at_level(logging.WARNING):
        losses, weights, used = train("cuda", True, 1, reads_back=True)
    assert not used
    assert "without a CUDA graph" in caplog.text
    wanted_losses, wanted, _ = train("cuda", False, 1)
    torch.testing.assert_close(weights, wanted)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted_losses))
    assert torch.rand(3, device="cuda").isfinite().all()  # a broken recording must not take the random numbers with it


def test_other_shapes_are_run(device):
    total = torch.nn.Parameter(torch.zeros((), device=device))

    def step(inputs, items):
        loss = (total - inputs["x"]).square().sum() / items
        loss.backward()
        return loss.detach()

    run = RecordedStep(step, [total])
    Recorder.recorded = run
    items = torch.tensor(1.0, device=device)
    for _ in range(6):
        run({"x": torch.ones(3, device=device)}, items)
        total.grad = None
    assert run.graph is not None
    assert float(run({"x": torch.ones(5, device=device)}, items)) == 5.0
    assert float(total.grad) == -10.0


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rows_need_no_mask_and_give_the_same_logits(family):
    ids = torch.arange(3, 51)[None]
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(48)[None] * 3, "use_cache": False}
    model = tiny_model(family)
    with torch.no_grad():
        wanted = model(**asked).logits
        assert expect_full_rows(model, Rows(48, 144))
        assert model.config._attn_implementation == FULL_ROWS
        torch.testing.assert_close(model(**asked).logits, wanted)
        packed = (torch.ones(48, 48).tril().bool() & (torch.arange(48)[:, None] // 24 == torch.arange(48) // 24))[None, None]
        got = model(**(asked | {"attention_mask": packed})).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(got, model(**(asked | {"attention_mask": packed})).logits)
    assert "full_rows" not in model.config.to_json_string(use_diff=False)


@cuda
@pytest.mark.parametrize("methods", [None, [{"name": "kerple"}], [{"name": "mkl_alibi"}, {"name": "log_n"}, {"name": "nope", "target": 256}, {"name": "pose"}]], ids=["rope", "bias", "skips"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_finetune_with_a_recording_learns_what_it_learns_without(recipe, tmp_path, monkeypatch, accumulate, methods):
    recipe |= {"methods": methods or recipe["methods"]}

    def run(name: str) -> list[float]:
        steps = {"max_steps": 12, "gradient_accumulation_steps": accumulate, "dataloader_num_workers": 0, "save_strategy": "no"}
        what = planning.plan(planning.as_recipe(recipe | {"train": recipe["train"] | steps, "compile": "on"}))
        model, _ = training._build_model(what)
        trainer = training._trainer(what, model, training._arguments(what.recipe, tmp_path / name))
        trainer.train()
        assert (trainer.recorded is not None and trainer.recorded.graph is not None) == (name == "recorded")
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    recorded = run("recorded")
    monkeypatch.setattr(training, "_recordable", lambda *args: False)
    torch.testing.assert_close(torch.tensor(recorded), torch.tensor(run("run")), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("changes", "recorded"),
    [
        ({}, True),
        ({"methods": [{"name": "kerple"}, {"name": "nope", "target": 256}, {"name": "pose"}]}, True),
        ({"methods": [{"name": "longrope", "factor": 4, "long_factor": [1.5] * 8}, {"name": "pose"}]}, False),  # looks at positions
        ({"lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}}, False),
        ({"train": {"gradient_checkpointing": True}}, False),
        ({"window": 48, "data": {"path": "short"}}, False),  # packed documents bring masks
    ],
    ids=["plain", "bias", "longrope", "dropout", "checkpointing", "packed"],
)
def test_only_steps_that_are_the_same_kernels_every_time_are_recorded(changes, recorded, recipe, tmp_path, monkeypatch):
    changes = dict(changes)
    if "data" in changes:
        changes["data"] = {"path": str(write_tokens(tmp_path, 12, 20))}
    if "train" in changes:
        changes["train"] = recipe["train"] | changes["train"]
    what = planning.plan(planning.as_recipe(recipe | changes))
    model, _ = training._build_model(what)
    arguments = training._arguments(what.recipe, tmp_path / "out")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training._recordable(what, model, arguments) is recorded
