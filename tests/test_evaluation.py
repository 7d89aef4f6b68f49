"""Evaluation: scores equal full logits without holding them, a stopped run goes on, what failed is a row, changes are paired."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hf_longctx import checkpoint, evaluation, scoring, task
from hf_longctx.decoding import decode_cells
from hf_longctx.evaluation import COLUMNS, built_in_source, evaluate, score_cells
from hf_longctx.recipe import DataSource
from hf_longctx.stats import bootstrap
from hf_longctx.task import Cell, Scored, exact_match, load_task, task_class
from tests.conftest import WINDOW, byte_tokenizer, largest_tensor, refused_in_a_line, tiny_config, tiny_model, write_tokens

PASSKEY = {"name": "passkey", "n": 2, "depths": 2}
PPL = {"name": "perplexity", "stride": 16}
TAIL = {"name": "tail_perplexity", "spans": 4}


@pytest.fixture
def pictures():
    """Ask for it where pictures are wanted: elsewhere they would cost most of the time."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    for module in (evaluation, task):
        monkeypatch.setattr(module, "bootstrap", lambda statistic, clusters: bootstrap(statistic, clusters, draws=200))
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(evaluation, "plot_results", lambda rows, folder: [])


def random_cells(lengths=(40, 25, 40, 25, 31), vocabulary=300, seed=0) -> list[Cell]:
    rng = np.random.default_rng(seed)
    return [Cell(rng.integers(3, vocabulary, n), int(rng.integers(1, n // 2)), n + int(rng.integers(-3, 2)), cluster=i) for i, n in enumerate(lengths)]


@torch.no_grad()
def reference(model, cell: Cell) -> Scored:
    """The model's own full logits."""
    logits = model(torch.from_numpy(cell.ids)[None]).logits[0, cell.start - 1 : cell.stop - 1].float()
    known = torch.from_numpy(cell.targets)
    nll = F.cross_entropy(logits[: len(known)], known, reduction="none").numpy()
    return Scored(np.append(nll, [np.nan] * (cell.stop - cell.start - len(known))), logits.argmax(-1).numpy())


def assert_equal(found, wanted, tolerance=1e-5):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.nll.shape == a.best.shape == b.nll.shape
        assert np.allclose(a.nll, b.nll, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert np.array_equal(a.best, b.best)


# --- scoring


@pytest.mark.floor
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("qwen3", {}), ("gpt_neox", {}), ("gemma2", {"head_dim": 16, "final_logit_softcapping": 2.0}), ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}), ("gemma3_text", {}), ("mamba", {}),
    ],
)  # fmt: skip
def test_scores_equal_the_models_own_full_logits(family, changes, monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 1)  # 16 tokens a block
    model, cells = tiny_model(family, **changes), random_cells()
    wanted = [reference(model, cell) for cell in cells]
    assert_equal(score_cells(model, cells), wanted)
    assert_equal(score_cells(model, cells, batch_size=1), wanted)
    if changes.get("final_logit_softcapping"):  # what is left out would be seen
        model.config.final_logit_softcapping = None
        assert not np.allclose(score_cells(model, cells)[0].nll, wanted[0].nll, atol=1e-2)


def test_a_stop_behind_the_last_token_asks_for_the_models_choice():
    model, ids = tiny_model(), np.arange(3, 23)
    (found,) = score_cells(model, [Cell(ids, 18, 21)])
    assert np.isnan(found.nll).tolist() == [False, False, True]
    assert found.best[2] == model(torch.from_numpy(ids)[None]).logits[0, -1].argmax()


def test_batches_hold_cells_of_one_length_up_to_the_tokens_at_once(monkeypatch):
    cells, config = random_cells((10, 20, 10, 10, 20)), tiny_config()
    assert list(scoring.batches(cells, lambda alike: 2)) == [[0, 2], [3], [1, 4]]
    assert list(scoring.batches(cells, lambda alike: scoring._rows(config, len(alike[0].ids), None, "cpu"))) == [[0, 2, 3], [1, 4]]
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 25)
    assert list(scoring.batches(cells, lambda alike: scoring._rows(config, len(alike[0].ids), None, "cpu"))) == [[0, 2], [3], [1], [4]]


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}])
def test_an_adapter_counts_wherever_it_sits(options):
    plain, cells = tiny_model(), random_cells()
    before = score_cells(plain, cells)
    model = get_peft_model(plain, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options))).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    found = score_cells(model, cells)
    assert_equal(found, [reference(model, cell) for cell in cells])
    assert not np.allclose(found[0].nll, before[0].nll, atol=1e-2)


def test_the_model_is_left_as_it_was():
    model, cells = tiny_model(), random_cells()
    wanted = reference(model, cells[0])
    score_cells(model, cells)
    assert not model.get_decoder()._forward_hooks
    assert_equal([reference(model, cells[0])], [wanted])


@pytest.mark.floor
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0, "tie_word_embeddings": False})])
def test_the_logits_of_all_tokens_are_never_alive(family, changes, monkeypatch):
    vocabulary, length, block = 3000, 512, 16
    model = tiny_model(family, vocab_size=vocabulary, **changes)
    cells = [Cell(np.random.default_rng(0).integers(3, vocabulary, length), 1, length)]
    allowed = max(vocabulary * 64, 4 * length * length, 64 * 512 * 4)  # the embedding, an eager attention map
    assert allowed < length * vocabulary

    def run():
        score_cells(model, cells)

    assert largest_tensor(run) >= (length - 1) * vocabulary  # one block is enough for all of it: the measure can see them
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", block * vocabulary)
    assert largest_tensor(run) <= allowed


def test_forward_passes_are_counted(monkeypatch):
    """Logits cost one pass over a single token a batch, however many blocks they have."""
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 1)  # 16 tokens a block
    model, seen = tiny_model(), []
    model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    score_cells(model, random_cells((40, 40, 40)), batch_size=2)
    assert seen == [80, 1, 40, 1]


# --- greedy decoding


def test_forced_scoring_agrees_with_greedy_decoding(smollm2):
    model, tokenizer = checkpoint.load(smollm2, device="cpu")
    cells = load_task({"name": "passkey", "n": 1, "depths": 4}).cells(tokenizer, [], 128, seed=0)
    for i in (1, 2):  # another digit than the one that is in the text
        ids = cells[i].ids.copy()
        ids[cells[i].start + i] = tokenizer.convert_tokens_to_ids(str((int(tokenizer.decode(ids[cells[i].start + i])) + 1) % 10))
        cells[i] = Cell(ids, cells[i].start, cells[i].stop, cells[i].depth)
    free = [Cell(cell.ids[: cell.start], cell.start, cell.stop) for cell in cells]
    forced, generated = [], []
    for cell, output, written in zip(cells, score_cells(model, cells), decode_cells(model, free), strict=True):
        said, answer = tokenizer.decode(written.best), tokenizer.decode(cell.targets)
        forced.append(exact_match(cell, output, tokenizer))
        generated.append(said.startswith(answer) and not said[len(answer) :][:1].isdigit())
    assert forced == generated
    assert {*forced} == {True, False}


# --- evaluate


def rows_of(folder: Path) -> list[dict]:
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_cost(rows) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in rows]


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Path:
    """A checkpoint like `base` with other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny_model(seed=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The length of the cells of each call of score_cells."""
    made, real = [], evaluation.score_cells
    monkeypatch.setattr(evaluation, "score_cells", lambda model, cells, *rest, **more: made.append(len(cells[0].ids)) or real(model, cells, *rest, **more))
    return made


def test_rows_name_what_made_them(base, long_tokens, tmp_path):
    seen = []
    rows = evaluate(base, [PPL, PASSKEY], ["400", 380], out=tmp_path, data=long_tokens, seed=3, progress=lambda *now: seen.append(now))
    assert [(r["task"], r["length"], r["metric"], r["depth"]) for r in rows] == [
        ("perplexity:stride=16", 380, "perplexity", None), ("perplexity:stride=16", 400, "perplexity", None),
        *[("passkey:n=2,depths=2", length, "accuracy", depth) for length in (380, 400) for depth in (None, 0.0, 1.0)],
    ]  # fmt: skip
    last = rows[-1]
    assert tuple(last) == COLUMNS
    assert set(COLUMNS) >= {
        "model", "revision", "method", "task", "length", "depth", "metric", "value", "n", "seed", "ci_low", "ci_high", "seconds", "peak_memory",
        "tokens", "tokenizer", "dtype",
    }  # fmt: skip
    assert (last["model"], last["revision"], last["method"], last["seed"], last["n"], last["tokens"]) == (str(base), None, "", 3, 2, 1600)
    assert (last["dtype"], last["peak_memory"], last["error"]) == ("float32", None, None)
    assert last["tokenizer"].endswith(" 259")
    assert last["seconds"] > 0
    assert seen[-1] == (f"{base}: passkey:n=2,depths=2 at 400", 1600, 1600)


def test_the_files_agree_and_are_valid_json(base, long_tokens, tmp_path, pictures):
    rows = evaluate(base, [PPL, PASSKEY, "state_norm"], [380, 400], out=tmp_path, data=DataSource(str(long_tokens)))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse) == rows
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [dict(r) for r in csv.DictReader(file)] == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "results.jsonl", "results.json", "results.csv", "passkey.png", "perplexity.png"}
    assert (tmp_path / "passkey.png").read_bytes()[:4] == b"\x89PNG"


def test_run_json_describes_the_run(base, tokens, tmp_path):
    evaluate(base, [PPL], [64], out=tmp_path / "a", data=tokens)
    note = json.loads((tmp_path / "a/run.json").read_text())
    assert {"torch", "transformers", "peft", "hf_longctx", "python"} <= set(note["versions"])
    assert set(note["trained_windows"].values()) == {WINDOW}
    assert note["machine"]
    assert note["arguments"]["tasks"] == [PPL | {"tokens": 64, "documents": 20}]
    assert note["arguments"]["data"]["path"] == str(tokens)


def test_the_built_in_text_is_named_with_pythons_version_and_a_hash(base, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "built_in_text", lambda: "The quick brown fox jumps over the lazy dog. " * 10)
    (row,) = evaluate(base, [PPL], [64], out=tmp_path)
    assert (row["n"], row["ci_low"], row["ci_high"]) == (63, None, None)  # one document: no interval
    source = json.loads((tmp_path / "run.json").read_text())["arguments"]["data"]
    assert source == built_in_source()
    assert "pydoc_data.topics of Python 3." in source
    monkeypatch.setattr(evaluation, "built_in_text", lambda: "Another Python has another text. " * 10)
    with pytest.raises(ValueError, match="other data"):
        evaluate(base, [PPL], [64], out=tmp_path)


def test_the_built_in_text_is_long():
    assert len(evaluation.built_in_text()) > 400_000
    assert "sha256" in built_in_source()


def test_perplexity_has_an_interval_over_documents(base, tokens, tmp_path):
    (row,) = evaluate(base, PPL, 64, out=tmp_path, data=tokens)
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert row["n"] == 12 * 63


def test_tasks_that_need_no_text_read_none(base, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "read_documents", None)
    assert evaluate(base, PASSKEY, "400", out=tmp_path)[0]["metric"] == "accuracy"


def test_bfloat16(base, tokens, tmp_path):
    rows = [evaluate(base, PASSKEY if kind else PPL, [400 if kind else 64], out=tmp_path / f"{kind}{dtype}", data=tokens, dtype=dtype) for kind in (0, 1) for dtype in ("float32", "bfloat16")]
    full, half = (r[0] for r in rows[:2])
    assert (full["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["value"] == pytest.approx(full["value"], rel=0.05)
    assert half["value"] != full["value"]
    assert rows[3][0]["metric"] == "accuracy"


@pytest.mark.floor
def test_methods_apply_and_are_named_whether_given_or_saved(base, tokens, tmp_path):
    yarn = {"name": "yarn", "factor": 4}
    checkpoint.patch(base, yarn, tmp_path / "patched")
    (plain,), (given,), (saved,) = (
        evaluate(model, PPL, 128, out=tmp_path / f"out{i}", data=tokens, methods=methods)
        for i, (model, methods) in enumerate([(base, ()), (base, yarn), (tmp_path / "patched", ())])
    )
    assert (given["method"], saved["method"], plain["method"]) == ("yarn:factor=4", "yarn:factor=4", "")
    assert (given["model"], saved["model"]) == (f"{base} + yarn:factor=4", str(tmp_path / "patched"))
    assert given["value"] == saved["value"] != plain["value"]


def test_the_hub_commit_is_the_revision(base, tmp_path):
    folder = tmp_path / "models--org--tiny" / "snapshots" / "0123abc"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(base)
    assert evaluate(folder, PASSKEY, 400, out=tmp_path / "out")[0]["revision"] == "0123abc"


# --- stopping and going on

TWO = ([TAIL, PASSKEY], [400, 420, 440])


def stopping(after: int):
    """Progress that stops the run when it begins to measure cells for the `after`-th time."""
    begun = []

    def progress(what, done, total):
        if what not in begun:
            begun.append(what)
        if len(begun) == after:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="session")
def long_tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("long"), 3, 500)


@pytest.fixture(scope="session")
def whole(base, other, long_tokens, tmp_path_factory):
    """An evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return without_cost(evaluate(base, *TWO, out=folder, data=long_tokens, baseline=other)), rows_of(folder)


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_stopped_run_goes_on_where_it_stopped(after, base, other, long_tokens, tmp_path, calls, whole):
    """Cells in order: three lengths of tail perplexity, then of passkey, of each model."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(base, *TWO, out=tmp_path, data=long_tokens, baseline=other, progress=stopping(after))
    assert len(calls) == after
    done = len({(r["model"], r["task"], r["length"]) for r in rows_of(tmp_path) if r["metric"] != "failed"})
    assert done == after - 1
    calls.clear()
    rows = evaluate(base, *TWO, out=tmp_path, data=long_tokens, baseline=other)
    assert len(calls) == 12 - done
    assert without_cost(rows) == whole[0]
    paired = [[{k: v for k, v in r.items() if k not in ("seconds", "peak_memory")} for r in made if r["metric"] != "failed"] for made in (rows_of(tmp_path), whole[1])]
    assert paired[0] == paired[1]


def test_a_finished_run_is_only_read(base, long_tokens, tmp_path, calls, monkeypatch):
    arguments = {"out": tmp_path, "data": long_tokens}
    rows = evaluate(base, TAIL, [32, 64], **arguments)
    calls.clear()
    monkeypatch.setattr(checkpoint, "load", None)
    assert evaluate(base, TAIL, ["64", 32, 32], **arguments) == rows
    assert not calls


def test_a_group_with_two_overall_rows_cut_between_them_is_done_again(base, long_tokens, tmp_path, calls):
    task = {"name": "longppl", "context": 32, "stride": 16, "documents": 1, "alpha": 0, "beta": -100}
    arguments = {"out": tmp_path, "data": long_tokens}
    rows = evaluate(base, task, 64, **arguments)
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(rows) > 1
    path.write_text(lines[0])
    calls.clear()
    assert without_cost(evaluate(base, task, 64, **arguments)) == without_cost(rows)
    assert calls


def test_a_local_path_in_a_tasks_options_is_not_shown(tmp_path):
    """Its name and a digest of what it holds are."""
    path = tmp_path / "squad.json"
    task = task_class("qa_1")(path=str(path))
    assert evaluation.spelled(task) == f"qa_1:path={path}"
    shown = []
    for content in ("{}", "[]"):
        path.write_text(content)
        shown.append(evaluation.spelled(task))
    assert all(re.fullmatch(r"qa_1:path=squad\.json#[0-9a-f]{6}", each) for each in shown)
    assert shown[0] != shown[1]


@pytest.mark.parametrize(("cache", "message"), [("quantised", "did you mean 'quantized'"), ("offloaded", "moves keys and values off a CUDA GPU")])
def test_a_cache_that_cannot_be_had_is_refused(cache, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(base, PASSKEY, 400, out=tmp_path / "out", device="cpu", cache=cache)
    assert (tmp_path / "out").exists() == (cache == "offloaded")  # only the device, known with the model, refuses that


def test_the_kind_of_cache_reaches_scorer_and_decoder(base, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(evaluation, "Reader", lambda *_: None)
    for name in ("score_cells", "decode_cells"):
        real = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *args, cache, name=name, real=real: given.append((name, cache)) or real(*args))
    evaluate(base, [PASSKEY, {"name": "vt", "n": 1}], 2500, out=tmp_path, cache="quantized")
    assert given == [("score_cells", "quantized"), ("decode_cells", "quantized")]


@pytest.mark.parametrize("cut", ["in a line", "between lines", "at the end of a line"])
def test_a_group_cut_short_is_done_again(cut, base, tmp_path, calls):
    rows = evaluate(base, PASSKEY, [400, 420], out=tmp_path)
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    path.write_text("".join(lines[:4]) + {"in a line": lines[4][:50], "between lines": lines[4], "at the end of a line": lines[4].rstrip("\n")}[cut])
    for expected in ([420], []):  # the second time nothing is left to do: the cut line took no whole one with it
        calls.clear()
        assert without_cost(evaluate(base, PASSKEY, [400, 420], out=tmp_path)) == without_cost(rows)
        assert calls == expected
    assert len(rows_of(tmp_path)) == 6


def test_another_evaluation_is_refused(base, other, tokens, long_tokens, tmp_path):
    first = {"model": base, "tasks": [PPL], "lengths": [64], "data": tokens}
    evaluate(**first, out=tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for change, named in [
        ({"model": other}, "models"), ({"methods": {"name": "yarn", "factor": 2}}, "models"), ({"baseline": other}, "models"), ({"lengths": [32, 64]}, "lengths"), ({"lengths": [64, 96]}, "tasks, lengths"),
        ({"tasks": [PPL | {"stride": 8}]}, "tasks"), ({"data": long_tokens}, "data"), ({"data": DataSource(str(tokens), tokens=2000)}, "data"),
        ({"seed": 1}, "seed"), ({"dtype": "bfloat16"}, "dtype"), ({"attn_implementation": "eager"}, "attn_implementation"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{tmp_path} holds an evaluation with other {named}; choose another --out$"):
            evaluate(**(first | change), out=tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    evaluate(**first, out=tmp_path, batch_size=3)  # what does not change the numbers may differ


def test_a_model_or_text_that_changed_in_its_place_is_another_one(tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        text.write_text("A line of text. " * 20)
        if seed:
            with pytest.raises(ValueError, match="other models; choose"):
                evaluate(model, PPL, 64, out=tmp_path / "out", data=text)
        evaluate(model, PPL, 64, out=tmp_path / f"out{seed or ''}", data=text)
    text.write_text("A lime of text. " * 20)
    with pytest.raises(ValueError, match="other data; choose"):
        evaluate(model, PPL, 64, out=tmp_path / "out1", data=text)


def test_a_model_in_its_own_output_folder_stays_the_same(base, tmp_path):
    """`longctx finetune` evaluates into the model's folder."""
    checkpoint.patch(base, {"name": "yarn", "factor": 2}, tmp_path / "model")
    for _ in range(2):
        evaluate(tmp_path / "model", PASSKEY, 400, out=tmp_path / "model" / "eval")


def test_a_mistake_does_not_occupy_the_folder(base, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here nor|no folder here"):
        evaluate("no/such-model", PPL, 64, out=tmp_path, data=tokens)
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(base, PPL, 64, out=tmp_path, data=tmp_path.parent / "none.npz")
    assert evaluate(base, PPL, 64, out=tmp_path, data=tokens)[0]["metric"] == "perplexity"


def test_a_folder_with_something_else_is_refused(base, tmp_path):
    for content, message in ((b"{}", "holds an evaluation with other"), (b"", "not an evaluation")):
        folder = tmp_path / message.replace(" ", "")
        folder.mkdir()
        (folder / ("run.json" if content else "notes.txt")).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            evaluate(base, PASSKEY, 400, out=folder)
    with pytest.raises(ValueError, match="is a file"):
        evaluate(base, PASSKEY, 400, out=tmp_path / "holdsanevaluationwithother" / "run.json")


@pytest.mark.parametrize(
    ("tasks", "lengths", "message"),
    [([], [64], "at least one task"), ([PPL], [], "at least one task and one length"), (["perplexty"], [64], "did you mean 'perplexity'"), ([PPL], ["long"], "number of tokens")],
)
def test_wrong_input_is_refused_before_the_folder_is_made(tasks, lengths, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(base, tasks, lengths, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_token_ids_of_another_vocabulary_are_refused(base, tmp_path):
    np.savez(tmp_path / "ids.npz", np.arange(250, 350))
    with pytest.raises(ValueError, match="holds token id 349, but the model knows only 300 tokens"):
        evaluate(base, PPL, 64, out=tmp_path / "out", data=tmp_path / "ids.npz")


# --- what fails


def test_what_fails_is_a_row_and_the_others_go_on(base, tokens, tmp_path, caplog):
    rows = evaluate(base, ["state_norm", TAIL | {"tokens": 20}], [32, 64], out=tmp_path, data=tokens)
    assert [(r["length"], r["metric"]) for r in rows] == [(32, "failed"), (64, "failed"), (32, "perplexity"), (64, "perplexity"), (64, "change_from_32")]
    failed = rows[0]
    assert tuple(failed) == COLUMNS
    assert (failed["value"], failed["ci_low"], failed["n"]) == (None, None, 0)
    assert failed["error"].startswith("llama has no state")
    assert failed["error"] in caplog.text


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([PASSKEY, TAIL], "passkey:n=2,depths=2 at 64: a prompt of 64 tokens is too short: the task itself takes 2"),
        ([PASSKEY | {"n": 1}, "perplexity"], "passkey:n=1,depths=2 at 64: a prompt of 64"),
        ([TAIL | {"tokens": 70}], "tail_perplexity:tokens=70,spans=4 at 64: spans of 70 tokens leave no context at length 64; set tokens lower"),
        ([{"name": "niah_single_2", "scoring": "generated"}], "niah_single_2:scoring=generated at 64: a length of 64 tokens is too short: the answer alone may have 128"),
        (["niah_single_2"], "niah_single_2 at 64: a prompt of 64 tokens"), (["position_nll"], "position_nll at 400: no document has 400 tokens"),
        (["qa_1"], "qa_1 needs SQuAD's dev-v2.0.json"), ([{"name": "qa_2", "path": "nowhere.json"}], "nowhere.json cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(tasks, message, base, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", None)
    refused_in_a_line(lambda: evaluate(base, tasks, [64, 400], out=tmp_path / "out", data=tokens), message)
    assert not (tmp_path / "out").exists()


def test_what_only_the_weights_tell_is_not_asked_for_before(base, tmp_path):
    for name in ("config.json", "model.safetensors"):  # of an adapter, the base has the tokenizer
        (tmp_path / name).symlink_to(base / name)
    assert evaluation.Subject(str(tmp_path), (), None, None).tokenizer() is None
    assert evaluation.Subject("model.gguf", (), None, None).tokenizer() is None
    tokenizer, config = evaluation.Subject(str(base), (), None, None).tokenizer()
    assert (len(tokenizer), config.vocab_size) == (259, 300)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore lines")


def test_what_failed_is_tried_again_and_leaves_no_trace(base, tokens, tmp_path, monkeypatch):
    arguments = {"out": tmp_path, "data": tokens}
    with monkeypatch.context() as patched:
        real = evaluation.score_cells
        patched.setattr(evaluation, "score_cells", lambda model, cells, *rest, **more: (out_of_memory if len(cells[0].ids) == 64 else real)(model, cells, *rest, **more))
        rows = evaluate(base, PPL | {"tokens": 100}, [32, 64, 100], **arguments)
    assert [r["metric"] for r in rows] == ["perplexity", "failed", "perplexity"]
    assert rows[1]["error"] == "CUDA out of memory. Tried to allocate 1 TiB"
    assert "failed" in (tmp_path / "results.jsonl").read_text()
    rows = evaluate(base, PPL | {"tokens": 100}, [32, 64, 100], **arguments)
    assert [(r["metric"], r["length"]) for r in rows] == [("perplexity", 32), ("perplexity", 64), ("perplexity", 100)]
    assert "failed" not in (tmp_path / "results.jsonl").read_text()
    assert "failed" not in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize(
    ("size", "chunk", "tried"),
    [
        (None, None, [(None, None), (1, None), (1, 16)]), (None, None, [(None, None), (1, None)]), (3, "16", [(3, 16), (1, 16)]),
        (3, "32", [(3, 32), (1, 32), (1, 16)]), (1, None, [(1, None), (1, 16)]), (1, None, [(1, None)]),
    ],
)  # fmt: skip
def test_out_of_memory_is_tried_again_with_less_at_a_time(size, chunk, tried, base, tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 1024)
    real, found, seen = evaluation.score_cells, [], []

    def tight(model, cells, batch_size=None, on_tokens=None, chunk=None, cache="dynamic"):
        found.append((batch_size, chunk))
        if len(found) < len(tried):
            on_tokens(64)
            out_of_memory(model, cells)
        return real(model, cells, batch_size, on_tokens, chunk)

    monkeypatch.setattr(evaluation, "score_cells", tight)
    rows = evaluate(base, PPL, 64, out=tmp_path, data=tokens, batch_size=size, chunk=chunk, progress=lambda *now: seen.append(now[1:]))
    assert found == tried
    assert rows[0]["metric"] == "perplexity"
    assert seen[-1] == (12 * 64, 12 * 64)  # not counted twice


def test_a_model_that_has_to_be_read_at_once_is_not_tried_in_chunks():
    cells = random_cells((400, 400))
    assert scoring.attempts(tiny_config(), cells, None, None, "cpu") == [(None, None), (1, None), (1, 64)]
    for config in (tiny_config("gemma2"), tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})):
        assert scoring.attempts(config, cells, None, None, "cpu") == [(None, None), (1, None)]


def test_a_model_that_gives_nan_has_failed(tmp_path, long_tokens):
    model = tiny_model()
    model.lm_head.weight.data[5] = math.nan
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = evaluate(tmp_path / "model", [PPL, PASSKEY], [400], out=tmp_path / "out", data=long_tokens)
    assert rows[1]["error"] == "the model gives probabilities that are not finite"
    assert [r["metric"] for r in rows] == ["failed", "failed"]


def test_a_mistake_of_ours_is_not_hidden(base, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_cells", lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError):
        evaluate(base, PASSKEY, 400, out=tmp_path)


# --- comparisons


@pytest.fixture
def stubbed(monkeypatch, base):
    """Models that know their scores: `scores(is_base, cell) -> nll`; retrieval is right where it is 0."""

    def install(scores):
        def stub(model, cells, *_, **__):
            outputs = []
            for i, cell in enumerate(cells):
                nll = np.full(cell.stop - cell.start, scores(model.config._name_or_path == str(base), i, cell))
                best = np.append(cell.ids, 3)[cell.start : cell.stop] + int(nll[0] > 0)
                outputs.append(Scored(nll, best))
            return outputs

        monkeypatch.setattr(evaluation, "score_cells", stub)

    return install


def test_tail_perplexity_is_compared_with_every_shorter_length(base, tokens, tmp_path, stubbed):
    stubbed(lambda is_base, i, cell: 3.0 - {32: 0.0, 64: 0.1, 128: 0.3}[len(cell.ids)] + 0.01 * (cell.cluster % 3) * (len(cell.ids) == 128))
    rows = evaluate(base, TAIL, [32, 64, 128], out=tmp_path, data=tokens)
    changes = {(r["length"], r["metric"]): r for r in rows if r["metric"].startswith("change")}
    assert list(changes) == [(64, "change_from_32"), (128, "change_from_32"), (128, "change_from_64")]
    first = changes[64, "change_from_32"]
    assert first["value"] == pytest.approx(math.exp(-0.1) - 1)
    assert (first["ci_low"], first["ci_high"]) == pytest.approx((math.exp(-0.1) - 1,) * 2)  # the same in every document
    last = changes[128, "change_from_64"]
    assert last["value"] == pytest.approx(math.exp(-0.2 + 0.01) - 1)  # clusters add 0, 0.01 and 0.02
    assert math.exp(-0.2) - 1 < last["ci_low"] < last["value"] < last["ci_high"] < math.exp(-0.18) - 1
    assert (last["n"], last["task"], last["seconds"], last["tokens"], last["depth"]) == (rows[2]["n"], "tail_perplexity:spans=4", None, None, None)


def test_everything_is_compared_with_the_baseline(base, other, long_tokens, tmp_path, stubbed):
    stubbed(lambda is_base, i, cell: math.nan if cell.depth is None else (0 if is_base and i != 3 else i % 2))
    rows = evaluate(base, [PPL, PASSKEY], [400], out=tmp_path, data=long_tokens, baseline=other)
    table = {(r["model"], r["task"].partition(":")[0], r["length"], r["metric"]): r for r in rows if r["depth"] is None}
    assert [k for k in table if k[3].startswith("change")] == [(str(base), "passkey", 400, "change_from_baseline")]  # the other failed: nothing to compare
    ours, theirs, change = (table[str(m), "passkey", 400, k] for m, k in ((base, "accuracy"), (other, "accuracy"), (base, "change_from_baseline")))
    assert (ours["value"], theirs["value"], change["value"]) == (0.75, 0.5, 0.25)
    assert (change["ci_low"], change["ci_high"]) == pytest.approx(evaluation.paired_shares([1, 1, 1, 0], [1, 0, 1, 0]))


def test_the_change_of_a_perplexity_is_that_of_the_perplexities(base, other, tokens, tmp_path, stubbed):
    """Windows of 63 and of 16 new tokens: tokens count alike, not windows."""
    stubbed(lambda is_base, i, cell: 2.0 + (0.5 if len(cell.targets) > 20 else 0.1) * is_base)
    ours, theirs, change = evaluate(base, PPL | {"tokens": 112}, 64, out=tmp_path, data=tokens, baseline=other)
    tokens_of = {"wide": 63, "narrow": 48}  # 64 - 1, then 3 windows of 16
    mean = (0.5 * tokens_of["wide"] + 0.1 * tokens_of["narrow"]) / 111
    assert change["metric"] == "change_from_baseline"
    assert change["value"] == pytest.approx(math.exp(mean) - 1)
    assert change["value"] == pytest.approx(ours["value"] / theirs["value"] - 1)
    assert change["model"] == ours["model"] == str(base)


def test_a_real_change_lies_in_its_interval(base, other, tokens, tmp_path):
    ours, theirs, change = evaluate(base, PPL, 64, out=tmp_path, data=tokens, baseline=other)
    assert change["value"] == pytest.approx(ours["value"] / theirs["value"] - 1)
    assert change["ci_low"] < change["value"] < change["ci_high"]


def test_other_tokens_are_not_compared(base, tmp_path, caplog):
    """A baseline whose tokenizer splits the text otherwise."""
    text = tmp_path / "text.txt"
    text.write_text("Some words to be split. " * 20)
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Lowercase"}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    tokenizer.save_pretrained(tmp_path / "model")
    rows = evaluate(base, [PPL, PASSKEY], [400], out=tmp_path / "out", data=text, baseline=tmp_path / "model")
    assert [(r["task"].partition(":")[0]) for r in rows if r["metric"] == "change_from_baseline"] == ["passkey"]  # the digits are the same
    assert "perplexity:stride=16 at 400 is not compared" in caplog.text


def test_a_baseline_must_be_another_model(base, tmp_path):
    with pytest.raises(ValueError, match="the baseline is the model itself"):
        evaluate(base, PASSKEY, 400, out=tmp_path, baseline=f"{base}/")
    rows = evaluate(base, PASSKEY, 400, out=tmp_path, baseline=f"{base}/", methods={"name": "yarn", "factor": 4})
    assert list(dict.fromkeys(r["model"] for r in rows)) == [f"{base} + yarn:factor=4", str(base)]


def test_the_baseline_of_the_same_name_has_the_same_revision():
    found = evaluation._subjects("org/m", (), "v1", None, "org/n") + evaluation._subjects("org/m", evaluation.load_methods("nope"), "v1", None, "org/m")
    assert [s.label for s in found] == ["org/m@v1", "org/n", "org/m@v1 + nope", "org/m@v1"]


def test_variants_of_a_task_are_told_apart(base, tokens, tmp_path, pictures):
    rows = evaluate(base, [PPL | {"tokens": 64}, PPL | {"tokens": 100}, PPL | {"tokens": "64"}], [32], out=tmp_path, data=tokens)
    assert [(r["task"], r["n"]) for r in rows] == [("perplexity:stride=16,tokens=64", 12 * 63), ("perplexity:stride=16,tokens=100", 12 * 99)]
    assert len(list(tmp_path.glob("perplexity-*.png"))) == 2


@pytest.mark.parametrize(("name", "what"), [("missing.parquet", "does not exist"), ("missing.npz", "does not exist"), ("odd.yaml", "expected .txt")])
def test_data_that_cannot_be_read_is_refused_before_out_is_taken(base, tmp_path, name, what):
    """Also where no task needs it: a mistyped file must not pass for the one that was meant."""
    (tmp_path / "odd.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match=what):
        evaluate(base, [{"name": "passkey", "n": 1, "depths": 2}], [512], out=tmp_path / "out", data=tmp_path / name)
    assert not (tmp_path / "out").exists()
