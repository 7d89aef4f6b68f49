"""Training models with a state: lanes, what each window starts from, stopping and resuming, adapters, what is saved and refused."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from packaging.version import Version
from transformers import TrainerCallback

from hf_longctx import checkpoint, files, lanes, passing, planning, training
from hf_longctx.data import IGNORE, Documents
from hf_longctx.integration import state
from hf_longctx.integration.state import CACHE_ARGUMENT, StatePassingCache
from hf_longctx.lanes import Lanes, StateWindows
from hf_longctx.method import method
from tests.conftest import byte_tokenizer, forked, refused_in_a_line, tiny_model
from tests.test_cli import longctx  # noqa: F401
from tests.test_state import EVERY, FAMILIES, VOCABULARY, stock
from tests.test_training import adapted, assert_equal_weights, at_step, trainer_for, weights  # noqa: F401

WINDOW = 8
LENGTHS = (40, 7, 81, 64, 8, 30, 95, 16)  # of the documents; their full windows: 5, 0, 10, 8, 1, 3, 11, 2


def numbered(lengths=LENGTHS, trained=None):
    """Documents whose tokens say where they stand: 1000 times the document and the place in it."""
    found = Documents.join([1000 * d + np.arange(size) for d, size in enumerate(lengths)])
    return found if trained is None else Documents(found.ids, found.starts, trained(found.ids))


def lane_rows(source, count, lane, times):
    return [source.in_lane(lane, count, time) for time in times]


# --- Lanes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_a_row_continues_the_row_before_it_in_its_lane(count):
    source = StateWindows(numbered(), WINDOW, [0, 0], "drop")
    for lane in range(count):
        before = None
        for row in lane_rows(source, count, lane, range(3 * len(source) // count)):
            ids, labels = row["input_ids"], row["labels"]
            assert np.array_equal(ids, np.arange(ids[0], ids[0] + WINDOW))
            assert labels[0] == IGNORE
            end = (ids[-1] + 1) % 1000 == LENGTHS[ids[0] // 1000]
            assert np.array_equal(labels[1:], np.append(ids[1:], IGNORE if end else ids[-1] + 1))
            assert row["fresh"] or ids[0] == before[-1] + 1
            assert row["fresh"] or ids[0] % 1000 != 0, "a document begins, and the row would start from the state of another"
            before = ids


@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_every_window_comes_once_an_epoch_and_in_another_order(count):
    source = StateWindows(numbered(), WINDOW, [0, 0], "drop")
    everything = sorted(1000 * d + start for d, size in enumerate(LENGTHS) for start in range(0, size - WINDOW + 1, WINDOW))
    assert len(source) == len(everything) == 40
    sizes = [(lane + 1) * 40 // count - lane * 40 // count for lane in range(count)]
    orders, fresh = [], 0
    for epoch in range(2):
        found = [lane_rows(source, count, lane, range(epoch * size, (epoch + 1) * size)) for lane, size in enumerate(sizes)]
        orders.append([int(row["input_ids"][0]) for rows in found for row in rows])
        assert sorted(orders[-1]) == everything
        fresh = fresh or sum(row["fresh"] for rows in found for row in rows)
    assert orders[0] != orders[1]
    assert source.share_fresh(count) == pytest.approx(fresh / 40)


def test_rows_are_a_function_of_the_seed_and_their_number():
    def make(total, seed=0):
        return Lanes([StateWindows(numbered(), WINDOW, [seed, 0], "drop")], [1.0], 6, total)

    few, many = make(60), make(6000)
    assert [r["input_ids"].tolist() for r in (few[i] for i in range(60))] == [r["input_ids"].tolist() for r in (many[i] for i in range(59, -1, -1))][::-1]
    assert many[5999]["input_ids"].tolist() == make(6000)[5999]["input_ids"].tolist()  # not only after those before it
    assert any(few[i]["input_ids"][0] != make(60, seed=1)[i]["input_ids"][0] for i in range(6))
    assert [few[i]["example"] for i in (0, 59)] == [0, 59]
    with pytest.raises(IndexError):
        few[60]


@pytest.mark.parametrize(
    ("count", "weights", "wanted"), [(8, [1], [8]), (8, [3, 1], [6, 2]), (7, [1, 1, 1], [3, 2, 2]), (4, [0.9, 0.05, 0.05], [4, 0, 0]), (5, [0.5, 0.2, 0.3], [3, 1, 1])]
)
def test_lanes_are_divided_by_weight(count, weights, wanted):
    assert lanes.divide(count, weights) == wanted


def test_each_source_has_lanes_of_its_own():
    first, second = StateWindows(numbered([80, 80]), WINDOW, [0, 0]), StateWindows(numbered([0, 0, 160]), WINDOW, [0, 1])
    rows = Lanes([first, second], [1, 3], 4, 40)
    documents = [[int(rows[i]["input_ids"][0]) // 1000 for i in range(lane, 40, 4)] for lane in range(4)]
    assert set(documents[0]) <= {0, 1}
    assert {found for lane in documents[1:] for found in lane} == {2}
    starts = {int(rows[i]["input_ids"][0]) for i in range(1, 4)}
    assert len(starts) == 3, "three lanes of one source begin at different places"


def test_the_first_token_stands_where_a_text_begins_and_nowhere_else():
    source = StateWindows(numbered(), WINDOW, [0, 0], "drop", first_token=9999)
    rows = lane_rows(source, 3, 1, range(26))
    assert {row["fresh"] for row in rows} == {True, False}
    assert all((row["input_ids"][0] == 9999) == row["fresh"] for row in rows)
    assert all((row["input_ids"][1:] % 1000 != 999).all() and 9999 not in row["labels"] for row in rows)


def test_of_a_conversation_only_answers_are_predicted_and_windows_end_with_the_last():
    """Document 0 is answered at 3-4 and 16-17, document 1 nowhere."""
    source = StateWindows(numbered([40, 40], trained=lambda ids: np.isin(ids, (3, 4, 16, 17))), WINDOW, [0, 0], first_token=9999)
    rows = lane_rows(source, 1, 0, range(len(source)))
    assert [row["labels"][row["labels"] != IGNORE].tolist() for row in rows] == [[3, 4], [16], [17]]
    assert [row["fresh"] for row in rows] == [True, False, False]
    assert rows[0]["input_ids"][0] == 0  # its template begins a conversation


def test_unordered_windows_come_once_an_epoch_with_the_label_behind_them():
    source = StateWindows(numbered(), WINDOW, [0, 0], "drop")
    rows = [source[i] for i in range(40)]
    assert len({int(row["input_ids"][0]) for row in rows}) == 40
    assert all(row["fresh"] for row in rows)
    ends = [row["labels"][-1] == IGNORE for row in rows]
    assert sum(ends) == sum(size % WINDOW == 0 for size in LENGTHS)
    assert all(row["labels"][-1] in (IGNORE, row["input_ids"][-1] + 1) for row in rows)


# --- Training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Ten documents of 100 tokens or so of the vocabulary of `stock` models."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.npz"
    np.savez(path, *[rng.integers(3, VOCABULARY, 90 + 3 * i) for i in range(10)])
    return path


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of("mamba")`: a tiny checkpoint of the family whose outputs depend on its state; treat it as read-only."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            stock(family).save_pretrained(made[family])
            byte_tokenizer().save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def recipe_for(folder_of, text):
    """`recipe_for(family, *methods, train={...}, lora=None)`: four steps of two micro-batches of two rows."""

    def make(family, *methods, train=None, **changes):
        steps = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
        steps |= {"logging_steps": 1, "save_steps": 2, "save_total_limit": 9, "disable_tqdm": True}
        return {
            "model": {"name": str(folder_of(family))}, "methods": [{"name": m} if isinstance(m, str) else m for m in methods], "window": 16,
            "data": {"path": str(text)}, "lora": None, "train": steps | (train or {}),
        } | changes  # fmt: skip

    return make


PLAIN = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no"}


def by_hand(recipe, carried=True):
    """The same run on the core alone: every weight, SGD, the mean over all labels of a step."""
    what = planning.plan(planning.as_recipe(recipe))
    model, train = checkpoint.load(recipe["model"]["name"], dtype="float32", device="cpu").model.train(), recipe["train"]
    state.prepare(model)
    size, parts = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
    kept = [None] * parts
    for step in range(train["max_steps"]):
        rows = [what.dataset[step * size * parts + i] for i in range(size * parts)]
        items = sum(int((row["labels"][1:] != IGNORE).sum()) for row in rows)
        for part in range(parts):
            own = rows[part * size : (part + 1) * size]
            ids, labels = (torch.from_numpy(np.stack([row[key] for row in own])) for key in ("input_ids", "labels"))
            if kept[part] is not None:
                kept[part] = state.zero_rows(kept[part], torch.tensor([row["fresh"] for row in own]))
            cache = StatePassingCache(model.config, kept[part])
            logits = model(ids, **{CACHE_ARGUMENT[model.config.model_type]: cache}).logits
            (F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE) / items).backward()
            kept[part] = cache.states() if carried else None
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= train["learning_rate"] * parameter.grad
        model.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def furthest(out, wanted):
    """The largest difference of a saved model's weights from those wanted."""
    found = checkpoint.load(out, dtype="float32", device="cpu").model
    return max(float((parameter.detach() - wanted[name]).abs().max()) for name, parameter in found.named_parameters())


@pytest.mark.floor
@EVERY
def test_a_run_equals_one_written_by_hand(recipe_for, tmp_path, family):
    recipe = recipe_for(family, "carry", train=PLAIN)
    out = training.finetune(recipe, tmp_path / "out")
    assert furthest(out, by_hand(recipe)) < 5e-6
    assert furthest(out, by_hand(recipe, carried=False)) > 1e-4, "what a window starts from does not matter here, so the test shows nothing"


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mamba", {"train": {"gradient_checkpointing": True}}), ("bamba", {"train": {"gradient_checkpointing": True}}),
        ("bamba", {"loss": "model"}), ("mamba2", {"train": {"dataloader_num_workers": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_neither_the_models_own_loss_nor_checkpointing_nor_workers_change_it(recipe_for, tmp_path, family, change):
    recipe = recipe_for(family, "carry", train=PLAIN | change.get("train", {}), loss=change.get("loss", "blocks"))
    assert furthest(training.finetune(recipe, tmp_path / "out"), by_hand(recipe)) < 5e-6


def test_only_lanes_keep_states_of_every_micro_batch(recipe_for, tmp_path):
    kept = {}
    for name in ("carry", "shuffled_carry"):
        out = training.finetune(recipe_for("mamba", name, train={"max_steps": 2}), tmp_path / name)
        kept[name] = {key.partition("/")[0] for key in passing_tensors(out / "checkpoint-2")}
    assert kept == {"carry": {"0", "1"}, "shuffled_carry": {"0"}}


def losses(out, step):
    history = json.loads((out / f"checkpoint-{step}/trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_decays_are_not_rounded_to_the_dtype_of_the_checkpoint(recipe_for, tmp_path):
    half = checkpoint.load(recipe_for("mamba")["model"]["name"], dtype="bfloat16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    out = training.finetune(recipe_for("mamba", "carry", model={"name": str(tmp_path / "half")}), tmp_path / "out")
    assert {value.dtype for value in weights(out).values()} == {torch.float32}


def test_a_recipe_that_names_no_state_method_trains_as_zero(recipe_for, tmp_path):
    named, unnamed = (training.finetune(recipe_for("mamba", *methods), tmp_path / str(len(methods))) for methods in (["zero"], []))
    assert_equal_weights(named, unnamed)
    assert passing.is_whole(unnamed / "checkpoint-4")


@pytest.mark.parametrize("name", ["shuffled_carry", "fitted_noise", "noise"])
def test_other_methods_start_windows_from_their_states(recipe_for, tmp_path, name):
    """Equal until states differ, at the same windows as zero; fitted noise starts from zeros while it has seen nothing."""
    spec = {"name": name, "sigma": 0.5} if name == "noise" else {"name": name}
    train = {"gradient_accumulation_steps": 1}
    own, zero = (losses(training.finetune(recipe_for("mamba2", m, train=train), tmp_path / str(i)), 4) for i, m in enumerate((spec, "zero")))
    assert (own[0] == zero[0]) == (name != "noise")
    assert own[1] != zero[1]


def test_states_are_the_same_numbers_whatever_trains(recipe_for, tmp_path):
    """bfloat16 autocast: SSM states stay float32, and a run with checkpointing goes through."""
    out = training.finetune(recipe_for("mamba", "carry", train={"bf16": True, "use_cpu": True, "gradient_checkpointing": True}), tmp_path / "out")
    saved = passing_tensors(out / "checkpoint-4")
    assert {t.dtype for name, t in saved.items() if name.endswith("ssm")} == {torch.float32}
    assert {name.partition("/")[0] for name in saved} == {"0", "1"}
    assert all(t.isfinite().all() for t in saved.values())
    assert np.isfinite(losses(out, 4)).all()


def passing_tensors(folder):
    from safetensors.torch import load_file

    (file,) = folder.glob("states-*.safetensors")
    return load_file(file)


# --- Stop and resume ---------------------------------------------------------------------------------------------------


CARRY, FITTED, LORA = {"name": "carry", "probability": 0.3}, {"name": "fitted_noise", "horizon": 3}, {"r": 2, "lora_dropout": 0.1}


@pytest.mark.parametrize(
    ("family", "spec", "lora"), [("mamba", CARRY, LORA), ("mamba", FITTED, None), ("mamba2", CARRY, None), ("mamba2", FITTED, LORA)], ids=str
)
def test_a_run_that_breaks_off_resumes_to_equal_weights(recipe_for, tmp_path, at_step, family, spec, lora):  # noqa: F811
    recipe = recipe_for(family, spec, lora=lora)
    whole = training.finetune(recipe, tmp_path / "whole")
    break_off(recipe, tmp_path / "out", at_step, 3)
    assert_equal_weights(whole, training.finetune(recipe, tmp_path / "out", resume=True))


def break_off(recipe, out, at_step, step):  # noqa: F811
    def die():
        raise RuntimeError("power cut")

    at_step(step, die)
    with pytest.raises(RuntimeError, match="power cut"):
        training.finetune(recipe, out)
    at_step(-1, None)


def test_a_checkpoint_without_states_is_passed_over(recipe_for, tmp_path, at_step):  # noqa: F811
    recipe = recipe_for("mamba", "carry", train={"max_steps": 6})
    whole = training.finetune(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    break_off(recipe, out, at_step, 5)
    assert training.last_checkpoint(out, states=True) == str(out / "checkpoint-4")
    (file,) = (out / "checkpoint-4").glob("states-*")
    file.rename(file.with_name("states-0-of-2.safetensors"))  # the other process did not come to write its own
    assert training.last_checkpoint(out, states=True) == str(out / "checkpoint-2")
    assert_equal_weights(whole, training.finetune(recipe, out, resume=True))


def test_two_processes_train_the_lanes_of_one_with_twice_the_batch(recipe_for, tmp_path, monkeypatch):
    """Lane by lane the same text, in the same micro-step, also after an interrupt; and one process cannot go on with the states of two."""
    alone = training.finetune(recipe_for("mamba", "carry", train={"save_strategy": "no"}), tmp_path / "one")
    recipe = recipe_for("mamba", "carry", train={"per_device_train_batch_size": 1, "save_steps": 100, "use_cpu": True})

    def interrupt(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    def interrupted():
        monkeypatch.setattr(training.Progress, "on_step_end", interrupt)
        with pytest.raises(training.Interrupted):
            training.finetune(recipe, tmp_path / "two")

    # Before 5.23 Transformers looks for the optimizer on a device "cpu:0" when several CPU processes resume; on GPUs it is right.
    able = Version(transformers.__version__) >= Version("5.23")
    if able:
        forked(interrupted, tmp_path)
    forked(lambda: training.finetune(recipe, tmp_path / "two", resume=able), tmp_path)
    one, two = weights(alone), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    refused_in_a_line(
        lambda: training.finetune(recipe, tmp_path / "two", resume=True),
        f"{tmp_path / 'two/checkpoint-4'} holds the states of 2 processes, and this is a run of 1; resume with as many as before",
    )


# --- Adapters ----------------------------------------------------------------------------------------------------------

MIXER = {"mamba": {"in_proj", "x_proj"}, "falcon_mamba": {"in_proj", "x_proj"}, "mamba2": {"in_proj"}}
HYBRID = {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
TARGETS = MIXER | {"bamba": HYBRID | {"gate_proj", "up_proj", "down_proj"}, "granitemoehybrid": HYBRID | {"input_linear", "output_linear"}}


class Gradients(TrainerCallback):
    """The largest gradient of each parameter, by step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({name: 0.0 if p.grad is None else float(p.grad.abs().max()) for name, p in self.model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("methods", [[], ["carry"]], ids=["zero", "carry"])
@EVERY
def test_every_adapter_gets_a_gradient(recipe_for, tmp_path, family, methods):
    recipe = recipe_for(family, *methods, lora={"r": 2}, also_train=["norms", "embeddings"], train={"max_steps": 2, "gradient_checkpointing": bool(methods)})
    trainer, model, _ = trainer_for(recipe, tmp_path)
    seen = Gradients(model)
    trainer.add_callback(seen)
    trainer.train()
    adapters = {name.split(".lora_")[0] for name in seen.steps[0] if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapters} == TARGETS[family]
    for step, parameters in enumerate(seen.steps):
        for name, largest in parameters.items():
            assert largest > 0 or ("lora_A" in name and step == 0), (step, name)  # B starts at zero, which hides A's gradient
    assert any("norm" in name for name in seen.steps[0])
    assert any("embed" in name for name in seen.steps[0])


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("mamba", ["in_proj", "dt_proj"], "lora: mamba reads the weights of dt_proj past its adapter, which would never be trained; leave dt_proj out of target_modules"),
        ("falcon_mamba", r".*\.dt_proj", "lora: falcon_mamba reads the weights of dt_proj past its adapter"),
        ("bamba", ["conv1d"], "lora: bamba reads the weights of conv1d past its adapter"),
        ("mamba2", ["out_proj"], "lora: [PEFT:"),
    ],
)
def test_adapters_that_would_not_be_trained_are_refused(recipe_for, tmp_path, family, targets, message):
    refused_in_a_line(lambda: training.finetune(recipe_for(family, lora={"r": 48, "target_modules": targets}), tmp_path / "out"), message)


# --- What is saved -----------------------------------------------------------------------------------------------------


def said(model):
    """The logits of a model, or of one in a folder."""
    model = checkpoint.load(model, dtype="float32", device="cpu").model if isinstance(model, str | Path) else model
    with torch.no_grad():
        return model(torch.arange(5, 45)[None], use_cache=False).logits


@pytest.mark.parametrize("family", ["mamba", "mamba2", "granitemoehybrid"])
def test_an_adapter_loads_and_merges_to_the_trained_model(recipe_for, folder_of, tmp_path, family):
    out = training.finetune(recipe_for(family, "carry", lora={"r": 2}), tmp_path / "out")
    note = checkpoint.read_sidecar(out)
    assert (note["base"], note["methods"]) == (str(folder_of(family)), [])
    assert training.read_recipe(out / files.RECIPE).methods == ({"name": "carry"},)
    merged = checkpoint.merge(out, tmp_path / "merged")
    assert (said(out) - said(folder_of(family))).abs().max() > 1e-3
    torch.testing.assert_close(said(merged), said(out), atol=1e-5, rtol=1e-4)


def test_trained_embeddings_stay_tied(recipe_for, tmp_path):
    """The table of Mamba has another name than that of most families."""
    recipe = recipe_for("mamba", lora={"r": 2}, also_train=["norms", "embeddings"])
    out, trained = adapted(recipe, tmp_path / "out")
    merged = checkpoint.merge(out, tmp_path / "merged")
    for folder in (out, merged):
        torch.testing.assert_close(said(folder), said(trained), atol=1e-5, rtol=1e-4)
    model = checkpoint.load(merged, device="cpu").model
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert (model.lm_head.weight - checkpoint.load(recipe["model"]["name"], device="cpu").model.lm_head.weight).abs().max() > 1e-3


def test_training_from_scratch(recipe_for, folder_of, tmp_path):
    keys = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300} | FAMILIES["mamba"]
    recipe = recipe_for("mamba", "carry", model={"config": keys, "tokenizer": str(folder_of("mamba"))})
    out = training.finetune(recipe, tmp_path / "out")
    loaded = checkpoint.load(out)
    assert loaded.model.config.model_type == "mamba"
    assert loaded.tokenizer.decode(loaded.tokenizer("abc").input_ids) == "abc"
    assert_equal_weights(out, training.finetune(recipe, tmp_path / "again"))


@pytest.mark.parametrize(("lora", "victim"), [({"r": 2}, "write_sidecar"), (None, "finish_folder")])
def test_a_result_that_was_not_saved_to_its_end_is_none(recipe_for, tmp_path, monkeypatch, lora, victim):
    """The folder does not pass for a model, also where one was there before, and resuming completes it."""
    recipe, out = recipe_for("mamba", lora=lora), tmp_path / "out"
    training.finetune(recipe, out)
    whole = weights(out)
    files_before = {path.name for path in out.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    move = Path.replace
    for when in ("while it is written", "while it is moved"):
        with monkeypatch.context() as patch:
            if when == "while it is written":
                patch.setattr(checkpoint, victim, full)
            else:
                patch.setattr(Path, "replace", lambda path, to: full() if path.name == "tokenizer.json" and path.parent != to.parent else move(path, to))
            with pytest.raises(OSError, match="No space left"):
                training.finetune(recipe, out, resume=True)
        assert not (out / ".unfinished").exists()
        if when == "while it is moved":
            with pytest.raises(ValueError, match="holds no model"):
                files.local_folder(out)
    training.finetune(recipe, out, resume=True)
    assert {path.name for path in out.iterdir()} == files_before
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(out).items())


# --- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [{"name": "carry"}, {"name": "pose", "target": 64}]}, "pose chooses tokens and their positions, but mamba reads text in order into a state; leave pose out"),
        ({"methods": [{"name": "cream", "target": 64}]}, "cream chooses tokens and their positions, but mamba reads text in order"),
        ({"methods": [{"name": "zero"}, {"name": "carry"}]}, "recipe: zero and carry both fill the state slot"),
        ({"methods": [{"name": "yarn", "factor": 2}]}, "mamba has no rotary position embedding"),
        ({"lora": {"r": 2}, "distill": 0.5}, "distill: mamba has a state"),
        ({"compile": "on"}, "compile: layers of mamba start from states"),
        ({"train": {"per_device_train_batch_size": 100}, "methods": [{"name": "carry"}]}, "TEXT has 60 windows of 16 tokens for 100 rows that read on"),
        ({"data": [{"path": "TEXT"}, {"path": "TEXT", "weight": 0.1}], "methods": [{"name": "carry"}]}, "TEXT: its weight 0.1 gives it none of the 4 rows of a step"),
        ({"data": {"path": "SHORT"}}, "SHORT: documents cannot be packed for mamba, whose state runs on from one to the next; set short: drop"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_work_are_refused(recipe_for, text, tmp_path, change, message):
    short = tmp_path / "short.npz"
    np.savez(short, np.arange(3, 40), np.arange(3, 10))
    change = json.loads(json.dumps(change).replace("TEXT", str(text)).replace("SHORT", str(short)))
    refused_in_a_line(lambda: planning.plan(planning.as_recipe(recipe_for("mamba") | change)), message.replace("TEXT", str(text)).replace("SHORT", str(short)))


def test_a_state_method_on_a_model_without_a_state_is_refused(recipe):
    refused_in_a_line(
        lambda: planning.plan(planning.as_recipe(recipe | {"methods": [{"name": "carry"}]})),
        "llama has no state that state methods can pass on; families that have: bamba, falcon_mamba,",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataloader_in_order", False), ("ignore_data_skip", True), ("auto_find_batch_size", True), ("torch_compile", True),
        ("accelerator_config", {"split_batches": True}), ("accelerator_config", {"dispatch_batches": True}),
    ],
)  # fmt: skip
def test_what_takes_rows_out_of_their_order_is_refused(recipe_for, tmp_path, key, value):
    refused_in_a_line(lambda: training.finetune(recipe_for("mamba", "carry", train={key: value}), tmp_path / "out"), f"train: {key} does not go with passing states (carry)")


def test_rows_out_of_order_are_noticed(recipe_for):
    what = planning.plan(planning.as_recipe(recipe_for("mamba", "carry")))
    one = passing.Passing(stock("mamba"), method("carry"), micro_batches=2, seed=0)
    other = passing.Passing(stock("mamba"), method("carry"), micro_batches=2, seed=0, process=1, processes=2)

    def batch(*examples):
        return {key: value for key, value in lanes.collate_rows([what.dataset[i] for i in examples]).items() if key != "labels"}

    with one.window(batch(0, 1)) as inputs:
        one.model(**inputs)
    refused_in_a_line(lambda: one.window(batch(4, 5)).__enter__(), "the data loader gave examples 4-5 in place of 2-3, so rows would not continue their texts")
    refused_in_a_line(lambda: other.window(batch(0, 1)).__enter__(), "the data loader gave examples 0-1 in place of 2-3")


def test_each_process_and_each_window_draw_their_own_states():
    def start(process, windows, seed=0):
        run = passing.Passing(stock("mamba"), method("noise", sigma=1.0), micro_batches=2, seed=seed, process=process, processes=2)
        for _ in range(windows):
            with run.window({"input_ids": torch.arange(3, 11)[None], "fresh": [True]}) as inputs, torch.no_grad():
                run.model(**inputs)
        return run.argument, inputs["cache_params"].layers[0].initial[1]

    (argument, first), (_, again) = start(0, 1), start(0, 1)
    assert argument == "cache_params"
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for _, other in (start(1, 1), start(0, 2), start(0, 3), start(0, 1, seed=1)))


# --- Dry run and probe -------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_the_lanes_and_no_coverage(recipe_for):
    recipe = recipe_for("mamba", {"name": "carry", "probability": 0.1}, train={"max_steps": 15})
    facts, rows = planning.dry_run(recipe, samples=2), planning.plan(planning.as_recipe(recipe)).dataset
    assert (facts["trained_window"], facts["target"], facts["coverage"], facts["sampler"]) == (None, None, None, None)
    assert facts["state"]["method"] == {"name": "carry", "probability": 0.1}
    assert (facts["state"]["lanes"], facts["windows"], facts["state"]["windows_per_lane"]) == (4, 60, 15)
    assert facts["state"]["fresh"] == sum(row["fresh"] for row in rows) / 60 > 10 / 60  # ten documents, and strips that begin within one
    assert [sample["labels"] for sample in facts["samples"]] == [16, 16]
    zero = planning.dry_run(recipe_for("mamba"))
    assert zero["state"] == {"method": {"name": "zero"}, "lanes": None, "windows_per_lane": None, "fresh": 1.0}


def test_the_command_line_shows_and_trains_it(longctx, recipe_for, tmp_path):  # noqa: F811
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_for("mamba", "carry", lora={"r": 2}, train={"max_steps": 2})))
    shown = longctx("finetune", "r.yaml", "--dry-run")
    assert (shown.status, shown.err) == (0, "")
    said = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    assert "(mamba, no window)" in said["model"]
    assert "carry (probability 0.0); 4 lanes of 15.0 windows an epoch, of which 20.0% begin a text" in said["states"]
    assert said["window"].split() == ["window", "16"]
    assert not {"positions", "coverage of relative distances"} & set(said)
    assert any(line.split()[:2] == ["tokens", "0-15"] for line in shown.out.splitlines())
    assert not (tmp_path / "coverage.png").exists()
    assert longctx("finetune", "r.yaml", "--out", "run").out.endswith("run: an adapter\n")


def test_dense_models_of_a_hybrid_family_have_no_state(tmp_path, recipe_for):
    """granitemoehybrid with attention alone trains as any transformer."""
    tiny_model(
        "granitemoehybrid", layer_types=["full_attention"] * 2, num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=24,
        mamba_n_heads=4, mamba_d_head=8, mamba_expand=1, hidden_size=32, position_embedding_type="rope",
    ).save_pretrained(tmp_path)  # fmt: skip
    byte_tokenizer().save_pretrained(tmp_path)
    what = planning.plan(planning.as_recipe(recipe_for("mamba", model={"name": str(tmp_path)})))
    assert what.passing is None


def test_a_probe_measures_and_changes_no_weight(recipe_for, tmp_path):
    np.savez(tmp_path / "far.npz", np.arange(600) % (VOCABULARY - 3) + 3)
    recipe = recipe_for("mamba", "carry")
    plain = training.finetune(recipe, tmp_path / "plain")
    probed = training.finetune(recipe | {"probe": {"tasks": ["perplexity"], "every": 2, "data": str(tmp_path / "far.npz")}}, tmp_path / "probed")
    history = json.loads((probed / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "probe/perplexity_256" in entry] == [2, 4]
    assert_equal_weights(plain, probed)
