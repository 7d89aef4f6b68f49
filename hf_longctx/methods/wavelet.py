"""Wavelets as a position encoding: ours, after the proposal of Li (2025).

The paper proposes wavelets; how columns are shared between scales and shifts, repetition and the learned gain are ours. The
relative, per-head wavelets of Oka et al. (ICLR 2025) are another method.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import Shape, require
from hf_longctx.methods._additive import Additive
from hf_longctx.schema import Size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longctx.modules import Values


@dataclass(frozen=True)
class Wavelet(Additive):
    """Adds wavelets of the position to token embeddings: column (j, m) of position p is 2^(-j/2) psi(2^-j p - m), times a
    learned gain.

    psi is the Haar wavelet (1 on [0, 1/2), -1 on [1/2, 1), else 0) or the Ricker wavelet about 1/2, c (1 - t^2) exp(-t^2 / 2) with
    t = u - 1/2 and c = 2 / (sqrt(3) pi^(1/4)). Scales run from j = J, J = ceil(log2 `length`), where one wavelet spans all positions,
    down to j = 1. Scale j has 2^(J-j) shifts; it is given that many columns or an even share of those not yet given away, whichever is
    less. Where columns are fewer than shifts, they repeat: with n columns, 2^-j p - m is taken modulo n into [(1-n)/2, (1+n)/2), so
    that fine scales tell neighbours apart and coarse ones places. Columns left over are zero.

    Haar columns are exactly orthogonal if `length` is a power of two. Positions past it count as the last one: make it the window
    you want to reach. Set `gain` 1 when training from scratch."""

    paper = "arXiv:2506.06398"
    psi: Literal["haar", "ricker"] = "haar"
    length: Size | None = None  # positions; default the trained window

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.length != 1, "length must be at least 2 positions, got 1: the finest wavelet spans two")

    def embedding(self, shape: Shape) -> "nn.Module":
        from hf_longctx.modules import Embedding

        formula = partial(encode, psi=PSI[self.psi], hidden=shape.hidden, length=self.length or shape.window)
        return Embedding(formula, gain=self.gain)


def encode(values: "Values", positions: "Tensor", *, psi: "Callable[[Tensor], Tensor]", hidden: int, length: int) -> "Tensor":
    """Scale by scale: some 17 small steps for 131,072 positions, no table. The argument of psi is exact in float32."""
    import torch

    place = positions.clamp(0, length - 1)[..., None].float()
    coarsest = scales(length)
    columns = []
    for j, n in share(hidden, coarsest):
        u = place / 2**j - torch.arange(n, device=positions.device)
        if n < 2 ** (coarsest - j):
            half = (n - 1) / 2
            u = torch.remainder(u + half, n) - half
        columns.append(2 ** (-j / 2) * psi(u))
    found = torch.cat(columns, -1)
    return torch.nn.functional.pad(found, (0, hidden - found.shape[-1]))


def scales(length: int) -> int:
    """ceil(log2 length)."""
    return (length - 1).bit_length()


def share(hidden: int, coarsest: int) -> list[tuple[int, int]]:
    """(scale, columns), coarsest first; what a scale cannot use goes to the finer ones."""
    shares, left = [], hidden
    for j in range(coarsest, 0, -1):
        n = min(2 ** (coarsest - j), left // j)
        shares.append((j, n))
        left -= n
    return [(j, n) for j, n in shares if n]


def haar(u: "Tensor") -> "Tensor":
    return ((u >= 0) & (u < 0.5)).float() - ((u >= 0.5) & (u < 1)).float()


def ricker(u: "Tensor") -> "Tensor":
    square = (u - 0.5) ** 2
    return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - square) * (-square / 2).exp()


PSI = {"haar": haar, "ricker": ricker}
