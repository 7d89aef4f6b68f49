"""RULER's retrieval tasks and key-value retrieval without a model: exact lengths, one right answer, found by reading the prompt."""

import functools
import hashlib
import json
import re
import uuid

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_longctx.evals import _haystack, vt
from hf_longctx.recipe import json_schema
from hf_longctx.task import Cell, Scored, encode, load_task, opening, task_names
from tests.conftest import byte_tokenizer
from tests.test_tasks import bos_tokenizer, merging_tokenizer, prose

NIAH = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"]
LINES = ["niah_single_1", "niah_multikey_2", "niah_multikey_3"]
UUIDS = ["niah_single_3", "niah_multikey_3", "kv_retrieval"]
EVERY = [*NIAH, "kv_retrieval", "vt"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@functools.cache
def tokenizer_of(kind, folder=None):
    """One object a kind: `documents` is cached for it."""
    made = {"bytes": byte_tokenizer, "bos": bos_tokenizer, "merging": merging_tokenizer}
    return AutoTokenizer.from_pretrained(folder) if kind == "smollm2" else made[kind]()


@pytest.fixture(params=["bytes", "bos", "merging", "smollm2"])
def tokenizer(request):
    return tokenizer_of(request.param, request.getfixturevalue("smollm2") if request.param == "smollm2" else None)


@functools.cache
def documents(tokenizer) -> list[np.ndarray]:
    """Words of letters, none of which is a key."""
    rng = np.random.default_rng(0)
    text = " ".join("".join(rng.choice(list(LETTERS), rng.integers(2, 4))) for _ in range(9000))
    return [encode(tokenizer, text), encode(tokenizer, text[::-1])]


def cells_of(tokenizer, name, length=2000, seed=0, **options) -> list[Cell]:
    small = {"n": 6} if name == "vt" else {"n": 2, "depths": 3}
    return load_task({"name": name} | small | options).cells(tokenizer, documents(tokenizer), length, seed)


def texts_of(tokenizer, cell) -> tuple[str, str]:
    """Prompt and answer. Where a token spans the seam, the answer begins with the end of the prompt."""
    return tokenizer.decode(cell.ids[: cell.start], skip_special_tokens=True), tokenizer.decode(cell.ids[cell.start :])


def whole(tokenizer, cell) -> str:
    return tokenizer.decode(cell.ids, skip_special_tokens=True)


def law_of_exact_length(tokenizer, cells, length: int) -> None:
    for cell in cells:
        assert len(cell.ids) == length
        assert cell.ids.dtype == np.int64
        assert cell.stop == length + 1  # the token after the answer is asked for too
        for bos in opening(tokenizer):
            assert np.flatnonzero(cell.ids == bos).tolist() == [0]


# --- every task


@pytest.mark.parametrize("name", EVERY)
def test_every_cell_has_the_exact_length(name, tokenizer):
    for length in (1900, 1901, 1902, 1911, 1950, 2003, 2048):
        law_of_exact_length(tokenizer, cells_of(tokenizer, name, length), length)


@pytest.mark.parametrize("name", EVERY)
def test_the_answer_is_what_a_reader_finds(name, tokenizer):
    for cell in cells_of(tokenizer, name):
        text, (_, answer) = whole(tokenizer, cell), texts_of(tokenizer, cell)
        found = READERS.get(name, read_niah)(text)
        assert text.endswith(found)
        assert answer.endswith(found)
        if name != "vt":
            assert text.count(found) == 2  # in its place and at the end
            assert re.fullmatch("[1-9][0-9]{6}", found) if name not in UUIDS else str(uuid.UUID(found)) == found


def read_niah(text: str) -> str:
    (key,) = re.findall(r"mentioned in the provided text\? The special magic \w+ for (\S+) mentioned in the provided text is", text)
    (value,) = re.findall(rf"One of the special magic \w+ for {key} is: ([\w-]+)\.", text)
    return value


def read_pairs(text: str) -> str:
    body = re.search(r"JSON data:\n(\{.*?\})\n", text, re.S)[1]
    return json.loads(body, object_pairs_hook=unique)[re.search(r'\nKey: "(.*?)"\nCorresponding value: "', text)[1]]


def unique(pairs) -> dict[str, str]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def read_chain(text: str) -> str:
    part = text.split(vt.HEAD)[2]
    name = re.search(r"Find all variables that are assigned the value (\d{5})", part)[1]
    found = []
    while (step := re.findall(rf"^VAR ([A-Z]+) = (?:VAR )?{name}$", part, re.M)) != []:
        (name,) = step
        found.append(name)
    assert len(set(found)) == 5
    return " ".join(found)


READERS = {"kv_retrieval": read_pairs, "vt": read_chain}


@pytest.mark.parametrize("name", EVERY)
def test_too_short_a_length_is_one_line_and_the_least_is_enough(name):
    tokenizer, one = tokenizer_of("bytes"), {"n": 1} if name == "vt" else {"n": 1, "depths": 1}
    with pytest.raises(ValueError, match=r"a prompt of 40 tokens is too short: the task itself takes [0-9]+$") as caught:
        cells_of(tokenizer, name, 40, **one)
    longest = int(str(caught.value).split()[-1]) + 20  # words differ in length, so trials do
    assert len(cells_of(tokenizer, name, longest, **one)[0].ids) == longest


@pytest.mark.parametrize("name", EVERY)
def test_cells_are_a_function_of_the_seed(name, tokenizer):
    first, again, other = (b"".join(c.ids.tobytes() for c in cells_of(tokenizer, name, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({c.ids[c.start :].tobytes() for c in cells_of(tokenizer, name)}) == 6  # another answer in every trial


@pytest.mark.parametrize("name", EVERY)
def test_documents_matter_where_they_are_needed(name):
    task = load_task(name)
    if task.needs_text:
        with pytest.raises(ValueError, match=r"no document has 2000 tokens for the haystack \(the longest has 0\)"):
            task.cells(byte_tokenizer(), [], 2000, 0)
    else:
        assert len(task.cells(byte_tokenizer(), [], 2000, 0)) == (100 if name == "vt" else 200)


def test_niah_single_2_is_what_it_was():
    """The hash was taken before its code became that of the whole family."""
    for seed, expected in (
        (0, "478fa53fe70f18a5c694309a3a06032dcebb405eeff2679800ee777195526b9a"),
        (1, "30d24c6fb531f8740f624e042868ff201aaeb7797a4aacf509370fda0ae85111"),
    ):
        cells = load_task({"name": "niah_single_2", "n": 3, "depths": 4}).cells(byte_tokenizer(), [prose(900), prose(2000, 1)], 640, seed)
        assert hashlib.sha256(b"".join(c.ids.tobytes() + f"{c.start} {c.stop} {c.depth}|".encode() for c in cells)).hexdigest() == expected


# --- haystacks


@pytest.mark.parametrize("name", NIAH)
def test_a_needle_stands_where_its_depth_says(name, tokenizer):
    task = load_task(name)
    head = _haystack.HEAD.format(kind=task.kind)
    for cell in cells_of(tokenizer, name, n=2, depths=5):
        text = whole(tokenizer, cell)
        value = read_niah(text)
        hay = text[len(head) : text.index("\nWhat is the special magic") + 1]
        sentence = re.search(rf"One of the special magic \w+ for \S+ is: {value}\.", hay)
        room = len(hay) - len(sentence[0])
        assert text.startswith(head)
        assert abs(sentence.start() / room - cell.depth) < (0.05 if name not in LINES and name != "niah_multikey_1" else 0.2)
        assert (not hay[: sentence.start()].strip()) == (cell.depth == 0) or name == "niah_multikey_1"
        assert (not hay[sentence.end() :].strip()) == (cell.depth == 1) or name == "niah_multikey_1"


@pytest.mark.parametrize("name", LINES)
def test_a_needle_stands_between_whole_lines(name, tokenizer):
    task = load_task(name)
    line = {"niah_single_1": re.escape(_haystack.NOISE[:-1])}.get(name, r"One of the special magic \w+ for \S+ is: [\w-]+\.")
    needle = rf"One of the special magic {task.kind}s for \S+ is: [\w-]+\."
    for cell in cells_of(tokenizer, name):
        text = whole(tokenizer, cell)
        lines = text[len(_haystack.HEAD.format(kind=task.kind)) : text.index("\nWhat is the special magic")].split("\n")
        broken = [i for i, each in enumerate(lines) if not re.fullmatch(f"{line}|{needle}", each)]
        assert broken in ([], [0]) or (cell.depth == 0 and broken == [1])  # the first line lacks its beginning, no other
        assert len(lines) > 8


@pytest.mark.parametrize("name", ["niah_multikey_1", "niah_multikey_2", "niah_multikey_3"])
def test_distractors_have_other_keys_and_values(name, tokenizer):
    for cell in cells_of(tokenizer, name):
        pairs = re.findall(r"One of the special magic \w+ for (\S+) is: ([\w-]+)\.", whole(tokenizer, cell))
        keys, values = zip(*pairs, strict=True)
        assert len(pairs) == 4 if name == "niah_multikey_1" else len(pairs) > 8
        assert len(set(values)) == len(pairs)
        assert len(set(keys)) == len(pairs) or name == "niah_multikey_2"  # where only that of the question is unique


def test_words_are_enough_and_all_different():
    assert len(set(_haystack.ADJECTIVES)) == len(_haystack.ADJECTIVES)
    assert len(set(_haystack.NOUNS)) == len(_haystack.NOUNS)
    assert len(_haystack.ADJECTIVES) * len(_haystack.NOUNS) == 4464  # as draw_pair_of_words says


def test_the_key_asked_for_is_never_that_of_a_distractor():
    lines = [("for dusty-river is: 1234567.", np.arange(2)), ("for calm-river is: 7654321.", np.arange(3)), ("for calm-zebra is: 1111111.", np.arange(4))]
    left = _haystack.shuffled(np.random.default_rng(0), lines, ("dusty-river", "1111111"))
    assert [len(ids) for ids in left] == [3]


# --- vt


def test_a_chain_is_in_order_and_its_example_too(tokenizer):
    for cell in cells_of(tokenizer, "vt"):
        text = whole(tokenizer, cell)
        example, part = text.split(vt.HEAD)[1:]
        names = read_chain(text).split()
        assert [part.index(f"VAR {name} = ") for name in names] == sorted(part.index(f"VAR {name} = ") for name in names)
        assert re.findall(r"^VAR ([A-Z]{3}) = ", example, re.M) == re.search(r"they are:((?: [A-Z]{3}){5})\n", example)[1].split()
        assert cell.depth is None


# --- key-value pairs


def test_as_many_pairs_as_fit_and_at_the_place_asked_for(tokenizer):
    for cell in cells_of(tokenizer, "kv_retrieval", 3000, depths=5):
        text = whole(tokenizer, cell)
        keys = re.findall(r'"([\w-]{36})": "', text)
        index = keys.index(re.search(r'Key: "(.*?)"', text)[1])
        assert index == round(cell.depth * (len(keys) - 1))
        pair = len(encode(tokenizer, f' "{keys[0]}": "{keys[1]}",\n'))
        assert text.count("\n\n") < pair + 3
        assert len(keys) >= 3000 // pair - 8


def test_a_number_of_pairs_can_be_asked_for():
    tokenizer = tokenizer_of("bytes")
    for cell in cells_of(tokenizer, "kv_retrieval", 8000, pairs=75):
        text = whole(tokenizer, cell)
        assert len(re.findall(r'"[\w-]{36}": "', text)) == 75
        assert len(cell.ids) < 8000
        assert "\n\n " not in text
    with pytest.raises(ValueError, match=r"a prompt of 8000 tokens is too short: it has room for 9[0-9] pairs, not 140$"):
        cells_of(tokenizer, "kv_retrieval", 8000, pairs=140)
    assert load_task({"name": "kv_retrieval", "pairs": 75}).to_dict()["pairs"] == 75


# --- judging


@pytest.mark.parametrize(("name", "after", "right"), [
    ("niah_single_3", ".", True), ("niah_single_3", "a", False), ("niah_single_3", "-", False), ("niah_single_3", "7", False), ("niah_single_3", "z", True),
    ("kv_retrieval", '"', True), ("kv_retrieval", "F", False), ("niah_single_1", "7", False), ("niah_single_1", "a", True),
    ("vt", "A", False), ("vt", " ", True), ("vt", "\n", True),
])  # fmt: skip
def test_nothing_may_prolong_an_answer(name, after, right):
    tokenizer = tokenizer_of("bytes")
    task, cells = load_task(name), cells_of(tokenizer, name)
    said = [np.append(cell.ids[cell.start :], encode(tokenizer, after)) for cell in cells]
    outputs = [Scored(np.zeros(len(best)), best) for best in said]
    assert task.score(cells, outputs, tokenizer)[0].value == right
    outputs[0].best[-2] += 1
    assert task.score(cells, outputs, tokenizer)[0].value == pytest.approx(right * 5 / 6)


def test_tasks_are_offered_by_the_command_line_and_the_recipe():
    from hf_longctx.cli.main import _task_names

    assert set(EVERY) <= set(_task_names())
    assert not any(name.startswith("_") for name in task_names())
    assert all(name in json.dumps(json_schema()) for name in EVERY)
