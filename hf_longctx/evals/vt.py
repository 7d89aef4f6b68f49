"""RULER's variable tracking, vt (Hsieh et al. 2024): one chain of assignments, hidden in repetitions of one line."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._haystack import NOISE, Scoring, draw_different, hide_between, noise, score_found
from hf_longctx.task import TURN, Cell, Result, Scored, Task, accuracy, encode, exact_match, for_prompts, question_and_answer, room_for

HOPS = 4
NEW = 30
HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    f"Question: Find all variables that are assigned the value {{value}} in the text above.{TURN} Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)


@dataclass(frozen=True)
class Vt(Task):
    """`VAR A = 12345`, then four times `VAR B = VAR A`, scattered in order over noise; what share of the five names does the model list?

    As in RULER: prompt, one example with names of three letters before it, one chain, four hops, names of five letters, random
    places; the share of the names that stand anywhere in 30 tokens. Unlike it: the example is shorter than its 500 tokens, and
    the first line is cut to make the length exact.

    `scoring: forced` is stricter, and one forward pass: all five must come, first and in the order of the chain, separated by
    spaces. The example shows that order and form."""

    source = "arXiv:2404.06654"
    needs_text = False
    n: PositiveInt = 100  # trials; they have no depth
    scoring: Scoring = "generated"
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, free = np.random.default_rng([seed, length]), self.scoring == "generated"
        room, tokenizer = room_for(length, NEW) if free else length, for_prompts(tokenizer, self.chat)
        hay = noise(tokenizer, room)
        found = []
        for _ in range(self.n):
            names, value = _names(rng, 5), str(rng.integers(10000, 100000))
            question, answer = QUESTION.format(value=value, count=len(names)), " " + " ".join(names)
            tail, size = question_and_answer(tokenizer, question, "" if free else answer)
            depths = np.sort(rng.random(len(names))).tolist()
            chain = [(depth, encode(tokenizer, line)) for depth, line in zip(depths, _chain(names, value), strict=True)]
            ids = hide_between(tokenizer, (encode(tokenizer, _example(rng) + HEAD), tail), chain, hay, room)
            found.append(Cell(ids, room - size, length if free else length + 1, answers=tuple(names)))
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        if self.scoring == "generated":
            return score_found(cells, outputs, tokenizer)
        return accuracy(cells, [exact_match(c, o, tokenizer, str.isalpha) for c, o in zip(cells, outputs, strict=True)])


def _names(rng: np.random.Generator, letters: int) -> list[str]:
    """Different names, one more than there are hops."""
    return draw_different(HOPS + 1, lambda: "".join(rng.choice(list(string.ascii_uppercase), letters)))


def _chain(names: Sequence[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}\n", *(f"VAR {b} = VAR {a}\n" for a, b in pairwise(names))]


def _example(rng: np.random.Generator) -> str:
    """A chain in little noise, with its answer: RULER's example has about 500 tokens, this one fewer."""
    names = _names(rng, 3)
    text = "".join(NOISE + line for line in _chain(names, "12345")) + NOISE
    return f"{HEAD}{text}{QUESTION.replace(TURN, '').format(value=12345, count=len(names))} {' '.join(names)}\n"
