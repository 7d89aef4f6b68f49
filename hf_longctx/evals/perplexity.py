"""Sliding-window perplexity (Press et al. 2021; Baevski & Auli 2019): windows of the length under test, new tokens scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.schema import Size
from hf_longctx.task import Cell, Result, Scored, Task, opening, perplexity_result


@dataclass(frozen=True)
class Perplexity(Task):
    """The first `tokens` tokens of each document are read through windows of `length` tokens that advance by `stride`; each
    window scores only the tokens that no window before it scored, and every token counts the same.

    All lengths score the same tokens, but those near a document's start have little context at any length: to compare
    lengths, prefer `tail_perplexity`."""

    source = "arXiv:2108.12409"
    stride: Size = 1024
    tokens: Size | None = None  # of each document; by default the longest length asked for
    documents: PositiveInt = 20  # at most

    def for_lengths(self, lengths: Sequence[int]) -> Task:
        return replace(self, tokens=self.tokens or max(lengths))

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        first = opening(tokenizer)
        limit = self.tokens or length
        if min(length, limit) < 2:
            raise ValueError(f"perplexity needs at least 2 tokens, got {min(length, limit)}")
        chosen = [d[:limit].astype(np.int64) for d in documents if len(d) >= limit][: self.documents]
        if not chosen:
            raise ValueError(f"no document has {limit} tokens (the longest has {max(map(len, documents), default=0)}); give --data with longer ones")
        return [cell for number, text in enumerate(chosen) for cell in self._windows(text, first, length, number)]

    def _windows(self, text: np.ndarray, first: np.ndarray, length: int, number: int) -> list[Cell]:
        room = length - len(first)
        stride = min(self.stride, length - 1)  # a window always starts with a token that is not scored
        found, done = [], 0
        while done < len(text):
            end = min(len(text), max(done + stride, room))
            begin = max(0, end - room)
            ids = np.concatenate([first, text[begin:end]])
            start = max(1, len(first) + done - begin)  # the very first token has nothing before it
            found.append(Cell(ids, start, len(ids), cluster=number))
            done = end
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        return [perplexity_result(cells, outputs)]
