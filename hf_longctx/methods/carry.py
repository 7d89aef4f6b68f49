"""State passing along documents: LongSSM (Wang 2024), TBTT in Ruiz & Gu 2025 (arXiv 2507.02782).

Both: the final state of a window, without gradient, is the initial state of the next. Ruiz & Gu call it truncated
backpropagation through time where windows are consecutive pieces of one text. Ours: the convolution's state is passed too, so
that two windows equal one text; rows start from zeros where their document ended; `probability`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, StateSource, require
from hf_longctx.methods._state import Source, clear, require_probability

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from hf_longctx.methods._state import States


@dataclass(frozen=True)
class Carry(Method):
    """h_0 of a window = h_T of the window before it in the same document, 0 in a document's first.

    Each row of the batch reads its own documents from beginning to end. With `probability`, a row starts from 0 all the same."""

    paper = "arXiv:2406.02080"
    probability: float = 0.0  # of a fresh start, a row and window

    def __post_init__(self) -> None:
        require_probability(self.probability)

    def state(self) -> StateSource:
        return Carried(self.probability, "stream")


class Carried(Source):
    def from_zeros(self, first: bool, ended: "Sequence[bool]") -> bool:
        return first or all(ended)

    def draw(self, final: "States", ended: "Tensor", rng: "np.random.Generator") -> "States":
        rows = len(final[0][0])
        require(len(ended) == rows, f"carry: {len(ended)} rows cannot continue {rows}; every batch needs as many rows as the one before it")
        return clear(final, ended)
