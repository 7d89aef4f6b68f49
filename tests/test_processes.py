"""Evaluation by two processes under torchrun: the rows of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hf_longctx
from hf_longctx import evaluation
from hf_longctx.cli.main import main
from hf_longctx.processes import Processes
from hf_longctx.task import Cell
from tests.conftest import refused_in_a_line

ROOT = Path(hf_longctx.__file__).resolve().parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def cost(cells) -> float:
    return sum(len(cell.ids) * (len(cell.ids) + 8192) for cell in cells)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[64] * 7, [64], [4096, *[512] * 8] * 3, [1, 100000, 1]])
def test_shares_are_runs_of_neighbours_of_about_equal_cost(count, lengths):
    cells = [Cell(np.zeros(length, int), 0, 1, cluster=i) for i, length in enumerate(lengths)]
    shares = [Processes(rank, count).share(cells) for rank in range(count)]
    assert [cell.cluster for share in shares for cell in share] == list(range(len(cells)))
    assert all(abs(cost(share) - cost(cells) / count) <= cost(cells[max(range(len(cells)), key=lambda i: lengths[i]):][:1]) for share in shares)


def test_a_process_alone_waits_for_nobody():
    assert Processes().gather(lambda: 3) == [3]
    assert Processes().first(lambda: 4) == 4
    with pytest.raises(KeyError):
        Processes().gather(lambda: {}["x"])


def test_together_needs_torchrun(base, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    refused_in_a_line(lambda: hf_longctx.evaluate(base, ["perplexity"], [64], out=tmp_path / "e", together=True), "together: this process was not started by torchrun;")


SCRIPT = """
import sys
from pathlib import Path
from hf_longctx import evaluation
from hf_longctx.evaluation import evaluate
from hf_longctx.processes import Processes

base, tokens, folder, *more = sys.argv[1:]
processes = Processes.of_torchrun()
assert processes.gather(lambda: processes.rank + 10) == [10, 11]
assert processes.first(lambda: processes.rank) == 0
for kind in (ValueError, RuntimeError):
    def fail(kind=kind):
        raise kind("only in the second") if processes.rank else kind
    try:
        processes.gather(lambda: fail() if processes.rank else 0)
    except kind as error:
        assert str(error) == "only in the second"
    else:
        raise SystemExit("nothing was raised")

read, counts = evaluation.score_cells, []
def counting(model, cells, *others, **options):
    counts.append(len(cells))
    if processes.rank and len(cells[0].ids) == 60:  # one process fails at one length
        raise RuntimeError("no memory left here")
    return read(model, cells, *others, **options)
evaluation.score_cells = counting
evaluation.plot_results = lambda rows, folder: []
TASKS = [{"name": "perplexity", "stride": 16, "tokens": 60}, {"name": "position_nll", "windows": 1, "documents": 1}]
rows = evaluate(base, TASKS, [40, 50, 60], out=folder, data=tokens, baseline=base, methods=[{"name": "yarn", "factor": 2}], together=True)
shown = [row["value"] for row in rows]
assert processes.gather(lambda: shown)[0] == shown  # all know them
Path(f"{folder}.{processes.rank}").write_text(str(counts))
"""


@pytest.fixture(scope="module")
def two(base, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "run.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, str(folder / "run.py"), str(base), str(tokens), str(folder / "e")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("failed: no memory left here") == 4  # two tasks of two models, said once each
    return folder / "e", [json.loads((folder / f"e.{rank}").read_text()) for rank in (0, 1)]


def test_two_processes_give_the_rows_of_one(two, base, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "plot_results", lambda rows, folder: [])
    tasks = [{"name": "perplexity", "stride": 16, "tokens": 60}, {"name": "position_nll", "windows": 1, "documents": 1}]
    wanted = hf_longctx.evaluate(base, tasks, [40, 50, 60], out=tmp_path / "e", data=tokens, baseline=base, methods=[{"name": "yarn", "factor": 2}])
    found = json.loads((two[0] / "results.json").read_text())
    assert [row for row in found if row["metric"] == "failed"]
    found = {(row["model"], row["task"], row["length"], row["metric"], row["depth"]): row for row in found if row["metric"] != "failed"}
    wanted = {(row["model"], row["task"], row["length"], row["metric"], row["depth"]): row for row in wanted if row["length"] != 60}
    assert list(found) == [key for key in wanted if key[2] != 60]
    for key, row in wanted.items():
        assert [found[key][name] for name in ("n", "tokens", "seed", "dtype")] == [row[name] for name in ("n", "tokens", "seed", "dtype")]
        for name in ("value", "ci_low", "ci_high"):
            assert found[key][name] == (row[name] if row[name] is None else pytest.approx(row[name], rel=1e-5, abs=1e-6))


def test_each_reads_its_share_and_one_writes(two):
    folder, (first, second) = two
    assert first == 2 * [18, 12, 6]  # of two models: half of the windows of twelve documents at each length,
    assert second == 2 * [18, 12, 6, 1, 1, 1]  # and of a task with a single cell, which one of them reads
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    keys = [(row["model"], row["task"], row["length"], row["metric"], row["depth"]) for row in lines]
    assert len(set(keys)) == len(keys)


def test_what_fails_in_one_process_is_a_failed_row_and_the_others_go_on(two):
    rows = json.loads((two[0] / "results.json").read_text())
    failed = [row for row in rows if row["metric"] == "failed"]
    assert {(row["length"], row["error"]) for row in failed} == {(60, "no memory left here")}
    assert {row["length"] for row in rows if row["metric"] == "perplexity"} >= {40, 50}


# --- the command


@pytest.fixture
def longctx(monkeypatch, capsys, tmp_path):
    """`longctx("eval ...", RANK=1, WORLD_SIZE=2)` -> status, output, errors."""

    def run(words, **environment):
        monkeypatch.chdir(tmp_path)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, str(environment.get(name, "")))
            if name not in environment:
                monkeypatch.delenv(name)
        monkeypatch.setattr(sys, "argv", ["longctx", *words.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run


def test_num_gpus_starts_the_same_command_under_torchrun(longctx, monkeypatch):
    from torch.distributed.elastic.multiprocessing.api import SignalException

    calls = []
    monkeypatch.setattr("torch.distributed.run.main", calls.append)
    assert longctx("eval /nowhere --num-gpus 2 --lengths 64 --out e") == (0, "", "")
    assert calls == [["--standalone", "--nproc-per-node", "2", "-m", "hf_longctx.cli", "eval", "/nowhere", "--lengths", "64", "--out", "e"]]
    monkeypatch.setattr("torch.distributed.run.main", lambda words: (_ for _ in ()).throw(SignalException("got SIGINT", 2)))
    assert longctx("eval /nowhere --num-gpus 2 --lengths 64 --out e")[::2] == (130, "longctx: interrupted; the same command goes on\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_one_prints(longctx, monkeypatch, rank):
    calls, row = [], {"model": "m", "task": "t", "length": 64, "depth": None, "metric": "failed", "value": None}
    monkeypatch.setattr(evaluation, "evaluate", lambda *given, **named: calls.append(named["together"]) or [row])
    code, out, error = longctx("eval /nowhere --lengths 64 --out e --num-gpus 2 --task passkey", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2)
    assert (code, bool(out), error, calls) == (1, rank == 0, "", [True])
    longctx("eval /nowhere --lengths 64 --out e --task passkey")
    assert calls == [True, False]


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_input_is_said_once_but_a_failure_by_whom_it_befell(longctx, monkeypatch, rank):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    assert longctx("eval /nowhere --lengths long --out e", **environment)[::2] == (2, "" if rank else "longctx: expected a number of tokens such as 2048, 2k or 128k, got 'long'\n")

    def broken(*given, **named):
        raise RuntimeError("no memory")

    monkeypatch.setattr(evaluation, "evaluate", broken)
    code, _, error = longctx("eval /nowhere --lengths 64 --out e", **environment)
    assert (code, error.partition(" (")[0]) == (1, "longctx: RuntimeError: no memory")
