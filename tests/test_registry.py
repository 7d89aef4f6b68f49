"""Names, keys and sizes that users write, and the package's own order: what it exports, imports and costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_longctx
from hf_longctx import method, method_names
from hf_longctx.method import describe, load_method, load_methods, method_class
from hf_longctx.schema import format_size, nearest, parse_size

PACKAGE = Path(hf_longctx.__file__).parent


def one_line(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- Methods.


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({"name": "yarm"}, ["unknown method 'yarm'", "did you mean 'yarn'?"]),
        ({"name": "quantum"}, ["unknown method 'quantum'", "there is: alibi, carry, cream,"]),
        ("_private", ["unknown method '_private'"]),
        ("../method", ["unknown method '../method'"]),
        ({"factor": 8}, ["a method needs a name", "{'factor': 8}", "yarn"]),
        ({"name": 7}, ["a method needs a name"]),
        ({"name": "yarn", "faktor": 8}, ["yarn: factor is required", "yarn: unknown key 'faktor'; did you mean 'factor'?"]),
        ({"name": "yarn", "factor": 8, "betafast": 1}, ["yarn: unknown key 'betafast'; did you mean 'beta_fast'?"]),
        ({"name": "plain", "target": 8}, ["plain: unknown key 'target'"]),
        ("yarn", ["yarn: factor is required"]),
        ({"name": "yarn", "factor": "eight"}, ["yarn: factor: input should be a valid number", "got 'eight'"]),
        ({"name": "yarn", "factor": None}, ["yarn: factor: input should be a valid number"]),
        ({"name": "yarn", "factor": [2]}, ["yarn: factor: input should be a valid number"]),
        ({"name": "yarn", "factor": 8, "blend": "log"}, ["yarn: blend: input should be 'frequency' or 'wavelength', got 'log'"]),
        ({"name": "yarn", "factor": 8, "truncate": 3}, ["yarn: truncate", "got 3"]),
        ({"name": "pose", "chunks": 2.5}, ["pose: chunks", "got 2.5"]),
        ({"name": "pose", "target": "2q"}, ["pose: target: expected a number of tokens such as 2048, 2k or 128k, got '2q'"]),
        ({"name": "longrope", "factor": 2, "long_factor": 3}, ["longrope: long_factor", "got 3"]),
        ({"name": "longrope", "factor": 2, "long_factor": [1, "x"]}, ["longrope: long_factor.1", "got 'x'"]),
        ({"name": "longrope", "factor": 2, "long_factor": [1, 0]}, ["long_factor must hold positive numbers, got 0"]),
        *(({"name": name, "factor": 0.5}, ["factor must be at least 1", "got 0.5"]) for name in ("linear", "ntk", "dynamic_ntk", "yarn", "llama3")),
        *(({"name": "linear", "factor": bad}, ["factor must be at least 1"]) for bad in (float("nan"), float("inf"), -2)),
        ({"name": "yarn", "factor": 8, "beta_fast": 1, "beta_slow": 2}, ["beta_fast must be above beta_slow, got 1 and 2"]),
        ({"name": "yarn", "factor": 8, "beta_fast": float("inf")}, ["beta_fast must be a positive number, got inf"]),
        ({"name": "yarn", "factor": 8, "mscale": 1}, ["mscale and mscale_all_dim come together"]),
        ({"name": "yarn", "factor": 8, "attention_factor": 0}, ["attention_factor must be a positive number"]),
        ({"name": "yarn", "factor": 8, "mscale": 0, "mscale_all_dim": 1}, ["mscale must be a positive number"]),
        ({"name": "longrope", "factor": 2, "long_factor": [1], "attention_factor": -1}, ["attention_factor must be a positive number"]),
        ({"name": "llama3", "factor": 8, "high_freq_factor": 1}, ["high_freq_factor must be above low_freq_factor"]),
        ({"name": "llama3", "factor": 8, "low_freq_factor": 0}, ["low_freq_factor must be a positive number"]),
        ({"name": "theta", "theta": 1, "target": "8k"}, ["theta must be above 1, got 1"]),
        ({"name": "theta", "theta": float("inf"), "target": "8k"}, ["theta must be a positive number, got inf"]),
        ({"name": "pose", "chunks": 1}, ["chunks must be at least 2", "use plain"]),
        ({"name": "pose", "chunks": 3, "form": "code"}, ["form: code has two chunks, got 3"]),
        ({"name": "pose", "pin_tail": 1.5}, ["pin_tail is a probability, got 1.5"]),
        ({"name": "pose", "plain": 1}, ["plain is a share below 1, got 1", "the method plain"]),
        ({"name": "cream", "sigma": 0}, ["sigma must be a positive number"]),
    ],
)
def test_a_wrong_method_is_one_line_that_says_what_to_write(spec, parts):
    one_line(lambda: load_method(spec), *parts)


def test_two_methods_in_one_slot_are_refused():
    yarn, pose = {"name": "yarn", "factor": 2}, {"name": "pose"}
    one_line(lambda: load_methods([yarn, pose, "nope"]), "yarn and nope both fill the rope slot; keep one of them")
    one_line(lambda: load_methods([pose, "cream"]), "pose and cream both fill the positions slot")
    assert [m.name for m in load_methods([yarn, pose])] == ["yarn", "pose"]


def test_the_ways_to_say_a_method():
    built = method("yarn", factor=8)
    assert load_methods(built) == load_methods({"name": "yarn", "factor": 8}) == load_methods([{"name": "yarn", "factor": "8"}]) == (built,)
    assert load_methods("plain") == load_methods(["plain"]) == (method("plain"),)
    assert load_methods([]) == ()
    assert method("pose", target="128k").target == 131072


def test_values_given_are_not_changed():
    spec = {"name": "yarn", "factor": 8}
    load_method(spec)
    assert spec == {"name": "yarn", "factor": 8}


@pytest.mark.parametrize("name", method_names())
def test_every_method_describes_itself(name):
    """`longctx methods` and the README's table are made of this."""
    facts = describe(method_class(name))
    assert facts["name"] == name
    assert facts["slots"]
    assert len(facts["formula"]) > 20
    assert sys.modules[f"hf_longctx.methods.{name}"].__doc__
    assert set(facts["required"]) <= set(facts["fields"])
    assert facts["paper"] or name == "plain"


def test_the_folder_is_the_registry(tmp_path, monkeypatch):
    """A file is a method; nothing else has to be told."""
    source = "from dataclasses import dataclass\nfrom hf_longctx.method import Method\n@dataclass(frozen=True)\nclass Half(Method):\n    by: int = 2\n    def rope(self, shape): ...\n"
    (tmp_path / "half.py").write_text(source)
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr("hf_longctx.methods.__path__", [*hf_longctx.methods.__path__, str(tmp_path)])
    assert "half" in method_names()
    assert "_helper" not in method_names()
    assert "half" in method_names("rope")
    assert method("half").to_dict() == {"name": "half", "by": 2}
    monkeypatch.delitem(sys.modules, "hf_longctx.methods.half")
    method_class.cache_clear()


# --- Sizes.


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (2048, 2048), ("2048", 2048), ("2k", 2048), ("128k", 131072), ("1m", 1048576), ("1.5k", 1536), ("0.5k", 512), (" 2 k ", 2048), ("2,048", 2048),
        ("2_048", 2048), ("200M", 200_000_000), ("1K", 1000), ("1B", 10**9), ("1,000.5K", 1000500), (2048.0, 2048), (2**63 + 1, 2**63 + 1),
    ],
)  # fmt: skip
def test_sizes(text, tokens):
    assert parse_size(text) == tokens
    assert type(parse_size(text)) is int


@pytest.mark.parametrize("bad", ["", "k", "2q", "2kk", "-2", "0", 0, -1, "1.0001k", 1.5, "1,5k", "12,34", True, None, "1e3", float("nan"), "inf", [2], "٣", "2k 3"])
def test_bad_sizes(bad):
    one_line(lambda: parse_size(bad), repr(bad))


def test_a_size_survives_its_text():
    for tokens in [*range(1, 5000), *(2**i + d for i in range(12, 40) for d in (-1, 0, 1)), 10**30]:
        assert parse_size(format_size(tokens)) == tokens
    assert (format_size(131072), format_size(1000), format_size(1023)) == ("128k", "1000", "1023")


def test_nearest():
    assert nearest("faktor", ["factor", "blend"]) == "; did you mean 'factor'?"
    assert nearest("zzz", ["b", "a"]) == "; there is: a, b"
    assert nearest(7, ["a"]) == "; there is: a"


# --- The package.


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_naming_methods_costs_no_torch():
    """Help, completion and every error about a method must come at once."""
    heavy = "; import sys; print([m for m in ('torch', 'transformers', 'numpy', 'peft', 'datasets') if m in sys.modules])"
    assert python("import hf_longctx; hf_longctx.method_names()" + heavy) == "[]"
    assert python("import hf_longctx; hf_longctx.method('yarn', factor=2); hf_longctx.method_names('rope')" + heavy) == "[]"


def test_public_names_resolve():
    for name in hf_longctx.__all__:
        assert getattr(hf_longctx, name) is not None
    assert dir(hf_longctx) == sorted(hf_longctx.__all__)
    promised = {"patch", "finetune", "merge", "evaluate", "load", "inspect_model", "method", "method_names"}  # design, section 4
    assert promised <= set(hf_longctx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        hf_longctx.pach  # noqa: B018


def test_public_names_are_functions_whatever_was_imported_first():
    """`method` is a module as well: the name must not change its meaning once something imports that."""
    for first in ("import hf_longctx.method", "from hf_longctx.method import Method", "import hf_longctx.methods.yarn"):
        python(f"{first}; from hf_longctx import method; assert callable(method)")
    assert callable(hf_longctx.patch)  # imports all of it
    assert hf_longctx.method is method
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules & set(hf_longctx.__all__) == {"method"}


LAYERS = {
    "schema": set(),
    "files": set(),
    "method": {"schema", "methods"},
    "on_import": set(),
    "modules": set(),
    "methods": {"method", "modules", "schema"},
    "kernels": set(),
    "integration": {"kernels", "method", "modules", "schema"},
    "patching": {"integration", "method", "schema", "__version__"},
    "calibration": {"data", "scoring", "task", "patching", "integration", "recipe", "method", "schema"},
    "checkpoint": {"calibration", "patching", "integration", "recipe", "method", "schema", "files", "__version__"},
    "lora": {"integration", "recipe"},
    "loss": {"lora"},
    "scoring": {"integration", "lora", "task"},
    "decoding": {"integration", "lora", "scoring", "task"},
    "processes": {"task"},
    "lanes": {"data", "method"},
    "passing": {"integration", "lora", "method"},
    "planning": {"lanes", "checkpoint", "probe", "lora", "data", "patching", "integration", "recipe", "task", "method", "schema", "files"},
    "callbacks": {"planning"},
    "provenance": {"__version__"},
    "card": {"provenance", "checkpoint", "evaluation", "recipe", "reporting", "method", "schema", "files", "__version__"},
    "hub": {"card", "checkpoint", "reporting", "recipe", "files", "__version__"},
}


def ours(path: Path) -> set[str]:
    """Names that a file imports from the package: modules, or what its __init__ defines; those for type checkers count too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and node.module.split(".")[0] == "hf_longctx":
            found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hf_longctx.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    """... checkpoint -> patching -> integration -> method, modules, kernels; methods/* -> method, modules."""
    for path in [PACKAGE / f"{layer}.py"] if (PACKAGE / f"{layer}.py").exists() else (PACKAGE / layer).glob("*.py"):
        assert ours(path) - {layer} <= LAYERS[layer], path.name


def test_the_import_rule_catches_a_step_up(tmp_path):
    path = tmp_path / "linear.py"
    path.write_text("from hf_longctx.method import Method\ndef f():\n    from hf_longctx import checkpoint\n")
    assert not ours(path) <= LAYERS["methods"]


def test_only_integration_knows_extension_points():
    """What Transformers may move between versions is named in one folder. (checkpoint and patching use its loading API.)"""
    for path in PACKAGE.rglob("*.py"):
        if "integration" not in path.parts:
            text = path.read_text()
            for word in ("rotary_emb", "inv_freq =", "ROPE_INIT_FUNCTIONS", "ALL_ATTENTION_FUNCTIONS", "masking_utils", "modeling_rope_utils"):
                assert word not in text, f"{word} in {path.name}"
