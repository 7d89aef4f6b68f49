"""Passkey retrieval (Mohtashami & Jaggi 2023, Landmark Attention; the prompt that YaRN, LongLoRA, PoSE and LongRoPE share)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._haystack import hide_between
from hf_longctx.task import TURN, Cell, Result, Scored, Task, accuracy, encode, exact_match, for_prompts, question_and_answer

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = f"\nWhat is the pass key?{TURN} The pass key is"


@dataclass(frozen=True)
class Passkey(Task):
    """A five-digit key between repetitions of one paragraph; correct if greedy decoding gives exactly the key.

    Every prompt has exactly the length asked for, answer included. Keys are uniform on 10000...99999 (published scripts draw
    1...50000; five digits keep the length exact). The needle stands between whole paragraphs (published scripts cut the filler
    anywhere, in the middle of words too; where they happen to cut then decides about a small model at the last depth)."""

    source = "arXiv:2305.16300"
    needs_text = False
    n: PositiveInt = 20  # keys a depth
    depths: PositiveInt = 10  # evenly spaced from 0 to 1
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, tokenizer = np.random.default_rng([seed, length]), for_prompts(tokenizer, self.chat)
        paragraph = encode(tokenizer, GARBAGE)
        filler = [paragraph] * (length // len(paragraph) + 1)
        found = []
        for depth in np.linspace(0, 1, self.depths):
            for _ in range(self.n):
                key = rng.integers(10000, 100000)
                tail, size = question_and_answer(tokenizer, QUESTION, f" {key}")
                needle = encode(tokenizer, NEEDLE.format(key=key))
                ids = hide_between(tokenizer, (encode(tokenizer, HEAD), tail), [(float(depth), needle)], filler, length)
                found.append(Cell(ids, len(ids) - size, len(ids) + 1, float(depth)))
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return accuracy(cells, [exact_match(c, o, tokenizer) for c, o in zip(cells, outputs, strict=True)])
