"""Learned position embeddings (Gehring et al. 2017; GPT-2, from which the spread of 0.02). Ours: the learned gain."""

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
class Learned(Additive):
    """Adds a learned vector for each position to token embeddings: row p of a table of `length` rows, times a learned gain.

    Rows start from normal(0, 0.02), the same for the same `seed`. Positions past the table take its last row: it does not
    extrapolate. While the gain is exactly 0 only the gain is trained. Set `gain` 1 when training from scratch."""

    paper = "arXiv:1705.03122"
    length: Size | None = None  # positions; default the trained window
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")

    def embedding(self, shape: Shape) -> "nn.Module":
        from hf_longctx.modules import Embedding

        length = self.length or shape.window
        return Embedding(partial(row, length=length), gain=self.gain, learned={"table": partial(draw, length, shape.hidden, self.seed)})


def draw(length: int, hidden: int, seed: int) -> "Tensor":
    import torch

    return torch.empty(length, hidden, device="cpu").normal_(0, 0.02, generator=torch.Generator("cpu").manual_seed(seed))


def row(values: "Values", positions: "Tensor", *, length: int) -> "Tensor":
    return values["table"][positions.clamp(0, length - 1)].float()
