"""Randomised positions (Ruoss et al. 2023), the RandPos baseline of the PoSE paper."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method
from hf_longctx.schema import Size

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RandomPositions(Method):
    """A sorted sample of `window` distinct positions below the target. As fine-tuning it fails (PoSE, table 1): nearly
    every neighbour is far away. It is here as the baseline."""

    paper = "arXiv:2305.16843"
    target: Size | None = None  # tokens; by default the patched model's window

    def positions(self, window: int, document_length: int, rng: "np.random.Generator") -> "tuple[np.ndarray, np.ndarray]":
        import numpy as np

        assert self.target is not None
        assert self.target >= window
        return np.arange(window), np.sort(rng.choice(self.target, size=window, replace=False))
