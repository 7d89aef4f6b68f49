"""Key-value retrieval (Liu et al. 2023, Lost in the Middle): the value of one key of a JSON object of UUIDs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._haystack import draw_uuid, encode_lines, is_hex, shuffled
from hf_longctx.task import TURN, Cell, Result, Scored, Task, accuracy, encode, exact_match, for_prompts, opening, question_and_answer

HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
PAIR = ' "{key}": "{value}"'
QUESTION = f'}}}}\n\nKey: "{{key}}"\nCorresponding value:{TURN} "'


@dataclass(frozen=True)
class KvRetrieval(Task):
    """A JSON object of random UUIDs for random UUIDs; correct if greedy decoding gives the value of the key asked for.

    As in Liu et al.: prompt, object, one key asked for; `depth` is the place of its pair. Unlike them: the prompt goes on to the
    opening quote of the value, which must follow at once (they look for it in 100 tokens); trials of one length share the other
    pairs, in other orders; and by default there are as many pairs as fit, blank lines between them making the length exact.
    With `pairs` (Liu et al.: 75, 140, 300) a prompt is as long as these make it, at most the length."""

    source = "arXiv:2307.03172"
    needs_text = False
    n: PositiveInt = 20  # trials a depth
    depths: PositiveInt = 10  # evenly spaced from 0 to 1
    pairs: PositiveInt | None = None  # by default as many as fit
    chat: bool = False  # ask within the tokenizer's chat template

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        rng, tokenizer = np.random.default_rng([seed, length]), for_prompts(tokenizer, self.chat)
        lines = encode_lines(tokenizer, lambda: PAIR.format(key=draw_uuid(rng), value=draw_uuid(rng)), 2 * length)
        found = []
        for depth in np.linspace(0, 1, self.depths):
            for _ in range(self.n):
                key, value = draw_uuid(rng), draw_uuid(rng)
                tail, size = question_and_answer(tokenizer, QUESTION.format(key=key), value)
                pair = encode(tokenizer, PAIR.format(key=key, value=value))
                ids = self._object(tokenizer, (pair, tail), shuffled(rng, lines, (key, value)), length, float(depth))
                found.append(Cell(ids, len(ids) - size, len(ids) + 1, float(depth)))
        return found

    def _object(self, tokenizer: Any, parts: tuple[np.ndarray, np.ndarray], others: list[np.ndarray], length: int, depth: float) -> np.ndarray:
        """The prompt: the pair asked for and its question, among as many other pairs as there is room for or were asked for."""
        pair, tail = parts
        first, head, seam, blank = opening(tokenizer), encode(tokenizer, HEAD), encode(tokenizer, ",\n"), encode(tokenizer, "\n")[-1:]
        room = length - sum(map(len, [first, head, pair, tail]))
        if room < 0:
            raise ValueError(f"a prompt of {length} tokens is too short: the task itself takes {length - room}")
        costs = np.cumsum([0, *(len(seam) + len(other) for other in others)])
        fit = int(np.searchsorted(costs, room, "right")) - 1
        count = fit if self.pairs is None else self.pairs - 1
        if count > fit:
            raise ValueError(f"a prompt of {length} tokens is too short: it has room for {fit + 1} pairs, not {self.pairs}")
        chosen = others[:count]
        chosen.insert(round(depth * count), pair)
        spare = room - int(costs[count]) if self.pairs is None else 0
        return np.concatenate([first, head, *_joined(chosen, seam, blank, spare), tail])

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return accuracy(cells, [exact_match(c, o, tokenizer, is_hex) for c, o in zip(cells, outputs, strict=True)])


def _joined(pairs: Sequence[np.ndarray], seam: np.ndarray, blank: np.ndarray, spare: int) -> Iterator[np.ndarray]:
    """Pairs with a seam between them, and `spare` blanks, which JSON ignores, spread evenly before them."""
    for i, pair in enumerate(pairs):
        if i:
            yield seam
        yield np.repeat(blank, spare // len(pairs) + (i < spare % len(pairs)))
        yield pair
