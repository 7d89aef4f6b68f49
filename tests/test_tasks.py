"""Tasks without a model: cells of the exact length, every token scored once, answers judged as greedy decoding would."""

import functools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_longctx.evals import _haystack, passkey
from hf_longctx.evaluation import score_cells
from hf_longctx.task import Cell, Scored, Task, encode, exact_match, load_task, opening, task_names
from tests.conftest import byte_tokenizer, tiny_model

BYTES = byte_tokenizer()


@functools.cache
def bos_tokenizer():
    """Bytes, and <s> before and </s> behind every text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return tokenizer


@functools.cache
def merging_tokenizer():
    """BPE whose tokens span words, digits and seams: "is 1" is one token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    lines = [f"is {n}{rng.integers(10000)}" for n in range(1, 100) for _ in range(20)] + [passkey.GARBAGE, _haystack.HEAD.format(kind="number"), passkey.HEAD] * 5
    raw.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


TOKENIZERS = {"bytes": lambda: BYTES, "bos": bos_tokenizer, "merging": merging_tokenizer}


def prose(size=3000, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 120, size).astype(np.uint16)


DOORS = {"lm_eval"}  # to tasks of others
BROUGHT = {"qa_1", "qa_2"}  # tasks that need a file of the user's
OPTIONS = {"longppl": {"name": "longppl", "context": 256, "stride": 64}}
WORDY = encode(BYTES, " ".join("".join(np.random.default_rng(i).choice(list("aeioubdfgklmnprst"), 5)) for i in range(900)))


def same(a: Cell, b: Cell) -> bool:
    return np.array_equal(a.ids, b.ids) and (a.start, a.stop, a.depth, a.cluster, a.answers) == (b.start, b.stop, b.depth, b.cluster, b.answers)


# --- registry


def test_every_task_survives_a_round_trip():
    assert set(task_names()) == {
        "cwe", "effective_remembrance", "fwe", "kv_retrieval", "lm_eval", "longchat_lines", "longppl", "needle", "niah_multikey_1", "niah_multikey_2",
        "niah_multikey_3", "niah_multiquery", "niah_multivalue", "niah_single_1", "niah_single_2", "niah_single_3", "passkey", "perplexity",
        "position_nll", "qa_1", "qa_2", "state_norm", "tail_perplexity", "vt",
    }  # fmt: skip
    for name in {*task_names()} - DOORS:
        made = load_task(name)
        for task in (made, made if name in BROUGHT else made.for_lengths([8192, 16384])):
            assert load_task(task.to_dict()) == task
            assert load_task(task) is task
            assert task.name == name
            assert task.source


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("paskey", r"unknown task 'paskey'; did you mean 'passkey'\?"),
        ({"name": "passkey", "depth": 3}, r"passkey: unknown key 'depth'; did you mean 'depths'\?"),
        ({"name": "passkey", "n": 0}, "passkey: n: .*greater than 0, got 0"),
        ({"name": "perplexity", "stride": "many"}, "perplexity: stride: expected a number of tokens"),
        ({"n": 3}, "a task needs a name, got {'n': 3}; there is: cwe, effective_remembrance, fwe, kv_retrieval, .*, passkey, perplexity"),
    ],
)
def test_what_is_refused_names_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_task(spec)
    assert "\n" not in str(caught.value)


def test_options_are_read_as_written():
    assert load_task({"name": "tail_perplexity", "tokens": "1k", "longest": "32k"}).longest == 32768


@pytest.mark.parametrize("name", sorted({*task_names()} - BROUGHT - DOORS))
def test_cells_depend_on_tokenizer_documents_length_and_seed_alone(name):
    task = load_task(OPTIONS.get(name, name))
    documents, length = ([WORDY], 2500) if name == "cwe" else ([prose()], 1500)
    first = task.cells(BYTES, documents, length, seed=0)
    np.random.seed(5)
    assert all(map(same, first, task.cells(BYTES, documents, length, seed=0)))
    if not task.needs_text or name.startswith("niah"):
        assert not all(map(same, first, task.cells(BYTES, documents, length, seed=1)))
        assert len({cell.ids[cell.start :].tobytes() + "".join(cell.answers).encode() for cell in first}) > 99  # another key every time


# --- retrieval

PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"
RETRIEVAL = {"passkey": "What is the pass key? The pass key is", "niah_single_2": "mentioned in the provided text is"}


def retrieval(name, kind, length=640, n=3, depths=4, seed=0):
    tokenizer = TOKENIZERS[kind]()
    return tokenizer, load_task({"name": name, "n": n, "depths": depths}).cells(tokenizer, [prose(900), prose(2000, 1)], length, seed)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", RETRIEVAL)
def test_every_cell_has_the_exact_length_and_hides_its_answer(name, kind):
    for length in (640, 641, 700):
        tokenizer, cells = retrieval(name, kind, length)
        assert len(cells) == 12
        for cell in cells:
            assert len(cell.ids) == length
            assert cell.stop == length + 1  # the token after the answer is asked for too
            text, answer = tokenizer.decode(cell.ids), tokenizer.decode(cell.ids[cell.start :])
            key = answer.split()[-1]
            assert len(key) == {"passkey": 5, "niah_single_2": 7}[name]
            assert text.endswith(f"{RETRIEVAL[name]} {key}")
            assert text.count(key) == {"passkey": 3, "niah_single_2": 2}[name]
            assert (cell.ids == 1).sum() == (kind == "bos")
            assert (cell.ids[0] == 1) == (kind == "bos")
            assert not (cell.ids == 2).any() or kind == "merging"  # no end-of-sequence token slips in


def test_a_merge_over_the_seam_is_what_is_scored():
    tokenizer, cells = retrieval("passkey", "merging")
    question = encode(tokenizer, PASSKEY_QUESTION)
    merged = [cell for cell in cells if not np.array_equal(cell.ids[cell.start - len(question) : cell.start], question)]
    assert merged  # otherwise this tokenizer shows nothing
    for cell in merged:
        answer = tokenizer.decode(cell.ids[cell.start :])
        key = answer.split()[-1]
        tail = encode(tokenizer, f"{PASSKEY_QUESTION} {key}")
        assert np.array_equal(cell.ids[-len(tail) :], tail)  # exactly what the tokenizer makes of question and answer
        kept = len(tail) - (len(cell.ids) - cell.start)
        assert np.array_equal(tail[:kept], question[:kept])  # the prompt is the question, as far as it is left whole
        assert tail[kept] != question[kept]
        assert answer.endswith(f" {key}")
        assert len(answer) > len(f" {key}")


@pytest.mark.parametrize("kind", ["bytes", "bos"])
def test_depth_runs_from_right_behind_the_head_to_right_before_the_question(kind):
    tokenizer, cells = retrieval("passkey", kind, n=1, depths=3)
    texts = [tokenizer.decode(cell.ids, skip_special_tokens=True) for cell in cells]
    start, end = passkey.HEAD, f"is the pass key.\n{PASSKEY_QUESTION}"
    assert [cell.depth for cell in cells] == [0.0, 0.5, 1.0]
    assert [text.startswith(f"{start}\nThe pass key is") for text in texts] == [True, False, False]
    assert [end in text for text in texts] == [False, False, True]
    assert abs(texts[1].index("\nThe pass key is") - len(start) - texts[2].index("\nThe pass key is") / 2 + len(start) / 2) <= len(passkey.GARBAGE) / 2
    assert all(text.split("\nThe pass key is")[0].endswith(passkey.GARBAGE) for text in texts[1:])  # between whole paragraphs


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", RETRIEVAL)
def test_too_short_a_length_is_one_line(name, kind):
    with pytest.raises(ValueError, match=r"a prompt of 40 tokens is too short: the task itself takes [0-9]+$") as caught:
        retrieval(name, kind, length=40)
    least = int(str(caught.value).split()[-1])
    assert least > 40


def test_the_least_length_that_the_message_names_is_enough():
    with pytest.raises(ValueError, match="takes") as caught:
        retrieval("passkey", "bos", length=40)
    least = int(str(caught.value).split()[-1])
    assert len(retrieval("passkey", "bos", length=least)[1][0].ids) == least
    with pytest.raises(ValueError, match="too short"):
        retrieval("passkey", "bos", length=least - 1)


def test_a_haystack_must_be_long_enough():
    with pytest.raises(ValueError, match=r"no document has 2001 tokens for the haystack \(the longest has 2000\)"):
        retrieval("niah_single_2", "bytes", length=2001)
    with pytest.raises(ValueError, match=r"the longest has 0\)"):
        load_task("niah_single_2").cells(BYTES, [], 700, 0)
    # 900 tokens do for 900, and the short document is then in use as well
    assert len(retrieval("niah_single_2", "bytes", length=900)[1]) == 12


# --- judging answers


def judged(text: str, said: str, tokenizer=BYTES) -> bool:
    """Forced scoring of the answer `text` by a model that would say `said`."""
    ids, best = encode(tokenizer, f"key is {text}"), encode(tokenizer, said)
    size = len(encode(tokenizer, text))
    cell = Cell(ids, len(ids) - size, len(ids) + 1)
    return exact_match(cell, Scored(np.zeros(size + 1), np.resize(best, size + 1)), tokenizer)


@pytest.mark.parametrize(
    ("said", "right"),
    [("12345.", True), ("12345 ", True), ("12345</", True), ("12346.", False), ("02345.", False), ("123456", False), ("12345\n", True), ("1234 5", False)],
)
def test_an_answer_is_right_if_it_is_the_key_and_ends_there(said, right):
    assert judged("12345", said) == right


def test_a_number_after_a_space_is_another_number():
    """A token " 7" does not prolong the key, whatever a decoder makes of a token on its own."""
    raw = Tokenizer(models.BPE(vocab={"▁": 0, "7": 1, "▁7": 2, "k": 3}, merges=[("▁", "7")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)
    cell = Cell(np.array([3, 1]), 1, 3)
    assert tokenizer.decode([2]) == "7"
    assert exact_match(cell, Scored(np.zeros(2), np.array([1, 2])), tokenizer)
    assert not exact_match(cell, Scored(np.zeros(2), np.array([1, 1])), tokenizer)


def test_accuracy_is_counted_over_all_and_by_depth():
    task = load_task({"name": "passkey", "n": 2, "depths": 2})
    cells = task.cells(BYTES, [], 400, 0)
    after = encode(BYTES, ".")
    outputs = [Scored(np.zeros(len(c.ids) - c.start + 1), np.append(c.ids[c.start :], after)) for c in cells]
    outputs[3].best[1] += 1
    overall, top, bottom = task.score(cells, outputs, BYTES)
    assert (overall.value, overall.n, overall.depth, overall.values) == (0.75, 4, None, (1, 1, 1, 0))
    assert (top.value, top.n, top.depth, top.values) == (1.0, 2, 0.0, ())
    assert (bottom.value, bottom.n, bottom.depth) == (0.5, 2, 1.0)
    assert (overall.ci_low, overall.ci_high) == pytest.approx((0.3006, 0.9544), abs=1e-4)


# --- perplexity


def scored(cells, first: int) -> dict[int, list[int]]:
    """Document -> indices of the tokens that were scored; documents are numbered from 1000 x cluster."""
    found: dict[int, list[int]] = {}
    for cell in cells:
        assert cell.start >= 1
        found.setdefault(cell.cluster, []).extend((cell.ids[cell.start : cell.stop] - 1000 * cell.cluster).tolist())
        assert cell.ids[0] == 1 or not first
    return found


def numbered(*sizes) -> list[np.ndarray]:
    return [np.arange(size) + 1000 * i for i, size in enumerate(sizes)]


@pytest.mark.parametrize("kind", ["bytes", "bos"])
@pytest.mark.parametrize(("length", "stride"), [(16, 4), (16, 15), (16, 16), (16, 100), (16, 1), (99, 7), (100, 7), (101, 7), (102, 7), (500, 7), (2, 1), (2, 9), (3, 2)])
def test_every_token_is_scored_once(kind, length, stride):
    first = int(kind == "bos")
    task = load_task({"name": "perplexity", "stride": stride, "tokens": 100})
    cells = task.cells(TOKENIZERS[kind](), numbered(99, 100, 101, 250), length, 0)
    found = scored(cells, first)
    assert list(found) == [0, 1, 2]
    for number, tokens in found.items():
        offset = 1000 * (number + 1) - 1000 * number  # the document of 99 tokens is left out, so numbers are one behind
        assert sorted(t - offset for t in tokens) == list(range(1 - first, 100))
    assert all(2 <= len(cell.ids) <= length for cell in cells)


def test_a_window_is_full_wherever_it_can_be():
    cells = load_task({"name": "perplexity", "stride": 7, "tokens": 100}).cells(BYTES, numbered(100), 30, 0)
    assert {len(cell.ids) for cell in cells} == {30}
    assert all(cell.start >= 30 - 7 for cell in cells[1:])


def test_the_longest_length_decides_how_much_is_read_of_how_many():
    task = load_task({"name": "perplexity", "documents": 2}).for_lengths([32, 64, 128])
    assert task.tokens == 128
    cells = task.cells(BYTES, numbered(127, 128, 200, 300), 32, 0)
    assert {cell.cluster for cell in cells} == {0, 1}
    assert max(cell.ids.max() for cell in cells) == 2000 + 127


@pytest.mark.parametrize(("length", "options", "message"), [(1, {}, "at least 2 tokens, got 1"), (64, {"tokens": 1}, "at least 2 tokens"), (2001, {}, r"no document has 2001 tokens \(the longest has 1500\)")])
def test_perplexity_refuses_what_it_cannot_measure(length, options, message):
    with pytest.raises(ValueError, match=message):
        load_task({"name": "perplexity"} | options).cells(BYTES, numbered(1500, 20), length, 0)


@torch.no_grad()
def test_perplexity_equals_a_token_by_token_computation():
    model, (length, stride, size) = tiny_model(), (24, 10, 61)
    documents = [np.random.default_rng(i).integers(3, 259, size) for i in range(2)]
    task = load_task({"name": "perplexity", "stride": stride, "tokens": size})
    cells = task.cells(BYTES, documents, length, 0)
    (result,) = task.score(cells, score_cells(model, cells), BYTES)
    total = []
    for text in documents:
        for t in range(1, size):
            end = length if t < length else min(size, length + ((t - length) // stride + 1) * stride)
            ids = torch.from_numpy(text[end - length : t + 1])[None]
            total.append(-model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item())
    assert result.n == len(total) == 2 * (size - 1)
    assert result.value == pytest.approx(np.exp(np.mean(total)), rel=1e-5)
    assert np.average(result.values, weights=result.weights) == pytest.approx(np.mean(total), rel=1e-5)
    assert len(set(result.weights)) > 1  # cells differ in size, so weights matter


# --- tail perplexity


def spans(cells) -> list[tuple[int, ...]]:
    return [tuple(cell.targets.tolist()) for cell in cells]


@pytest.mark.parametrize("kind", ["bytes", "bos"])
def test_the_same_tokens_are_scored_at_every_length(kind):
    lengths, tokenizer = [20, 50, 128], TOKENIZERS[kind]()
    task = load_task({"name": "tail_perplexity", "spans": 5}).for_lengths(lengths)
    documents = numbered(127, 128, 137, 140, 500, 999)
    found = {length: task.cells(tokenizer, documents, length, 0) for length in lengths}
    assert task.tokens == 10  # half the shortest
    assert spans(found[20]) == spans(found[50]) == spans(found[128])
    assert [c.cluster for c in found[128]] == [1, 2, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5]
    for length, cells in found.items():
        for cell in cells:
            assert len(cell.ids) == length
            assert cell.stop - cell.start == 10
            text = cell.ids[int(kind == "bos") :]
            assert np.array_equal(np.diff(text), np.ones(len(text) - 1))  # what stands before a span is what the document has there
            assert (cell.ids[0] == 1) == (kind == "bos")
    taken = [t for span in spans(found[20]) for t in span]
    assert len(taken) == len(set(taken))  # no overlap


def test_spans_reach_the_end_of_the_document():
    task = load_task({"name": "tail_perplexity", "spans": 3, "tokens": 8}).for_lengths([32, 64])
    ends = [cell.ids[-1] + 1 for cell in task.cells(BYTES, numbered(164), 32, 0)]
    assert ends == [64, 114, 164]


def test_a_span_is_what_was_asked_for_or_an_error():
    task = load_task({"name": "tail_perplexity", "tokens": 16}).for_lengths([16, 64])
    assert task.tokens == 16
    assert {c.stop - c.start for c in task.cells(BYTES, numbered(200), 64, 0)} == {16}
    with pytest.raises(ValueError, match="spans of 16 tokens leave no context at length 16"):
        task.cells(BYTES, numbered(200), 16, 0)
    with pytest.raises(ValueError, match=r"no document has 64 tokens \(the longest has 60\)"):
        task.cells(BYTES, numbered(60), 32, 0)
    with pytest.raises(ValueError, match="set longest higher"):
        task.cells(BYTES, numbered(200), 128, 0)


def test_the_default_span_is_at_most_1024_tokens():
    assert load_task("tail_perplexity").for_lengths([8192, 32768]).tokens == 1024
    assert load_task("tail_perplexity").for_lengths([512, 32768]).tokens == 256


def test_the_opening_is_the_tokenizers_own():
    assert [opening(TOKENIZERS[kind]()).tolist() for kind in TOKENIZERS] == [[], [1], []]


def test_a_task_says_what_it_lacks():
    with pytest.raises(NotImplementedError):
        Task().cells(BYTES, [], 10, 0)
