"""Perplexity of the same tokens under growing left context: does more context help?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.schema import Size
from hf_longctx.task import Cell, Result, Scored, Task, opening, perplexity_result


@dataclass(frozen=True)
class TailPerplexity(Task):
    """Spans of `tokens` tokens, up to `spans` a document, each scored with everything before it that fits into `length`.

    The spans are the same at every length, so lengths and models are compared on equal text, span by span, and a model that
    uses its context falls. Spans do not overlap; they end at least the longest length asked for into the document."""

    source = "ours"
    tokens: Size | None = None  # of a span; by default 1,024, or half the shortest length asked for if that is less
    spans: PositiveInt = 8  # a document, as far as it is long enough
    longest: Size | None = None  # context that every span must have; by default the longest length asked for

    def for_lengths(self, lengths: Sequence[int]) -> Task:
        return replace(self, longest=self.longest or max(lengths), tokens=self.tokens or _span(min(lengths)))

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        first = opening(tokenizer)
        need, size = self.longest or length, self.tokens or _span(length)
        if size + len(first) >= length:
            raise ValueError(f"spans of {size} tokens leave no context at length {length}; set tokens lower")
        if need < length:
            raise ValueError(f"spans with {need} tokens before and in them cannot be measured at length {length}; set longest higher")
        found = []
        for number, text in enumerate(documents):
            for end in self._ends(len(text), need, size):
                ids = np.concatenate([first, text[end - length + len(first) : end].astype(np.int64)])
                found.append(Cell(ids, len(ids) - size, len(ids), cluster=number))
        if not found:
            raise ValueError(f"no document has {need} tokens (the longest has {max(map(len, documents), default=0)}); give --data with longer ones")
        return found

    def _ends(self, available: int, need: int, size: int) -> list[int]:
        if available < need:
            return []
        count = min(self.spans, 1 + (available - need) // size)
        return np.linspace(need, available, count).round().astype(int).tolist() if count > 1 else [available]

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return [perplexity_result(cells, outputs)]


def _span(shortest: int) -> int:
    return max(1, min(1024, shortest // 2))
