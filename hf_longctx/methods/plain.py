"""Contiguous text at its own positions: ordinary training, and the baseline that every skipping sampler must beat."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Plain(Method):
    """Contiguous text: token i of the window gets position i."""

    def positions(self, window: int, document_length: int, rng: "np.random.Generator") -> "tuple[np.ndarray, np.ndarray]":
        import numpy as np

        return np.arange(window), np.arange(window)

    def runs(self, window: int) -> int:
        return 1
