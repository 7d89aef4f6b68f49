"""Tasks of lm-evaluation-harness: what it is asked, what becomes of its numbers, and that ours agree with it."""

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_longctx import checkpoint, evaluation
from hf_longctx.cli.main import main
from hf_longctx.decoding import decode_cells
from hf_longctx.evals import lm_eval as task_file
from hf_longctx.evals._haystack import score_found
from hf_longctx.evaluation import evaluate, spelled
from hf_longctx.stats import wilson
from hf_longctx.task import Cell, load_task
from tests.conftest import refused_in_a_line

RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")  # those that need no network
CHOICES = ("green", "blue", "red as ever")
QUESTIONS = [("The grass is", 0), ("The sky is", 1), ("A leaf is", 0), ("The sea is", 1), ("Blood is", 2), ("A rose is", 2), ("Moss is", 0)]
COLOURS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: {choices}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No index of an earlier test, and no pictures."""
    task_file._manager.cache_clear()
    monkeypatch.setattr(evaluation, "plot_results", lambda rows, folder: [])


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'hf-longctx[lm-eval]'")


@pytest.fixture
def colours(tmp_path):
    """A folder of tasks in the harness's YAML: seven questions, another task with their tag, and one whose data are missing."""
    folder = tmp_path / "yaml"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    (folder / "colours.yaml").write_text("tag: [two]" + COLOURS.format(name="colours", data=data, choices=json.dumps(CHOICES)))
    (folder / "gone.yaml").write_text("tag: [two]" + COLOURS.format(name="gone", data=tmp_path / "gone.jsonl", choices=json.dumps(CHOICES)))
    (folder / "both.yaml").write_text("group: both\ntask: [colours, gone]\n")
    return str(folder)


# --- without the harness


def test_a_task_behind_a_slash_is_an_option_of_the_task_before_it(monkeypatch):
    monkeypatch.setattr(task_file, "find_spec", lambda name: True)
    task = load_task({"name": "lm_eval/hellaswag", "limit": 100})
    assert (task.name, task.task, spelled(task)) == ("lm_eval/hellaswag", "hellaswag", "lm_eval/hellaswag:limit=100")
    assert load_task(task.to_dict()) == task
    assert spelled(load_task("lm_eval/a/b")) == "lm_eval/a/b"
    refused_in_a_line(lambda: load_task("lm_eval"), "lm_eval needs a name after a slash, as in lm_eval/hellaswag, got 'lm_eval'")
    refused_in_a_line(lambda: load_task("passkey/x"), "unknown task 'passkey/x'; did you mean 'passkey'?")
    refused_in_a_line(lambda: load_task("lm_evil/x"), "unknown task 'lm_evil/x'; ")
    refused_in_a_line(lambda: load_task({"name": "lm_eval/x", "limits": 1}), "lm_eval/x: unknown key 'limits'; did you mean 'limit'?")
    refused_in_a_line(lambda: task.cells(None, [], 10, 0), "lm_eval/hellaswag reads the model by itself")


def longctx(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["longctx", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, *capsys.readouterr()


def test_without_the_harness_a_line_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, error = longctx(monkeypatch, capsys, "eval", "/nowhere", "--task", "lm_eval/hellaswag", "--lengths", "2k", "--out", tmp_path / "e")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("longctx: lm_eval/hellaswag: the harness is not installed: pip install 'hf-longctx[lm-eval]'")
    assert not (tmp_path / "e").exists()


def samples_of(values, metric="acc", chosen="none"):
    return [{"doc_id": i, "doc_hash": str(i), "target_hash": "t", "filter": chosen, metric: v} for i, v in enumerate(values)]


def test_numbers_of_the_harness_become_results():
    found = {
        "alias": "x", "acc,none": 0.75, "acc_stderr,none": 0.25, "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1,
        "f1,none": 0.4, "f1_stderr,none": 0.01, "word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A",
    }  # fmt: skip
    samples = samples_of([1.0, 1.0, 0.0, 1.0]) + samples_of([1, 0, 1, 0], "exact_match", "strict-match")
    for sample, f1 in zip(samples, [0.1, 0.7, 0.3, 0.5], strict=False):
        sample["f1"] = f1
    acc, exact, f1, perplexity = task_file._results(found, samples, {"x": {"original": 9, "effective": 4}})
    assert (acc.metric, acc.value, acc.n, (acc.ci_low, acc.ci_high)) == ("acc", 0.75, 4, wilson(3, 4))
    assert (acc.values, acc.weights, acc.clusters) == ((1, 1, 0, 1), (1, 1, 1, 1), (0, 1, 2, 3))
    assert (exact.metric, (exact.ci_low, exact.ci_high), exact.values) == ("exact_match/strict-match", wilson(2, 4), ())  # one is paired
    assert (f1.value, f1.ci_low, f1.ci_high) == pytest.approx((0.4, 0.4 - 0.0195996, 0.4 + 0.0195996), abs=1e-6)
    assert (perplexity.metric, perplexity.value, perplexity.n) == ("word_perplexity", 9.0, 4)
    assert np.isnan(perplexity.ci_low)


def test_a_number_that_is_not_the_mean_of_its_samples_is_not_paired():
    (result,) = task_file._results({"mcc,none": 0.3, "mcc_stderr,none": 0.1}, samples_of([1.0, 0.0], "mcc"), {"x": {"effective": 2}})
    assert result.values == ()
    assert (result.ci_low, result.ci_high) == pytest.approx((0.3 - 0.195996, 0.3 + 0.195996), abs=1e-6)


@pytest.fixture
def pretended(monkeypatch):
    """A harness that has two tasks, one of them of lengths, and answers with what it was asked."""
    calls = []
    entry = types.SimpleNamespace(yaml_path="/tasks/x.yaml", tags=set(), kind=types.SimpleNamespace(name="TASK"), cfg={"metric_list": [{"metric": "acc"}]})
    lengths = types.SimpleNamespace(**(vars(entry) | {"cfg": {"metric_list": [{"metric": "4096"}, {"metric": "8192"}]}}))

    def simple_evaluate(model, **options):
        (name,), about = options["tasks"], options["task_manager"].options.get("metadata")
        calls.append((model.options, options))
        if name == "broken":
            raise ConnectionError("the hub\ncannot be reached")
        metric = str(about["max_seq_lengths"][0]) if about else "acc"
        scores = [0.5, 1.0] if about else [1.0, 0.0]
        print("noise")
        print("noise", file=sys.stderr)
        return {"results": {name: {f"{metric},none": float(np.mean(scores))}}, "samples": {name: samples_of(scores, metric)}, "n-samples": {name: {"effective": 2}}}

    class Made:
        def __init__(self, **options):
            self.options, self.task_index = options, {"once": entry, "long": lengths, "broken": entry}

    module = types.ModuleType("lm_eval")
    module.__spec__, module.simple_evaluate = importlib.machinery.ModuleSpec("lm_eval", None), simple_evaluate
    for name, values in {"lm_eval": None, "lm_eval.models": {}, "lm_eval.models.huggingface": {"HFLM": Made}, "lm_eval.tasks": {"TaskManager": Made}}.items():
        part = module if values is None else types.ModuleType(name)
        vars(part).update(values or {})
        monkeypatch.setitem(sys.modules, name, part)
    return calls


def test_a_task_runs_once_and_one_of_lengths_at_each(pretended, base, tmp_path, capsys):
    tasks = ["lm_eval/once", "lm_eval/long", {"name": "lm_eval/broken", "limit": 3, "shots": 2, "chat": True}]
    rows = evaluate(base, tasks, [64, 32], out=tmp_path / "e", batch_size=4)
    assert [(row["task"], row["length"], row["metric"], row["value"], row["n"]) for row in rows] == [
        ("lm_eval/once", None, "acc", 0.5, 2),
        ("lm_eval/long", 32, "accuracy", 0.75, 2),
        ("lm_eval/long", 64, "accuracy", 0.75, 2),
        ("lm_eval/broken:limit=3,shots=2,chat=True", None, "failed", None, 0),
    ]
    assert rows[1]["ci_low"] < rows[1]["value"] < rows[1]["ci_high"]
    assert rows[0]["seconds"] >= 0
    assert rows[-1]["error"] == "lm_eval/broken: ConnectionError: the hub cannot be reached"
    models, options = zip(*pretended, strict=True)
    assert [each.get("max_length") for each in models] == [None, 32 + 1024, 64 + 1024, None]
    assert {each["batch_size"] for each in models} == {4}
    about = options[1]["task_manager"].options["metadata"]
    assert about == {"max_seq_lengths": [32], "tokenizer": str(base)}
    assert (options[3]["limit"], options[3]["num_fewshot"], options[3]["apply_chat_template"]) == (3, 2, True)
    assert (options[0]["limit"], options[0]["num_fewshot"], options[0]["apply_chat_template"]) == (None, None, False)
    assert "noise" not in "".join(capsys.readouterr())
    del pretended[:]
    evaluate(base, tasks, [64, 32], out=tmp_path / "e")  # goes on: what failed is tried again
    assert [each["tasks"] for _, each in pretended] == [["broken"]]


def test_an_unknown_task_is_refused_with_the_nearest_before_anything_is_loaded(pretended, tmp_path):
    refused_in_a_line(
        lambda: evaluate("/nowhere", ["lm_eval/onze"], [64], out=tmp_path / "e"), "lm-evaluation-harness has no task 'onze'; did you mean 'once'?"
    )
    refused_in_a_line(lambda: evaluate("/nowhere", [{"name": "lm_eval/once", "path": str(tmp_path / "no")}], [64], out=tmp_path / "e"), "lm_eval: path ")


# --- with it


def test_several_tasks_without_a_number_are_named(harness, colours, tmp_path):
    for name, members in (("two", "colours, gone"), ("both", "colours, gone")):
        refused_in_a_line(
            lambda name=name: evaluate("/nowhere", [{"name": f"lm_eval/{name}", "path": colours}], [64], out=tmp_path / "e"),
            f"lm_eval/{name} is several tasks without a number of their own; give them by name: {members}",
        )
    with pytest.raises(ValueError, match=f"^lm-evaluation-harness has no task 'colour' in {colours}; did you mean 'colours'"):
        load_task({"name": "lm_eval/colour", "path": colours}).for_lengths([64])


@torch.no_grad()
def answers_by_hand(model, tokenizer):
    """For each question which choice is likeliest, as a whole and by the character."""
    found = []
    for question, _ in QUESTIONS:
        ids = tokenizer(question)["input_ids"]
        sums = []
        for choice in CHOICES:
            more = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
            sums.append(logits[range(len(more)), more].sum().item())
        found.append((int(np.argmax(sums)), int(np.argmax(np.array(sums) / [len(choice) for choice in CHOICES]))))
    return found


@pytest.mark.parametrize("methods", [[], [{"name": "yarn", "factor": 4}], [{"name": "alibi"}], [{"name": "ssmax"}]])
def test_the_harness_reads_the_patched_model(harness, colours, base, tmp_path, methods):
    task = {"name": "lm_eval/colours", "path": colours}
    acc, norm, *_ = evaluate(base, [task], [64], out=tmp_path / "e", methods=methods)
    model, tokenizer = checkpoint.load(base, methods=methods)
    said = answers_by_hand(model, tokenizer)
    for row, index in ((acc, 0), (norm, 1)):
        hits = [each[index] == answer for each, (_, answer) in zip(said, QUESTIONS, strict=True)]
        assert (row["value"], row["n"], (row["ci_low"], row["ci_high"])) == (pytest.approx(np.mean(hits)), 7, wilson(sum(hits), 7))
    assert (acc["metric"], norm["metric"], acc["length"]) == ("acc", "acc_norm", None)


def test_a_baseline_is_paired_and_missing_data_are_a_row(harness, colours, base, tmp_path, monkeypatch, capsys):
    words = ["eval", base, "-m", "alibi", "--baseline", base, "--lengths", "64", "--out", tmp_path / "e"]
    code, out, _ = longctx(monkeypatch, capsys, *words, "--task", f"lm_eval/gone:path={colours}", "--task", f"lm_eval/colours:path={colours},limit=5")
    assert code == 1
    rows = json.loads((tmp_path / "e" / "results.json").read_text())
    failed = [row for row in rows if row["metric"] == "failed"]
    assert [row["task"].partition(":")[0] for row in failed] == ["lm_eval/gone"] * 2
    assert failed[0]["error"].startswith("lm_eval/gone: ")
    ours, theirs = ([row for row in rows if row["metric"] == "acc" and row["model"].endswith(end)] for end in ("alibi", base.name))
    (change,) = (row for row in rows if row["metric"] == "change_from_baseline")
    assert change["value"] == pytest.approx(ours[0]["value"] - theirs[0]["value"])
    assert change["ci_low"] <= change["value"] <= change["ci_high"]
    assert ours[0]["n"] == theirs[0]["n"] == 5
    assert "points" in out
    assert "no length" in out


# --- the same prompts from both


FEW = """
from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, vt_utils

def fewer(module, name):
    whole = getattr(module, name)
    setattr(module, name, lambda *given, **named: whole(*given, **(named | {{"num_samples": min(named.get("num_samples", 500), {count})}})))

for module, name in ((niah_utils, "generate_samples"), (vt_utils, "sys_vartrack_w_noise_random"), (cwe_utils, "sys_word_pair_random"), (fwe_utils, "sys_kwext")):
    fewer(module, name)
niah_single_1, niah_multikey_2, niah_multikey_3 = niah_utils.niah_single_1, niah_utils.niah_multikey_2, niah_utils.niah_multikey_3
vt, cwe, fwe = vt_utils.get_vt_dataset, cwe_utils.get_cw_dataset, fwe_utils.fwe_download
"""


@pytest.fixture
def few(harness, tmp_path):
    """`few(12)`: a folder of RULER's tasks as the harness has them, with 12 samples of each instead of 500."""
    pytest.importorskip("wonderwords", reason="RULER's tasks need it")

    def make(count):
        folder, ruler = tmp_path / "ruler", Path(harness.__file__).parent / "tasks" / "ruler"
        folder.mkdir()
        (folder / "few.py").write_text(FEW.format(count=count))
        for name in RULER:
            (folder / f"{name}.yaml").write_text(f"include: {ruler / name}.yaml\ntask: few_{name}\ncustom_dataset: !function few.{name}\n")
        return str(folder)

    return make


def test_tasks_of_lengths_get_their_length(few, base, tmp_path):
    rows = evaluate(base, [{"name": "lm_eval/few_niah_single_1", "path": few(2)}], [900], out=tmp_path / "e")
    assert [(row["length"], row["metric"], row["value"], row["n"]) for row in rows] == [(900, "accuracy", 0.0, 2)]


asked_for = pytest.mark.skipif("LONGCTX_CROSS_CHECK" not in os.environ, reason="takes minutes a task: set LONGCTX_CROSS_CHECK=1k,16")


@asked_for
@pytest.mark.parametrize("name", RULER)
def test_prompts_of_the_harness_get_its_scores(few, smollm2, tmp_path, monkeypatch, name):
    """What it asked, decoded and scored by us: the same share, sample by sample."""
    import lm_eval

    length, count = os.environ["LONGCTX_CROSS_CHECK"].split(",")
    run, kept = lm_eval.simple_evaluate, []
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *args, **options: kept.append(run(*args, **options)) or kept[0])
    (row,) = evaluate(smollm2, [{"name": f"lm_eval/few_{name}", "path": few(int(count))}], [length], out=tmp_path / "e")
    samples = kept[0]["samples"][f"few_{name}"]
    model, tokenizer = checkpoint.load(smollm2)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    cells = []
    for sample in samples:
        ((prompt, options),) = sample["arguments"]
        ids = np.array(tokenizer(prompt)["input_ids"])
        cells.append(Cell(ids, len(ids), len(ids) + options["max_gen_toks"], answers=tuple(sample["doc"]["outputs"])))
    outputs = decode_cells(model, cells)
    found = [score_found([cell], [output], tokenizer)[0].value for cell, output in zip(cells, outputs, strict=True)]
    said = [sample[str(row["length"])] for sample in samples]
    print(name, "harness", np.mean(said), "same prompts", np.mean(found), "samples that differ", sum(a != pytest.approx(b) for a, b in zip(found, said, strict=True)))
    if torch.cuda.is_available():  # in half precision a batch rounds otherwise than a padded one
        assert abs(np.mean(found) - np.mean(said)) <= 0.02
    else:
        assert found == pytest.approx(said)


@asked_for
@pytest.mark.parametrize("name", [name for name in RULER if name != "cwe"])
def test_scores_agree_with_the_harness(few, smollm2, tmp_path, name):
    """On the same model at the same length: samples are others, prompts the same but for what the tasks say of themselves.

    Not cwe's: the harness leaves RULER's example out, and then the question is easier."""
    length, count = os.environ["LONGCTX_CROSS_CHECK"].split(",")
    n = {"n": 2, "depths": int(count) // 2} if name.startswith("niah") else {"n": int(count)}
    options = {"scoring": "generated"} if name != "cwe" and name != "fwe" else {}
    ours, theirs = evaluate(smollm2, [{"name": name} | n | options, {"name": f"lm_eval/few_{name}", "path": few(int(count))}], [length], out=tmp_path / "e")[:: n.get("depths", 0) + 1]
    print({row["task"]: (row["value"], row["ci_low"], row["ci_high"], row["n"], row["seconds"]) for row in (ours, theirs)})
    assert ours["n"] == theirs["n"] == int(count)
    assert ours["ci_low"] <= theirs["ci_high"]
    assert theirs["ci_low"] <= ours["ci_high"]
