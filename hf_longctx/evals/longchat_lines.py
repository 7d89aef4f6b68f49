"""LongChat's lines (Li et al. 2023, LongEval): a record of numbered registers, the content of one is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from hf_longctx.evals._haystack import ADJECTIVES, NOUNS, draw_pair_of_words, encode_lines, hide_between, shuffled
from hf_longctx.task import TURN, Cell, Result, Scored, Task, accuracy, encode, exact_match, for_prompts, question_and_answer

HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' at the end "
    "of the line as a numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask "
    "you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
LINE = "line {key}: REGISTER_CONTENT is <{value}>\n"
QUESTION = (
    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
    f"{TURN} The <REGISTER_CONTENT> in line {{key}} is <"
)
PAIRS = len(ADJECTIVES) * len(NOUNS)


@dataclass(frozen=True)
class LongchatLines(Task):
    """Every line gives a number for a key, "torrid-kid", one key is asked for; correct if greedy decoding gives its number.

    As in LongChat: head, lines and question, word for word. Unlike it: as many lines as fit (200 to 680), the first of them cut
    to make the length exact; the prompt goes on to the bracket before the number, which must follow at once (the first number
    in the reply); numbers have five digits (1...50000); the line asked for lies at even depths (anywhere: `depths=0`, which
    LongChat has 50 trials of); no two keys are equal (there, they can be). Words come from our own list, and keys have three
    where pairs would be too few, from about 45,000 tokens on. Trials of one length share the other lines, in other orders."""

    source = "https://lmsys.org/blog/2023-06-29-longchat/"
    needs_text = False
    n: PositiveInt = 20  # trials a depth
    depths: NonNegativeInt = 10  # evenly spaced from 0 to 1; with 0, `n` trials anywhere
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, tokenizer = np.random.default_rng([seed, length]), for_prompts(tokenizer, self.chat)
        record = _Record(rng, 3 if 2 * length > PAIRS * len(encode(tokenizer, LINE.format(key="golden-falcon", value=12345))) else 2)
        lines = encode_lines(tokenizer, record.line, length + length // 8 + 512)  # those like the one asked for are left out
        found = []
        for depth in np.repeat(np.linspace(0, 1, self.depths), self.n) if self.depths else rng.random(self.n):
            key, value = record.key(), record.value()
            tail, size = question_and_answer(tokenizer, QUESTION.format(key=key), value)
            asked = encode(tokenizer, LINE.format(key=key, value=value))
            others = shuffled(rng, lines, (f" {key}:", value))
            ids = hide_between(tokenizer, (encode(tokenizer, HEAD), tail), [(float(depth), asked)], others, length)
            found.append(Cell(ids, len(ids) - size, len(ids) + 1, float(depth) if self.depths else None))
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return accuracy(cells, [exact_match(c, o, tokenizer) for c, o in zip(cells, outputs, strict=True)])


class _Record:
    """Lines with different keys of `words` words."""

    def __init__(self, rng: np.random.Generator, words: int) -> None:
        self.rng, self.words, self.taken = rng, words, set[str]()

    def key(self) -> str:
        return "".join(f"{ADJECTIVES[self.rng.integers(len(ADJECTIVES))]}-" for _ in range(self.words - 2)) + draw_pair_of_words(self.rng)

    def value(self) -> str:
        return str(self.rng.integers(10000, 100000))

    def line(self) -> str:
        key = self.key()
        while key in self.taken:
            key = self.key()
        self.taken.add(key)
        return LINE.format(key=key, value=self.value())
