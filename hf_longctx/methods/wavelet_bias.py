"""A bias made of wavelets: ours.

After "Theoretical Analysis of Positional Encodings" (arXiv 2506.06398), which proposes wavelets as absolute encodings, and
Oka et al. (ICLR 2025), who use them relatively, with a scale and a shift for each dimension of a head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import Method, Shape, require

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longctx.modules import Bias, Values


@dataclass(frozen=True)
class WaveletBias(Method):
    """A learned sum of wavelets of the distance, one an octave: b_h(d) = sum over j < `scales` of w_hj psi((d - c_j) / 2^j).

    d is the distance, h the head, c_j = `shift` 2^j; w is learned, from zero. ricker: psi(u) = (1 - u^2) exp(-u^2/2).
    haar: psi(u) = 1 on [0, 1/2), -1 on [1/2, 1), else 0. With w at zero a pretrained model is left as it is. Far away
    the bias is 0, so the sum of exp(b) over all distances does not converge."""

    paper = "arXiv:2506.06398"
    wavelet: Literal["ricker", "haar"] = "ricker"
    scales: int = 16  # widths 1, 2, .. 2^15 tokens
    shift: float = 0.0  # centre of each wavelet, in widths
    per_layer: bool = False  # one module a layer instead of one shared by all

    def __post_init__(self) -> None:
        require(1 <= self.scales <= 30, f"scales must be between 1 and 30 (widths up to 2^29 tokens), got {self.scales}")
        require(abs(self.shift) <= 16, f"shift must be between -16 and 16 widths, got {self.shift:g}")

    def bias(self, shape: Shape) -> "Bias":
        from hf_longctx.modules import Bias

        return Bias(self._sum, learned={"weight": [[0.0] * shape.heads for _ in range(self.scales)]})

    def converges(self, shape: Shape) -> bool:
        return False

    def _sum(self, values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
        weight = values["weight"]
        psi = _ricker if self.wavelet == "ricker" else _haar
        d = distance.to(weight.dtype)
        total = 0 * d
        for j in range(self.scales):
            # head * 0 + j: FlexAttention returns gradients only of tensors that a tensor indexes.
            total = total + weight[head * 0 + j, head] * psi(d * 2.0**-j - self.shift)
        return total


def _ricker(u: "Tensor") -> "Tensor":
    square = u * u
    return (1 - square) * (-0.5 * square).exp()


def _haar(u: "Tensor") -> "Tensor":
    return ((u >= 0) & (u < 0.5)).to(u.dtype) - ((u >= 0.5) & (u < 1)).to(u.dtype)
