"""Starting every window of a state-space model from zeros: how they are pretrained, and the baseline of state passing.

The same code path as the other state methods, so that a comparison differs in nothing but the states.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, StateSource
from hf_longctx.methods._state import Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from hf_longctx.methods._state import States


@dataclass(frozen=True)
class Zero(Method):
    """h_0 = 0 in every window: nothing of the text before it."""

    paper = "arXiv:2312.00752"

    def state(self) -> StateSource:
        return Zeros()


class Zeros(Source):
    def from_zeros(self, first: bool, ended: "Sequence[bool]") -> bool:
        return True

    def draw(self, final: "States", ended: "Tensor", rng: "np.random.Generator") -> "States":
        rows = len(ended)
        return [(conv.new_zeros(rows, *conv.shape[1:]), ssm.new_zeros(rows, *ssm.shape[1:])) for conv, ssm in final]
