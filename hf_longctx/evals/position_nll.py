"""Loss against position: does the loss go on falling with context, and does it rise where the model was not trained?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._windows import whole_windows
from hf_longctx.stats import bootstrap_means
from hf_longctx.task import Cell, Result, Scored, Task, perplexity_result


@dataclass(frozen=True)
class PositionNll(Task):
    """Whole windows of `length` tokens, each read in one pass; mean -log p (nats) of the tokens by how many stand before them.

    Up to `windows` of a document, evenly spaced and without overlap, from the first `documents` that are long enough. The
    overall result is the perplexity of all tokens. The others are one mean a bucket of positions, each token counting the same:
    metric "nll", `depth` times the length is the mean position, `n` the number of tokens, the interval a bootstrap over
    documents. Token i of a window has i tokens before it, the beginning-of-sequence token included; the first is not scored.

    Other tokens stand in each bucket, so neighbours differ by chance too; for equal tokens under growing context see
    `tail_perplexity`. Lengths read other windows: compare models at one length. Beside a baseline, each bucket has its paired
    change of perplexity over the same tokens."""

    source = "ours"
    buckets: PositiveInt = 32  # or as many as there are positions
    spacing: Literal["equal", "log"] = "equal"
    windows: PositiveInt = 8  # a document
    documents: PositiveInt = 20  # at most

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        found = whole_windows(self.name, tokenizer, documents, length, self.windows, self.documents)
        return [Cell(ids, 1, length, cluster=number) for ids, number in found]

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        length = len(cells[0].ids)
        edges = self._edges(length)
        sizes = np.diff(edges)
        means = np.array([np.add.reduceat(o.nll.astype(np.float64), edges[:-1] - 1) for o in outputs]) / sizes  # windows weigh the same
        places = (edges[:-1] + (sizes - 1) / 2) / length
        clusters = tuple(c.cluster for c in cells)
        columns = [each.tolist() for each in (means.mean(0), len(cells) * sizes, *bootstrap_means(means, clusters), places)]
        paired = [
            {"values": tuple(mine), "weights": (int(size),) * len(cells), "clusters": clusters} for mine, size in zip(means.T.tolist(), sizes, strict=True)
        ]
        return [perplexity_result(cells, outputs), *(Result("nll", *row, **each) for *row, each in zip(*columns, paired, strict=True))]

    def _edges(self, length: int) -> np.ndarray:
        """Bucket k holds the positions from edge k up to but not including edge k+1."""
        spaced = np.linspace(0, length, self.buckets + 1) if self.spacing == "equal" else np.geomspace(1, length, self.buckets + 1)
        return np.unique(np.clip(spaced.round().astype(int), 1, None))
