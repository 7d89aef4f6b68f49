"""The report as a reader of the file gets it: parsed, not compared with a golden copy."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import product

import pytest

import hf_longctx
from hf_longctx import html_report
from hf_longctx.cli.main import main
from hf_longctx.html_report import write_report

VOID = {"meta"}
EVIL = 'org/<script>alert("1")</script>&amp;\'"><img src=x onerror=alert(1)>'
DEPTHS, LENGTHS = (0.0, 0.5, 1.0), (2048, 8192)
RUN = {
    "arguments": {
        "attn_implementation": "sdpa", "data": {"path": "books.txt", "name": None, "files": "0123abcd4567ef89"}, "lengths": [2048, 8192], "seed": 7,
        "models": [["ours", "aaaa1111bbbb2222"], ["theirs", "cccc3333dddd4444"]], "tasks": [{"name": "passkey", "n": 20, "depths": 3}],
    },
    "machine": "Some GPU 80GB", "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}  # fmt: skip


def row(metric="accuracy", value=0.5, low=0.25, high=0.75, model="ours", task="passkey", length=2048, depth=None, **more):
    about = {"revision": "f00dfeed", "method": "yarn:factor=4", "n": 20, "seed": 7, "tokenizer": "LlamaTokenizer 49152", "dtype": "bfloat16", "error": None}
    about |= {"seconds": 1.234, "tokens": 40960, "peak_memory": 3.21}
    return {"model": model, "task": task, "length": length, "depth": depth, "metric": metric, "value": value, "ci_low": low, "ci_high": high} | about | more


def failed(**more):
    return row("failed", None, None, None, **more)


def rows_of(model="ours"):
    """Every kind of row, no two numbers alike."""
    found = [row(value=v, low=v - 0.1, high=v + 0.1, length=n, model=model) for v, n in ((0.87, 2048), (0.31, 8192))]
    found += [row(value=(i + 1) / 8, depth=d, length=n, model=model, n=7) for i, (d, n) in enumerate(product(DEPTHS, LENGTHS))]
    for task, shift in (("perplexity", 0.0), ("tail_perplexity:spans=4", 0.5)):
        found += [row("perplexity", v + shift, v + shift - 0.6, v + shift + 0.7, task=task, length=n, model=model) for v, n in ((12.34, 2048), (9.87, 8192))]
    found.append(row("change_from_2048", -0.2002, -0.25, -0.15, task="tail_perplexity:spans=4", length=8192, model=model))
    return found


@pytest.fixture
def evaluation(tmp_path):
    """`evaluation("a", rows, run)` -> a folder as `longctx eval` leaves it."""

    def make(name, rows, run=RUN):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(rows), encoding="utf-8")
        if run is not None:
            (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        return folder

    return make


class Page(HTMLParser):
    """Elements as (tag, attributes, text inside), with every tag closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, tag, kind=None):
        return [(a, " ".join("".join(text).split())) for name, a, text in self.elements if name == tag and kind in (None, *(a.get("class") or "").split())]

    def texts(self, tag, kind=None):
        return [text for _, text in self.all(tag, kind)]


def page_of(out):
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture
def page(evaluation, tmp_path):
    ours = [*rows_of(), row("change_from_baseline", 0.405, 0.3, 0.5), failed(length=32768, error="out of memory: 12 GiB")]
    return page_of(write_report([evaluation("a", ours + rows_of("theirs")), evaluation("b", rows_of("third"))], tmp_path / "r.html"))


# --- what it says


def test_every_number_is_there(page):
    cells, marks = " ".join(page.texts("td")), " ".join(page.texts("title"))
    for number in ("0.87 [0.77, 0.97]", "0.31 [0.21, 0.41]", "12.34 [11.74, 13.04]", "9.87 [9.27, 10.57]", "12.84 [12.24, 13.54]", "10.37 [9.77, 11.07]"):
        assert cells.count(number) == 3, number  # once for each model
    for change in ("-20.0 % [-25.0, -15.0] n = 20", "+40.5 points [+30.0, +50.0] n = 20"):
        assert change in cells
    assert "third, 8k tokens: 9.87 [9.27, 10.57]" in marks
    assert {"value 0.87; 40,960 tokens, 1.234 seconds, 3.21 GiB"} <= {a.get("title") for a, _ in page.all("td")}


def test_models_of_all_folders_stand_side_by_side_in_one_table(page):
    table, *_ = page.texts("table", "summary")
    for task in ("passkey: accuracy", "perplexity ", "tail_perplexity:spans=4: perplexity"):
        assert table.count(f" {task}") >= 1
    assert re.search(r"passkey: accuracy ours.* theirs.* third.*run 2.* perplexity ours", table.replace("yarn", " yarn"))
    assert page.texts("th")[:5] == ["model", "2k", "8k", "32k", "effective length (85 % of 2k)"]


def test_a_model_of_the_same_name_in_two_folders_is_two_lines(evaluation, tmp_path):
    folders = [evaluation(name, [row(value=value)]) for name, value in (("a", 0.11), ("b", 0.22))]
    lines = page_of(write_report(folders, tmp_path / "r.html")).texts("tr")
    assert [re.findall(r"run \d|0\.\d\d", line)[:2] for line in lines if "[" in line] == [["run 1", "0.11"], ["run 2", "0.22"]]


def test_a_heat_map_has_a_cell_for_each_depth_and_length(page):
    cells = page.all("td", "cell")
    assert len(page.all("table", "heat")) == 3
    assert len(cells) == len(DEPTHS) * (3 * len(LENGTHS) + 1)  # "ours" failed at 32k: a column without numbers
    assert [text for _, text in cells[:9]] == ["12", "25", "–", "38", "50", "–", "62", "75", "–"]
    assert cells[0][0]["title"] == "depth 0 %, 2k tokens: 0.12 [0.25, 0.75], n = 7"
    assert cells[2][0]["title"] == "depth 0 %, 32k tokens: no number"


def test_a_chart_is_named_and_its_lines_differ_without_colours(page):
    charts = page.all("svg", "chart")
    assert [a["role"] for a, _ in charts] == ["img", "img"]
    assert charts[0][0]["aria-label"].startswith("perplexity: perplexity against length")
    lines = [a for tag, a, _ in page.elements if tag == "polyline"][:3]
    assert len({a["stroke-dasharray"] for a in lines}) == len({a["stroke"] for a in lines}) == 3
    assert len({len(a["points"].split()) for a in lines}) == 1


def test_the_trained_window_is_marked_only_where_it_is_known(evaluation, tmp_path):
    rows = [row for row in rows_of() if row["task"] == "perplexity"]
    known = evaluation("in-run", rows, RUN | {"trained_windows": {"ours": 4096}})
    unknown = evaluation("unknown", rows, RUN | {"trained_windows": "?"})
    for folder, marked in ((known, True), (unknown, False)):
        page = page_of(write_report(folder, tmp_path / f"{folder.name}.html"))
        assert bool(page.all("line", "window")) == ("trained window 4k" in page.texts("text")) == marked


def charts_of(out):
    """Titles of the charts, each with the points of its lines in pixels."""
    found = []
    for tag, attributes, _ in page_of(out).elements:
        if tag == "svg" and attributes.get("class") == "chart":
            found.append((attributes["aria-label"], []))
        if tag == "svg" and attributes.get("aria-hidden"):
            found.append(None)  # a sample in a legend
        if tag == "polyline" and found[-1]:
            found[-1][1].append([tuple(map(float, point.split(","))) for point in attributes["points"].split()])
    return dict(filter(None, found))


def by_position(metric, task, values, length=1024, model="ours", **more):
    return [row(metric, v, None, None, depth=d, length=length, model=model, task=task, **more) for d, v in values]


def test_what_is_measured_at_places_of_the_text_is_drawn_over_them(evaluation, tmp_path):
    places = [(1 / 4, 2.0), (1 / 2, 4.0), (1, 8.0)]
    rows = [each for model in ("ours", "theirs") for n in (512, 1024) for each in by_position("nll", "position_nll", places, n, model)]
    rows += [each for n in (512, 1024) for each in by_position("state_norm", "state_norm", places, n)]
    rows += by_position("effective_remembrance", "effective_remembrance", [(1 / 4, 0.25), (1 / 2, 0.75)]) + by_position("state_norm_layer_0", "state_norm", places)
    rows += [row("perplexity", 9.0, task="position_nll", length=n) for n in (512, 1024)]  # of other texts at each length: no curve
    out = write_report(evaluation("a", rows, RUN | {"trained_windows": {"ours": 256, "theirs": 256}}), tmp_path / "r.html")
    charts = charts_of(out)
    assert [title.partition(",")[0] for title in charts] == [
        "position_nll: -log p (nats a token) against position (tokens before)",
        "state_norm: norm of the SSM state",
        "effective_remembrance: EffRem(t): total variation against tokens left out at the start (t)",
    ]
    losses, norms, remembered = charts.values()
    assert [len(line) for line in losses] == [3, 3, 3, 3]  # two models at two lengths
    assert len(norms) == 1  # of the longest length, all layers together
    (x1, y1), (x2, y2), (x3, y3) = norms[0]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # doublings are equally far from each other
    assert x2 - x1 > 50
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 - y2 > 50
    (low, high), top, bottom = (y for _, y in remembered[0]), html_report._TOP, html_report._HIGH - html_report._BOTTOM
    assert (low, high) == pytest.approx((bottom + (top - bottom) / 4, bottom + 3 * (top - bottom) / 4))  # from 0 to 1, not logarithmic
    page = page_of(out)
    assert page.texts("text").count("trained window 256") == 3
    assert page.texts("text").count("512") == 3  # on each axis
    assert [text for text in page.texts("li") if text.startswith("theirs")] == ["theirs, 512 run 1", "theirs, 1k run 1"]
    assert "ours, 1k, 512 tokens: 4.00" in page.texts("title")


def test_many_intervals_are_a_band_and_few_are_bars(evaluation, tmp_path):
    for count, bands in ((12, 0), (13, 1)):
        rows = [row("nll", 3.0, 2.5, 3.5, depth=(k + 1) / count, task="position_nll") for k in range(count)]
        page = page_of(write_report(evaluation(f"e{count}", rows), tmp_path / f"{count}.html"))
        assert len(page.all("polygon")) == bands
        if bands:
            assert len(page.all("polygon")[0][0]["points"].split()) == 2 * count


def test_scores_of_tasks_without_depths_are_drawn_by_length(evaluation, tmp_path):
    rows = [row(value=v, length=n, task=task) for task in ("vt", "passkey") for n, v in ((2048, 1.0), (8192, 0.5))]
    rows += [row(depth=0.5, length=2048), row(task="once"), row("acc", task="lm_eval/x", length=None)]
    charts = charts_of(write_report(evaluation("a", rows), tmp_path / "r.html"))
    assert list(charts) == ["vt: accuracy against length (tokens), which is logarithmic"]
    assert [y for _, y in charts.popitem()[1][0]] == [html_report._TOP, (html_report._TOP + html_report._HIGH - html_report._BOTTOM) / 2]


def test_effective_lengths_have_a_column_that_says_of_what(evaluation, tmp_path):
    rows = [row(value=v, length=n, model=m) for m, values in (("ours", (1, 0.9, 0.7)), ("theirs", (1, 0.7, 0.7))) for n, v in zip((2048, 4096, 8192), values, strict=True)]
    rows += [row("perplexity", 9.0, task="perplexity"), row("acc", task="lm_eval/x", length=None)]
    folder = evaluation("a", rows)
    page = page_of(write_report(folder, tmp_path / "r.html"))
    assert page.texts("th")[:6] == ["model", "no length", "2k", "4k", "8k", "effective length (85 % of 2k)"]
    lines = [re.findall(r"<td[^>]*>([^<]*)", text) for text in re.findall(r"(?s)<tr>(.*?)</tr>", (tmp_path / "r.html").read_text(encoding="utf-8"))]
    assert [line[-1].strip() for line in lines if len(line) == 5] == ["4k", "2k", "", ""]
    assert "at least 85 % of the score at 2k" in page.texts("caption")[0]
    page = page_of(write_report(folder, tmp_path / "s.html", kept=0.7, reference="4k"))
    assert page.texts("th")[5] == "effective length (70 % of 4k)"
    assert "≥ 8k" in page.texts("td")


def test_what_failed_is_listed_with_its_error(page):
    assert "ours run 1 passkey 32k out of memory: 12 GiB" in page.texts("tr")
    assert page.all("td", "bad") == [({"class": "bad", "title": "out of memory: 12 GiB"}, "failed")]


def test_a_task_that_failed_everywhere_is_still_there(evaluation, tmp_path):
    page = page_of(write_report(evaluation("a", [failed(error=None)]), tmp_path / "r.html"))
    assert "ours run 1 passkey 2k no reason given" in page.texts("tr")
    assert not page.all("svg")
    assert not page.all("table", "heat")


def test_what_the_numbers_were_made_from(page):
    (origin, *_) = page.texts("section")
    for part in (
        "books.txt", "0123abcd4567ef89", "passkey, n 20, depths 3", "sdpa", "Some GPU 80GB", "torch 2.13.0", "aaaa1111bbbb2222", "cccc3333dddd4444",
        "yarn:factor=4", "f00dfeed", "LlamaTokenizer 49152", "bfloat16", " 7 ",
    ):  # fmt: skip
        assert part in origin, part
    assert "against theirs" in " ".join(page.texts("th"))


@pytest.mark.parametrize("run", [None, {}, {"arguments": None}, {"arguments": {"models": "?", "tasks": [1], "data": 3}, "versions": []}])
def test_a_folder_that_does_not_describe_itself_is_shown_as_far_as_it_goes(evaluation, tmp_path, run):
    page = page_of(write_report(evaluation("a", rows_of(), run), tmp_path / "r.html"))
    assert "0.87 [0.77, 0.97] n = 20" in page.texts("td")


def test_no_rows_are_an_empty_report(evaluation, tmp_path):
    assert page_of(write_report(evaluation("a", []), tmp_path / "r.html")).texts("h1") == ["Evaluation at long context"]


# --- what it is


def test_whatever_a_file_holds_is_text(evaluation, tmp_path):
    rows = [each | {"task": each["task"] + EVIL, "method": EVIL, "dtype": EVIL, "tokenizer": EVIL, "revision": EVIL} for each in rows_of(EVIL)]
    rows += [failed(model=EVIL, error=EVIL, length=4096), row("change_from_baseline" + EVIL, model=EVIL), row(EVIL, depth=0.5, model=EVIL)]
    run = {"arguments": {"models": [[EVIL, EVIL], [EVIL, EVIL]], "data": EVIL, "tasks": [{"name": EVIL, EVIL: EVIL}]}, "machine": EVIL, "versions": {EVIL: EVIL}}
    out = write_report(evaluation("<b>'\"&", rows, run), tmp_path / "r.html")
    page = page_of(out)
    assert not [tag for tag, attributes, _ in page.elements if tag in ("script", "img", "b") or any(name.startswith("on") for name in attributes)]
    assert "<script" not in out.read_text(encoding="utf-8")
    assert any(text.startswith(EVIL) for text in page.texts("th"))


def test_text_that_is_no_unicode_is_no_obstacle(evaluation, tmp_path):
    assert page_of(write_report(evaluation("a", [row(model="m\ud800\u202e")]), tmp_path / "r.html")).texts("h1")


def test_it_needs_no_network_and_no_script(page):
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "image", "use", "base", "form"), tag
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in attributes.get("style", "")
    assert not re.search(r"url\(|@import|https?:|//", page.texts("style")[0])


def test_links_lead_somewhere(page):
    targets = {a["id"] for _, a, _ in page.elements if "id" in a}
    assert targets == {"run-1", "run-2"}
    assert {a["href"][1:] for a, _ in page.all("a")} == targets


def test_tables_can_be_read_aloud(page):
    assert all(a["scope"] in ("col", "row", "rowgroup") for a, _ in page.all("th"))
    assert len(page.texts("caption")) == len(page.texts("table"))
    assert all(page.texts("caption"))
    assert [a["lang"] for a, _ in page.all("html")] == ["en"]
    assert any(a.get("name") == "viewport" for a, _ in page.all("meta"))


def contrast(first, second):
    def light(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark_have_contrast(page):
    style = page.texts("style")[0]
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    for rules in (light, dark.partition("}}")[0]):
        colours = {name: bytes.fromhex(value if len(value) == 6 else "".join(2 * c for c in value)) for name, value in re.findall(r"--(\w+):#(\w+)", rules)}
        assert len(colours) == 13
        for name in colours.keys() - {"back", "band", "line"}:
            assert contrast(colours[name], colours["back"]) >= 4.5, name
        assert contrast(colours["text"], colours["band"]) >= 4.5


@pytest.mark.parametrize("share", [-1, 0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1, 7])
def test_numbers_on_colours_have_contrast(share):
    back = html_report._shade(share)
    text = {"#000": (0, 0, 0), "#fff": (255, 255, 255)}[html_report._readable_on(back)]
    assert contrast(back, text) >= 4.5


@pytest.mark.parametrize(("low", "high", "ticks"), [(1, 8, [1, 2, 4, 8]), (3, 9, [4, 8]), (256, 1024, [256, 512, 1024]), (5, 7, [5]), (64, 64, [64])])
def test_positions_are_marked_at_powers_of_two(low, high, ticks):
    assert html_report._doublings(low, high) == ticks
    assert len(html_report._doublings(1, 2**20)) == 11


@pytest.mark.parametrize(("low", "high"), [(1, 1), (12.1, 12.9), (9.6, 63), (1, 1e9), (4, 15.9), (1.0, 1.0001), (0.2, 0.7), (3, 12.1), (1, 1e200)])
def test_ticks_are_a_handful_and_in_order(low, high):
    ticks = html_report._ticks(low, high)
    assert 1 <= len(ticks) <= 11
    assert ticks == sorted(set(ticks))
    assert all(tick > 0 for tick in ticks)


def test_equal_input_gives_equal_bytes(evaluation, tmp_path):
    folder = evaluation("a", rows_of())
    first, second = (write_report([folder], tmp_path / name) for name in ("1.html", "new/2.html"))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.html", "a", "new"]  # nothing half-written is left


# --- the command


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["longctx", "report", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run


def test_the_command_does_what_the_function_does(evaluation, report, tmp_path):
    folders = [evaluation("a", rows_of()), evaluation("b", rows_of("third"))]
    status, shown, error = report(*folders, "--out", "r.html")
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["model", "task", "metric", "effective", "length", "(85", "%", "of", "2k)"]
    assert lines[1:] == [[model, "passkey", "accuracy", "2k"] for model in ("ours", "third")] + [["r.html:", "2", "evaluations"]]
    assert (status, error) == (0, "")
    assert (tmp_path / "r.html").read_bytes() == hf_longctx.write_report(folders, tmp_path / "s.html").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("empty --out new.html", "empty holds no finished evaluation: there is no results.json in it; `longctx eval ... --out empty` writes it"),
        ("good none --out new.html", "none holds no finished evaluation"),
        ("broken --out new.html", "results.json is not valid JSON"),
        ("other --out new.html", "other does not hold what `longctx eval` writes"),
        ("words --out new.html", "words does not hold what `longctx eval` writes"),
        ("infinite --out new.html", "infinite does not hold what `longctx eval` writes"),
        ("good --out used.html", "used.html already exists; choose another --out or add --overwrite"),
        ("good --out good/results.json --overwrite", "give a .html file for --out"),
        ("good --out good", "give a .html file for --out"),
        ("good --out new.html --kept 1.5", "the share of the score that is kept must be above 0 and at most 1, got 1.5"),
        ("good --out new.html --reference zero", "expected a number of tokens such as 2048, 2k or 128k, got 'zero'"),
        ("good", "Missing option '--out'"),
        ("--out new.html", "Missing argument 'DIR...'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(evaluation, report, tmp_path, words, message):
    evaluation("good", rows_of())
    evaluation("broken", [])
    (tmp_path / "broken" / "results.json").write_text("[{")
    evaluation("other", [{"some": "thing"}])
    evaluation("words", [row(value="high")])
    evaluation("infinite", [row(value=float("inf"))])
    (tmp_path / "empty").mkdir()
    (tmp_path / "used.html").write_text("kept")
    status, out, err = report(*words.split())
    assert message in err
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert (tmp_path / "used.html").read_text() == "kept"
    assert not (tmp_path / "new.html").exists()


def test_the_command_takes_share_and_reference(evaluation, report, tmp_path):
    rows = [row(value=v, length=n) for n, v in ((2048, 1.0), (4096, 0.6), (8192, 0.5))]
    status, shown, _ = report(evaluation("a", rows), "--out", "r.html", "--kept", "0.8", "--reference", "4k")
    assert (status, shown.split("\n")[1].split()) == (0, ["ours", "passkey", "accuracy", "≥", "8k"])
    assert "effective length (80 % of 4k)" in page_of(tmp_path / "r.html").texts("th")


def test_overwrite_replaces_the_file(evaluation, report, tmp_path):
    (tmp_path / "used.html").write_text("old")
    assert report(evaluation("a", rows_of()), "--out", "used.html", "--overwrite")[0] == 0
    assert page_of(tmp_path / "used.html").texts("h1")


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give at least one folder"):
        write_report([], tmp_path / "r.html")


def test_a_real_evaluation(base, tmp_path):
    hf_longctx.evaluate(base, [{"name": "passkey", "n": 1, "depths": 2}, {"name": "perplexity", "documents": 1}], [320, 400], out=tmp_path / "a")
    page = page_of(write_report(tmp_path / "a", tmp_path / "r.html"))
    assert len(page.all("td", "cell")) == 4
    assert "Python" in page.texts("section")[0]


# --- in a browser


@pytest.fixture
def browser():
    """A Chromium that can be started from the command line."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    return found or pytest.skip("there is no Chromium on PATH")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 500)])
def test_it_is_drawn_in_light_and_dark_and_on_a_narrow_screen(browser, evaluation, tmp_path, scheme, width):
    import numpy as np
    from PIL import Image

    out, picture = write_report(evaluation("a", rows_of()), tmp_path / "r.html"), tmp_path / "r.png"
    options = [f"--screenshot={picture}", f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options, out.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
        colours = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)[::7].tolist()}
    assert pixels.shape == (1600, width)
    assert (np.median(pixels) > 200) == (scheme == "light")
    assert html_report._shade(0.5) in colours  # the heat map
