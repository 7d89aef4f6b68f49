"""Tables and pictures of results."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_longctx.files import read_json
from hf_longctx.schema import format_size

SCORES = ("accuracy", "acc", "acc_norm", "exact_match", "f1")  # from 0 to 1, more is better; all but the first are the harness's
SHARES = (*SCORES, "effective_remembrance")  # metrics from 0 to 1, whose changes are points
KEPT, REFERENCE = 0.85, 2048  # of the effective length: the share that Modarressi et al. (2025, NoLiMa) ask for
_COLOURS = ("#3b6fb6", "#c4572e", "#4f9b58", "#8a5fb0", "#b3892b", "#5b8c94")


def is_share(metric: str) -> bool:
    """Whether its changes are points; the harness's names may end in a filter of answers, as exact_match/strict-match."""
    return metric.partition("/")[0] in SHARES


def check_results(folders: Sequence[str | Path]) -> list[Path]:
    """The folders as paths. Raises ValueError for one without results.json."""
    for folder in map(Path, folders):
        if not (folder / "results.json").is_file():
            raise ValueError(f"{folder} holds no finished evaluation: there is no results.json in it; `longctx eval ... --out {folder}` writes it")
    return [Path(folder) for folder in folders]


class EffectiveLength(NamedTuple):
    """How far a score holds.

    Attributes:
        length: the longest length, in tokens, whose score keeps its share, as do those of all measured lengths between; None
            if the score at `reference` is 0, of which there is no share.
        reference: the length that it is a share of: the one asked for, or the shortest that was measured.
        longest: no longer one was measured; the score may hold further.
    """

    length: int | None
    reference: int
    longest: bool


def effective_lengths(rows: Sequence[Mapping[str, Any]], kept: float = KEPT, reference: int = REFERENCE) -> dict[tuple[str, str, str], EffectiveLength]:
    """For each (model, task, metric) with a score at two lengths or more; the definition is that of NoLiMa (arXiv:2502.05167).

    Scores are those from 0 to 1 of which more is better; perplexity has no effective length. A length that failed does not hold.

    Args:
        kept: the share of the score at `reference` that has to be kept, 0 to 1.
        reference: tokens.

    Raises:
        ValueError: `kept` is not above 0 and at most 1.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"the share of the score that is kept must be above 0 and at most 1, got {kept}")
    overall = [row for row in rows if row["depth"] is None and row["length"] is not None]
    found = {}
    for key in dict.fromkeys((row["model"], row["task"], row["metric"]) for row in overall if row["metric"] in SCORES):
        mine = [row for row in overall if (row["model"], row["task"]) == key[:2] and row["metric"] in (key[2], "failed")]
        scores = {row["length"]: row["value"] for row in mine}
        if sum(value is not None for value in scores.values()) > 1:
            found[key] = _effective_length(scores, kept, reference)
    return found


def _effective_length(scores: Mapping[int, float | None], kept: float, reference: int) -> EffectiveLength:
    start = reference if scores.get(reference) is not None else min(length for length, value in scores.items() if value is not None)
    first = scores[start]
    if not first:
        return EffectiveLength(None, start, False)
    lengths = sorted(length for length in scores if length >= start)
    holds = [(value := scores[length]) is not None and value >= kept * first - 1e-12 for length in lengths]
    count = (*holds, False).index(False)
    return EffectiveLength(lengths[count - 1], start, all(holds))


def effective_text(found: EffectiveLength | None, reference: int = REFERENCE) -> str:
    """`8k`; `≥ 32k` where no longer length was measured; with the length that it is a share of, if not the one asked for."""
    if found is None:
        return ""
    size = "–" if found.length is None else f"{'≥ ' * found.longest}{format_size(found.length)}"
    return size + (f" (of {format_size(found.reference)})" if found.reference != reference else "")


def effective_head(kept: float = KEPT, reference: int = REFERENCE) -> str:
    """Of its column: what it is the longest length of."""
    return f"effective length ({100 * kept:.4g} % of {format_size(reference)})"


def name_of_length(length: int | None) -> str:
    """Of its column: some results are of a task as it is, at no length."""
    return "no length" if length is None else format_size(length)


def sorted_lengths(rows: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Those of the rows; what has none comes first."""
    return sorted({row["length"] for row in rows}, key=lambda length: length or 0)


def table(rows: Sequence[Mapping[str, Any]], kept: float = KEPT, reference: int = REFERENCE) -> list[list[str]]:
    """A header and a line for each (model, task, metric), a column a length, and one of effective lengths where there are some;
    depths are left to the pictures. Raises ValueError as `effective_lengths`."""
    overall = [row for row in rows if row["depth"] is None]
    lengths, effective = sorted_lengths(overall), effective_lengths(overall, kept, reference)
    lines = [["model", "task", "metric", *map(name_of_length, lengths), *([effective_head(kept, reference)] if effective else [])]]
    shares = {row["task"] for row in rows if is_share(row["metric"])}
    for key in dict.fromkeys((row["model"], row["task"], row["metric"]) for row in overall):
        found = {row["length"]: row for row in overall if (row["model"], row["task"], row["metric"]) == key}
        holds = [effective_text(effective.get(key), reference)] if effective else []
        lines.append([*key, *(cell_text(found.get(length), key[1] in shares) for length in lengths), *holds])
    return lines


def cell_text(row: Mapping[str, Any] | None, share: bool) -> str:
    """`value [low, high]`, without the interval where there is none; changes in percent, those of shares in points."""
    if row is None:
        return ""
    if row["value"] is None:
        return "failed"
    change = row["metric"].startswith("change")
    scale, unit = (100, " points" if share else " %") if change else (1, "")
    size = abs(row["value"])
    digits = "+.1f" if change else ".2g" if 0 < size < 0.01 else ".2f" if size < 1000 else ".0f"
    value, *interval = (None if row[k] is None else f"{scale * row[k]:{digits}}" for k in ("value", "ci_low", "ci_high"))
    return f"{value}{unit}" + (f" [{', '.join(map(str, interval))}]" if None not in interval else "")


def plot_results(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One PNG a task: length against depth where a task has accuracies by depth, a curve over positions where it has something
    else by position, otherwise a curve over length. The trained windows that `run.json` in the folder names are marked in curves
    over position."""
    made = []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    families = [task.partition(":")[0] for task in tasks]
    for task, family in zip(tasks, families, strict=True):
        path = folder / (re.sub("[^A-Za-z0-9._=-]+", "-", family if families.count(family) == 1 else task) + ".png")
        if _draw(task, [row for row in rows if row["task"] == task], path):
            made.append(path)
    return made


def _draw(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """False if there is nothing to draw."""
    by_depth = {row["metric"] for row in rows if row["depth"] is not None}
    for metric, draw in (("nll", _losses), ("state_norm", _state_norms), ("effective_remembrance", _remembrance), ("accuracy", _heat_map)):
        if metric in by_depth:
            draw(task, rows, path)
            return True
    overall = [row for row in rows if row["metric"] in ("accuracy", "perplexity") and row["length"] is not None]
    if overall:
        _curves(task, overall, path)
    return bool(overall)


def _heat_map(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    plt = _pyplot()
    rows = [row for row in rows if row["metric"] == "accuracy"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows if row["depth"] is not None})
    wide = max(2.2, 0.55 * len(lengths)) + 0.8
    figure, axes = plt.subplots(1, len(models), figsize=(1.2 + wide * len(models), 1.4 + 0.26 * len(depths)), squeeze=False, sharey=True, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        image = _panel(axis, [row for row in rows if row["model"] == model and row["depth"] is not None], lengths, depths)
        axis.set_title(_wrapped(model, wide), fontsize=9)
    axes[0][0].set_ylabel("depth")
    figure.colorbar(image, ax=axes[0].tolist(), label="accuracy (%)", format=lambda share, _: f"{100 * share:.0f}")
    figure.suptitle(task, fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _panel(axis: Any, rows: Sequence[Mapping[str, Any]], lengths: list[int], depths: list[float]) -> Any:
    """One model's accuracies, with the number in each cell; a cell that failed stays white."""
    import numpy as np

    grid = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        y, x = depths.index(row["depth"]), lengths.index(row["length"])
        grid[y, x] = row["value"]
        axis.text(x, y, f"{100 * row['value']:.0f}", ha="center", va="center", fontsize=7, color="black")
    axis.set_xticks(range(len(lengths)), [format_size(n) for n in lengths], rotation=0 if len(lengths) < 8 else 90)
    axis.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
    axis.set_xlabel("length (tokens)")
    return axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.85, aspect="auto", origin="upper")


def _curves(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    plt = _pyplot()
    from matplotlib.ticker import LogLocator

    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for colour, model in zip(_COLOURS * 9, dict.fromkeys(row["model"] for row in rows), strict=False):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["length"])
        lengths, values = [row["length"] for row in mine], [row["value"] for row in mine]
        axis.plot(lengths, values, marker="o", color=colour, label=_wrapped(model, 5))
        axis.fill_between(lengths, *_interval(mine), color=colour, alpha=0.15, linewidth=0)
    ticks = sorted({row["length"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [format_size(n) for n in ticks])
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.set_xlabel("length (tokens)")
    axis.set_ylabel(rows[0]["metric"])
    axis.set_title(task, fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _losses(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against the number of tokens before, and below it the paired change against a baseline where there is one."""
    plt = _pyplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    changes = [row for row in rows if row["metric"] == "change_from_baseline" and row["depth"] is not None]
    figure, axes = plt.subplots(1 + bool(changes), 1, figsize=(5.6, 6.0 if changes else 3.6), sharex=True, squeeze=False, layout="constrained")
    for axis, mine, label, scale in zip(
        axes[:, 0], ([row for row in rows if row["metric"] == "nll"], changes), ("-log p (nats a token)", "change of perplexity (%)"), (1, 100), strict=False
    ):
        _lines(axis, mine, models, scale)
        for window in sorted(set(_trained_windows(path.parent).values())):
            _mark(axis, window, f"trained window {format_size(window)}")
        axis.set_ylabel(label)
    if changes:
        axes[1, 0].axhline(0, color="black", linewidth=0.8)
    _over_tokens(axes[-1, 0], "position (tokens before)")
    axes[0, 0].set_title(task, fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _remembrance(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    mine = [row for row in rows if row["metric"] == "effective_remembrance" and row["depth"] is not None]
    _lines(axis, mine, list(dict.fromkeys(row["model"] for row in rows)))
    _over_tokens(axis, "tokens left out at the start (t)")
    axis.set_ylim(-0.02, 1.02)
    axis.set_ylabel("EffRem(t): total variation")
    axis.set_title(task, fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _state_norms(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a model: norm of the state against the tokens read, of each layer and of all, at the longest length."""
    plt = _pyplot()
    models = list(dict.fromkeys(row["model"] for row in rows if row["metric"] == "state_norm"))
    figure, axes = plt.subplots(1, len(models), figsize=(0.8 + 4.6 * len(models), 3.8), squeeze=False, sharey=True, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model and row["metric"].startswith("state_")]
        longest = max(row["length"] for row in mine)
        _norms_of(axis, [row for row in mine if row["length"] == longest])
        if window := _trained_windows(path.parent).get(model):
            _mark(axis, window, f"trained window {format_size(window)}")
        _over_tokens(axis, "tokens read")
        axis.set_yscale("log")
        axis.set_title(_wrapped(model, 4), fontsize=9)
    axes[0][0].set_ylabel("norm of the SSM state")
    figure.suptitle(task, fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _norms_of(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One model's at one length: first layers dark, last ones light, all together in black."""
    import matplotlib

    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["depth"] is not None:
            curves.setdefault(row["metric"], []).append(row)
    layers = sorted((name for name in curves if name != "state_norm"), key=lambda name: int(name.rpartition("_")[2]))
    shades = matplotlib.colormaps["viridis"].resampled(max(len(layers), 2))
    for number, name in enumerate([*layers, "state_norm"]):
        mine, together = sorted(curves[name], key=lambda row: row["depth"]), name == "state_norm"
        places = [row["depth"] * row["length"] for row in mine]
        shown = "all layers" if together else f"layer {number}" if number in (0, len(layers) - 1) else None
        colour = "black" if together else shades(number)
        axis.plot(places, [row["value"] for row in mine], color=colour, linewidth=1.8 if together else 0.9, label=shown)
        if together:
            axis.fill_between(places, *_interval(mine), color=colour, alpha=0.15, linewidth=0)
    for row in rows:
        if row["metric"] == "state_left_at":
            _mark(axis, row["value"], f"a layer leaves at {format_size(round(row['value']))}", 0.92)


def _lines(axis: Any, rows: Sequence[Mapping[str, Any]], models: Sequence[str], scale: float = 1) -> None:
    """Values over positions: a colour a model, a dash a length."""
    lengths = sorted({row["length"] for row in rows})
    for model, length in dict.fromkeys((row["model"], row["length"]) for row in rows):
        mine = sorted((row for row in rows if (row["model"], row["length"]) == (model, length)), key=lambda row: row["depth"])
        colour, dash = _COLOURS[models.index(model) % len(_COLOURS)], ("-", "--", ":", "-.")[lengths.index(length) % 4]
        places = [row["depth"] * length for row in mine]
        label = _wrapped(model, 5) + (f" ({format_size(length)})" if len(lengths) > 1 else "")
        marker = "." if len(mine) < 64 else None
        axis.plot(places, [scale * row["value"] for row in mine], linestyle=dash, marker=marker, color=colour, label=label)
        axis.fill_between(places, *_interval(mine, scale), color=colour, alpha=0.15, linewidth=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def _interval(rows: Sequence[Mapping[str, Any]], scale: float = 1) -> Any:
    """Its lower and upper ends, NaN where there is none."""
    return ([float("nan") if row[key] is None else scale * row[key] for row in rows] for key in ("ci_low", "ci_high"))


def _over_tokens(axis: Any, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: format_size(round(value)))
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def _mark(axis: Any, place: float, text: str, height: float = 0.99) -> None:
    axis.axvline(place, color="#888888", linestyle="--", linewidth=1)
    axis.text(place, height, f" {text}", transform=axis.get_xaxis_transform(), va="top", fontsize=8, color="#666666")


def _trained_windows(folder: Path) -> dict[str, int]:
    """Of the models of the evaluation in this folder, as far as it says."""
    path = folder / "run.json"
    found = read_json(path).get("trained_windows") if path.is_file() else None
    return {model: window for model, window in (found or {}).items() if window}


def plot_coverage(found: Mapping[str, Any], window: int, path: Path, title: str) -> None:
    """The share of training examples that contain each relative distance, as a PNG."""
    import numpy as np

    plt = _pyplot()
    probability = np.asarray(found["probability"])
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    parts = np.array_split(np.arange(len(probability)), min(256, len(probability)))
    axis.plot([part.mean() for part in parts], [probability[part].mean() for part in parts], color=_COLOURS[0])
    axis.axvline(window, color="#888888", linestyle="--", linewidth=1)
    axis.text(window, axis.get_ylim()[1], " training window", va="top", fontsize=8, color="#666666")
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.set_ylim(0, 1.3)
    axis.set_xlabel("relative distance (positions)")
    axis.set_ylabel("share of examples with it")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _wrapped(model: str, inches: float) -> str:
    """A label that fits: of a long path its last two parts, the methods beside it on lines of their own."""
    name, *methods = model.split(" + ")
    short = name if name.count("/") < 2 else "…/" + "/".join(name.split("/")[-2:])
    return "\n".join(line for part in [short, *(f"+ {m}" for m in methods)] for line in textwrap.wrap(part, round(14 * inches)))
