"""Tables and pictures: what they say, not how they look."""

import numpy as np
import pytest
from PIL import Image

from hf_longctx import reporting
from hf_longctx.reporting import EffectiveLength, effective_lengths, effective_text, plot_coverage, plot_results, table


def row(metric="accuracy", value=0.5, low=0.25, high=0.75, model="m", task="passkey", length=2048, depth=None):
    return {"model": model, "task": task, "length": length, "depth": depth, "metric": metric, "value": value, "ci_low": low, "ci_high": high}


def test_a_line_for_each_metric_and_a_column_for_each_length():
    rows = [row(), row(length=8192, value=1.0, low=0.72, high=1.0), row(depth=0.5, value=0.1), row(model="n", length=8192)]
    assert table(rows) == [
        ["model", "task", "metric", "2k", "8k", "effective length (85 % of 2k)"],
        ["m", "passkey", "accuracy", "0.50 [0.25, 0.75]", "1.00 [0.72, 1.00]", "≥ 8k"],
        ["n", "passkey", "accuracy", "", "0.50 [0.25, 0.75]", ""],
    ]
    assert table(rows[2:])[0] == ["model", "task", "metric", "8k"]  # no model has two lengths


def test_what_has_no_length_has_a_column_of_its_own():
    rows = [row(length=8192), row("acc", task="lm_eval/x", length=None), row(length=2048)]
    assert table(rows)[0] == ["model", "task", "metric", "no length", "2k", "8k", "effective length (85 % of 2k)"]
    assert table(rows)[2] == ["m", "lm_eval/x", "acc", "0.50 [0.25, 0.75]", "", "", ""]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (row("perplexity", 12.345, 11, 13.5, task="perplexity"), "12.35 [11.00, 13.50]"),
        (row("perplexity", 12.345, None, None, task="perplexity"), "12.35"),
        (row("key_share", 0.00451, 0.002, 0.0123, task="longppl"), "0.0045 [0.002, 0.012]"),
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


# --- effective length


def scores(**values):
    """`scores(L2048=0.5)` -> rows; None is a length that failed."""
    made = {int(name[1:]): value for name, value in values.items()}
    return [row("failed" if value is None else "accuracy", value, length=length) for length, value in made.items()]


def effective(rows, **options):
    return effective_lengths(rows, **options)["m", "passkey", "accuracy"]


@pytest.mark.parametrize(
    ("rows", "wanted", "shown"),
    [
        (scores(L2048=0.8, L4096=0.68, L8192=0.67), EffectiveLength(4096, 2048, False), "4k"),  # 0.68 is exactly 85 % of 0.8
        (scores(L8192=1.0, L2048=1.0, L4096=0.9), EffectiveLength(8192, 2048, True), "≥ 8k"),
        (scores(L2048=1.0, L4096=0.5, L8192=1.0), EffectiveLength(2048, 2048, False), "2k"),  # 8k holds, but what lies between does not
        (scores(L1024=0.1, L2048=1.0, L4096=1.0), EffectiveLength(4096, 2048, True), "≥ 4k"),  # shorter than the reference: not asked
        (scores(L2048=1.0, L4096=1.0, L8192=None, L16384=1.0), EffectiveLength(4096, 2048, False), "4k"),  # what failed does not hold
        (scores(L4096=0.4, L8192=0.4, L16384=0.1), EffectiveLength(8192, 4096, False), "8k (of 4k)"),  # the reference was not measured,
        (scores(L2048=None, L4096=0.4, L8192=0.1), EffectiveLength(4096, 4096, False), "4k (of 4k)"),  # or failed
        (scores(L2048=0.0, L4096=0.5), EffectiveLength(None, 2048, False), "–"),
    ],
)
def test_the_effective_length_is_the_longest_that_keeps_its_share(rows, wanted, shown):
    assert effective(rows) == wanted
    assert effective_text(effective(rows)) == shown


def test_share_and_reference_are_the_readers_choice():
    rows = scores(L1024=1.0, L2048=0.6, L4096=0.5, L8192=0.3)
    assert [effective(rows, kept=kept).length for kept in (0.9, 0.8, 0.5)] == [2048, 4096, 8192]
    assert effective(rows, reference=1024) == EffectiveLength(1024, 1024, False)
    assert effective_text(effective(rows), 1024) == "2k (of 2k)"
    for kept in (0, 1.01, -1, float("nan")):
        with pytest.raises(ValueError, match=r"^the share of the score that is kept must be above 0 and at most 1, got "):
            effective_lengths(rows, kept=kept)


def test_only_scores_at_two_lengths_have_an_effective_length():
    other = [row("perplexity", v, task="perplexity", length=n) for n, v in ((2048, 9), (4096, 8))] + [row("effective_remembrance", 0.5, task="r", length=n) for n in (2048, 4096)]
    lone = [row(model="n"), row("failed", None, None, None, model="n", length=4096), row(model="n", length=8192, depth=0.5)]
    whole = [row("acc", 0.5, task="lm_eval/x", length=n) for n in (2048, None)]
    assert effective_lengths([*other, *lone, *whole]) == {}
    assert set(effective_lengths([*other, *scores(L2048=1, L4096=1), row(task="vt"), row(task="vt", length=4096)])) == {("m", t, "accuracy") for t in ("passkey", "vt")}


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
    rows = [row(task=task, depth=0.0) for task in ("passkey", "passkey:n=5,depths=3")]
    rows += [row("perplexity", 3, task="perplexity:stride=256"), row(task="lm_eval/ruler_vt")]
    made = plot_results(rows, tmp_path)
    assert [path.name for path in made] == ["passkey.png", "passkey-n=5-depths=3.png", "perplexity.png", "lm_eval-ruler_vt.png"]
    assert all(map(is_picture, made))


def test_what_has_no_length_has_no_curve(tmp_path):
    assert plot_results([row("perplexity", 9, task="lm_eval/x", length=None)], tmp_path) == []


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


def test_coverage_is_drawn(tmp_path):
    path = tmp_path / "coverage.png"
    plot_coverage({"probability": np.linspace(1, 0, 512)}, 64, path, "pose, 64 -> 512")
    assert is_picture(path)
