"""ALiBi: attention with linear biases (Press et al. 2021).

Follows the authors' code (ofirpress/attention_with_linear_biases), also for head counts that are no power of two.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, Shape, require_positive
from hf_longctx.methods._relative import head_slopes, require_slopes

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longctx.modules import Bias, Values


@dataclass(frozen=True)
class Alibi(Method):
    """Takes a fixed slope times the distance off attention logits: b_h(d) = -`multiplier` m_h d, m_h = 2^(-8h/H), h = 1..H heads.

    Where H is no power of two: the slopes of the power of two below, then every other slope of twice that power.
    `slopes` gives a list of one's own, one a head. The sum of exp(b) over all distances converges unless a slope is 0.
    """

    paper = "arXiv:2108.12409"
    slopes: tuple[float, ...] | None = None
    multiplier: float = 1.0  # below 1 sees farther

    def __post_init__(self) -> None:
        require_slopes(self.slopes)
        require_positive(multiplier=self.multiplier)

    def bias(self, shape: Shape) -> "Bias":
        from hf_longctx.modules import Bias

        slopes = [self.multiplier * m for m in head_slopes(self.slopes, shape.heads, self.name)]
        return Bias(_linear, fixed={"slopes": slopes})

    def converges(self, shape: Shape) -> bool:
        return all(m > 0 for m in head_slopes(self.slopes, shape.heads, self.name))


def _linear(values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
    return -values["slopes"][head] * distance
