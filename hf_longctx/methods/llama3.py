"""The scaling of Llama 3.1 (Grattafiori et al. 2024; formula as in Meta's reference code)."""

import math
from dataclasses import dataclass

from hf_longctx.method import Method, RopeChange, Shape, require, require_factor, require_positive


@dataclass(frozen=True)
class Llama3(Method):
    """Slows pairs with long wavelengths, keeps those with short ones, blends between them.

    theta'_j = theta_j / factor where the wavelength exceeds L / low_freq_factor, theta_j where it is below
    L / high_freq_factor, and between them (1-s) theta_j / factor + s theta_j with
    s = (L / wavelength - low) / (high - low). No attention temperature."""

    paper = "arXiv:2407.21783"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        require_factor(self.factor)
        require_positive(low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor must be above low_freq_factor, got {self.high_freq_factor:g} and {self.low_freq_factor:g}",
        )

    def rope(self, shape: Shape) -> RopeChange:
        scaled = [self._scale(f, shape.window) for f in shape.trained.inv_freq]
        native = {
            "rope_type": "llama3", "factor": float(self.factor), "original_max_position_embeddings": shape.window,
            "low_freq_factor": float(self.low_freq_factor), "high_freq_factor": float(self.high_freq_factor),
        }  # fmt: skip
        window = shape.window * self.factor
        return RopeChange.static(scaled, window, native if shape.plain else None, shape.trained.attention_factor)

    def _scale(self, freq: float, window: int) -> float:
        turns = window * freq / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = min(max(keep, 0.0), 1.0)
        return (1 - keep) * freq / self.factor + keep * freq
