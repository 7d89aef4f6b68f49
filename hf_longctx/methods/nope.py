"""No positional embedding (Kazemnejad et al. 2023; dropped after pre-training: DroPE, arXiv 2512.12167)."""

from dataclasses import dataclass

from hf_longctx.method import Method, RopeChange, Shape, require
from hf_longctx.schema import Size

_STILL = 1e-18  # slow enough that no position reached in practice turns by one float32 rounding; zero has no saved form


@dataclass(frozen=True)
class Nope(Method):
    """No rotation at all: theta'_j = 0, so that only the causal mask tells positions apart. A pretrained RoPE model must be
    retrained afterwards (DroPE uses billions of tokens). `target` is the window to write, the trained one by default."""

    paper = "arXiv:2305.19466"
    target: Size | None = None  # tokens

    def rope(self, shape: Shape) -> RopeChange:
        target = self.target or shape.window
        require(target >= shape.window, f"target {target} is below the trained window {shape.window}")
        return RopeChange.static([f * _STILL for f in shape.trained.inv_freq], target, None)
