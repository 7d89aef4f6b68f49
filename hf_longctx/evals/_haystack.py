"""What the synthetic retrieval tasks share: RULER's niah prompts (Hsieh et al. 2024), words and haystacks made of whole lines."""

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt

from hf_longctx.task import (
    TURN,
    Cell,
    Result,
    Scored,
    Task,
    accuracy,
    answers_found,
    encode,
    exact_match,
    for_prompts,
    hide_several,
    opening,
    question_and_answer,
    room_for,
)

HEAD = "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = f"What is the special magic {{kind}} for {{key}} mentioned in the provided text?{TURN} The special magic {{kind}} for {{key}} mentioned in the provided text is"
SEVERAL_HEAD = "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind}s afterwards.\n"
SEVERAL_QUESTION = (
    "\nWhat are all the special magic {kind}s for {keys} mentioned in the provided text?"
    f"{TURN} The special magic {{kind}}s for {{keys}} mentioned in the provided text are"
)
NEW = 128  # tokens that a model may write in RULER's niah tasks
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
WORDS = (
    "amber", "basket", "candle", "dolphin", "emerald", "falcon", "garden", "harbor", "island", "jacket", "kettle", "ladder",
    "marble", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "temple", "umbrella", "velvet", "walnut", "zipper",
)  # fmt: skip
NOUNS = (
    *WORDS, "anchor", "bridge", "canyon", "desert", "engine", "feather", "glacier", "hammer", "iris", "jungle", "kitchen", "lantern",
    "meadow", "nectar", "ocean", "pigeon", "quilt", "river", "shadow", "thunder", "urchin", "valley", "window", "yacht",
    "apron", "barrel", "carpet", "dragon", "elbow", "forest", "guitar", "helmet", "insect", "jewel", "kernel", "lemon",
    "mirror", "nutmeg", "oyster", "pillow", "racket", "spider", "tunnel", "utensil", "violin", "wallet", "yogurt", "zebra",
)  # fmt: skip
ADJECTIVES = (
    "able", "bright", "calm", "damp", "eager", "faint", "gentle", "hasty", "icy", "jolly", "keen", "loyal", "merry", "noble", "odd", "polite",
    "quick", "rapid", "silent", "tidy", "upper", "vivid", "warm", "young", "angry", "brave", "clever", "dusty", "early", "fancy", "grand", "humble",
    "idle", "juicy", "kind", "lazy", "modest", "narrow", "open", "proud", "quiet", "rough", "simple", "tender", "useful", "vast", "wild", "zany",
    "ancient", "bitter", "curious", "distant", "elegant", "fearless", "golden", "hollow", "inner", "jagged", "knotty", "lively", "mellow", "nimble",
)  # fmt: skip
Needle = tuple[float, np.ndarray]  # depth, tokens
Scoring = Literal["forced", "generated"]


def draw_number(rng: np.random.Generator) -> str:
    """Seven digits, the first not 0."""
    return str(rng.integers(10**6, 10**7))


def draw_uuid(rng: np.random.Generator) -> str:
    """A random UUID, version 4, as RULER and Liu et al. write it."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def draw_word(rng: np.random.Generator) -> str:
    return WORDS[rng.integers(len(WORDS))]


def draw_pair_of_words(rng: np.random.Generator) -> str:
    """RULER's form of a key, "golden-falcon": one of 4,464."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def draw_different(count: int, draw: Callable[[], str]) -> list[str]:
    """As many different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def is_hex(text: str) -> bool:
    """What would prolong a UUID."""
    return bool(text) and set(text) <= set("0123456789abcdefABCDEF-")


def encode_lines(tokenizer: Any, draw: Callable[[], str], size: int) -> list[tuple[str, np.ndarray]]:
    """Lines of text and their tokens, drawn until there are `size` tokens: in batches, which tokenizers are fast at."""
    found: list[tuple[str, np.ndarray]] = []
    total = 0
    while total < size:
        texts = [draw() for _ in range(max(16, size // 64))]
        ids = encode_each(tokenizer, texts)
        found += zip(texts, ids, strict=True)
        total += sum(map(len, ids))
    return found


def encode_each(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """As `encode`, of many pieces of text, which tokenizers are fast at."""
    return [np.array(ids, dtype=np.int64) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def different_words(tokenizer: Any, documents: Sequence[np.ndarray], most: int) -> list[str]:
    """Words of 4 to 12 small letters, in the order in which they come up, up to `most`."""
    found: dict[str, None] = {}
    for document in documents:
        for start in range(0, len(document), 2**16):
            words = re.findall(r"\b[^\W\d_]{4,12}\b", tokenizer.decode(document[start : start + 2**16]))
            found |= dict.fromkeys(word for word in words if word.islower())
            if len(found) >= most:
                return list(found)[:most]
    return list(found)


def shuffled(rng: np.random.Generator, lines: Sequence[tuple[str, np.ndarray]], without: Sequence[str]) -> list[np.ndarray]:
    """Tokens of the lines in a random order, less those that contain one of the strings `without`."""
    order = (lines[i] for i in rng.permutation(len(lines)))
    return [ids for text, ids in order if not any(word in text for word in without)]


def long_enough(documents: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Those that a haystack can be cut from. Raises ValueError if there is none."""
    found = [d for d in documents if len(d) >= length]
    if not found:
        raise ValueError(f"no document has {length} tokens for the haystack (the longest has {max(map(len, documents), default=0)})")
    return found


def stretch(rng: np.random.Generator, documents: list[np.ndarray], length: int) -> np.ndarray:
    """A random stretch of a random document."""
    text = documents[rng.integers(len(documents))]
    start = int(rng.integers(len(text) - length + 1))
    return text[start : start + length].astype(np.int64)


def behind_a_stop(tokenizer: Any, filler: np.ndarray, room: int, depth: float) -> float:
    """The depth of the last full stop before `depth` in the first `room` tokens, or `depth` itself; 1 stays the end."""
    if room <= 0 or depth == 1:
        return depth
    stops = np.flatnonzero(np.isin(filler[: round(depth * room)], encode(tokenizer, ".")))
    return float(stops[-1] + 1) / room if len(stops) else depth


def hide_between(tokenizer: Any, ends: tuple[np.ndarray, np.ndarray], needles: Sequence[Needle], lines: Sequence[np.ndarray], length: int) -> np.ndarray:
    """As `hide_several`, but needles stand between whole lines, at the seam that is nearest to their depth.

    The length is made exact where it disturbs least: the first line lacks its beginning."""
    room = length - len(opening(tokenizer)) - sum(map(len, ends)) - sum(len(needle) for _, needle in needles)
    if room <= 0:  # no haystack, or the error message of a length that is too short
        return hide_several(tokenizer, ends, needles, np.zeros(0, dtype=np.int64), length)
    text = np.concatenate(lines)
    seams = np.cumsum([0, *map(len, lines)]) - (len(text) - room)
    seams = np.append(0, seams[seams > 0])
    placed = [(float(seams[np.abs(seams - depth * room).argmin()]) / room, needle) for depth, needle in needles]
    return hide_several(tokenizer, ends, placed, text[-room:], length)


@dataclass(frozen=True)
class Niah(Task):
    """A needle in a haystack: a value is given for a key in one sentence, and asked for at the end.

    With `scoring: forced` the value must follow the prompt at once; with `generated`, RULER's way, stand anywhere in 128 tokens."""

    source = "arXiv:2404.06654"
    kind: ClassVar[str] = "number"  # or "uuid"
    n: PositiveInt = 20  # trials a depth
    depths: PositiveInt = 10  # evenly spaced from 0 to 1
    scoring: Scoring = "forced"
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, free = np.random.default_rng([seed, length]), self.scoring == "generated"
        room, tokenizer = room_for(length, NEW) if free else length, for_prompts(tokenizer, self.chat)
        hay = self.haystack(tokenizer, documents, room, rng)
        found = []
        for depth in np.linspace(0, 1, self.depths):
            for _ in range(self.n):
                ids, size, answer = self.prompt(tokenizer, hay, room, float(depth), rng)
                found.append(Cell(ids, room - size, length if free else length + 1, float(depth), answers=(answer,)))
        return found

    def haystack(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, rng: np.random.Generator) -> Any:
        """What all trials of one length draw from."""
        raise NotImplementedError

    def prompt(self, tokenizer: Any, hay: Any, length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, int, str]:
        """Ids of one trial, how many of them are the answer, and this as text."""
        raise NotImplementedError

    def value(self, rng: np.random.Generator) -> str:
        return draw_uuid(rng) if self.kind == "uuid" else draw_number(rng)

    def ends(self, tokenizer: Any, key: str, value: str, gap: str = "\n") -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """Head, and question with what is forced of the answer, and how many tokens that has. `gap` ends the haystack."""
        tail, size = self.tail(tokenizer, gap + QUESTION.format(kind=self.kind, key=key), f" {value}")
        return (encode(tokenizer, HEAD.format(kind=self.kind)), tail), size

    def tail(self, tokenizer: Any, question: str, answer: str) -> tuple[np.ndarray, int]:
        return question_and_answer(tokenizer, question, answer if self.scoring == "forced" else "")

    def sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.kind, key=key, value=value)

    def prolongs(self, text: str) -> bool:
        """Whether this character behind the answer would make it another one."""
        return is_hex(text) if self.kind == "uuid" else text.isdigit()

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        if self.scoring == "generated":
            return score_found(cells, outputs, tokenizer)
        return accuracy(cells, [exact_match(c, o, tokenizer, self.prolongs) for c, o in zip(cells, outputs, strict=True)])


def score_found(cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
    """Mean share of its answers that each cell found: RULER's string_match_all, which it calls accuracy."""
    return accuracy(cells, [float(np.mean(answers_found(c, o, tokenizer))) for c, o in zip(cells, outputs, strict=True)])


@dataclass(frozen=True)
class NiahInProse(Niah):
    """The haystack is a stretch of the user's text, cut wherever the depth says."""

    others: ClassVar[int] = 0  # needles for other keys

    def haystack(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, rng: np.random.Generator) -> list[np.ndarray]:
        return long_enough(documents, length)

    def prompt(self, tokenizer: Any, hay: list[np.ndarray], length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, int, str]:
        text = stretch(rng, hay, length)
        key, value = draw_word(rng), self.value(rng)
        ends, size = self.ends(tokenizer, key, value)
        needles = [(depth, self.needle(tokenizer, key, value)), *self.distractors(tokenizer, key, value, rng)]
        return hide_several(tokenizer, ends, needles, text, length), size, value

    def needle(self, tokenizer: Any, key: str, value: str) -> np.ndarray:
        return encode(tokenizer, f" {self.sentence(key, value)} ")

    def distractors(self, tokenizer: Any, key: str, value: str, rng: np.random.Generator) -> list[Needle]:
        """Needles for `others` other keys with other values, at random depths."""
        if not self.others:
            return []
        keys = rng.choice([word for word in WORDS if word != key], self.others, replace=False)
        found = []
        for other in keys:
            number = self.value(rng)
            while number == value:
                number = self.value(rng)
            found.append((float(rng.random()), self.needle(tokenizer, str(other), number)))
        return found


@dataclass(frozen=True)
class NiahInNoise(Niah):
    """The haystack is RULER's noise: one line of short sentences, again and again."""

    needs_text = False

    def haystack(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, rng: np.random.Generator) -> list[np.ndarray]:
        return noise(tokenizer, length)

    def prompt(self, tokenizer: Any, hay: list[np.ndarray], length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, int, str]:
        key, value = draw_word(rng), self.value(rng)
        ends, size = self.ends(tokenizer, key, value, gap="")
        return hide_between(tokenizer, ends, [(depth, encode(tokenizer, self.sentence(key, value) + "\n"))], hay, length), size, value


def noise(tokenizer: Any, length: int) -> list[np.ndarray]:
    """Lines of noise, at least `length` tokens."""
    line = encode(tokenizer, NOISE)
    return [line] * (length // len(line) + 1)


@dataclass(frozen=True)
class NiahInNeedles(Niah):
    """The haystack is made of needles for other keys.

    They are drawn and tokenised once a length, twice as many as a prompt holds; each trial takes some of them in an order of
    its own. One that has the key or the value asked for is never taken."""

    needs_text = False

    def key(self, rng: np.random.Generator) -> str:
        return draw_uuid(rng) if self.kind == "uuid" else draw_pair_of_words(rng)

    def line(self, rng: np.random.Generator) -> str:
        return self.sentence(self.key(rng), self.value(rng)) + "\n"

    def haystack(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
        return encode_lines(tokenizer, lambda: self.line(rng), 2 * length)

    def prompt(self, tokenizer: Any, hay: list[tuple[str, np.ndarray]], length: int, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, int, str]:
        key, value = self.key(rng), self.value(rng)
        ends, size = self.ends(tokenizer, key, value, gap="")
        needle = encode(tokenizer, self.sentence(key, value) + "\n")
        return hide_between(tokenizer, ends, [(depth, needle)], shuffled(rng, hay, (key, value)), length), size, value


@dataclass(frozen=True)
class NiahOfFour(Task):
    """Four needles in a stretch of the user's text, behind full stops, at random depths; all their values are asked for."""

    source = "arXiv:2404.06654"
    keys: ClassVar[int] = 1
    n: PositiveInt = 100  # trials; they have no depth
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, room = np.random.default_rng([seed, length]), room_for(length, NEW)
        tokenizer = for_prompts(tokenizer, self.chat)
        hay = long_enough(documents, room)
        return [self._cell(tokenizer, stretch(rng, hay, room), length, rng) for _ in range(self.n)]

    def _cell(self, tokenizer: Any, text: np.ndarray, length: int, rng: np.random.Generator) -> Cell:
        keys = draw_different(self.keys, lambda: draw_pair_of_words(rng))
        values = draw_different(4, lambda: draw_number(rng))
        needles = [encode(tokenizer, f" {NEEDLE.format(kind='number', key=keys[i % self.keys], value=value)} ") for i, value in enumerate(values)]
        asked = ", ".join(keys[:-1]) + (", and " if len(keys) > 1 else "") + keys[-1]
        ends = encode(tokenizer, SEVERAL_HEAD.format(kind="number")), encode(tokenizer, SEVERAL_QUESTION.format(kind="number", keys=asked))
        room = length - NEW - sum(map(len, [opening(tokenizer), *ends, *needles]))
        depths = [behind_a_stop(tokenizer, text, room, float(depth)) for depth in rng.random(4)]
        ids = hide_several(tokenizer, ends, list(zip(depths, needles, strict=True)), text, length - NEW)
        return Cell(ids, len(ids), length, answers=tuple(values))

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return score_found(cells, outputs, tokenizer)
