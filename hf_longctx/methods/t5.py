"""T5's relative position bias (Raffel et al. 2019).

Follows the causal form in GPT-NeoX (ParallelRelativePositionBias), with its scale of sqrt(head_dim).
"""

import math
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import Method, Shape
from hf_longctx.methods._relative import require_buckets, t5_buckets, t5_lookup, xavier_normal
from hf_longctx.schema import Size

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longctx.modules import Bias, Values


@dataclass(frozen=True)
class T5(Method):
    """A learned bias for each bucket of distances: b_h(d) = sqrt(D) W[bucket(d), h], D the head's dimension.

    Without `scale`, W alone. bucket(d) = d for d < e = `buckets`/2, then e + floor(n ln(d/e) / ln(`max_distance`/e))
    with n = `buckets` - e, at most `buckets` - 1. `init: zero` leaves a pretrained model as it is until W is trained;
    `normal` is GPT-NeoX's Xavier normal. All far distances share a bucket, so the sum of exp(b) over all distances does
    not converge."""

    paper = "arXiv:1910.10683"
    buckets: int = 32
    max_distance: Size = 128  # tokens; all beyond share the last bucket
    scale: bool = True  # times sqrt(head_dim)
    init: Literal["zero", "normal"] = "zero"
    seed: int = 0  # of `init: normal`
    per_layer: bool = False  # one module a layer instead of one shared by all

    def __post_init__(self) -> None:
        require_buckets(self.buckets, self.max_distance)

    def bias(self, shape: Shape) -> "Bias":
        from hf_longctx.modules import Bias

        zero = [[0.0] * shape.heads for _ in range(self.buckets)]
        table = zero if self.init == "zero" else xavier_normal(self.buckets, shape.heads, Random(self.seed))
        formula = partial(_table, math.sqrt(shape.head_dim) if self.scale else 1.0)
        return Bias(formula, learned={"table": table}, fixed={"bucket": t5_buckets(self.buckets, self.max_distance)})

    def converges(self, shape: Shape) -> bool:
        return False


def _table(scale: float, values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
    return scale * t5_lookup(values["table"], values["bucket"], head, distance)
