"""RULER's common words extraction, cwe (Hsieh et al. 2024): which ten words of a long list are the frequent ones?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._haystack import different_words, encode_each, score_found
from hf_longctx.task import TURN, Cell, Result, Scored, Task, encode, for_prompts, opening, pad_before, room_for

COMMON = 10
NEW = 120
HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    f"{TURN} Answer: The top 10 words that appear most often in the list are:"
)


@dataclass(frozen=True)
class Cwe(Task):
    """A numbered list in which 10 words stand 30 times and all others 3 times; what share of the 10 does the model list?

    As in RULER: prompt; an example before it, of 40 words, 10 of them 10 times, the others 3 times; below 4,096 tokens 6 times
    and once, and an example of 20 words, 3 times and once; as many words as fit; 120 tokens to answer in; the share of the words
    that stand anywhere in them. Unlike it: words are those of the user's text that have 4 to 12 letters, all small (wonderwords,
    and a list of English words where these are too few), and blank lines make the length exact. (lm-evaluation-harness leaves the
    example out, and the list has as many fewer words: SmolLM2 scores higher so.)"""

    source = "arXiv:2404.06654"
    n: PositiveInt = 100  # trials; they have no depth
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, tokenizer = np.random.default_rng([seed, length]), for_prompts(tokenizer, self.chat)
        words = _Words(tokenizer, documents, room_for(length, NEW))
        return [self._cell(tokenizer, words, length, rng) for _ in range(self.n)]

    def _cell(self, tokenizer: Any, words: "_Words", length: int, rng: np.random.Generator) -> Cell:
        example, repeats = (words.some(rng, 40, (10, 3)), (30, 3)) if length >= 4096 else (words.some(rng, 20, (3, 1)), (6, 1))
        ends = np.append(opening(tokenizer), encode(tokenizer, example + HEAD)), encode(tokenizer, QUESTION)
        room = length - NEW - sum(map(len, ends))
        order = rng.permutation(len(words.texts))
        order = order[: words.fitting(order, repeats, room, length - NEW)]
        body = words.numbered(rng.permutation(_repeated(order, repeats)))
        ids = pad_before(ends[1], encode(tokenizer, "\n")[-1:], [ends[0], *body], length - NEW)
        return Cell(ids, len(ids), length, answers=tuple(words.texts[i] for i in order[:COMMON]))

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return score_found(cells, outputs, tokenizer)


def _repeated(words: np.ndarray, repeats: tuple[int, int]) -> np.ndarray:
    """The first ten as often as `repeats` says first, the others as it says then."""
    return np.repeat(words, [repeats[0]] * COMMON + [repeats[1]] * (len(words) - COMMON))


class _Words:
    """Different words of a text, as many as a prompt of `room` tokens can hold, and the tokens of words and numbers."""

    def __init__(self, tokenizer: Any, documents: Sequence[np.ndarray], room: int) -> None:
        most = max(512, room // 2)  # enough for the first, too, where the prompt will turn out too short
        self.texts = different_words(tokenizer, documents, most)
        self.words = encode_each(tokenizer, [f" {word}" for word in self.texts])
        self.numbers = encode_each(tokenizer, ["1.", *(f" {i}." for i in range(2, most))])

    def some(self, rng: np.random.Generator, count: int, repeats: tuple[int, int]) -> str:
        """An example of `count` words, with its answer."""
        if count > len(self.texts):
            raise ValueError(f"the text has {len(self.texts)} different words, too few for cwe; give --data with more text")
        words = np.array(self.texts)[rng.choice(len(self.texts), count, replace=False)]
        return f"{HEAD}{_list(rng.permutation(_repeated(words, repeats)))}{QUESTION.replace(TURN, '')} {_list(words[:COMMON])}\n"

    def fitting(self, order: np.ndarray, repeats: tuple[int, int], room: int, length: int) -> int:
        """How many words, in this order, fit into `room` of `length` tokens."""
        costs = np.cumsum([len(self.words[i]) for i in order])
        others = np.arange(1, len(order) - COMMON + 1)
        places = repeats[0] * COMMON + repeats[1] * others
        places = places[places <= len(self.numbers)]
        tokens = repeats[0] * costs[COMMON - 1] + repeats[1] * (costs[COMMON:][: len(places)] - costs[COMMON - 1])
        tokens += np.cumsum([len(number) for number in self.numbers])[places - 1]
        fit = int(np.searchsorted(tokens, room, "right"))
        if not fit:
            raise ValueError(f"a prompt of {length} tokens is too short: the task itself takes {length - room + tokens[0]}")
        if fit == len(tokens):
            raise ValueError(f"the text has {len(order)} different words, too few for a list of {room} tokens; give --data with more text")
        return COMMON + fit

    def numbered(self, words: np.ndarray) -> list[np.ndarray]:
        """Tokens of "1. word 2. word ...", piece by piece."""
        return [piece for number, word in zip(self.numbers, words, strict=False) for piece in (number, self.words[word])]


def _list(words: np.ndarray) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
