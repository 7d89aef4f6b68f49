"""RULER's frequent words extraction, fwe (Hsieh et al. 2024): which three of many made-up words are the most frequent?"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._haystack import draw_different, encode_each, score_found
from hf_longctx.task import TURN, Cell, Result, Scored, Task, encode, for_prompts, opening, pad_before, room_for

NEW = 50
LETTERS = 6
ALPHA = 2.0
ZETA = math.pi**2 / 6  # of ALPHA: the sum of k ** -ALPHA over all k
HEAD = "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words."
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the "
    f"above coded text?{TURN} Answer: According to the coded text above, the three most frequently appeared words are:"
)


@dataclass(frozen=True)
class Fwe(Task):
    """Words of six random letters; the one of rank k stands N k^-2 / zeta(2) times, rounded down, that of rank 1 being dots; what
    share of the words of rank 2, 3 and 4 does the model list?

    As in RULER: prompt, one word for every 50 tokens to draw from, N as large as fits, words in a random order, 50 tokens to
    answer in; the share of the three that stand anywhere in them. Unlike it: blank lines make the length exact, and each trial has
    an order of its own, where RULER shuffles the ranks of all trials alike."""

    source = "arXiv:2404.06654"
    needs_text = False
    n: PositiveInt = 100  # trials; they have no depth
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, room = np.random.default_rng([seed, length]), room_for(length, NEW)
        tokenizer = for_prompts(tokenizer, self.chat)
        ends = np.append(opening(tokenizer), encode(tokenizer, HEAD)), encode(tokenizer, QUESTION)
        blank = encode(tokenizer, "\n")[-1:]
        found = []
        for _ in range(self.n):
            words = ["...", *draw_different(max(4, room // 50 - 1), lambda: _word(rng))]
            pieces = encode_each(tokenizer, [f" {word}" for word in words])
            counts = _counts(pieces, room - sum(map(len, ends)), room)
            body = [pieces[i] for i in rng.permutation(np.repeat(np.arange(len(words)), counts))]
            found.append(Cell(pad_before(ends[1], blank, [ends[0], *body], room), room, length, answers=tuple(words[1:4])))
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return score_found(cells, outputs, tokenizer)


def _word(rng: np.random.Generator) -> str:
    return "".join(string.ascii_lowercase[i] for i in rng.integers(26, size=LETTERS))


def _counts(pieces: Sequence[np.ndarray], room: int, length: int) -> np.ndarray:
    """How often each word stands, for the largest N with which all of them fit into `room` of `length` tokens and rank 4 is told
    from rank 5."""
    costs = np.array(list(map(len, pieces)))
    shares = np.arange(1, len(pieces) + 1) ** -ALPHA / ZETA
    fits, too_many = 0, 2 * max(room, 1)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if _tokens(costs, shares, middle) <= room else (fits, middle)
    while fits and np.diff(_times(shares, fits)[3:5]) == 0:
        fits -= 1
    if not fits:
        least = next(n for n in range(1, 100) if np.diff(_times(shares, n)[3:5]) != 0)
        raise ValueError(f"a prompt of {length} tokens is too short: the task itself takes {length - room + _tokens(costs, shares, least)}")
    return _times(shares, fits)


def _times(shares: np.ndarray, n: int) -> np.ndarray:
    return (n * shares).astype(int)


def _tokens(costs: np.ndarray, shares: np.ndarray, n: int) -> int:
    return int(costs @ _times(shares, n))
