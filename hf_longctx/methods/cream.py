"""CREAM, continuity-relativity indexing with Gaussian middle (Wu et al. 2024)."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from hf_longctx.method import Method, require_positive
from hf_longctx.schema import Size

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Cream(Method):
    """Head, middle and tail of the target window in one short window.

    Three segments: a head at the first positions, a tail at the last ones before the target, and a middle whose end is
    drawn around the centre: a ~ truncated normal(1 + f, sigma) on [2, 2f], then uniform between head + (mid-1) a/2 and
    a N / 2 - tail - 1, with N the window and f = target / N. A coin per example makes head and tail a third of the window
    ("relativity") or 4 f tokens ("continuity").

    Departures from the published script, where it misbehaves: the coin is tossed per example (there: per 3,000); sigma
    defaults to 0.375 f (there: 3 whatever f, which at f = 64 never trains 31 % of the distances); a is not rounded down to a
    whole number; head and tail never take more than a third of the window each."""

    paper = "arXiv:2406.07138"
    target: Size | None = None  # tokens; by default the patched model's window
    sigma: float | None = None  # of the middle's place, in units of half a window; default 0.375 target / window

    def __post_init__(self) -> None:
        require_positive(sigma=self.sigma)

    def positions(self, window: int, document_length: int, rng: "np.random.Generator") -> "tuple[np.ndarray, np.ndarray]":
        import numpy as np

        assert self.target is not None
        assert self.target >= window
        third = window // 3
        edge = third if rng.random() < 0.5 else min(math.ceil(4 * self.target / window), third)
        middle = window - 2 * edge
        end = self._middle_end(window, edge, middle, rng)
        positions = np.concatenate([np.arange(edge), np.arange(end - middle + 1, end + 1), np.arange(self.target - edge, self.target)])
        # The text really found there, as far as the document reaches; the tail is the document's end, or the target's.
        last = min(document_length, self.target)
        stop = min(end + 1, last - edge)
        tokens = np.concatenate([np.arange(edge), np.arange(stop - middle, stop), np.arange(last - edge, last)])
        return tokens, positions

    def runs(self, window: int) -> int:
        return 3

    def _middle_end(self, window: int, edge: int, middle: int, rng: "np.random.Generator") -> int:
        """The position of the middle segment's last token."""
        assert self.target is not None
        factor = self.target / window
        normal = NormalDist(1 + factor, self.sigma or 0.375 * factor)
        place = rng.uniform(normal.cdf(2), normal.cdf(2 * factor))  # inverting the CDF costs the same for any sigma, rejection does not
        alpha = min(max(normal.inv_cdf(min(max(place, 1e-300), 1 - 1e-16)), 2.0), 2 * factor)
        low = int(edge + (middle - 1) * alpha / 2)
        high = int(alpha / 2 * window) - edge - 1
        end = int(rng.integers(low, max(low, high), endpoint=True))
        return min(max(end, edge + middle - 1), self.target - edge - 1)
