"""Scalable-Softmax, SSMax (Nakanishi 2025).

Ours: `init`. With s = 1 / ln L the logits of a pretrained model are unchanged where L keys are visible, L its trained window, and
flatter below. The paper finds SSMax best from the start of pretraining; put in later, it recovers part of the gain.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, Shape, require_positive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longctx.modules import Values


@dataclass(frozen=True)
class Ssmax(Method):
    """Attention logits times s ln n, with s learned per head and layer.

    n is the number of keys that the query sees, itself included, padding left out: softmax then weighs a key of logit z by
    n^(s z). With `offset`, s ln n + b, and b is learned too, from 0: the paper's variant with a bias."""

    paper = "arXiv:2501.19399"
    init: float | None = None  # s before training; default 1 / ln(trained window)
    offset: bool = False  # the paper's b; not called bias, which is the name of a slot

    def __post_init__(self) -> None:
        require_positive(init=self.init)

    def attention(self, shape: Shape) -> "nn.Module":
        from hf_longctx.modules import Scaling

        learned = {"s": [self.init or 1 / math.log(shape.window)] * shape.heads}
        if self.offset:
            learned["b"] = [0.0] * shape.heads
        return Scaling(rescale, learned=learned)


def rescale(values: "Values", q: "Tensor", k: "Tensor", q_pos: "Tensor", q_index: "Tensor", k_valid: "Tensor | None") -> "tuple[Tensor, Tensor]":
    log_n = q_index.float().clamp(min=1).log()  # a padding query may see nothing; its output is not read, but must be finite
    factor = values["s"][:, None] * log_n[:, None]  # [batch, heads, queries]
    if "b" in values:
        factor = factor + values["b"][:, None]
    return (q * factor[..., None]).to(q.dtype), k
