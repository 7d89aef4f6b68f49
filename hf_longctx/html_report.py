"""One HTML file that shows evaluations side by side; it needs no network, no script and no other file."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from hf_longctx import files
from hf_longctx.reporting import (
    KEPT,
    REFERENCE,
    SCORES,
    cell_text,
    check_results,
    effective_head,
    effective_lengths,
    effective_text,
    is_share,
    name_of_length,
    sorted_lengths,
)
from hf_longctx.schema import format_size, parse_size

Row = Mapping[str, Any]
Columns = Mapping[str, Mapping[tuple[int, str, str, str], str]]  # by name, the texts by run, model, task and metric
_NEEDED = ("model", "task", "length", "depth", "metric", "value", "ci_low", "ci_high")
_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 320, 56, 24, 44, 48  # of a chart, and its margins
_LOW, _MIDDLE, _FULL = (202, 86, 32), (245, 240, 232), (33, 102, 172)  # orange to blue: told apart by the colour-blind too
_MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-4,-4h8v8h-8z", "M0,-5L5,4H-5z", "M0,-6L5,0L0,6L-5,0z", "M0,5L5,-4H-5z", "M-4,-4L4,4M-4,4L4,-4",
)  # fmt: skip
_MANY = 12  # points of a line whose intervals would hide each other as bars
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "14 4")  # five of them and six marks: thirty curves differ without their colours
_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#57606a;--line:#d0d7de;--band:#f3f5f7;--link:#0a58b8;--bad:#a3201a;--c0:#2f62a8;--c1:#b4481f;
--c2:#2f7a3c;--c3:#75489c;--c4:#80600f;--c5:#336b76}@media (prefers-color-scheme:dark){:root{--back:#14171b;--text:#e6e9ed;--soft:#a3acb6;--line:#3b434c;
--band:#1f242a;--link:#82b4f5;--bad:#ff9d94;--c0:#8ab4f0;--c1:#f0a080;--c2:#8fd19a;--c3:#c8a5e8;--c4:#e0c070;--c5:#90c8d4}}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem}
h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-bottom:1px solid var(--line)}h3{font-size:1rem;margin:1.2rem 0 .3rem}a{color:var(--link)}
small,caption,.note{color:var(--soft);font-size:.85rem}h1,h2,h3,dd,li,caption,tbody th{overflow-wrap:anywhere}.wide{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}caption{position:sticky;left:0;text-align:left;padding:.2rem 0;max-width:calc(100vw - 2rem)}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;font-weight:normal}thead th{font-weight:600}
td{min-width:4.5rem}.summary td{white-space:nowrap}td small,th small{display:block}tbody th[scope=row]{min-width:12rem;max-width:24rem}
th[scope=rowgroup]{background:var(--band);font-weight:600}.summary tbody th[scope=row]{position:sticky;left:0;background:var(--back)}td.error{min-width:15rem}
.bad{color:var(--bad);font-weight:600}.maps,.charts{display:flex;flex-wrap:wrap;gap:1rem 2.5rem}figure{flex:0 1 33rem;min-width:0;margin:0}.maps .wide{max-width:100%}
.heat td,.heat th{padding:.15rem .5rem;text-align:right;white-space:nowrap}.heat caption{max-width:24rem}.heat tbody th[scope=row]{min-width:0}
.heat td{min-width:2.6rem;text-align:center;border:1px solid var(--back)}.heat td.none{border:1px dashed var(--soft)}
.chart{width:100%;min-width:30rem}.chart text{fill:var(--text);font:13px system-ui,sans-serif}.grid{stroke:var(--line)}
.window{stroke:var(--soft);stroke-dasharray:5 4}ul.legend{list-style:none;padding:0;margin:.2rem 0}
.legend svg{width:48px;height:16px;vertical-align:middle;margin-right:.5rem}dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}
dt{color:var(--soft)}dd{margin:0}@media (max-width:40rem){body{padding:.7rem;font-size:15px}
.summary tbody th[scope=row]{min-width:7rem;max-width:38vw;font-size:.85rem}dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}}
"""


class Run(NamedTuple):
    """One folder of `longctx eval`; `number` is how the report refers to it."""

    number: int
    folder: Path
    rows: list[Row]
    about: Row


def write_report(
    folders: str | Path | Sequence[str | Path], out: str | Path, *, overwrite: bool = False, kept: float = KEPT, reference: int | str = REFERENCE
) -> Path:
    """Write one self-contained HTML file about the evaluations in `folders`: tables, heat maps, curves, failures and origins.

    Equal evaluations give equal bytes.

    Args:
        folders: what `evaluate` wrote, one or more.
        out: the .html file to write.
        overwrite: replace `out` if it exists.
        kept, reference: the effective length is the longest whose score is at least this share, 0 to 1, of the score at
            `reference` tokens (or a size such as "2k"), as are those of all measured lengths between.

    Raises:
        ValueError: a folder without a readable results.json, no folder at all, an `out` that exists or is no .html file, or a
            `kept` or `reference` that is out of range.
    """
    places = check_results([folders] if isinstance(folders, str | Path) else folders)
    path = Path(out).expanduser()
    if not places:
        raise ValueError("give at least one folder of `longctx eval`")
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"{path}: give a .html file for --out")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} already exists; choose another --out or add --overwrite")
    page = _page([_read(number, folder) for number, folder in enumerate(places, 1)], kept, parse_size(reference))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(page.encode("utf-8", "replace"))
    os.replace(partial, path)
    return path


def _read(number: int, folder: Path) -> Run:
    about = files.read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    rows: Any = files.read_json(folder / "results.json")
    if not isinstance(rows, list) or not isinstance(about, dict) or not all(map(_is_row, rows)):
        raise ValueError(f"{folder} does not hold what `longctx eval` writes; run `longctx eval ... --out` into a new folder")
    return Run(number, folder, [row | {"run": number} for row in rows], about)


def _is_row(row: Any) -> bool:
    """Whether it has what is drawn, as what `longctx eval` writes: names, a length, and numbers that may be missing."""
    if not isinstance(row, dict) or set(_NEEDED) - set(row):
        return False
    if row["length"] is not None and (not isinstance(row["length"], int) or row["length"] < 1):
        return False
    numbers = [row[key] for key in ("depth", "value", "ci_low", "ci_high")]
    named = all(isinstance(row[key], str) for key in ("model", "task", "metric"))
    return named and all(x is None or (isinstance(x, int | float) and math.isfinite(x)) for x in numbers)


# --- elements: text and attributes are escaped by the serialiser, whatever a file holds


def _el(tag: str, *content: Any, **attributes: Any) -> Element:
    """An element; of attributes, `class_` is class and `stroke_width` stroke-width. Content that is None is left out."""
    made = Element(tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items() if value is not None})
    for each in content:
        if isinstance(each, Element):
            made.append(each)
        elif each is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + str(each)
        elif each is not None:
            made.text = (made.text or "") + str(each)
    return made


def _table(head: Iterable[str], bodies: Iterable[Sequence[Element]], caption: str, kind: str | None = None) -> Element:
    top = _el("thead", _el("tr", *(_el("th", name, scope="col") for name in head)))
    return _wide(_el("table", _el("caption", caption), top, *(_el("tbody", *lines) for lines in bodies), class_=kind), caption)


def _wide(content: Element, title: str) -> Element:
    """What scrolls by itself where the screen is narrow, also by keyboard."""
    return _el("div", content, class_="wide", tabindex=0, role="region", aria_label=title)


def _page(runs: Sequence[Run], kept: float, reference: int) -> str:
    rows = [row for run in runs for row in run.rows]
    tables = [*_summary(runs, rows, kept, reference), *_changes(runs, rows)]
    parts = [*tables, *_heat_maps(rows), *_curves(runs, rows), *_positions(runs, rows), *_failures(rows)]
    body = _el("body", _el("h1", "Evaluation at long context"), *parts, _el("h2", "What the numbers were made from"), *map(_origin, runs))
    indent(body, " ")
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Evaluation at long context</title>'
    text = tostring(body, encoding="unicode", short_empty_elements=False)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<style>{_STYLE}</style>\n</head>\n{text}\n</html>\n'


def _link(number: int) -> Element:
    return _el("a", f"run {number}", href=f"#run-{number}")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _is_change(row: Row) -> bool:
    return row["metric"].startswith("change")


# --- tables over lengths


def _summary(runs: Sequence[Run], rows: Sequence[Row], kept: float, reference: int) -> list[Element]:
    overall = [row for row in rows if row["depth"] is None and not _is_change(row)]
    effective = [effective_lengths(run.rows, kept, reference) for run in runs]
    caption = "Value [95 % interval] by length in tokens. Accuracy is a share from 0 to 1; lower perplexity is better."
    if not any(effective):
        return [_el("h2", "Results"), _over_lengths(runs, overall, caption)]
    caption += (
        f" Effective length: the longest whose score is at least {100 * kept:.4g} % of the score at {format_size(reference)} (where that was not measured, at the "
        "shortest length that was), as are those of all measured lengths between; ≥: no longer one was measured."
    )
    column = {(run.number, model, task, metric): effective_text(each, reference) for run, found in zip(runs, effective, strict=True) for (model, task, metric), each in found.items()}
    return [_el("h2", "Results"), _over_lengths(runs, overall, caption, {effective_head(kept, reference): column})]


def _changes(runs: Sequence[Run], rows: Sequence[Row]) -> list[Element]:
    mine = [row for row in rows if _is_change(row) and row["depth"] is None]
    caption = "Paired on the same cells, with 95 % intervals: accuracy and distances in points, perplexity in per cent (less is better)."
    return [_el("h2", "Paired changes"), _over_lengths(runs, mine, caption)] if mine else []


def _over_lengths(runs: Sequence[Run], rows: Sequence[Row], caption: str, more: Columns | None = None) -> Element:
    """A group of lines for each task and metric, a line in it for each model of each run, a column for each length, and `more`."""
    lengths, more = sorted_lengths(rows), more or {}
    named = {(row["task"], row["metric"]) for row in rows if row["metric"] != "failed"}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        # what failed stands in the line of the task's other lengths, if there is one
        keys = [key for key in sorted(named) if key[0] == row["task"]] if row["metric"] == "failed" else []
        for key in keys or [(row["task"], row["metric"])]:
            groups.setdefault(key, []).append(row)
    bodies = [_group(runs, key, mine, lengths, more) for key, mine in groups.items()]
    return _table(["model", *map(name_of_length, lengths), *more], bodies, caption, "summary")


def _group(runs: Sequence[Run], key: tuple[str, str], rows: Sequence[Row], lengths: Sequence[int | None], more: Columns) -> list[Element]:
    title = key[0] if key[0] == key[1] else f"{key[0]}: {key[1].replace('_', ' ')}"
    lines = [_el("tr", _el("th", title, scope="rowgroup", colspan=1 + len(lengths) + len(more)))]
    for number, model in dict.fromkeys((row["run"], row["model"]) for row in rows):
        run = runs[number - 1]
        share = any(row["task"] == key[0] and is_share(row["metric"]) for row in run.rows)
        found = {row["length"]: row for row in rows if (row["run"], row["model"]) == (number, model)}
        others = [each[0] for each in _subjects(run)[1:]] if key[1] == "change_from_baseline" else []
        method = next(iter(found.values())).get("method") or None
        about = _el("small", method, " " if method else None, f"against {others[0]} " if others else None, _link(number))
        texts = [_el("td", column.get((number, model, *key), "")) for column in more.values()]
        lines.append(_el("tr", _el("th", model, about, scope="row"), *(_value(found.get(length), share) for length in lengths), *texts))
    return lines


def _value(row: Row | None, share: bool) -> Element:
    """A number with its interval, and how many cells or tokens it is made of; what it cost is in the tooltip."""
    if row is None:
        return _el("td", "–", title="not measured")
    if row["value"] is None:
        return _el("td", "failed", class_="bad", title=row.get("error"))
    units = (("tokens", "tokens"), ("seconds", "seconds"), ("peak_memory", "GiB"))
    cost = ", ".join(f"{row[key]:,} {unit}" for key, unit in units if row.get(key) is not None)
    number, bracket, interval = cell_text(row, share).partition("[")
    below = [_el("small", text) for text in (bracket + interval, f"n = {row['n']:,}" if row.get("n") else "") if text]
    return _el("td", number, *below, title=f"value {row['value']}" + (f"; {cost}" if cost else ""))


def _failures(rows: Sequence[Row]) -> list[Element]:
    failed = [row for row in rows if row["metric"] == "failed"]
    lines = []
    for row in failed:
        model = _el("th", row["model"], _el("small", _link(row["run"])), scope="row")
        error = _el("td", row.get("error") or "no reason given", class_="error")
        lines.append(_el("tr", model, _el("td", row["task"]), _el("td", name_of_length(row["length"])), error))
    return [_el("h2", "Failed"), _table(("model", "task", "length", "error"), [lines], "Tasks that gave no number at a length.")] if failed else []


# --- heat maps


def _heat_maps(rows: Sequence[Row]) -> list[Element]:
    mine = [row for row in rows if row["depth"] is not None and row["metric"] == "accuracy"]
    if not mine:
        return []
    note = "Share of right answers in per cent, by depth (0 %: start of the context) and length; orange is low, blue is high."
    parts = [_el("h2", "Where in the context"), _el("p", note, class_="note")]
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in mine):
        models = dict.fromkeys((row["run"], row["model"]) for row in mine if (row["task"], row["metric"]) == (task, metric))
        maps = [_heat_map([row for row in rows if (row["task"], row["run"], row["model"]) == (task, *each)], metric) for each in models]
        parts += [_el("h3", f"{task}: {metric}"), _el("div", *maps, class_="maps")]
    return parts


def _heat_map(rows: Sequence[Row], metric: str) -> Element:
    """One model's: a real table, so that it can be read without seeing its colours."""
    cells = {(row["depth"], row["length"]): row for row in rows if row["depth"] is not None and row["metric"] == metric}
    lengths, depths = sorted({row["length"] for row in rows}), sorted({depth for depth, _ in cells})
    lines = [_el("tr", _el("th", _percent(depth), scope="row"), *(_heat_cell(cells.get((depth, n)), depth, n) for n in lengths)) for depth in depths]
    return _table(["depth", *map(format_size, lengths)], [lines], f"{rows[0]['model']} (run {rows[0]['run']})", "heat")


def _heat_cell(row: Row | None, depth: float, length: int) -> Element:
    where = f"depth {_percent(depth)}, {format_size(length)} tokens"
    if row is None or row["value"] is None:
        return _el("td", "–", class_="cell none", title=f"{where}: no number")
    back = _shade(row["value"])
    title = f"{where}: {cell_text(row, True)}" + (f", n = {row['n']}" if row.get("n") else "")
    return _el("td", f"{100 * row['value']:.0f}", class_="cell", title=title, style=f"background:rgb{back};color:{_readable_on(back)}".replace(", ", ","))


def _shade(share: float) -> tuple[int, ...]:
    at = 2 * min(max(share, 0.0), 1.0)
    first, second = (_LOW, _MIDDLE) if at < 1 else (_MIDDLE, _FULL)
    return tuple(round(a + (b - a) * (at - (at >= 1))) for a, b in zip(first, second, strict=True))


def _readable_on(back: Iterable[int]) -> str:
    """Black or white, whichever contrasts more (WCAG 2); one of them always reaches 4.5."""
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in back))
    return "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fff"


# --- curves


class _Series(NamedTuple):
    """One line of a chart: what it is called, of which run, and for each place the value and the ends of its interval."""

    label: str
    run: int
    points: list[tuple[int, float, float | None, float | None]]


class _Axis(NamedTuple):
    """A logarithmic axis, or one from 0 to 1."""

    name: str
    logarithmic: bool = True


class _Position(NamedTuple):
    """What is drawn against positions in the text: the heading, the vertical axis, the horizontal one, and of which lengths."""

    heading: str
    y: _Axis
    x: str
    longest_only: bool = False


_POSITIONS = {
    "nll": _Position("Loss by position", _Axis("-log p (nats a token)"), "position (tokens before)"),
    "state_norm": _Position("Norm of the state by position", _Axis("norm of the SSM state, all layers"), "tokens read", longest_only=True),
    "effective_remembrance": _Position("Effective remembrance", _Axis("EffRem(t): total variation", logarithmic=False), "tokens left out at the start (t)"),
}


def _curves(runs: Sequence[Run], rows: Sequence[Row]) -> list[Element]:
    """Perplexities and scores by length, of tasks that are not drawn by depth."""
    overall = [row for row in rows if row["depth"] is None and row["length"] is not None]
    elsewhere = {row["task"] for row in rows if row["depth"] is not None and row["metric"] in ("accuracy", *_POSITIONS)}
    parts = []
    for heading, metrics, axis in (("Perplexity by length", ("perplexity",), _Axis("perplexity")), ("Scores by length", SCORES, _Axis("score", logarithmic=False))):
        mine = [row for row in overall if row["metric"] in metrics and not (axis.logarithmic and (row["value"] or 0) <= 0)]
        mine = [row for row in mine if row["value"] is not None and row["task"] not in elsewhere]
        charts = []
        for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in mine):
            found = [row for row in mine if (row["task"], row["metric"]) == (task, metric)]
            if axis.logarithmic or len(sorted_lengths(found)) > 1:
                lengths = sorted({row["length"] for row in found})
                charts.append(_chart(runs, task, axis._replace(name=metric), ("length (tokens)", lengths), _by_length(found), found))
        parts += [_el("h2", heading), _el("div", *charts, class_="charts")] if charts else []
    return parts


def _by_length(rows: Sequence[Row]) -> list[_Series]:
    keys = dict.fromkeys((row["run"], row["model"]) for row in rows)
    return [_Series(model, run, _points((row["length"], row) for row in rows if (row["run"], row["model"]) == (run, model))) for run, model in keys]


def _positions(runs: Sequence[Run], rows: Sequence[Row]) -> list[Element]:
    """Loss, norm of the state and remembrance, which are measured at places in the text: a line a model and length."""
    parts = []
    for metric, drawn in _POSITIONS.items():
        mine = [row for row in rows if row["metric"] == metric and row["depth"] and row["value"] is not None and not (drawn.y.logarithmic and row["value"] <= 0)]
        charts = []
        for task in dict.fromkeys(row["task"] for row in mine):
            found = [row for row in mine if row["task"] == task]
            series = _by_position(found, drawn.longest_only)
            places = [point[0] for each in series for point in each.points]
            charts.append(_chart(runs, task, drawn.y, (drawn.x, _doublings(min(places), max(places))), series, found))
        parts += [_el("h2", drawn.heading), _el("div", *charts, class_="charts")] if charts else []
    return parts


def _by_position(rows: Sequence[Row], longest_only: bool) -> list[_Series]:
    lengths: dict[tuple[int, str], set[int]] = {}
    for row in rows:
        lengths.setdefault((row["run"], row["model"]), set()).add(row["length"])
    found = []
    for (run, model), mine in lengths.items():
        for length in [max(mine)] if longest_only else sorted(mine):
            points = ((round(row["depth"] * length), row) for row in rows if (row["run"], row["model"], row["length"]) == (run, model, length))
            found.append(_Series(f"{model}, {format_size(length)}", run, _points(points)))
    return found


def _points(placed: Iterable[tuple[int, Row]]) -> list[tuple[int, float, float | None, float | None]]:
    return sorted((max(place, 1), row["value"], row["ci_low"], row["ci_high"]) for place, row in placed)


def _trained_window(run: Run, row: Row) -> int | None:
    """Where run.json tells it."""
    given = run.about.get("trained_windows")
    found = given.get(row["model"]) if isinstance(given, Mapping) else None
    return found if isinstance(found, int) and found > 0 else None


def _chart(runs: Sequence[Run], task: str, y_axis: _Axis, x_axis: tuple[str, Sequence[int]], series: Sequence[_Series], rows: Sequence[Row]) -> Element:
    """A chart with the trained windows of the rows' models, and its legend; lines also differ by mark and dash.

    x_axis: its name and ticks."""
    windows = sorted({window for row in rows if (window := _trained_window(runs[row["run"] - 1], row))})
    places = sorted({point[0] for each in series for point in each.points})
    ends = [end for each in series for _, *three in each.points for end in three if end is not None and (end > 0 or not y_axis.logarithmic)]
    ticks = _ticks(min(ends), max(ends)) if y_axis.logarithmic else [0, 0.25, 0.5, 0.75, 1]
    x = _scale([*places, *windows], _LEFT + 14, _WIDE - _RIGHT)
    y = _scale([*ends, *ticks], _HIGH - _BOTTOM, _TOP, y_axis.logarithmic)
    title = f"{task}: {y_axis.name} against {x_axis[0]}, {'both axes' if y_axis.logarithmic else 'which is'} logarithmic"
    chart = _el("svg", _el("title", title), viewBox=f"0 0 {_WIDE} {_HIGH}", role="img", aria_label=title, class_="chart")
    chart.extend(_axes(x_axis, (y_axis.name, ticks), windows, x, y))
    names = []
    for number, each in enumerate(series):
        chart.append(_line(number, each, x, y, y_axis.logarithmic))
        sample = _el("svg", *_drawn(number, [(2, 8), (46, 8)], [(24, 8)]), viewBox="0 0 48 16", aria_hidden="true")
        names.append(_el("li", sample, f"{each.label} ", _el("small", _link(each.run))))
    return _el("figure", _el("h3", task), _wide(chart, title), _el("ul", *names, class_="legend"))


def _scale(values: Sequence[float], start: float, stop: float, logarithmic: bool = True) -> Any:
    """From `values` to pixels; a single value lies in the middle."""
    place = math.log2 if logarithmic else float
    low, high = place(min(values)), place(max(values))
    return lambda value: round(start + (stop - start) * ((place(value) - low) / (high - low) if high > low else 0.5), 1)


def _doublings(low: int, high: int) -> list[int]:
    """Powers of two within `low ... high`, eleven at most."""
    found = [2**k for k in range(low.bit_length() - (low & (low - 1) == 0), high.bit_length())]
    return found[:: 1 + len(found) // 12] or [low]


def _ticks(low: float, high: float) -> list[float]:
    """A handful of round numbers about `low ... high`: evenly spaced over a narrow range, else by magnitude."""
    if high < 4 * low:
        span = max(high - low, 0.02 * high)
        step = next(s for p in itertools.count(math.floor(math.log10(span)) - 1) for f in (1, 2, 5) if span / (s := f * 10.0**p) <= 5)
        return [float(f"{i * step:.6g}") for i in range(max(1, math.floor(low / step)), math.ceil(high / step) + 1)]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{f}e{p}") for p in range(first, last + 1) for f in factors if 0.8 * low <= f * 10.0**p <= 1.25 * high]
        if len(found) <= 8:
            break
    return found[:: 1 + len(found) // 9] or [low, high]


def _axes(across: tuple[str, Sequence[int]], up: tuple[str, Sequence[float]], windows: Sequence[int], x: Any, y: Any) -> list[Element]:
    """Names and ticks of both, and the trained windows."""
    bottom, right = _HIGH - _BOTTOM, _WIDE - _RIGHT
    parts = [_el("line", x1=_LEFT, x2=right, y1=y(tick), y2=y(tick), class_="grid") for tick in up[1]]
    parts += [_el("text", f"{tick:g}", x=_LEFT - 6, y=y(tick) + 4, text_anchor="end") for tick in up[1]]
    parts += [_el("text", format_size(length), x=x(length), y=bottom + 18, text_anchor="middle") for length in across[1]]
    for window in windows:
        parts.append(_el("line", x1=x(window), x2=x(window), y1=_TOP, y2=bottom, class_="window"))
        parts.append(_el("text", f"trained window {format_size(window)}", x=x(window), y=_TOP - 6, text_anchor="start" if x(window) < _WIDE / 2 else "end"))
    return [*parts, _el("text", across[0], x=(_LEFT + right) / 2, y=_HIGH - 8, text_anchor="middle"), _el("text", up[0], x=4, y=14)]


def _line(number: int, series: _Series, x: Any, y: Any, logarithmic: bool) -> Element:
    """Of one series, with its intervals: a bar a point, or a band where there are many."""
    group, colour = _el("g"), f"var(--c{number % 6})"
    places = [(x(at), y(value)) for at, value, *_ in series.points]
    ends = [(x(at), y(low), y(high)) for at, _, low, high in series.points if low is not None and high is not None and (low > 0 or not logarithmic)]
    many = len(places) > _MANY
    if ends and many:
        around = [(at, high) for at, _, high in ends] + [(at, low) for at, low, _ in reversed(ends)]
        SubElement(group, "polygon", {"points": " ".join(f"{a},{b}" for a, b in around), "fill": colour, "fill-opacity": "0.18"})
    elif ends:
        SubElement(group, "path", {"d": "".join(f"M{at},{low}V{high}" for at, low, high in ends), "stroke": colour, "stroke-width": "1.5"})
    titles = []
    for at, value, low, high in series.points:
        titles.append(f"{series.label}, {format_size(at)} tokens: {cell_text({'metric': '', 'value': value, 'ci_low': low, 'ci_high': high}, False)}")
    group.extend(_drawn(number, places, places, titles, 0.5 if many else 1))
    return group


def _drawn(
    number: int, line: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]], titles: Sequence[str] = (), size: float = 1
) -> list[Element]:
    """A line and its marks, in the colour, dash and shape of curve `number`."""
    colour, points = f"var(--c{number % 6})", " ".join(f"{a},{b}" for a, b in line)
    shapes = []
    drawn = _el("polyline", points=points, fill="none", stroke=colour, stroke_width=2, stroke_dasharray=_DASHES[number % 5])
    for (a, b), title in itertools.zip_longest(marks, titles):
        shape = _el("path", d=_MARKS[number % 6], transform=f"translate({a},{b})" + (f"scale({size})" if size != 1 else ""), fill=colour, stroke=colour)
        shapes.append(_el("g", _el("title", title), shape) if title else shape)
    return [drawn, *shapes]


# --- origins


def _arguments(run: Run) -> Row:
    found = run.about.get("arguments")
    return found if isinstance(found, Mapping) else {}


def _subjects(run: Run) -> list[Sequence[Any]]:
    """[label, hash of its files] of each model, as run.json has them."""
    found = _arguments(run).get("models")
    return [each for each in found if isinstance(each, list) and each] if isinstance(found, list) else []


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        named = [_plain(value["name"])] if value.get("name") else []
        return ", ".join(named + [f"{key} {_plain(item)}" for key, item in value.items() if key != "name" and item is not None])
    return " | ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _origin(run: Run) -> Element:
    arguments, about = _arguments(run), run.about
    facts = {"folder": str(run.folder)} | {key: arguments.get(key) for key in ("data", "tasks", "lengths")}
    facts |= {"attention": arguments.get("attn_implementation"), "machine": about.get("machine"), "versions": about.get("versions")}
    lines = [part for key, value in facts.items() if value for part in (_el("dt", key), _el("dd", _plain(value)))]
    return _el("section", _el("h3", f"Run {run.number}"), _el("dl", *lines), _models(run), id=f"run-{run.number}")


def _models(run: Run) -> Element:
    hashes = {each[0]: each[-1] for each in _subjects(run) if isinstance(each[0], str)}
    columns = ("method", "revision", "tokenizer", "dtype", "seed")
    lines = []
    for model in dict.fromkeys(row["model"] for row in run.rows):
        mine = [row for row in run.rows if row["model"] == model]
        values = [", ".join(dict.fromkeys(str(row[key]) for row in mine if row.get(key) not in (None, ""))) for key in columns]
        lines.append(_el("tr", _el("th", model, scope="row"), *(_el("td", value or "–") for value in [*values, hashes.get(model)])))
    return _table(("model", *columns, "hash of its files"), [lines], f"Models of run {run.number}")
