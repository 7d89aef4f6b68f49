"""Pictures of methods: the numbers in them against closed forms, what the command prints and what it refuses."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hf_longctx.cli.main import main
from hf_longctx.data import coverage
from hf_longctx.method import load_method, method, method_class, method_names
from hf_longctx.method_plot import HIDDEN, WINDOW, common_shape, plot_method, receptive_field, receptive_fields

NEEDED = {
    "dynamic_ntk": {"factor": 4}, "linear": {"factor": 4}, "llama3": {"factor": 4}, "ntk": {"factor": 4}, "yarn": {"factor": 4},
    "longrope": {"factor": 4, "long_factor": [4.0] * 64, "short_factor": [1.0] * 64}, "theta": {"theta": 1e6, "target": "16k"},
    "noise": {"sigma": 1}, "mamba_extend": {"scales": 0.5}, "delta_filter": {"trained": "2k", "target": "16k"},
}  # fmt: skip
DRAWN = {"bias", "attention", "embedding", "rope", "positions"}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn("alibi", heads=4)`: the numbers of a picture, which is not rendered."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: None)

    def draw(name, length=2048, heads=4, **fields):
        return plot_method(method(name, **NEEDED.get(name, {}), **fields), tmp_path / "picture.png", heads=heads, length=length)

    return draw


@pytest.fixture
def longctx(tmp_path, monkeypatch, capsys):
    """`longctx("methods", ...)` in this process, from a folder of its own: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["longctx", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run


# The receptive field


def geometric(slope: float, length: int) -> int:
    """The smallest D with 1 - e^(-m(D+1)) >= 0.99 (1 - e^(-m N)), solved for D."""
    whole = -math.expm1(-slope * length)
    return math.ceil(-math.log1p(-0.99 * whole) / slope) - 1


@pytest.mark.parametrize("slope", [3.0, 0.7, 0.25, 2**-5, 2**-8, 1e-3, 1e-4])
@pytest.mark.parametrize("length", [100, 4096])
def test_the_receptive_field_of_a_geometric_kernel(slope, length):
    assert receptive_field(-slope * np.arange(length)) == geometric(slope, length)
    assert receptive_field(7 - slope * np.arange(length)) == geometric(slope, length)  # softmax takes a constant away


def test_the_receptive_field_counts_distance_zero_and_knows_no_overflow():
    assert receptive_field(np.zeros(100)) == 98  # 99 of 100 distances
    assert receptive_field(np.array([0.0, -1000.0, -2000.0])) == 0
    assert receptive_field(np.array([0.0, 5000.0])) == 1


def test_alibi_by_head(drawn):
    slopes = [2 ** (-8 * h / 32) for h in range(1, 33)]
    found = drawn("alibi", length=16384, heads=32)
    assert found["receptive_field"] == [geometric(m, 16384) for m in slopes]
    assert found["converges"]
    assert (found["slot"], found["length"], found["shape"]["heads"]) == ("bias", 16384, 32)


def test_mass_past_the_range_is_said_to_be_beyond(drawn):
    slopes = (1.0, 2**-8, 1e-4, 0.0)  # the last two reach past 4,096 tokens
    found = drawn("alibi", length=4096, slopes=slopes)
    assert found["receptive_field"] == [4, geometric(2**-8, 4096), None, None]
    assert not found["converges"]
    assert drawn("t5")["receptive_field"] == [None] * 4
    # The bias of sandwich is bounded, but the far field of its steepest head is e^-100: in practice the mass is near.
    assert drawn("sandwich")["receptive_field"][0] is not None


def test_a_bias_that_knows_the_query_is_drawn_at_the_last_one():
    module = method("fire").bias(common_shape(2))
    curves, _ = receptive_fields(module, 2, 700)
    for d in (0, 1, 50, 699):
        with torch.no_grad():
            assert curves[1][d] == pytest.approx(float(module(torch.tensor(1), torch.tensor(699), torch.tensor(699 - d))), rel=1e-6)


# The other slots


def test_the_factor_on_logits(drawn):
    assert drawn("log_n", length=131072)["factor"]["131072"] == pytest.approx([17 / 12])
    assert drawn("log_n")["factor"]["1024"] == [1.0]
    assert drawn("ssmax")["factor"]["64"] == pytest.approx([6 / 12])
    # Random normal keys are about sqrt(head_dim) long, so that their sum leaves 1/n.
    assert drawn("key_norm")["factor"]["2048"] == pytest.approx([1 / 2048], rel=0.01)
    assert drawn("key_norm", by="mean")["factor"]["2048"] == pytest.approx([1], rel=0.01)


def test_the_similarity_of_sinusoidal_positions(drawn):
    found = drawn("sinusoidal")
    rates = 10000.0 ** (-2 * np.arange(HIDDEN // 2) / HIDDEN)
    for d in (0, 1, 8, 1024):
        assert found["similarity"][str(d)] == pytest.approx(np.cos(d * rates).sum() / HIDDEN, abs=1e-5)


def test_the_frequencies_of_each_regime(drawn):
    assert drawn("linear")["relative_frequency"] == {str(4 * WINDOW): pytest.approx([0.25] * 64)}
    assert drawn("longrope")["relative_frequency"] == {str(WINDOW): pytest.approx([1.0] * 64), str(4 * WINDOW): pytest.approx([0.25] * 64)}
    found = drawn("yarn")
    assert found["attention_factor"] == {str(4 * WINDOW): pytest.approx(0.1 * math.log(4) + 1)}
    assert found["relative_frequency"][str(4 * WINDOW)][:1] == [1.0]
    assert found["relative_frequency"][str(4 * WINDOW)][-1] == pytest.approx(0.25)


def test_coverage_is_that_of_a_dry_run(drawn):
    found = drawn("pose", length=8192)
    expected = coverage(method("pose", target=8192), WINDOW, 8192)
    assert found["bins"] == expected["bins"]
    assert drawn("pose", target="16k")["length"] == 16384


# Pictures


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_picture(name, tmp_path):
    chosen = load_method({"name": name, **NEEDED.get(name, {})})
    path = tmp_path / "picture.PNG"
    if not DRAWN & set(chosen.slots):
        with pytest.raises(ValueError, match="there are no pictures of the slot"):
            plot_method(chosen, path)
        return
    found = plot_method(chosen, path, heads=4, length=5000)
    assert json.loads(json.dumps(found)) == found
    assert path.read_bytes().startswith(b"\x89PNG")
    with Image.open(path) as picture:
        assert 700 <= picture.width <= 1700
        assert 400 <= picture.height <= 800
        assert len(picture.convert("RGB").getcolors(2**20)) > 50  # not blank


def test_drawing_leaves_pyplot_alone(drawn):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    drawn("alibi")
    assert plt.get_fignums() == before


def test_one_head_and_other_shapes(tmp_path):
    for name, shape in (("alibi", {"heads": 1, "length": 2048}), ("kerple", {"heads": 7, "length": 2})):
        assert len(plot_method(method(name), tmp_path / "picture.png", **shape)["receptive_field"]) == shape["heads"]


# The command


def test_the_command_draws_and_tells(longctx, tmp_path):
    status, printed, errors = longctx("methods", "alibi:multiplier=0.5", "--plot", "alibi.png")
    assert (status, errors) == (0, "")
    rows = [line.split() for line in printed.splitlines()]
    assert ["1", str(geometric(0.5 * 2**-0.25, 131072))] in rows
    assert ["32", f"{geometric(0.5 * 2**-8, 131072):,}"] in rows
    assert printed.endswith("alibi.png\n")
    assert (tmp_path / "alibi.png").stat().st_size > 10_000


def test_heads_that_are_alike_share_a_line(longctx):
    slopes = [0.5] * 16 + [0.25] + [0.5] * 15
    _, printed, _ = longctx("methods", f"alibi:slopes={slopes}", "--plot", "alibi.png")
    near, far = (str(geometric(slope, 131072)) for slope in (0.5, 0.25))
    assert [line.split() for line in printed.splitlines()[3:-1]] == [["1-16", near], ["17", far], ["18-32", near]]


def test_the_command_prints_numbers_as_json(longctx):
    status, printed, _ = longctx("methods", "t5", "--plot", "t5.png", "--json")
    found = json.loads(printed)
    assert (status, found["receptive_field"], found["picture"]) == (0, [None] * 32, "t5.png")
    assert found["method"] == method_class("t5")().to_dict()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plot x.png", "give NAME[:key=value,...]"),
        ("alibbi --plot x.png", "unknown method 'alibbi'; did you mean 'alibi'?"),
        ("alibi:multiplyer=2 --plot x.png", "unknown key 'multiplyer'; did you mean 'multiplier'?"),
        ("yarn --plot x.png", "yarn: factor is required"),
        ("alibi --plot x.pdf", "x.pdf: pictures are PNG; give a name that ends in .png"),
        ("alibi --plot none/x.png", "none/x.png cannot be written: there is no folder none"),
        ("sinusoidal --plot folder.png", "folder.png cannot be written: Is a directory"),
        ("alibi:slopes=[1] --plot x.png", "1 slopes for a model of 32 heads"),
        ("pose:target=2k --plot x.png", "target 2048 is below the window of the picture, 4096"),
        ("alibi:multiplier=2", "values are for --plot FILE.png"),
    ],
)
def test_wrong_input_is_one_line(longctx, tmp_path, words, message):
    (tmp_path / "folder.png").mkdir()
    status, printed, errors = longctx("methods", *words.split())
    assert (status, printed) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
