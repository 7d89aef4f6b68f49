"""Attention logits divided by the lengths of the keys (Bernhard 2023).

The paper divides q k by the sum of the Euclidean lengths of the keys, and studies it on random vectors only. Ours: in a causal model
the sum runs over the keys that a query sees; `mean`, `max` and the gain. The sum grows with the number of keys, which makes
attention uniform at any real length; the mean is close to the usual sqrt(head_dim) where components have unit variance. None leaves a
pretrained model as it is.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import Method, Shape, require_positive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longctx.modules import Values


@dataclass(frozen=True)
class KeyNorm(Method):
    """Attention logits g q k / N, in place of q k / sqrt(head_dim), where N sums the lengths of the visible keys.

    N = sum of ||k_j|| over the keys j that the query sees, itself included, padding left out; or their mean, or the longest. g =
    `gain`, with `learn_gain` learned per head and layer from there. The model goes on to divide by sqrt(head_dim), so queries are
    multiplied by it first; a model that multiplies by another c ends with c sqrt(head_dim) times these logits."""

    paper = "arXiv:2311.09406"
    packs = False
    by: Literal["sum", "mean", "max"] = "sum"
    gain: float = 1.0  # g, or where it starts
    learn_gain: bool = False

    def __post_init__(self) -> None:
        require_positive(gain=self.gain)

    def attention(self, shape: Shape) -> "nn.Module":
        from hf_longctx.modules import Scaling

        learned = {"gain": [self.gain] * shape.heads} if self.learn_gain else None
        return Scaling(partial(rescale, by=self.by, gain=self.gain), learned=learned)


def rescale(
    values: "Values", q: "Tensor", k: "Tensor", q_pos: "Tensor", q_index: "Tensor", k_valid: "Tensor | None", *, by: str, gain: float
) -> "tuple[Tensor, Tensor]":
    total = visible_length(k, q_index, k_valid, by).repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # of each query head's keys
    total = total.where(total > 0, 1.0)  # a padding query sees nothing, and keys may all be zero: logits are then zero anyway
    gains = values["gain"][:, None] if "gain" in values else gain
    return (q * (math.sqrt(q.shape[-1]) * gains / total)[..., None]).to(q.dtype), k


def visible_length(k: "Tensor", q_index: "Tensor", k_valid: "Tensor | None", by: str) -> "Tensor":
    """[batch, kv_heads, queries]: sum, mean or maximum of the lengths of the keys that each query sees, at least in float32."""
    import torch

    lengths = torch.linalg.vector_norm(k, dim=-1, dtype=torch.promote_types(k.dtype, torch.float32))
    if k_valid is not None:
        lengths = lengths.masked_fill(~k_valid[:, None], 0)  # what a static cache holds past its end is not even finite for sure
    running = lengths.cummax(-1).values if by == "max" else lengths.cumsum(-1)
    last = last_visible(q_index, k_valid).clamp(0, k.shape[2] - 1)
    seen = running.gather(-1, last[:, None].expand(*k.shape[:2], -1))  # without a mask one row counts for all
    return seen / q_index[:, None].clamp(min=1) if by == "mean" else seen


def last_visible(q_index: "Tensor", k_valid: "Tensor | None") -> "Tensor":
    """[batch, queries]: the index of the last key that each query sees, wherever padding lies and however long the cache is.

    A causal query that sees n keys sees the first n valid ones, so the last is where the running count of valid keys reaches n."""
    import torch

    if k_valid is None:
        return q_index - 1
    return torch.searchsorted(k_valid.cumsum(-1), q_index.contiguous())
