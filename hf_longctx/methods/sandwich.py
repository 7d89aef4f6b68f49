"""Sandwich: the inner product of two sinusoidal position embeddings (Chi et al. 2022).

Follows NVIDIA NeMo (sandwich_relative_position_embedding), whose sum starts at i = 1.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, Shape, require

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longctx.modules import Bias, Values

_BITS = 40  # of an angle's fraction of a turn; times distances below 2^25 it stays within 64 bits


@dataclass(frozen=True)
class Sandwich(Method):
    """How alike two sinusoidal position embeddings are, as a bias by distance, with nothing to learn.

    b_h(d) = (sum over i = 1..`dim`/2 of cos(d / 10000^(2i/`dim`)) - `dim`/2) / (8h/H), d the distance, h = 1..H heads.
    The bias is bounded, so the sum of exp(b) over all distances does not converge."""

    paper = "arXiv:2212.10356"
    dim: int = 128

    def __post_init__(self) -> None:
        require(self.dim >= 2 and self.dim % 2 == 0, f"dim must be even and at least 2, got {self.dim}")

    def bias(self, shape: Shape) -> "Bias":
        from hf_longctx.modules import Bias

        return Bias(self._cosines, fixed={"rate": [shape.heads / (8 * h) for h in range(1, shape.heads + 1)]})

    def converges(self, shape: Shape) -> bool:
        return False

    def _cosines(self, values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
        """cos x - 1 = -2 sin^2(x/2) keeps the digits of near distances. Angles are whole numbers of 2^-40 turns, wrapped
        exactly: in float32 the fastest would be off by 0.03 radians at a distance of a million."""
        rate = values["rate"][head]
        distance = distance.long()
        total = 0 * rate
        for i in range(1, self.dim // 2 + 1):
            turns = round(2**_BITS / (2 * math.pi * 10000 ** (2 * i / self.dim)))
            half_angle = (distance * turns & (2**_BITS - 1)).to(rate.dtype) * (math.pi / 2**_BITS)
            total = total + half_angle.sin().square()
        return -2 * rate * total
