"""FIRE: functional interpolation for relative position encoding (Li et al. 2023).

Follows the code in the paper's appendix; torch's initial values of linear layers, from `seed`.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from hf_longctx.method import Method, Shape, require
from hf_longctx.schema import Size

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longctx.modules import Bias, Values

_EPS = 1e-6


@dataclass(frozen=True)
class Fire(Method):
    """A learned function of the distance as a fraction of the query's position, both on a log scale.

    b_h(i, d) = MLP_h(log(1 + |c| d) / (log(1 + |c| max(i, |l| `threshold`)) + 1e-6)), i the query's position, d the
    distance. MLP: 1 -> `width` -> one output a head, with ReLU. Learned: its weights, c (from 0.1) and l (from 1). The
    distance is a fraction of the way to the first token, so the bias is bounded and the sum of its exp over all
    distances does not converge."""

    paper = "arXiv:2310.04418"
    threshold: Size = 512  # tokens: below this position the normaliser is constant
    width: int = 32
    seed: int = 0  # of the initial MLP
    per_layer: bool = False  # one module a layer instead of one shared by all

    def __post_init__(self) -> None:
        require(self.threshold >= 1, f"threshold must be at least 1 token, got {self.threshold}")
        require(self.width >= 1, f"width must be at least 1, got {self.width}")

    def bias(self, shape: Shape) -> "Bias":
        from hf_longctx.modules import Bias

        return Bias(self._fraction_mlp, by_distance=False, learned=self._initial(shape.heads))

    def converges(self, shape: Shape) -> bool:
        return False

    def _initial(self, heads: int) -> dict[str, object]:
        rng, bound = Random(self.seed), 1 / math.sqrt(self.width)
        mlp = {
            "w1": [rng.uniform(-1, 1) for _ in range(self.width)],
            "b1": [rng.uniform(-1, 1) for _ in range(self.width)],
            "w2": [[rng.uniform(-bound, bound) for _ in range(heads)] for _ in range(self.width)],
            "b2": [rng.uniform(-bound, bound) for _ in range(heads)],
        }
        return {**mlp, "c": [0.1], "l": [1.0]}

    def _fraction_mlp(self, values: "Values", head: "Tensor", q_pos: "Tensor", k_pos: "Tensor") -> "Tensor":
        import torch

        from hf_longctx.modules import without_autocast

        # Tensors pick parameters, zeros what all heads share: FlexAttention returns gradients only of tensors that a tensor indexes.
        zero, unit = q_pos * 0, torch.arange(self.width, device=q_pos.device)
        c, threshold = values["c"][zero].abs(), values["l"][zero].abs() * self.threshold
        i = q_pos.to(c.dtype)
        reach = i.where(i > threshold, threshold)
        x = (c * (q_pos - k_pos).clamp(min=0)).log1p() / ((c * reach).log1p() + _EPS)
        hidden = torch.addcmul(values["b1"][unit], x[..., None], values["w1"][unit]).relu()  # of a pair: all heads share it
        with without_autocast(hidden):  # which rounds a product, unlike what is pointwise
            total = torch.einsum("...u,...u->...", values["w2"][unit, head[..., None]], hidden)  # weights first: keys end up last in memory
        return total + values["b2"][head]
