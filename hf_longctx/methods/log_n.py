"""Attention logits grow with the logarithm of the number of keys (Chiang and Cholak 2022; Su 2021; the Qwen team 2023).

Softmax over more keys is flatter; Su's argument is that logits times ln n keep its entropy about constant. Su and Qwen divide
by the logarithm of a reference length. Qwen's code and the ReRoPE and Self-Extend patches count from the position; here n is the
number of keys that the query sees, padding left out, so skipped training positions (PoSE) do not change it.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import Method, Shape, require
from hf_longctx.schema import Size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longctx.modules import Values


@dataclass(frozen=True)
class LogN(Method):
    """Attention logits times a logarithm of the number of visible keys.

    With n keys visible to a query, itself included, and L = `reference`: `qwen` max(1, ln n / ln L), which leaves the trained
    window as it is; `su` ln n / ln L, flatter below L too; `chiang` ln n, for models trained with it."""

    paper = "arXiv:2202.12172"
    form: Literal["su", "chiang", "qwen"] = "qwen"
    reference: Size | None = None  # L, in tokens; default the trained window; not used by `chiang`

    def __post_init__(self) -> None:
        require(self.form != "chiang" or self.reference is None, f"reference is not used by form chiang, got {self.reference}; leave it out")
        require(self.reference != 1, "reference must be at least 2 tokens, got 1: its logarithm divides")

    def attention(self, shape: Shape) -> "nn.Module":
        from hf_longctx.modules import Scaling

        return Scaling(partial(rescale, form=self.form, reference=self.reference or shape.window))


def rescale(
    values: "Values", q: "Tensor", k: "Tensor", q_pos: "Tensor", q_index: "Tensor", k_valid: "Tensor | None", *, form: str, reference: int
) -> "tuple[Tensor, Tensor]":
    seen = q_index.float().clamp(min=1)  # a padding query may see nothing; its output is not read, but must be finite
    factor = seen.log()
    if form != "chiang":
        factor = factor / math.log(reference)
    if form == "qwen":
        factor = factor.where(seen > reference, 1.0)  # exactly 1: a rounded ln L / ln L may not be
    return (q * factor[:, None, :, None]).to(q.dtype), k
