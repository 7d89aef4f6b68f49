"""KERPLE: kernelized relative positional embedding (Chi et al. 2022).

Follows the authors' code (chijames/KERPLE, ParallelKerpleLog and ParallelKerplePower without the multiplicative kernel).
"""

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import Method, Shape
from hf_longctx.methods._relative import clamped, kerple_draw, log_polynomial

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longctx.modules import Bias, Values


@dataclass(frozen=True)
class Kerple(Method):
    """A learned decay with the distance: b_h(d) = -p_h log(1 + a_h d), or -a_h d^p_h with `form: power`.

    d is the distance, h the head; a_h >= 0.01 and p_h >= 0.01 are learned, from random values in [0, 1) and [0, 2); the
    p_h of `power` is at most 2. The sum of exp(b) over all distances converges for power, and for log only where every
    p_h is above 1."""

    paper = "arXiv:2205.09921"
    form: Literal["log", "power"] = "log"
    seed: int = 0  # of the initial a and p
    per_layer: bool = False  # one module a layer instead of one shared by all

    def bias(self, shape: Shape) -> "Bias":
        from hf_longctx.modules import Bias

        return Bias(_log if self.form == "log" else _power, learned=kerple_draw(shape.heads, Random(self.seed)))

    def converges(self, shape: Shape) -> bool:
        """At the initial p; training moves it."""
        return self.form == "power" or min(kerple_draw(shape.heads, Random(self.seed))["p"]) > 1


def _log(values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
    return log_polynomial(values["a"][head], values["p"][head], distance)


def _power(values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
    a, p = clamped(values["a"][head]), clamped(values["p"][head], most=2.0)
    # Not 0^p: its derivative with respect to p holds log 0.
    return -a * distance.clamp(min=1).to(p.dtype).pow(p) * (distance > 0)
