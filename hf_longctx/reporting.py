"""Tables and pictures of results."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_longctx.schema import format_size

_COLOURS = ("#3b6fb6", "#c4572e", "#4f9b58", "#8a5fb0", "#b3892b", "#5b8c94")


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A header and a line for each (model, task, metric), a column a length; depths are left to the pictures."""
    overall = [row for row in rows if row["depth"] is None]
    lengths = sorted({row["length"] for row in overall})
    lines = [["model", "task", "metric", *map(format_size, lengths)]]
    for key in dict.fromkeys((row["model"], row["task"], row["metric"]) for row in overall):
        found = {row["length"]: row for row in overall if (row["model"], row["task"], row["metric"]) == key}
        lines.append([*key, *(_cell(found.get(length)) for length in lengths)])
    return lines


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["value"] is None or math.isnan(row["value"]):
        return "failed"
    if row["metric"].startswith("change"):
        return f"{100 * row['value']:+.1f} % [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]"
    digits = 2 if row["metric"] in ("accuracy", "perplexity") else 3
    return f"{row['value']:.{digits}f} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def plot_results(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One PNG a task: length against depth where a task has depths, otherwise a curve over length."""
    made = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task and row["metric"] in ("accuracy", "perplexity")]
        if not mine:
            continue
        path = folder / f"{task.partition(':')[0]}.png"
        draw = _heat_map if any(row["depth"] is not None for row in mine) else _curves
        draw(task, mine, path)
        made.append(path)
    return made


def _heat_map(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import numpy as np

    plt = _pyplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows if row["depth"] is not None})
    figure, axes = plt.subplots(1, len(models), figsize=(1.6 + 3.4 * len(models), 3.6), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in rows:
            if row["model"] == model and row["depth"] is not None:
                grid[depths.index(row["depth"]), lengths.index(row["length"])] = row["value"]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="upper")
        axis.set_xticks(range(len(lengths)), [format_size(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
        axis.set_xlabel("length (tokens)")
        axis.set_title(_short(model), fontsize=9)
    axes[0][0].set_ylabel("depth")
    figure.colorbar(image, ax=axes[0].tolist(), label="accuracy", fraction=0.05)
    figure.suptitle(task, fontsize=10)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _curves(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for colour, model in zip(_COLOURS * 9, dict.fromkeys(row["model"] for row in rows), strict=False):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["length"])
        lengths, values = [row["length"] for row in mine], [row["value"] for row in mine]
        axis.plot(lengths, values, marker="o", color=colour, label=_short(model))
        axis.fill_between(lengths, [row["ci_low"] for row in mine], [row["ci_high"] for row in mine], color=colour, alpha=0.15, linewidth=0)
    ticks = sorted({row["length"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [format_size(n) for n in ticks])
    axis.set_yscale("log")
    axis.set_xlabel("length (tokens)")
    axis.set_ylabel(rows[0]["metric"])
    axis.set_title(task, fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


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


def _short(model: str) -> str:
    """The last part of a path, whole hub ids."""
    return model if model.count("/") < 2 else "…/" + model.rpartition("/")[2]
