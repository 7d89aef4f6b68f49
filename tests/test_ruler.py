"""RULER's retrieval tasks and key-value retrieval without a model: exact lengths, one right answer, found by reading the prompt."""

import collections
import functools
import hashlib
import json
import re
import sys
import uuid

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_longctx.evals import _haystack, cwe, fwe, vt
from hf_longctx.recipe import json_schema
from hf_longctx.stats import bootstrap_means, wilson
from hf_longctx.task import Cell, Scored, encode, load_task, load_tasks, opening, task_class, task_names
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
    small = {"n": 6, "scoring": "forced"} if name == "vt" else {"n": 2, "depths": 3}
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
    task, cells = load_task({"name": name, "scoring": "forced"} if name == "vt" else name), cells_of(tokenizer, name)
    said = [np.append(cell.ids[cell.start :], encode(tokenizer, after)) for cell in cells]
    outputs = [Scored(np.zeros(len(best)), best) for best in said]
    assert task.score(cells, outputs, tokenizer)[0].value == right
    outputs[0].best[-2] += 1
    assert task.score(cells, outputs, tokenizer)[0].value == pytest.approx(right * 5 / 6)


def test_ruler_stands_for_its_tasks_that_need_no_files():
    tasks = load_tasks([{"name": "ruler", "n": 3, "chat": True}, "vt", "passkey"])
    every = {name for name in task_names() if sys.modules[task_class(name).__module__].__doc__.startswith("RULER's")}
    assert {task.name for task in tasks[:-2]} == every - {"qa_1", "qa_2"}
    assert [(task.n, task.chat) for task in tasks[:-2]] == [(3, True)] * 11
    assert tasks[-2:] == [load_task("vt"), load_task("passkey")]
    with pytest.raises(ValueError, match=r"^niah_multivalue: unknown key 'depths'"):
        load_tasks([{"name": "ruler", "depths": 3}])
    with pytest.raises(ValueError, match=r"^unknown task 'rular'; did you mean 'ruler'"):
        load_tasks(["rular"])


def test_tasks_are_offered_by_the_command_line_and_the_recipe():
    from hf_longctx.cli.main import _task_names

    assert {*EVERY, "ruler"} <= set(_task_names())
    assert not any(name.startswith("_") for name in task_names())
    schema = json.dumps(json_schema())
    assert all(name in schema for name in (*EVERY, '"ruler"'))


# --- what the model writes by itself

FREE = ["niah_multivalue", "niah_multiquery", "cwe", "fwe", "vt", *NIAH]
WRITTEN = dict.fromkeys(["niah_multivalue", "niah_multiquery", *NIAH], 128) | {"cwe": 120, "fwe": 50, "vt": 30}  # RULER's tokens_to_generate
LEAST = {"cwe": 3200}  # bytes


def free_cells(tokenizer, name, length=None, seed=0, **options) -> list[Cell]:
    small = {"n": 2, "depths": 3, "scoring": "generated"} if name in NIAH else {"n": 4}
    return load_task({"name": name} | small | options).cells(tokenizer, free_documents(tokenizer), length or LEAST.get(name, 2200), seed)


@functools.cache
def free_documents(tokenizer) -> list[np.ndarray]:
    """Sentences of words of four letters and more, none of which is a key."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(LETTERS), rng.integers(4, 8))) for _ in range(1500)]
    return [encode(tokenizer, " ".join(word + ("." if i % 9 == 8 else "") for i, word in enumerate(rng.choice(words, 6000))))]


@pytest.mark.parametrize("name", FREE)
def test_a_prompt_and_what_may_be_written_have_the_exact_length(name, tokenizer):
    least = LEAST.get(name, 2200)
    for length in (least, least + 1, 7000):
        cells = free_cells(tokenizer, name, length)
        assert len(cells) == (6 if name in NIAH else 4)
        for cell in cells:
            assert (len(cell.ids), cell.start, cell.stop, cell.size) == (length - WRITTEN[name], length - WRITTEN[name], length, length)
            assert cell.free
            assert cell.ids.dtype == np.int64
            for bos in opening(tokenizer):
                assert np.flatnonzero(cell.ids == bos).tolist() == [0]


@pytest.mark.parametrize("name", FREE)
def test_a_reader_of_the_prompt_finds_the_answers(name, tokenizer):
    for cell in free_cells(tokenizer, name):
        text = whole(tokenizer, cell)
        assert sorted(READERS_OF_SEVERAL.get(name, read_several)(text)) == sorted(cell.answers)
        assert not any(text.rstrip().endswith(answer) for answer in cell.answers)


def read_several(text: str) -> list[str]:
    """All values of all keys that the question names."""
    (asked,) = re.findall(r"special magic \w+ for ([^?]+?) mentioned in the provided text (?:is|are)$", text)
    return [v for key in re.split(", and |, ", asked) for v in re.findall(rf"One of the special magic \w+ for {key} is: ([\w-]+)\.", text)]


def read_common(text: str) -> list[str]:
    counts = numbered_words(text.split(cwe.HEAD)[2].split("\nQuestion")[0])
    return [word for word, count in counts.items() if count == max(counts.values())]


def numbered_words(text: str) -> dict[str, int]:
    found = re.findall(r"(\d+)\. (\w+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return collections.Counter(word for _, word in found)


def read_frequent(text: str) -> list[str]:
    counts = collections.Counter(re.findall(r"\b[a-z]{6}\b", text.removeprefix(fwe.HEAD).split("\nQuestion")[0]))
    assert counts.most_common(4)[-1][1] < counts.most_common(3)[-1][1]
    return [word for word, _ in counts.most_common(3)]


READERS_OF_SEVERAL = {"cwe": read_common, "fwe": read_frequent, "vt": lambda text: read_chain(text).split()}


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery"])
def test_four_needles_stand_behind_full_stops_in_places_of_their_own(name, tokenizer):
    places = []
    for cell in free_cells(tokenizer, name, 4200, n=8):
        text = whole(tokenizer, cell)
        hay = text[text.index("\n") : text.index("\nWhat are all")]
        needles = list(re.finditer(r"One of the special magic numbers for (\w+-\w+) is: (\d{7})\.", hay))
        assert len({needle[2] for needle in needles}) == 4
        assert len({needle[1] for needle in needles}) == (1 if name == "niah_multivalue" else 4)
        if tokenizer is not tokenizer_of("merging"):  # whose stops are parts of other tokens
            assert all(hay[: needle.start()].rstrip().endswith(".") or needle.start() < 99 for needle in needles)
        places += [needle.start() / len(hay) for needle in needles]
        assert cell.depth is None
    assert min(places) < 0.2 < 0.8 < max(places)
    assert len({round(place, 4) for place in places}) > 28


@pytest.mark.parametrize(("length", "repeats", "example", "of"), [(3200, (6, 1), (3, 1), 20), (9000, (30, 3), (10, 3), 40)])
def test_common_words_are_as_many_as_in_ruler(length, repeats, example, of):
    tokenizer = tokenizer_of("bytes")
    seen = set()
    for cell in free_cells(tokenizer, "cwe", length):
        first, second = whole(tokenizer, cell).split(cwe.HEAD)[1:]
        shown, answer = first.split("\nQuestion")
        for counts, (often, rarely) in ((numbered_words(shown), example), (numbered_words(second.split("\nQuestion")[0]), repeats)):
            assert sorted(counts.values(), reverse=True) == [often] * 10 + [rarely] * (len(counts) - 10)
        assert len(numbered_words(shown)) == of
        assert set(numbered_words(answer.split("list are: ")[1])) == {word for word, count in numbered_words(shown).items() if count == example[0]}
        assert second.count("\n\n") < 16 * repeats[1]  # no room for one word more
        seen |= set(cell.answers)
    assert len(seen) > 30


def test_frequencies_are_those_of_rulers_zeta_distribution():
    tokenizer = tokenizer_of("bytes")
    (cell,) = free_cells(tokenizer, "fwe", 30000, n=1)
    words = whole(tokenizer, cell).removeprefix(fwe.HEAD).split("\nQuestion")[0].split()
    counts = [count for _, count in collections.Counter(words).most_common()]
    assert collections.Counter(words).most_common(1)[0][0] == "..."
    n = next(n for n in range(len(words), 2 * len(words)) if int(n / 4 / fwe.ZETA) == counts[1] and int(n / fwe.ZETA) == counts[0])
    assert counts == [int(n / k**2 / fwe.ZETA) for k in range(1, len(counts) + 1)]
    assert pytest.approx(sum(k**-2 for k in range(1, 10**5)), abs=1e-4) == fwe.ZETA
    assert words[:9] != sorted(words)[:9]


@pytest.mark.parametrize("name", FREE)
def test_a_length_too_short_for_what_may_be_written_is_one_line(name):
    tokenizer = tokenizer_of("bytes")
    with pytest.raises(ValueError, match=rf"^a length of 30 tokens is too short: the answer alone may have {WRITTEN[name]}$"):
        free_cells(tokenizer, name, 30)
    with pytest.raises(ValueError, match=r"^a prompt of [0-9]+ tokens is too short: the task itself takes [0-9]+$") as caught:
        free_cells(tokenizer, name, 160)
    least = int(str(caught.value).split()[-1]) + WRITTEN[name]
    with pytest.raises(ValueError, match="too short"):
        free_cells(tokenizer, name, least - 60)
    assert {cell.size for cell in free_cells(tokenizer, name, least + 60)} == {least + 60}  # words differ in length


def test_too_few_words_are_told():
    tokenizer = tokenizer_of("bytes")
    with pytest.raises(ValueError, match=r"^the text has 2 different words, too few for cwe; give --data with more text$"):
        load_task("cwe").cells(tokenizer, [encode(tokenizer, "some Words, Any! some 123 abc more")], 3200, 0)
    few = encode(tokenizer, " ".join(f"{a}{b}word" for a in "abcdefg" for b in "xyz"))
    with pytest.raises(ValueError, match=r"^the text has 21 different words, too few for a list of [0-9]+ tokens; give --data with more text$"):
        load_task("cwe").cells(tokenizer, [few], 3200, 0)


def written(tokenizer, text) -> Scored:
    ids = encode(tokenizer, text)
    return Scored(np.zeros(len(ids)), ids)


@pytest.mark.parametrize("name", FREE)
def test_the_score_is_the_share_of_the_answers_that_are_found(name):
    tokenizer = tokenizer_of("bytes")
    task = load_task({"name": name} | ({"scoring": "generated"} if name in NIAH else {}))
    cells = free_cells(tokenizer, name)[:4]
    some = [len(cell.answers) // 2 for cell in cells]
    texts = [", ".join(reversed(cells[0].answers)).upper(), " and ".join(cells[1].answers[: some[1]]), "", f"It is x{cells[3].answers[0]}9."]
    overall, *_ = task.score(cells, [written(tokenizer, text) for text in texts], tokenizer)
    shares = [1.0, some[1] / len(cells[1].answers), 0.0, 1 / len(cells[3].answers)]
    assert (overall.metric, overall.n, overall.value) == ("accuracy", 4, pytest.approx(np.mean(shares)))
    assert overall.values == pytest.approx(shares)
    if len(cells[0].answers) == 1:
        assert (overall.ci_low, overall.ci_high) == wilson(2, 4)
    else:
        low, high = bootstrap_means(np.array(shares)[:, None], range(4))
        assert (overall.ci_low, overall.ci_high) == pytest.approx((low[0], high[0]))


# --- qa_1 and qa_2


def squad(folder, articles=3, paragraphs=4) -> str:
    def paragraph(a, p):
        text = f"Paragraph {p} of article {a}. " + "".join(f"Fact {a}{p}{i} holds. " for i in range(12))
        asked = [
            {"question": f"What holds in {p} of {a}?", "is_impossible": False, "answers": [{"text": f"Fact {a}{p}3"}, {"text": "that"}]},
            {"question": "What does not?", "is_impossible": True, "answers": []},
        ]
        return {"context": text, "qas": asked}

    data = [{"title": str(a), "paragraphs": [paragraph(a, p) for p in range(paragraphs)]} for a in range(articles)]
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": data}))
    return str(folder / "squad.json")


def hotpot(folder, questions=4) -> str:
    data = [
        {"question": f"Who is {i}?", "answer": f"Person {i}", "context": [[f"T{i}-{j}", [f"Sentence {i}{j}. ", "Another one. "]] for j in range(10)]}
        for i in range(questions)
    ]
    (folder / "hotpot.json").write_text(json.dumps(data))
    return str(folder / "hotpot.json")


@pytest.mark.parametrize("kind", ["bytes", "bos", "merging"])
@pytest.mark.parametrize("length", [1600, 1601, 2200])
def test_a_paragraph_stands_among_those_of_its_article_first(kind, length, tmp_path):
    tokenizer, path = tokenizer_of(kind), squad(tmp_path)
    cells = load_task({"name": "qa_1", "path": path}).cells(tokenizer, [], length, 0)
    assert len(cells) == 12  # those that can be answered
    places = set()
    for cell in cells:
        assert (len(cell.ids), cell.stop) == (length - 32, length)
        text = whole(tokenizer, cell)
        article, paragraph = re.fullmatch(r"Fact (\d)(\d)3", cell.answers[0]).groups()
        assert text.endswith(f"\n\nQuestion: What holds in {paragraph} of {article}? Answer:")
        documents = re.findall(r"Document (\d+):\n(.*?)\s*(?=\n\nDocument|\n\nAnswer the question)", text, re.S)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        found = [re.match(r"Paragraph (\d) of article (\d)\.", document) for _, document in documents]
        own = [(match[2], match[1]) == (article, paragraph) for match in found if match]
        assert own.count(True) == 1
        assert documents[own.index(True)][1].endswith(f"Fact {article}{paragraph}11 holds.")  # whole
        others = [match[2] for match in found if match and match[2] != article]
        assert not others or len([match for match in found if match and match[2] == article]) == 4
        places.add(own.index(True))
    assert len(places) > 1


def test_the_paragraphs_of_a_question_are_all_there(tmp_path):
    tokenizer = tokenizer_of("bytes")
    cells = load_task({"name": "qa_2", "path": hotpot(tmp_path), "n": 3}).cells(tokenizer, [], 1500, 0)
    assert len(cells) == 3
    for cell in cells:
        text, number = whole(tokenizer, cell), cell.answers[0].split()[1]
        assert len(cell.ids) == 1500 - 32
        assert all(f"T{number}-{j}\nSentence {number}{j}. Another one." in text for j in range(10))
        assert text.count("Document ") > 10


def test_any_answer_of_a_question_is_right(tmp_path):
    tokenizer, task = tokenizer_of("bytes"), load_task({"name": "qa_1", "path": squad(tmp_path), "n": 4})
    cells = task.cells(tokenizer, [], 1600, 0)
    texts = [cells[0].answers[0].lower(), "It is THAT.", "", "Fact"]
    overall, *_ = task.score(cells, [written(tokenizer, text) for text in texts], tokenizer)
    assert (overall.values, overall.n) == ((1.0, 1.0, 0.0, 0.0), 4)
    assert (overall.ci_low, overall.ci_high) == wilson(2, 4)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_a_file_that_cannot_serve_is_one_line_before_anything_else(name, tmp_path):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "empty.json").write_text('{"data": []}' if name == "qa_1" else "[]")
    wrong = (hotpot if name == "qa_1" else squad)(tmp_path)
    file = {"qa_1": "SQuAD's dev-v2.0.json", "qa_2": "HotpotQA's hotpot_dev_distractor_v1.json"}[name]
    for path, message in (
        (None, f"{name} needs {file}, which does not come with hf-longctx: give its place as {name}:path=FILE"),
        (tmp_path / "nowhere.json", f"{tmp_path}/nowhere.json cannot be read: No such file or directory"),
        (tmp_path / "text.json", f"{tmp_path}/text.json is no JSON file; {file} is"),
        (tmp_path / "empty.json", f"{tmp_path}/empty.json has no question that can be answered"),
        (wrong, f"{wrong} is not laid out as {file}"),
    ):
        with pytest.raises(ValueError) as caught:
            load_task({"name": name} | ({} if path is None else {"path": str(path)})).for_lengths([4096])
        assert str(caught.value) == message


def test_documents_must_fit_and_be_enough(tmp_path):
    tokenizer, task = tokenizer_of("bytes"), load_task({"name": "qa_1", "path": squad(tmp_path)})
    with pytest.raises(ValueError, match=r"^a prompt of 418 tokens is too short: the documents of the question 'What holds in \d of \d\?' do not fit$"):
        task.cells(tokenizer, [], 450, 0)
    with pytest.raises(ValueError, match=r"^a prompt of 7968 tokens takes more documents than the 12 that there are$"):
        task.cells(tokenizer, [], 8000, 0)


# --- within a chat template

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ASKED = {  # what the prompt goes on with in the assistant's name
    "passkey": " The pass key is", "needle": "\n\nThe best thing to do in San Francisco is", "kv_retrieval": ' "', "longchat_lines": " The <REGISTER_CONTENT> in line",
    "cwe": " Answer: The top 10 words", "fwe": " Answer: According to the coded text", "vt": " Answer: According to the chain", "qa_1": " Answer:", "qa_2": " Answer:",
}  # fmt: skip


@functools.cache
def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(("name", "kind"), [*[(name, "bytes") for name in {**ASKED, **WRITTEN}], *[(name, "smollm2") for name in ("passkey", "cwe", "niah_multiquery")]])
def test_the_question_is_a_users_turn_and_the_answer_begins_the_assistants(name, kind, request, tmp_path):
    tokenizer = chat_tokenizer() if kind == "bytes" else tokenizer_of("smollm2", request.getfixturevalue("smollm2"))
    options = {"qa_1": {"path": squad(tmp_path)}, "qa_2": {"path": hotpot(tmp_path)}}.get(name, {})
    made = load_task({"name": name, "n": 2, "chat": True} | options)
    text_of, length = free_documents(tokenizer), LEAST.get(name, 1500 if kind == "smollm2" else 2300)
    length = {"bytes": 1600, "smollm2": 500}[kind] if options else length
    plain = load_task({"name": name, "n": 2} | options).cells(tokenizer, text_of, length, 0)[0]
    for cell in made.cells(tokenizer, text_of, length, 0)[:2]:
        assert (len(cell.ids), cell.free) == (len(plain.ids), plain.free)
        text = tokenizer.decode(cell.ids)
        begin = ASKED.get(name, " The special magic")
        user, answer = re.split(r"<\|assistant\|>\n" if kind == "bytes" else r"<\|im_start\|>assistant\n", text)
        head = tokenizer.apply_chat_template([{"role": "user", "content": "#"}], tokenize=False).split("#")[0]
        content = user.removeprefix(head).removesuffix("</s>\n" if kind == "bytes" else "<|im_end|>\n")
        turn = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        assert text == turn + answer
        assert answer.startswith(begin)
        if kind == "bytes":
            assert np.flatnonzero(cell.ids == 1).tolist() == [0]
            assert (cell.ids == 2).sum() == 1  # tokens, not their names
        else:
            assert (cell.ids == tokenizer.convert_tokens_to_ids("<|im_start|>")).sum() == (3 if "system" in head else 2)


def test_without_a_template_there_is_no_chat():
    with pytest.raises(ValueError, match=r"^the tokenizer has no chat template to ask within; leave out chat, or take a chat model's$"):
        load_task({"name": "passkey", "chat": True}).cells(tokenizer_of("bytes"), [], 600, 0)
    refusing = byte_tokenizer()
    refusing.chat_template = "{{ raise_exception('no questions, please') }}"
    with pytest.raises(ValueError, match=r"^the chat template refuses a question: no questions, please$"):
        load_task({"name": "passkey", "chat": True}).cells(refusing, [], 600, 0)
