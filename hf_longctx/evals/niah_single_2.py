"""RULER's niah_single_2 (Hsieh et al. 2024): a number for a word, hidden in running prose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.task import Cell, Result, Scored, Task, accuracy, encode, exact_match, hide, question_and_answer

HEAD = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
NEEDLE = " One of the special magic numbers for {word} is: {number}. "
QUESTION = (
    "\nWhat is the special magic number for {word} mentioned in the provided text? "
    "The special magic number for {word} mentioned in the provided text is"
)
WORDS = (
    "amber", "basket", "candle", "dolphin", "emerald", "falcon", "garden", "harbor", "island", "jacket", "kettle", "ladder",
    "marble", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "temple", "umbrella", "velvet", "walnut", "zipper",
)  # fmt: skip


@dataclass(frozen=True)
class NiahSingle2(Task):
    """One sentence gives a seven-digit number for a word, somewhere in a document; correct if greedy decoding gives it.

    As in RULER but for three things: the haystack is the user's text (RULER: essays), depths are evenly spaced, and the answer
    must come first (RULER: anywhere in 128 tokens)."""

    source = "arXiv:2404.06654"
    n: PositiveInt = 20  # trials a depth
    depths: PositiveInt = 10  # evenly spaced from 0 to 1

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng = np.random.default_rng([seed, length])
        long = [d for d in documents if len(d) >= length]
        if not long:
            raise ValueError(f"no document has {length} tokens for the haystack (the longest has {max(map(len, documents), default=0)})")
        found = []
        for depth in np.linspace(0, 1, self.depths):
            for _ in range(self.n):
                text = long[rng.integers(len(long))]
                start = int(rng.integers(len(text) - length + 1))
                word, number = WORDS[rng.integers(len(WORDS))], rng.integers(10**6, 10**7)
                needle = encode(tokenizer, NEEDLE.format(word=word, number=number))
                tail, size = question_and_answer(tokenizer, QUESTION.format(word=word), f" {number}")
                filler = text[start : start + length].astype(np.int64)
                ids = hide(tokenizer, (encode(tokenizer, HEAD), needle, tail), filler, length, float(depth))
                found.append(Cell(ids, len(ids) - size, len(ids) + 1, float(depth)))
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return accuracy(cells, [exact_match(c, o, tokenizer) for c, o in zip(cells, outputs, strict=True)])
