"""Tables and pictures: what they say, not how they look."""

import numpy as np
import pytest
from PIL import Image

from hf_longctx import reporting
from hf_longctx.reporting import plot_coverage, plot_results, table


def row(metric="accuracy", value=0.5, low=0.25, high=0.75, model="m", task="passkey", length=2048, depth=None):
    return {"model": model, "task": task, "length": length, "depth": depth, "metric": metric, "value": value, "ci_low": low, "ci_high": high}


@pytest.mark.floor
def test_a_line_for_each_metric_and_a_column_for_each_length():
    rows = [row(), row(length=8192, value=1.0, low=0.72, high=1.0), row(depth=0.5, value=0.1), row(model="n", length=8192)]
    assert table(rows) == [
        ["model", "task", "metric", "2k", "8k"],
        ["m", "passkey", "accuracy", "0.50 [0.25, 0.75]", "1.00 [0.72, 1.00]"],
        ["n", "passkey", "accuracy", "", "0.50 [0.25, 0.75]"],
    ]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (row("perplexity", 12.345, 11, 13.5, task="perplexity"), "12.35 [11.00, 13.50]"),
        (row("perplexity", 12.345, None, None, task="perplexity"), "12.35"),
        (row("failed", None, None, None), "failed"),
        (row("change_from_2048", -0.0314, -0.05, 0.01, task="tail_perplexity"), "-3.1 % [-5.0, +1.0]"),
        (row("change_from_2048", -0.0314, None, None, task="tail_perplexity"), "-3.1 %"),
    ],
)
def test_a_cell(given, shown):
    assert table([given])[1][3] == shown


def test_changes_of_shares_are_points_not_percent():
    lines = table([row(), row("change_from_baseline", 0.125, 0.0, 0.25)])
    assert lines[2][3] == "+12.5 points [+0.0, +25.0]"


def test_nothing_to_show_is_a_header():
    assert table([]) == [["model", "task", "metric"]]


# --- pictures


def is_picture(path) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return path.read_bytes()[:4] == b"\x89PNG" and min(pixels.shape) > 200 and pixels.std() > 5


def test_a_heat_map_shows_every_depth_and_length(tmp_path, figures):
    rows = [row(value=v, depth=d, length=n) for n, v in ((2048, 1.0), (8192, 0.25)) for d in (0.0, 1.0)] + [row(), row(length=8192)]
    rows += [row(value=0.75, depth=0.0, model="other"), row("failed", None, None, None, model="other", length=8192)]
    (path,) = plot_results(rows, tmp_path)
    assert path == tmp_path / "passkey.png"
    assert is_picture(path)
    left, right, *_ = figures[0].axes
    assert [t.get_text() for t in left.get_xticklabels()] == [t.get_text() for t in right.get_xticklabels()] == ["2k", "8k"]
    assert [t.get_text() for t in left.texts] == ["100", "100", "25", "25"]
    assert np.array_equal(left.images[0].get_array(), [[1, 0.25], [1, 0.25]])
    assert np.ma.filled(right.images[0].get_array(), -1).tolist() == [[0.75, -1], [-1, -1]]  # what failed stays white
    assert [left.get_title(), right.get_title()] == ["m", "other"]


def test_a_curve_shows_every_length_and_only_intervals_that_exist(tmp_path, figures):
    rows = [row("perplexity", v, low, high, task="perplexity", length=n) for n, v, low, high in ((8192, 11, None, None), (2048, 12, 10, 14))]
    rows += [row("change_from_baseline", -0.1, task="perplexity"), row("failed", None, None, None, task="perplexity", length=32768)]
    (path,) = plot_results(rows, tmp_path)
    assert is_picture(path)
    (axis,) = figures[0].axes
    assert axis.lines[0].get_xydata().tolist() == [[2048, 12], [8192, 11]]
    assert axis.get_ylabel() == "perplexity"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["2k", "8k"]


def test_variants_of_a_task_get_a_picture_each(tmp_path):
    rows = [row(task=task, depth=0.0) for task in ("passkey", "passkey:n=5,depths=3")] + [row("perplexity", 3, task="perplexity:stride=256")]
    made = plot_results(rows, tmp_path)
    assert [path.name for path in made] == ["passkey.png", "passkey-n=5-depths=3.png", "perplexity.png"]
    assert all(map(is_picture, made))


def test_a_task_that_failed_everywhere_has_no_picture(tmp_path):
    assert plot_results([row("failed", None, None, None)], tmp_path) == []


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("org/model", "org/model"),
        ("/a/b/c/model", "…/c/model"),
        ("/a/b/c/model + yarn:factor=4", "…/c/model\n+ yarn:factor=4"),
        ("a-very-long-name-" * 3, "a-very-long-\nname-a-very-\nlong-name-a-\nvery-long-name-"),
    ],
)
def test_labels_fit(model, shown):
    assert reporting._wrapped(model, 1.1) == shown


@pytest.mark.floor
def test_coverage_is_drawn(tmp_path):
    path = tmp_path / "coverage.png"
    plot_coverage({"probability": np.linspace(1, 0, 512)}, 64, path, "pose, 64 -> 512")
    assert is_picture(path)
