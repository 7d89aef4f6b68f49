"""Norm of the state against position: does the state leave the region that training knew? Ruiz & Gu (2025) blame that for failures beyond the trained length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import PositiveInt

from hf_longctx.evals._windows import whole_windows
from hf_longctx.schema import Size
from hf_longctx.stats import bootstrap, bootstrap_means
from hf_longctx.task import Cell, Result, Scored, Task


@dataclass(frozen=True)
class StateNorm(Task):
    """Euclidean norm of a state-space model's state after 1, 2, 4, ... `length` tokens of text, read from a state of zeros.

    Metric "state_norm" is that of all layers together, "state_norm_layer_i" that of the i-th layer that has a state (of the SSM;
    the convolution's is bounded by its inputs): a mean over windows, with a bootstrap interval over documents; `depth` times the
    length is the number of tokens read. Overall there is "state_norm" at the end, and beyond `window` tokens two more:
    "state_growth", the norm at the end over the norm after `window` tokens, in the layer where that is most; "state_left_at", the
    first place, in tokens, where the norm of a layer is above the largest that any text gave it within `window`, if there is one.

    A norm that stays says little: the state may turn away without growing. Raises on models without a state."""

    source = "arXiv:2507.02782"
    window: Size | None = None  # that the model was trained with; by default the shortest length asked for
    points: PositiveInt = 2  # places in each doubling of the position
    windows: PositiveInt = 2  # a document
    documents: PositiveInt = 20  # at most

    def for_lengths(self, lengths: Sequence[int]) -> Task:
        return replace(self, window=self.window or min(lengths))

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        places = self._places(length)
        found = whole_windows(self.name, tokenizer, documents, length, self.windows, self.documents)
        return [Cell(ids, length, length, cluster=number, states_at=places) for ids, number in found]

    def _places(self, length: int) -> tuple[int, ...]:
        doublings = np.arange(0, np.log2(length), 1 / self.points)
        return tuple(sorted({*(2**doublings).round().astype(int).tolist(), min(self.window or length, length), length}))

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        places, clusters = np.array(cells[0].states_at), [c.cluster for c in cells]
        norms = np.array([o.norms for o in outputs], dtype=np.float64)  # [windows, places, layers]
        if not np.isfinite(norms).all():
            raise ValueError(f"the state is not finite after {places[~np.isfinite(norms).all((0, 2))][0]} tokens")
        together = _rows("state_norm", np.linalg.norm(norms, axis=2), places, clusters)
        layers = [row for i in range(norms.shape[2]) for row in _rows(f"state_norm_layer_{i}", norms[:, :, i], places, clusters)]
        overall = [replace(together[-1], depth=None)]
        if self.window and self.window < places[-1]:
            overall += self._beyond(norms, places, clusters)
        return [*overall, *together, *layers]

    def _beyond(self, norms: np.ndarray, places: np.ndarray, clusters: Sequence[int]) -> list[Result]:
        known = places <= self.window

        def growth(index: Any) -> float:
            means = norms[index].mean(0)
            return float((means[-1] / means[known][-1]).max())

        found = [Result("state_growth", growth(slice(None)), len(norms), *bootstrap(growth, clusters))]
        left = places[(norms.mean(0) > norms[:, known].max((0, 1))).any(1)]
        return [*found, Result("state_left_at", float(left[0]), len(norms), np.nan, np.nan)] if len(left) else found


def _rows(metric: str, norms: np.ndarray, places: np.ndarray, clusters: Sequence[int]) -> list[Result]:
    """One a place, of norms [windows, places]."""
    columns = (norms.mean(0), *bootstrap_means(norms, clusters), places / places[-1])
    return [Result(metric, value, len(norms), low, high, depth) for value, low, high, depth in zip(*(c.tolist() for c in columns), strict=True)]
