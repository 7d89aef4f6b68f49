"""LongChat's lines, Kamradt's needle and loss against position: cells read as a reader would, scores computed a second time."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_longctx
from hf_longctx.evals import longchat_lines, needle
from hf_longctx.evals._haystack import NOUNS
from hf_longctx.evaluation import score_cells
from hf_longctx.html_report import write_report
from hf_longctx.reporting import plot_results
from hf_longctx.stats import bootstrap, bootstrap_means, wilson
from hf_longctx.task import Cell, Scored, encode, load_task, opening
from tests.conftest import byte_tokenizer, tiny_model
from tests.test_ruler import law_of_exact_length, tokenizer_of
from tests.test_tasks import numbered, same

BYTES = byte_tokenizer()
KAMRADT = (
    "\n\nWhat is the best thing to do in San Francisco? Don't give information outside the document or repeat your findings"
    "\n\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day"
)
SENTENCES = "".join(f"Nothing of note befell the {word} in that year. " for word in np.random.default_rng(0).choice(NOUNS, 400))


@pytest.fixture(params=["bytes", "bos", "merging", "smollm2"])
def tokenizer(request):
    return tokenizer_of(request.param, request.getfixturevalue("smollm2") if request.param == "smollm2" else None)


def cells_of(tokenizer, name, length=2000, seed=0, **options) -> list[Cell]:
    small = {"n": 2, "depths": 3}
    return load_task({"name": name} | small | options).cells(tokenizer, [encode(tokenizer, SENTENCES)], length, seed)


def whole(tokenizer, cell) -> str:
    return tokenizer.decode(cell.ids, skip_special_tokens=True)


# --- both retrieval tasks


@pytest.mark.parametrize("name", ["longchat_lines", "needle"])
def test_every_cell_has_the_exact_length(name, tokenizer):
    for length in (1500, 1501, 1513, 2048):
        law_of_exact_length(tokenizer, cells_of(tokenizer, name, length), length)


@pytest.mark.parametrize("name", ["longchat_lines", "needle"])
def test_cells_are_a_function_of_the_seed(name, tokenizer):
    first, again, other = (cells_of(tokenizer, name, seed=seed) for seed in (0, 0, 1))
    assert all(map(same, first, again))
    assert not any(map(same, first, other))
    assert len({cell.ids.tobytes() for cell in first}) == 6


@pytest.mark.parametrize("name", ["longchat_lines", "needle"])
def test_too_short_a_length_is_one_line_and_the_least_is_enough(name, tokenizer):
    with pytest.raises(ValueError, match=r"a prompt of 20 tokens is too short: the task itself takes [0-9]+$") as caught:
        cells_of(tokenizer, name, 20)
    least = int(str(caught.value).split()[-1]) + (0 if name == "needle" else 30)  # words differ in length, so trials do
    assert {len(cell.ids) for cell in cells_of(tokenizer, name, least)} == {least}


@pytest.mark.parametrize("name", ["longchat_lines", "needle"])
def test_accuracy_is_that_of_a_reader_of_what_was_said(name, tokenizer):
    """What greedy decoding would say is written as text and judged by a second, simpler rule."""
    task, cells = load_task({"name": name, "n": 2, "depths": 3}), cells_of(tokenizer, name)
    rng, after = np.random.default_rng(0), encode(tokenizer, ">.")
    outputs, right = [], []
    for cell in cells:
        best = np.append(cell.targets, after[:1])
        if len(right) % 2:
            best[rng.integers(len(best) - 1)] = encode(tokenizer, "q")[-1]
        outputs.append(Scored(np.zeros(len(best)), best))
        right.append(tokenizer.decode(best[:-1]) == tokenizer.decode(cell.targets))
    assert 0 < sum(right) < 6
    overall, *by_depth = task.score(cells, outputs, tokenizer)
    assert (overall.metric, overall.value, overall.n, overall.depth) == ("accuracy", sum(right) / 6, 6, None)
    assert overall.values == tuple(map(float, right))
    assert (overall.ci_low, overall.ci_high) == wilson(sum(right), 6)
    assert [(row.depth, row.value, row.n) for row in by_depth] == [(d, sum(right[2 * i : 2 * i + 2]) / 2, 2) for i, d in enumerate((0.0, 0.5, 1.0))]


@pytest.mark.parametrize(("name", "after", "right"), [
    ("longchat_lines", ">", True), ("longchat_lines", "7", False), ("longchat_lines", ".", True),
    ("needle", ".", True), ("needle", "s", False), ("needle", " ", True), ("needle", "\n", True),
])  # fmt: skip
def test_nothing_may_prolong_an_answer(name, after, right):
    cells = cells_of(BYTES, name)
    said = [np.append(cell.targets, encode(BYTES, after)) for cell in cells]
    assert load_task(name).score(cells, [Scored(np.zeros(len(best)), best) for best in said], BYTES)[0].value == right


# --- longchat_lines


def read_record(text: str) -> tuple[list[tuple[str, str]], str, str]:
    """Key and content of each line, the key asked for, and what the text ends with."""
    body, tail = text.removeprefix(longchat_lines.HEAD).split("\nNow the record is over.")
    key, again, answer = re.fullmatch(
        r" Tell me what is the <REGISTER_CONTENT> in line (\S+)\? I need the number\. The <REGISTER_CONTENT> in line (\S+) is <(\d{5})", tail
    ).groups()
    assert key == again
    return re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d{5})>$", body, re.M), key, answer


def test_the_number_is_in_the_line_of_the_key_and_keys_are_different(tokenizer):
    for cell in cells_of(tokenizer, "longchat_lines", depths=5):
        text = whole(tokenizer, cell)
        lines, key, answer = read_record(text)
        assert text.startswith(longchat_lines.HEAD)
        assert tokenizer.decode(cell.targets).endswith(answer)
        assert dict(lines)[key] == answer
        assert len(dict(lines)) == len(lines)
        assert text.count(answer) == 2  # in its place and at the end
        index = [found for found, _ in lines].index(key)
        assert abs(index - cell.depth * (len(lines) - 1)) <= 1
        assert index == {0.0: 0, 1.0: len(lines) - 1}.get(cell.depth, index)


def test_there_are_as_many_lines_as_fit_and_only_the_first_is_cut(tokenizer):
    for cell in cells_of(tokenizer, "longchat_lines", 3000):
        body = whole(tokenizer, cell).removeprefix(longchat_lines.HEAD).split("\nNow the record is over.")[0]
        lines = body.removesuffix("\n").split("\n")
        broken = [i for i, line in enumerate(lines) if not re.fullmatch(r"line \S+: REGISTER_CONTENT is <\d{5}>", line)]
        assert broken in ([], [0]) or (cell.depth == 0 and broken == [1])
        assert len(lines) > 20


def test_the_line_asked_for_may_lie_anywhere():
    cells = cells_of(BYTES, "longchat_lines", n=50, depths=0)
    assert len(cells) == 50
    assert {cell.depth for cell in cells} == {None}
    places = [[found for found, _ in lines].index(key) for lines, key, _ in (read_record(whole(BYTES, cell)) for cell in cells)]
    assert len(set(places)) > 12
    outputs = [Scored(np.zeros(6), np.append(cell.targets, encode(BYTES, ">"))) for cell in cells]
    (result,) = load_task({"name": "longchat_lines", "depths": 0}).score(cells, outputs, BYTES)
    assert (result.value, result.n) == (1, 50)


@pytest.mark.parametrize(("length", "words"), [(100_000, 2), (110_000, 3)])
def test_where_pairs_of_words_are_too_few_keys_have_three(length, words):
    (cell,) = cells_of(BYTES, "longchat_lines", length, n=1, depths=1)
    lines, key, answer = read_record(whole(BYTES, cell))
    assert {found.count("-") for found, _ in lines} == {key.count("-")} == {words - 1}
    assert len(dict(lines)) == len(lines) > 2000
    assert [found for found, value in lines if value == answer] == [key]


# --- needle


def test_the_needle_stands_behind_a_full_stop_where_its_depth_says(tokenizer):
    stops = np.isin(encode(tokenizer, SENTENCES), encode(tokenizer, ".")).any()  # in "merging" a full stop is part of other tokens
    for cell in cells_of(tokenizer, "needle", 1500, n=3, depths=5):
        text = whole(tokenizer, cell)
        assert text.startswith(needle.HEAD)
        assert text.endswith(KAMRADT)
        assert tokenizer.decode(cell.targets).endswith(needle.ANSWER.strip())  # a token may span the seam
        assert text.count(needle.ANSWER) == 2
        hay = text.removeprefix(needle.HEAD).removesuffix(KAMRADT)
        before, after = hay.split(needle.NEEDLE)
        assert before + after in SENTENCES
        if cell.depth in (0, 1):
            assert (before, after)[int(cell.depth)] == ""
        else:
            assert before.endswith(".") or not stops
            assert -60 < len(before) - cell.depth * (len(before) + len(after)) < 20  # at most a sentence before


def test_without_a_full_stop_the_depth_decides():
    text = encode(BYTES, SENTENCES.replace(".", ","))
    cells = load_task({"name": "needle", "n": 1, "depths": 3}).cells(BYTES, [text], 1000, 0)
    before, after = whole(BYTES, cells[1]).removeprefix(needle.HEAD).removesuffix(KAMRADT).split(needle.NEEDLE)
    assert abs(len(before) - len(after)) <= 1


def test_the_grid_of_the_original_can_be_asked_for():
    cells = cells_of(BYTES, "needle", n=1, depths=35)
    assert [cell.depth for cell in cells] == pytest.approx(np.linspace(0, 1, 35))


def test_a_needle_needs_a_document_as_long_as_the_prompt():
    with pytest.raises(ValueError, match=r"^no document has 2000 tokens for the haystack \(the longest has 0\)$"):
        load_task("needle").cells(BYTES, [], 2000, 0)


# --- position_nll


def buckets(result) -> list[tuple[float, int, float]]:
    return [(row.depth, row.n, row.value) for row in result[1:]]


@pytest.mark.parametrize("kind", ["bytes", "bos"])
@pytest.mark.parametrize(("length", "options"), [(16, {}), (33, {"windows": 2}), (100, {"windows": 3}), (101, {"documents": 1}), (250, {}), (2, {}), (3, {})])
def test_windows_are_whole_and_do_not_overlap(kind, length, options):
    tokenizer = tokenizer_of(kind)
    first = opening(tokenizer)
    if length < 2 + len(first):
        return
    texts = numbered(99, 250, 1000, 4000)
    cells = load_task({"name": "position_nll"} | options).cells(tokenizer, texts, length, 0)
    long = [text for text in texts if len(text) >= length][: options.get("documents", 20)]
    assert sorted({cell.cluster for cell in cells}) == list(range(len(long)))
    for number, text in enumerate(long):
        mine = [cell for cell in cells if cell.cluster == number]
        assert len(mine) == min(options.get("windows", 8), len(text) // length)
        seen = np.concatenate([cell.ids[len(first) :] for cell in mine])
        assert len(np.unique(seen)) == len(seen)
        assert set(seen.tolist()) <= set(text.tolist())
        assert seen[0] == text[0]
    for cell in cells:
        assert len(cell.ids) == length
        assert (cell.start, cell.stop, cell.depth) == (1, length, None)
        assert cell.ids[: len(first)].tolist() == first.tolist()
        assert (np.diff(cell.ids[len(first) :]) == 1).all()


@pytest.mark.parametrize("spacing", ["equal", "log"])
@pytest.mark.parametrize(("length", "count"), [(2, 32), (9, 4), (16, 32), (64, 1), (100, 7), (1024, 32)])
def test_every_token_is_in_one_bucket_and_counts_the_same(spacing, length, count):
    rng = np.random.default_rng(0)
    task = load_task({"name": "position_nll", "buckets": count, "spacing": spacing})
    cells = task.cells(BYTES, numbered(3 * length, length), length, 0)
    outputs = [Scored(rng.gamma(2, 2, length - 1).astype(np.float32), np.zeros(length - 1)) for _ in cells]
    overall, *rows = task.score(cells, outputs, BYTES)
    everything = np.concatenate([output.nll for output in outputs]).astype(np.float64)
    assert overall.metric == "perplexity"
    assert overall.value == pytest.approx(np.exp(everything.mean()))
    assert overall.n == sum(row.n for row in rows) == 4 * (length - 1)
    assert np.average([row.value for row in rows], weights=[row.n for row in rows]) == pytest.approx(everything.mean())
    assert 1 <= len(rows) <= min(count, length - 1)
    assert {row.metric for row in rows} == {"nll"}
    begin = 1
    for row in rows:  # depth and n say which positions the bucket has
        size = row.n // 4
        assert row.depth * length == pytest.approx(begin + (size - 1) / 2)
        assert row.value == pytest.approx(np.mean([output.nll[begin - 1 : begin - 1 + size] for output in outputs]), rel=1e-6)
        assert row.ci_low <= row.value <= row.ci_high
        begin += size
    sizes = [row.n for row in rows]
    assert max(sizes[1:], default=0) - min(sizes[1:], default=0) <= 4 or spacing == "log"
    assert sizes == sorted(sizes) or spacing == "equal" or length < 1024


def test_powers_of_two_are_edges():
    """So that no bucket mixes positions inside and outside of a trained window."""
    task = load_task("position_nll")
    cells = task.cells(BYTES, numbered(4096), 4096, 0)
    rows = task.score(cells, [Scored(np.arange(1, 4096.0) / 4096, np.zeros(4095))], BYTES)[1:]
    assert [row.n for row in rows] == [127] + [128] * 31
    assert [row.value for row in rows] == pytest.approx([64 / 4096] + [(128 * k + 63.5) / 4096 for k in range(1, 32)])
    assert np.isnan([row.ci_low for row in rows]).all()  # one document says nothing about the next


def test_intervals_of_many_means_are_those_of_each():
    rng = np.random.default_rng(0)
    values, clusters = rng.gamma(2, 1, (60, 3)) + np.repeat(rng.normal(0, 1, 12), 5)[:, None], np.repeat(np.arange(12), 5)[:-7].tolist()
    values = values[:-7]  # the last documents have fewer windows
    found = np.array(bootstrap_means(values, clusters))
    one_by_one = np.array([bootstrap(lambda index, k=k: float(values[index, k].mean()), clusters) for k in range(3)]).T
    assert found == pytest.approx(one_by_one, abs=0.06)  # two samples of 2,000 draws
    assert (found[1] - found[0] > 0.5).all()


@pytest.mark.parametrize(("length", "message"), [(1, "position_nll needs at least 2 tokens, got 1"), (2001, r"no document has 2001 tokens \(the longest has 1500\); give --data")])
def test_loss_against_position_refuses_what_it_cannot_measure(length, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_task("position_nll").cells(BYTES, numbered(1500, 20), length, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="needs at least 3 tokens, got 2"):
        load_task("position_nll").cells(tokenizer_of("bos"), numbered(1500), 2, 0)
    with pytest.raises(ValueError, match="position_nll: spacing: input should be 'equal' or 'log', got 'even'"):
        load_task({"name": "position_nll", "spacing": "even"})


@torch.no_grad()
def test_it_equals_a_direct_computation(base, tokens, tmp_path):
    """Through `evaluate`, from files, against transformers' own loss position by position."""
    task = {"name": "position_nll", "buckets": 4, "windows": 2}
    rows = hf_longctx.evaluate(base, task, [48], out=tmp_path / "out", data=tokens)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    losses = []
    with np.load(tokens) as documents:
        for name in documents.files:
            text = documents[name]
            for window in (text[:48], text[len(text) - 48 :]):
                ids = torch.from_numpy(window.astype(np.int64))
                log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
                losses.append([-log_p[i, ids[i + 1]].item() for i in range(47)])
    losses = np.array(losses)  # window, position - 1
    expected = [losses[:, a - 1 : b - 1].mean() for a, b in ((1, 12), (12, 24), (24, 36), (36, 48))]
    found = [row for row in rows if row["metric"] == "nll"]
    assert AutoTokenizer.from_pretrained(base)("")["input_ids"] == []  # so the first token of a window is text
    assert [row["value"] for row in found] == pytest.approx(expected, rel=1e-5)
    assert [row["depth"] * 48 for row in found] == pytest.approx([6, 17.5, 29.5, 41.5])
    assert [row["n"] for row in found] == [24 * 11, 24 * 12, 24 * 12, 24 * 12]
    (overall,) = [row for row in rows if row["depth"] is None]
    assert (overall["metric"], overall["n"]) == ("perplexity", 24 * 47)
    assert overall["value"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert hf_longctx.evaluate(base, task, [48], out=tmp_path / "out", data=tokens) == rows  # a finished one is read back


def test_buckets_of_what_score_cells_gives():
    task, rng = load_task({"name": "position_nll", "buckets": 3}), np.random.default_rng(0)
    cells = task.cells(BYTES, [rng.integers(3, 259, 480) for _ in range(2)], 60, 0)
    outputs = score_cells(tiny_model(), cells)
    direct = np.array([output.nll for output in outputs])
    assert [row.value for row in task.score(cells, outputs, BYTES)[1:]] == pytest.approx([direct[:, :19].mean(), direct[:, 19:39].mean(), direct[:, 39:].mean()])


# --- what is drawn


def row(value, depth, metric="nll", length=1024, model="m"):
    return {"model": model, "task": "position_nll", "length": length, "depth": depth, "metric": metric, "value": value, "ci_low": value - 0.1, "ci_high": None}


def drawn_rows():
    rows = [row(4 - d - (model == "n"), d, length=length, model=model) for model in "mn" for length in (1024, 4096) for d in (0.25, 0.75)]
    return rows + [row(20.0, None, "perplexity", length) for length in (1024, 4096)]


def test_the_picture_is_loss_against_position_with_the_trained_window(tmp_path, figures):
    (tmp_path / "run.json").write_text(json.dumps({"trained_windows": {"m": 2048, "n": None}}))
    (path,) = plot_results(drawn_rows(), tmp_path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    (axis,) = figures[0].axes
    curves, window = axis.lines[:4], axis.lines[4:]
    assert [line.get_xydata().tolist() for line in curves] == [[[256, y], [768, y - 0.5]] if n == 1024 else [[1024, y], [3072, y - 0.5]] for y in (3.75, 2.75) for n in (1024, 4096)]
    assert [line.get_label() for line in curves] == ["m (1k)", "m (4k)", "n (1k)", "n (4k)"]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 4
    assert [line.get_xdata() for line in window] == [[2048, 2048]]
    assert [text.get_text() for text in axis.texts] == [" trained window 2k"]


def test_the_picture_needs_no_trained_window(tmp_path, figures):
    plot_results(drawn_rows(), tmp_path)
    assert len(figures[0].axes[0].lines) == 4


def test_a_report_takes_no_loss_for_a_share(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(drawn_rows()))
    page = write_report(tmp_path, tmp_path / "r.html").read_text()
    assert "Where in the context" not in page
    assert "position_nll: perplexity" in page
