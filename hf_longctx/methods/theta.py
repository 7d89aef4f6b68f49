"""Adjusted base frequency, ABF (Xiong et al. 2023; Code Llama, Roziere et al. 2023): a larger base, then training."""

from dataclasses import dataclass

from hf_longctx.method import Method, RopeChange, Shape, require, require_positive
from hf_longctx.schema import Size


@dataclass(frozen=True)
class Theta(Method):
    """A larger rotary base: theta'_j = `theta`^(-2j/D), and the window becomes `target`."""

    paper = "arXiv:2309.16039"
    theta: float  # the new base: 1e6 in Code Llama, 8e6 for 64k and 1.28e8 for 512k in ProLong
    target: Size  # tokens

    def __post_init__(self) -> None:
        require_positive(theta=self.theta)
        require(self.theta > 1, f"theta must be above 1, got {self.theta:g}")

    def rope(self, shape: Shape) -> RopeChange:
        require(shape.plain, f"theta needs a model trained with plain RoPE; this one was trained with {shape.rope_type}")
        require(self.target >= shape.window, f"target {self.target} is below the trained window {shape.window}")
        dim = shape.rotary_dim
        freqs = [self.theta ** (-2 * j / dim) for j in range(dim // 2)]
        return RopeChange.static(freqs, self.target, {"rope_type": "default", "rope_theta": float(self.theta)})
