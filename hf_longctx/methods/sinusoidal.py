"""Sinusoidal position encoding (Vaswani et al. 2017). Ours: the learned gain."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hf_longctx.method import Shape, require_positive
from hf_longctx.methods._additive import Additive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longctx.modules import Values


@dataclass(frozen=True)
class Sinusoidal(Additive):
    """Adds sines and cosines of the position to token embeddings: columns 2i and 2i+1 of position p are sin and cos of
    p `base`^(-2i/hidden), times a learned gain. Any position has one. When training from scratch, set `gain` to
    the spread of the token embeddings, 0.02 in most models (recipes/lab)."""

    paper = "arXiv:1706.03762"
    base: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(base=self.base)

    def embedding(self, shape: Shape) -> "nn.Module":
        from hf_longctx.modules import Embedding

        return Embedding(partial(encode, hidden=shape.hidden, base=self.base), gain=self.gain)


def encode(values: "Values", positions: "Tensor", *, hidden: int, base: float) -> "Tensor":
    """Computed for the positions asked for: a table of 131,072 positions would take 2 GiB at hidden size 4,096."""
    import torch

    # In float64: at position 100,000 a float32 angle is off by up to 0.004 radians.
    pair = torch.arange((hidden + 1) // 2, device=positions.device, dtype=torch.float64)
    angle = positions[..., None] * base ** (-2 * pair / hidden)
    return torch.stack((angle.sin().float(), angle.cos().float()), -1).flatten(-2)[..., :hidden]
