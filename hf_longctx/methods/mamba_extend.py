"""MambaExtend (Azizi, Kundu, Sadeghi & Pedram, ICLR 2025): one factor a layer on the step size, found without gradients.

The numbers of the search are those of the released code. It looks at the perplexity of the *test* set to choose between the step
and the two probes; here everything is chosen on the text that is given for calibration, which must be training text, no scaling is
among the candidates, and the best factors of all are kept instead of the last ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_longctx.method import Calibrated, Method, StateShape, StepSizes, require, require_positive
from hf_longctx.schema import Size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from hf_longctx.modules import Values

FLOOR = 0.01


@dataclass(frozen=True)
class MambaExtend(Method):
    """Delta_t := s_l softplus(dt_t + b) in layer l: below 1, states decay more slowly and take in less of each token.

    `scales`: s_l of each state-space layer in order (a hybrid's attention layers have none), or one number for all. Without them they
    are sought on `samples` windows of `target` tokens: s starts from U(0.75, 1); step k draws p from {-1, 1}^layers, evaluates the
    perplexity P at s +- c_k p, c_k = 0.1 / (1 + k)^0.1, moves to s - a_k (P_+ - P_-) / (2 c_k) p, a_k = 0.001 cos(pi k / 198), or to
    the better probe if that has less perplexity; no s is below 0.01."""

    paper = "https://openreview.net/forum?id=LgzRo1RpLS"
    scales: float | tuple[float, ...] | None = None
    target: Size | None = None  # tokens of a window to calibrate on: the length that the model is meant for
    samples: int = 20
    steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for scale in self.scales if isinstance(self.scales, tuple) else [self.scales]:
            require_positive(scales=scale)
        require(self.samples >= 1 and self.steps >= 1, f"samples and steps must be at least 1, got {self.samples} and {self.steps}")
        require(
            self.scales is not None or self.target is not None,
            "give scales (one number, or one a state-space layer), or target, the length in tokens that data is to be read in to find them",
        )

    def delta(self, shape: StateShape, layer: int) -> "nn.Module":
        from hf_longctx.modules import StepSize

        scales = self.scales
        require(scales is not None, "mamba_extend has not been calibrated: give data to `longctx patch` (--data FILE), or scales")
        if isinstance(scales, tuple):
            require(len(scales) == shape.layers, f"mamba_extend: {len(scales)} scales for the {shape.layers} state-space layers of this {shape.family}")
            scales = scales[layer]
        return StepSize(scaled, fixed={"scale": scales})

    @property
    def calibration(self) -> tuple[int, int] | None:
        if self.scales is not None:
            return None
        assert self.target is not None
        return self.samples, self.target

    def calibrate(self, steps: StepSizes) -> Calibrated:
        import numpy as np

        rng = np.random.default_rng(self.seed)

        def perplexity(scales: "np.ndarray") -> float:
            return steps.perplexity(replace(self, scales=tuple(map(float, scales))))

        found = search(perplexity, rng.uniform(0.75, 1, steps.shape.layers), self.steps, rng)
        return Calibrated(replace(self, scales=tuple(round(float(scale), 6) for scale in found)))


def scaled(values: "Values", delta: "Tensor") -> "Tensor":
    return delta * values["scale"]


def search(loss: "Callable[[np.ndarray], float]", start: "np.ndarray", steps: int, rng: "np.random.Generator") -> "np.ndarray":
    """Simultaneous perturbation (SPSA) from `start`, [layers]; returns the factors of least loss among ones and all that were tried."""
    import numpy as np

    tried = [(loss(point), point) for point in (np.ones_like(start), start)]
    scales = start
    for k in range(steps):
        c, a = 0.1 / (1 + k) ** 0.1, 0.001 * math.cos(math.pi * k / 198)
        direction = rng.choice([-1.0, 1.0], len(start))
        probes = [np.maximum(scales + side * c * direction, FLOOR) for side in (1, -1)]
        up, down = map(loss, probes)
        slope = (up - down) / (2 * c)
        step = np.maximum(scales - a * slope * direction, FLOOR) if math.isfinite(slope) else scales
        candidates = [(loss(step), step), (up, probes[0]), (down, probes[1])]
        tried += candidates
        scales = min(candidates, key=lambda found: found[0])[1]
    return min(tried, key=lambda found: found[0])[1]
