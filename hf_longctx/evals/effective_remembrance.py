"""Effective remembrance (Ruiz & Gu 2025): how much does a prediction depend on the tokens far behind it?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._windows import whole_windows
from hf_longctx.stats import bootstrap_means
from hf_longctx.task import Cell, Result, Scored, Task, opening


@dataclass(frozen=True)
class EffectiveRemembrance(Task):
    """EffRem_T(t) = TV(q(. | x[0:T]), q(. | x[t:T])): q is the model's distribution of the next token, TV(p, q) = 1/2 sum |p - q|,
    T the length; the model reads the text with and without its first t tokens, behind the opening token if the tokenizer has one.

    0: the first t tokens do not matter; 1: the predictions have nothing in common. Near 1 for a t far below T, the model leans
    on the beginning of the text, which the paper finds where models fail beyond their trained length. t is a half of T, a
    fourth, ...; `depth` is t / T, each value a mean over windows with a bootstrap interval over documents. The overall result
    is that of a half. Any causal model has it."""

    source = "arXiv:2507.02782"
    halvings: PositiveInt = 8
    windows: PositiveInt = 2  # a document
    documents: PositiveInt = 20  # at most

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        found, first = [], len(opening(tokenizer))
        for ids, number in whole_windows(self.name, tokenizer, documents, length, self.windows, self.documents):
            for dropped in (0, *self._dropped(length)):
                kept = np.concatenate([ids[:first], ids[first + dropped :]])
                found.append(Cell(kept, len(kept), len(kept) + 1, dropped / length, number, distribution=True))
        return found

    def _dropped(self, length: int) -> list[int]:
        """t, from few tokens to half of the text."""
        return sorted({length >> k for k in range(1, self.halvings + 1)} - {0})

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        said = [output.probabilities for output in outputs]
        starts = [i for i, cell in enumerate(cells) if cell.depth == 0]
        size = len(cells) // len(starts)
        distances = np.array([[_distance(said[i], said[i + k]) for k in range(1, size)] for i in starts])  # [windows, t]
        clusters = tuple(cells[i].cluster for i in starts)
        columns = (distances.mean(0), *bootstrap_means(distances, clusters))
        rows = []
        for cell, mine, value, low, high in zip(cells[1:size], distances.T.tolist(), *(c.tolist() for c in columns), strict=True):
            rows.append(Result(self.name, value, len(starts), low, high, cell.depth, tuple(mine), (1,) * len(starts), clusters))
        return [replace(rows[-1], depth=None), *rows]


def _distance(p: Any, q: Any) -> float:
    """Total variation."""
    return float(np.abs(p.astype(np.float64) - q).sum() / 2)
