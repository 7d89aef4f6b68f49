"""The command line: what it prints, what it exits with, what it refuses in one line; mostly in this process."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer

import hf_longctx
from hf_longctx import training
from hf_longctx.cli.main import _in_words, app, main, parse_spec
from hf_longctx.method import method_names
from hf_longctx.recipe import dump_recipe, parse_recipe

MODULE = [sys.executable, "-m", "hf_longctx.cli"]


class Run(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def longctx(tmp_path, monkeypatch, capsys):
    """`longctx("patch", folder, ...)`: what the command does in this process, from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "LONGCTX_TRACEBACK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*words: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["longctx", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Run(stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def recipe_file(recipe, tmp_path) -> Path:
    """The recipe of conftest.py, two steps long, as a file."""
    recipe["train"] |= {"max_steps": 2, "save_steps": 1}
    dump_recipe(parse_recipe(recipe), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def in_process_of_its_own(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Nothing heavy is imported to print


HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "matplotlib")


def test_help_version_and_methods_import_nothing_heavy():
    code = f"""
import sys
from hf_longctx.cli.main import app, main
import typer
verbs = sorted(typer.main.get_command(app).commands)
for words in ([], ["--help"], ["--version"], ["methods"], ["methods", "yarn", "--json"], ["pach"], *([verb, "--help"] for verb in verbs)):
    sys.argv = ["longctx", *words]
    try:
        main()
    except SystemExit as stopped:
        assert stopped.code == (2 if words == ["pach"] else 0), (words, stopped.code)
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    printed = in_process_of_its_own(code)
    assert printed.endswith("heavy: []\n")
    assert printed.count("Usage: longctx") >= 10


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("longctx ", {"patch", "finetune", "eval"}),
        ("longctx finetune --", {"--dry-run", "--num-gpus"}),
        ("longctx finetune smollm2", {"smollm2-135m-32k"}),
        ("longctx methods ya", {"yarn"}),
        ("longctx patch model -m ", {"yarn", "linear"}),
        ("longctx eval model --task pass", {"passkey"}),
    ],
)
def test_completion_imports_nothing_heavy(words, found):
    code = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", [name for name in {HEAVY} if name in sys.modules]))
sys.argv = ["longctx"]
from hf_longctx.cli.main import main
main()
"""
    printed = in_process_of_its_own(code, _LONGCTX_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    assert found <= set(printed.split("\n"))
    assert printed.endswith("heavy: []\n")


def test_the_shell_gets_a_script_that_completes():
    code = "import sys; sys.argv = ['longctx']; from hf_longctx.cli.main import main; main()"
    assert "_LONGCTX_COMPLETE=complete_bash" in in_process_of_its_own(code, _LONGCTX_COMPLETE="source_bash")


def test_every_command_and_option_says_what_it_is():
    for verb, command in typer.main.get_command(app).commands.items():
        assert command.help, verb
        for parameter in command.params:
            assert len(parameter.help or "") >= 8, f"{verb} {parameter.name} has no help text"


def test_as_a_command_and_as_a_module():
    script = Path(sys.executable).with_name("longctx")
    for start in ([str(script)], MODULE, [sys.executable, "-m", "hf_longctx"]):
        done = subprocess.run([*start, "--version"], capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr, done.returncode) == (f"{hf_longctx.__version__}\n", "", 0)


def test_an_error_is_one_line_in_a_process_of_its_own_too(base, tmp_path):
    """There logging and warnings of libraries reach stderr as well."""
    words = ["eval", base, "--lengths", "64", "--task", "perplexity:documents=1", "--baseline", "no/such", "--out", tmp_path / "out"]
    done = subprocess.run([*MODULE, *map(str, words)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("longctx: 'no/such' ")
    assert done.stderr.count("\n") == 1, done.stderr


# The options are frozen


OPTIONS = {
    "methods": "NAME --plot --json",
    "inspect": "MODEL --json --revision",
    "patch": "MODEL -m --method --out --overwrite --revision --data",
    "finetune": "RECIPE --out --set --dry-run --resume --overwrite --num-gpus",
    "merge": "ADAPTER_DIR --out --base --overwrite",
    "push": "DIR REPO_ID --private --revision --create-pr --base --results",
    "eval": "MODEL --lengths --out --task -m --method --data --baseline --revision --base --device --dtype --seed --batch-size --chunk --cache --num-gpus",
    "report": "DIR... --out --overwrite --kept --reference",
    "demo": "--out",
    "schema": "",
}


def test_there_are_no_other_verbs_and_options():
    """What varies goes into recipes (design, section 4): a new option is a decision of the owner, not a convenience."""
    found = {}
    for verb, command in typer.main.get_command(app).commands.items():
        options = [o for p in command.params for o in (p.opts + p.secondary_opts if p.param_type_name == "option" else [p.metavar or p.name.upper()])]
        found[verb] = sorted(options)
    assert found == {verb: sorted(options.split()) for verb, options in OPTIONS.items()}


# Specs


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("nope", {}),
        ("nope:", {}),
        ("yarn:factor=4", {"factor": 4}),
        ("yarn: factor = 4 , blend = wavelength", {"factor": 4, "blend": "wavelength"}),
        ("yarn:factor=4,", {"factor": 4}),
        ("x:a=[1, 2],b=3", {"a": [1, 2], "b": 3}),
        ("x:a={b: [1, {c: 2, d: 3}], e: 4},f=5", {"a": {"b": [1, {"c": 2, "d": 3}], "e": 4}, "f": 5}),
        ("x:a=b=c,d=e==", {"a": "b=c", "d": "e=="}),
        ("x:a='1, 2',b=\"c]\",d=it's,e=1", {"a": "1, 2", "b": "c]", "d": "it's", "e": 1}),
        ("x:a=true,b=null,c=2e-5,d=128k,e=", {"a": True, "b": None, "c": 2e-5, "d": "128k", "e": None}),
        ("x:url=https://a.b/c:8", {"url": "https://a.b/c:8"}),
    ],
)
def test_a_spec_is_yaml_values_between_commas(text, values):
    assert parse_spec(text) == {"name": text.partition(":")[0]} | values


def test_a_value_can_be_in_a_file(tmp_path):
    (tmp_path / "factors.json").write_text("[1.0, 2.5]")
    assert parse_spec(f"longrope:factor=8,long_factor=@{tmp_path}/factors.json") == {"name": "longrope", "factor": 8, "long_factor": [1.0, 2.5]}
    with pytest.raises(ValueError, match=r"nothing\.json does not exist"):
        parse_spec("longrope:long_factor=@nothing.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarn:4", "expected key=value, got '4'"),
        ("yarn:factor=4,,blend=x", "expected key=value, got ''"),
        ("yarn:factor=4,factor=8", "factor is given twice"),
        ("yarn:name=ntk", "the name goes before the colon"),
        ("yarn:factor=[4", "is not a YAML value"),
    ],
)
def test_a_spec_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


# Wrong input: status 2 and one line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pach BASE --out new", "No such command 'pach'. Did you mean 'patch'?"),
        ("patch BASE --outt new -m nope", "No such option: --outt"),
        ("patch BASE -m nope", "Missing option '--out'"),
        ("patch BASE --out new", "Missing option '-m'"),
        ("methods yran", "unknown method 'yran'; did you mean 'yarn'?"),
        ("patch BASE --out new -m yran:factor=4", "did you mean 'yarn'?"),
        ("patch BASE --out new -m yarn:factr=4", "unknown key 'factr'; did you mean 'factor'?"),
        ("patch BASE --out new -m yarn", "yarn: factor is required"),
        ("patch BASE --out new -m yarn:factor=0.5", "factor must be at least 1"),
        ("patch BASE --out new -m yarn:factor=big", "factor: "),
        ("patch BASE --out new -m yarn:factor=[4", "is not a YAML value"),
        ("patch BASE --out new -m yarn:factor=@none.json", "none.json does not exist"),
        ("patch BASE --out new -m yarn:factor=4 -m ntk:factor=2", "both fill the rope slot"),
        ("patch BASE --out new -m pose", "belongs to training"),
        ("patch BASE --out used -m nope", "used already holds something"),
        ("patch BASE --out used/file -m nope", "used/file is a file"),
        ("patch BASE --out used/file/below -m nope", "used/file"),
        ("patch no/such --out new -m nope", "'no/such' is no folder here"),
        ("inspect nothing", "'nothing' is no folder here"),
        ("inspect used", "used holds no model"),
        ("merge BASE --out new", "is not an adapter folder"),
        ("finetune nope", "no recipe file 'nope'; there is: demo"),
        ("finetune smollm2-135m-32kk", "did you mean 'smollm2-135m-32k'?"),
        ("finetune RECIPE", "give --out FOLDER, or --dry-run"),
        ("finetune RECIPE --out used", "used already holds something"),
        ("finetune RECIPE --out new --resume", "holds no run to resume"),
        ("finetune RECIPE --out new --resume --overwrite", "give one of them"),
        ("finetune RECIPE --out new --num-gpus 0", "'--num-gpus'"),
        ("finetune RECIPE --out new --set windw=3", "unknown key 'windw'; did you mean 'window'?"),
        ("finetune RECIPE --out new --set train.max_step=3", "unknown key 'max_step'; did you mean 'max_steps'?"),
        ("finetune RECIPE --out new --set window=3.5", "window"),
        ("finetune RECIPE --out new --set window", "--set needs key=value"),
        ("finetune RECIPE --out new --set data.path=none.txt", "none.txt"),
        ("finetune BAD --out new", "unknown key 'windw'"),
        ("finetune used/file --out new", "is not a recipe"),
        ("eval BASE --out new", "Missing option '--lengths'"),
        ("eval BASE --out new --lengths 4x", "got '4x'"),
        ("eval BASE --out new --lengths 64,", "got ''"),
        ("eval BASE --out new --lengths 64 --task paskey", "unknown task 'paskey'; did you mean 'passkey'?"),
        ("eval BASE --out new --lengths 64 --task passkey:m=1", "unknown key 'm'"),
        ("eval BASE --out new --lengths 64 --task passkey:n=0", "n: "),
        ("eval BASE --out new --lengths 64 -m yran", "did you mean 'yarn'?"),
        ("eval BASE --out new --lengths 64 --batch-size 0", "'--batch-size'"),
        ("eval BASE --out new --lengths 64 --chunk 4x", "got '4x'"),
        ("eval nothing --out new --lengths 64", "'nothing' is no folder here"),
        ("eval BASE --out new --lengths 64 --data none.txt", "none.txt"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(longctx, base, recipe_file, tmp_path, words, message):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("kept")
    (tmp_path / "bad.yaml").write_text(recipe_file.read_text() + "\nwindw: 3\n")
    places = {"BASE": base, "RECIPE": recipe_file, "BAD": tmp_path / "bad.yaml"}
    status, out, err = longctx(*(places.get(word, word) for word in words.split()))
    assert message in err
    assert (status, out) == (2, "")
    assert err.startswith("longctx: ")
    assert err.count("\n") == 1, err
    assert (tmp_path / "used" / "file").read_text() == "kept"


def test_a_traceback_can_be_had(longctx, monkeypatch):
    assert "Traceback" not in longctx("methods", "yran").err
    monkeypatch.setenv("LONGCTX_TRACEBACK", "1")
    status, _, err = longctx("methods", "yran")
    assert status == 2
    assert "Traceback" in err
    assert "method.py" in err
    assert err.endswith("did you mean 'yarn'?\n")


# Printing


def test_methods_are_listed_whole(longctx):
    status, out, err = longctx("methods")
    assert (status, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["method", "slot", "fields", "paper"]
    assert [line.split()[0] for line in lines] == method_names()
    assert "…" not in out
    assert "truncate, blend" in out


@pytest.mark.parametrize("name", [None, *method_names()])
def test_methods_as_json(longctx, name):
    found = json.loads(longctx("methods", *([name] if name else []), "--json").out)
    assert [each["name"] for each in (found if name is None else [found])] == ([name] if name else method_names())


def test_one_method_is_described(longctx):
    out = longctx("methods", "yarn").out
    for part in ("slot     rope", "arXiv:2309.00071", "theta'_j", "factor = (required)", "beta_fast = 32.0"):
        assert part in out


def test_the_schema_is_json(longctx):
    schema = json.loads(longctx("schema").out)
    assert {"model", "methods", "window", "data", "lora", "train"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_inspect_in_words_and_as_json(longctx, base):
    facts = json.loads(longctx("inspect", base, "--json").out)
    assert (facts["family"], facts["trained_window"], facts["methods"]) == ("llama", 64, [])
    lines = dict(line.split(maxsplit=1) for line in longctx("inspect", base).out.splitlines() if not line.startswith(("trained", "loads", "kv", "head ")))
    assert (lines["family"], lines["methods"], lines["window"]) == ("llama", "none", "64")


def test_inspect_says_what_methods_were_told_and_keeps_lists_short(longctx, base, tmp_path):
    longctx("patch", base, "-m", "nope:target=128", "--out", tmp_path / "patched")
    printed = longctx("inspect", tmp_path / "patched").out
    assert re.search(r"^methods +nope:target=128$", printed, re.M)
    assert re.search(r"^rope .*long_factor 1e\+18 to 1e\+18 \(8 numbers\).*rope_theta 10000", printed, re.M)
    assert re.search(r"^needs plugin +no$", printed, re.M)


def test_nested_values_stand_in_brackets():
    assert _in_words({"full": {"rope_theta": 1e6, "factor": 8.0}, "sliding": [1, 2]}) == "full (rope_theta 1e+06, factor 8), sliding [1, 2]"


# The verbs, one after another


@pytest.mark.floor
def test_patch_inspect_finetune_merge_eval(longctx, base, recipe_file, tmp_path):
    assert longctx("patch", base, "-m", "yarn:factor=8", "--out", "patched") == (0, "patched: window 64 -> 512 by yarn; proved\n", "")
    assert json.loads(longctx("inspect", "patched", "--json").out)["window"] == 512

    sets = ("--set", "model.name=patched", "--set", "methods=[{name: pose, chunks: 2}]")
    status, out, _ = longctx("finetune", recipe_file, *sets, "--out", "adapter")
    assert (status, out.splitlines()[-1]) == (0, "adapter: an adapter")
    facts = json.loads(longctx("inspect", "adapter", "--json").out)
    assert (facts["kind"], facts["window"]) == ("adapter", 512)

    status, out, err = longctx("merge", "adapter", "--out", "merged")
    assert (status, err) == (0, "")
    assert out.startswith("merged: llama, window 512; loads with transformers>=5")
    assert longctx("merge", "adapter", "--out", "merged").status == 2
    assert longctx("merge", "adapter", "--out", "merged", "--overwrite").status == 0

    words = ("eval", "merged", "--lengths", "420,512", "--task", "passkey:n=1,depths=2", "--baseline", "patched", "--out", "results", "--device", "cpu")
    status, out, _ = longctx(*words)
    assert status == 0
    head, *lines = out.splitlines()
    assert head.split() == ["model", "task", "metric", "420", "512", "effective", "length", "(85", "%", "of", "2k)"]
    assert [line.split()[:3] for line in lines[:2]] == [[name, "passkey:n=1,depths=2", "accuracy"] for name in ("merged", "patched")]
    assert {"results.json", "results.csv", "passkey.png"} <= {path.name for path in (tmp_path / "results").iterdir()}
    rows = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {(row["model"], row["length"]) for row in rows} == {(m, n) for m in ("merged", "patched") for n in (420, 512)}
    before = (tmp_path / "results" / "results.jsonl").read_bytes()
    assert longctx(*words).out.splitlines()[1:-1] == lines[:-1]  # nothing is measured again
    assert (tmp_path / "results" / "results.jsonl").read_bytes() == before


def test_a_failed_cell_is_status_1_after_the_others(longctx, base):
    status, out, _ = longctx("eval", base, "--lengths", "450", "--task", "state_norm", "--task", "passkey:n=1,depths=1", "--out", "out")
    assert status == 1
    assert "failed" in out
    rows = json.loads(Path("out/results.json").read_text())
    assert [(row["task"].partition(":")[0], row["metric"]) for row in rows if row["depth"] is None] == [("state_norm", "failed"), ("passkey", "accuracy")]


def test_a_length_that_is_too_short_is_one_line(longctx, base):
    status, out, err = longctx("eval", base, "--lengths", "100,450", "--task", "passkey:n=1,depths=1", "--out", "out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("longctx: passkey:n=1,depths=1 at 100: a prompt of 100 tokens is too short")
    assert not Path("out").exists()


def test_the_text_is_named_where_one_is_used(longctx, base, tokens):
    options = ("--lengths", "64", "--task", "perplexity:documents=1", "--dtype", "float32", "--seed", "1", "--batch-size", "2")
    out = longctx("eval", base, *options, "--out", "a").out
    assert out.startswith("text: pydoc_data.topics of Python")
    out = longctx("eval", base, *options, "--out", "b", "--data", tokens, "-m", "yarn:factor=2").out
    assert "pydoc" not in out
    assert "yarn" in out


def test_what_finetune_warns_of_is_a_line_told_once(recipe_file, tmp_path):
    code = f"""
import sys
from hf_longctx.cli.main import main
sys.argv, sys.stderr = ["longctx", "finetune", {str(recipe_file)!r}, "--set", "methods=[{{name: t5}}]", "--out", {str(tmp_path / "out")!r}], sys.stdout
try:
    main()
except SystemExit as stopped:
    assert stopped.code == 0
"""
    told = [line for line in in_process_of_its_own(code).splitlines() if "converge" in line]
    assert len(told) == 1
    assert told[0].startswith("longctx: the sum of exp(bias) over all distances does not converge for t5")


def test_an_evaluation_that_breaks_after_training_costs_nothing_but_itself(longctx, recipe_file, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("no text\nat all")

    monkeypatch.setattr("hf_longctx.evaluation.evaluate", broken)
    status, out, err = longctx("finetune", recipe_file, "--out", "run", "--set", "eval={tasks: [passkey], lengths: [450]}", "--set", "train.disable_tqdm=true")
    assert (status, out) == (1, "run: an adapter\n")
    assert err == "longctx: run is saved; its evaluation failed: no text at all; `longctx eval run` measures it\n"
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("change", ["eval={tasks: [paskey]}", "eval={data: none.txt}", "probe={lengths: [3]}"])
def test_what_is_measured_is_checked_before_training(longctx, recipe_file, monkeypatch, change):
    monkeypatch.setattr(training, "_build_model", lambda what: pytest.fail("it went on"))
    status, out, err = longctx("finetune", recipe_file, "--out", "run", "--set", change)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert not Path("run").exists()


@pytest.mark.parametrize(("length", "status"), [(450, 0), (100, 1)])
def test_a_recipe_can_end_in_an_evaluation(longctx, recipe_file, tmp_path, length, status):
    wish = f"eval={{tasks: [{{name: passkey, n: 1, depths: 1}}], lengths: [{length}]}}"
    found = longctx("finetune", recipe_file, "--out", "run", "--set", wish)
    assert found.status == status
    assert "run: an adapter" in found.out
    assert (tmp_path / "run" / "eval" / "results.json").is_file() == (status == 0)


# finetune


def test_a_dry_run_shows_the_plan_and_trains_nothing(longctx, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "finetune", lambda *a, **k: pytest.fail("it trained"))
    before = set(tmp_path.iterdir())
    status, out, err = longctx("finetune", recipe_file, "--dry-run", "--out", "run")
    assert (status, err) == (0, "")
    for part in (
        "(llama, trained window 64)", "yarn (factor 4.0", "pose (target 256, chunks 2", "32 -> positions up to 256", "12 documents, 72 windows",
        "2 steps x 2 windows = 128 tokens", "memory", "GiB (estimate)", "sample 0  31 labels", "positions       0-", "coverage of relative distances",
    ):  # fmt: skip
        assert part in out
    shares = out.split("16 equal bins\n")[1].split("\n")[0].split()
    assert len(shares) == 16
    assert set(tmp_path.iterdir()) - before == {tmp_path / "coverage.png"}  # and `run` is free for the real one
    assert (tmp_path / "coverage.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_counts_every_process(longctx, recipe_file):
    assert "2 steps x 4 windows = 256 tokens" in longctx("finetune", recipe_file, "--dry-run", "--num-gpus", "2").out


@pytest.mark.parametrize("words", [["--num-gpus", "2"], ["--num-gpus=2"], ["--num-gpus=4", "--num-gpus", "2"]])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_num_gpus_starts_the_same_command_under_torchrun(longctx, recipe_file, monkeypatch, words, place):
    calls = []
    monkeypatch.setattr("torch.distributed.run.main", calls.append)
    monkeypatch.setattr(training, "finetune", lambda *a, **k: pytest.fail("it trained here"))
    parts = [["finetune", str(recipe_file)], ["--set", "seed=2"], ["--out", "2"]]
    given = [word for part in [*parts[: place + 1], words, *parts[place + 1 :]] for word in part]
    assert longctx(*given).status == 0
    assert calls == [["--standalone", "--nproc-per-node", "2", "-m", "hf_longctx.cli", *(word for part in parts for word in part)]]


def test_a_process_of_torchrun_trains(longctx, recipe_file, monkeypatch):
    """It starts no torchrun of its own, and only the first one prints."""
    calls = []
    monkeypatch.setattr(training, "finetune", lambda *a, **k: calls.append(k))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    assert longctx("finetune", recipe_file, "--out", "run", "--num-gpus", "2") == (0, "", "")
    assert calls == [{"resume": False, "overwrite": False}]


def test_what_stops_torchrun_decides_the_status(longctx, recipe_file, monkeypatch):
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    for status, error in (
        (130, SignalException("got SIGINT", signal.SIGINT)),
        (2, ChildFailedError("x", {0: ProcessFailure(0, 1, 2, "/nowhere")})),
        (1, ChildFailedError("x", {0: ProcessFailure(0, 1, 1, "/nowhere")})),
        (1, ChildFailedError("x", {0: ProcessFailure(0, 1, -9, "/nowhere")})),
    ):
        monkeypatch.setattr("torch.distributed.run.main", lambda words, error=error: (_ for _ in ()).throw(error))
        assert longctx("finetune", recipe_file, "--out", "run", "--num-gpus", "2").status == status


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
    ],
)
def test_a_full_disk_is_named(longctx, recipe_file, monkeypatch, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(training, "finetune", full)
    status, out, err = longctx("finetune", recipe_file, "--out", "run")
    assert (status, out) == (1, "")
    assert "the disk is full" in err
    assert "--resume" in err


@pytest.mark.parametrize("error", [RuntimeError("CUDA is tired\nvery"), OSError(errno.EIO, "Input/output error"), torch.OutOfMemoryError("too much")])
def test_what_nobody_foresaw_is_status_1(longctx, recipe_file, monkeypatch, error):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(training, "finetune", broken)
    status, _, err = longctx("finetune", recipe_file, "--out", "run")
    assert status == 1
    assert err.startswith(f"longctx: {type(error).__name__}: ")
    assert "LONGCTX_TRACEBACK=1" in err
    assert err.count("\n") == 1


def test_the_end_of_a_file_is_no_ctrl_c(longctx, base, monkeypatch):
    """The parser prints an empty line for it."""

    def cut(*args, **options):
        raise EOFError("no data left in file")

    monkeypatch.setattr("hf_longctx.checkpoint.inspect_model", cut)
    status, out, err = longctx("inspect", base)
    assert (status, out) == (1, "")
    assert err.strip().startswith("longctx: EOFError: no data left in file")


def test_ctrl_c_anywhere_is_status_130(longctx, base, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_longctx.checkpoint.inspect_model", stopped)
    assert longctx("inspect", base) == (130, "", "longctx: interrupted\n")


def test_ctrl_c_in_an_evaluation_says_how_to_go_on(longctx, base, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_longctx.evaluation.score_cells", stopped)
    assert longctx("eval", base, "--lengths", "450", "--task", "passkey:n=1,depths=1", "--out", "e") == (130, "", "longctx: interrupted; the same command goes on\n")


def test_ctrl_c_is_status_130_and_resume_finishes(longctx, recipe, tmp_path):
    recipe["train"] |= {"max_steps": 150, "save_steps": 5}
    dump_recipe(parse_recipe(recipe), tmp_path / "long.yaml")
    words = ["finetune", "long.yaml", "--out", "run"]
    process = subprocess.Popen([*MODULE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("longctx: interrupted at step ")
    assert "--resume" in err
    assert out == ""
    step = int(err.splitlines()[-1].partition("step ")[2].partition(";")[0])
    assert 0 < step < 150
    assert longctx(*words).status == 2  # it is in use

    status, out, _ = longctx(*words, "--resume")
    assert (status, out.splitlines()[-1]) == (0, "run: an adapter")
    state = json.loads(Path(training.last_checkpoint(tmp_path / "run"), "trainer_state.json").read_text())
    assert state["global_step"] == 150
    assert any(entry["step"] == step for entry in state["log_history"])  # it went on, and did not begin anew
