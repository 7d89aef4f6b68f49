"""RULER's variable tracking, vt (Hsieh et al. 2024): one chain of assignments, hidden in repetitions of one line."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._haystack import NOISE, hide_between, noise
from hf_longctx.task import Cell, Result, Scored, Task, accuracy, encode, exact_match, question_and_answer

HOPS = 4
HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)


@dataclass(frozen=True)
class Vt(Task):
    """`VAR A = 12345`, then four times `VAR B = VAR A`, scattered in order over noise; correct if greedy decoding lists the five names.

    As in RULER: prompt, one example with names of three letters before it, one chain, four hops, names of five letters, random
    places. Stricter than RULER, which looks for each name anywhere in 30 tokens and counts the share it finds: here all five
    must come, first and in the order of the chain, separated by spaces. The example shows that order and form. So the numbers
    lie below RULER's; they compare models here, not with published ones. The first line is cut to make the length exact."""

    source = "arXiv:2404.06654"
    needs_text = False
    n: PositiveInt = 100  # trials; they have no depth

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng = np.random.default_rng([seed, length])
        hay = noise(tokenizer, length)
        found = []
        for _ in range(self.n):
            names, value = _names(rng, 5), str(rng.integers(10000, 100000))
            tail, size = question_and_answer(tokenizer, QUESTION.format(value=value, count=len(names)), " " + " ".join(names))
            depths = np.sort(rng.random(len(names))).tolist()
            chain = [(depth, encode(tokenizer, line)) for depth, line in zip(depths, _chain(names, value), strict=True)]
            ids = hide_between(tokenizer, (encode(tokenizer, _example(rng) + HEAD), tail), chain, hay, length)
            found.append(Cell(ids, len(ids) - size, len(ids) + 1))
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return accuracy(cells, [exact_match(c, o, tokenizer, str.isalpha) for c, o in zip(cells, outputs, strict=True)])


def _names(rng: np.random.Generator, letters: int) -> list[str]:
    """Different names, one more than there are hops."""
    found: list[str] = []
    while len(found) <= HOPS:
        name = "".join(rng.choice(list(string.ascii_uppercase), letters))
        if name not in found:
            found.append(name)
    return found


def _chain(names: Sequence[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}\n", *(f"VAR {b} = VAR {a}\n" for a, b in pairwise(names))]


def _example(rng: np.random.Generator) -> str:
    """A chain in little noise, with its answer: RULER's example has about 500 tokens, this one fewer."""
    names = _names(rng, 3)
    text = "".join(NOISE + line for line in _chain(names, "12345")) + NOISE
    return f"{HEAD}{text}{QUESTION.format(value=12345, count=len(names))} {' '.join(names)}\n"
