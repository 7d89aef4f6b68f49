"""Legendre polynomials as a position encoding: ours, after the proposal of Li (2025).

The paper proposes orthogonal polynomials; scale, grid, clipping and the learned gain are ours. The degree is the column and the
position the argument; the encoding of arXiv 2405.04585 has them the other way round.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hf_longctx.method import Shape, require
from hf_longctx.methods._additive import Additive
from hf_longctx.schema import Size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longctx.modules import Values


@dataclass(frozen=True)
class Legendre(Additive):
    """Adds Legendre polynomials of the position to token embeddings: column k of position p is sqrt(2k+1) P_k(x), times a
    learned gain, with x = 2p / (`length` - 1) - 1 clipped to [-1, 1].

    Make `length` the window you want to reach: later positions all get x = 1. Columns have mean square 1 over the window and are
    orthogonal in the limit of a fine grid, that is while k^2 stays well below `length`; at the two ends they reach sqrt(2k+1). When
    training from scratch, set `gain` to the spread of the token embeddings, 0.02 in most models (recipes/lab)."""

    paper = "arXiv:2506.06398"
    length: Size | None = None  # positions; default the trained window

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.length != 1, "length must be at least 2 positions, got 1: they span the interval from -1 to 1")

    def embedding(self, shape: Shape) -> "nn.Module":
        from hf_longctx.modules import Embedding

        length = self.length or shape.window
        return Embedding(partial(row, length=length), gain=self.gain, fixed={"table": partial(table, length, shape.hidden)})


def row(values: "Values", positions: "Tensor", *, length: int) -> "Tensor":
    return values["table"][positions.clamp(0, length - 1)].float()


def table(length: int, hidden: int) -> "Tensor":
    """float32 [length, hidden], by the recurrence (k+1) P_{k+1} = (2k+1) x P_k - k P_{k-1} in float64, stable on [-1, 1].

    Built once, because the recurrence is `hidden` steps one after the other however few positions there are, and decoding would pay
    for it in every step. For 131,072 positions of size 4,096 the table takes 2 GiB."""
    import torch

    x = torch.linspace(-1, 1, length, dtype=torch.float64)
    columns = torch.empty(hidden, length)
    before, now = torch.zeros_like(x), torch.ones_like(x)
    for k in range(hidden):
        columns[k] = math.sqrt(2 * k + 1) * now
        before, now = now, ((2 * k + 1) * x * now - k * before) / (k + 1)
    return columns.T.contiguous()
