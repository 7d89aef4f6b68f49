"""YaRN: yet another RoPE extension method (Peng et al. 2023).

Follows the authors' code and Transformers: the ramp is linear in the *dimension index*; the paper's formula (section
3.2) has it linear in the number of rotations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_longctx.method import Method, RopeChange, Shape, require, require_factor, require_positive


@dataclass(frozen=True)
class Yarn(Method):
    """Slows pairs that turn little within the trained window, keeps the others, sharpens attention.

    theta'_j = (1-g_j) theta_j / factor + g_j theta_j, where g falls from 1 (pairs that turn more than `beta_fast` times
    in the trained window are kept) to 0 (fewer than `beta_slow` times: interpolated); cos and sin times 0.1 ln factor + 1.

    `blend: wavelength` is the form of the PoSE code, theta'_j = theta_j / ((1-g_j) factor + g_j); the two differ only
    inside the ramp. Transformers has no type for it, so it is saved as `longrope` with two equal factor lists."""

    paper = "arXiv:2309.00071"
    factor: float
    beta_fast: float = 32.0  # rotations over the trained window above which a pair is kept
    beta_slow: float = 1.0  # rotations below which a pair is interpolated
    attention_factor: float | None = None  # default: 0.1 ln factor + 1, or the ratio of the two mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # round the ends of the ramp to whole pairs
    blend: Literal["frequency", "wavelength"] = "frequency"

    def __post_init__(self) -> None:
        require_factor(self.factor)
        require_positive(
            beta_fast=self.beta_fast, beta_slow=self.beta_slow, attention_factor=self.attention_factor, mscale=self.mscale, mscale_all_dim=self.mscale_all_dim
        )
        require(self.beta_fast > self.beta_slow, f"beta_fast must be above beta_slow, got {self.beta_fast:g} and {self.beta_slow:g}")
        require(
            (self.mscale is None) == (self.mscale_all_dim is None),
            "mscale and mscale_all_dim come together: the attention factor is their ratio",
        )

    def rope(self, shape: Shape) -> RopeChange:
        kept = self._kept(shape)
        scaled = [self._blend(f, g) for f, g in zip(shape.trained.inv_freq, kept, strict=True)]
        temperature = self._temperature() * shape.trained.attention_factor
        native = self._native(shape) if shape.plain and self.blend == "frequency" else None
        return RopeChange.static(scaled, shape.window * self.factor, native, temperature)

    def _blend(self, freq: float, kept: float) -> float:
        if self.blend == "wavelength":
            return freq / ((1 - kept) * self.factor + kept)
        return freq / self.factor * (1 - kept) + freq * kept

    def _kept(self, shape: Shape) -> list[float]:
        """g_j of each pair."""
        dim = shape.rotary_dim
        low, high = (self._pair_that_turns(turns, shape) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001  # as Transformers avoids the division by zero
        return [1 - min(max((j - low) / width, 0.0), 1.0) for j in range(dim // 2)]

    def _pair_that_turns(self, turns: float, shape: Shape) -> float:
        """The (fractional) pair index whose frequency makes `turns` rotations over the trained window."""
        if not shape.plain:
            return _place_of(turns * 2 * math.pi / shape.window, shape.trained.inv_freq)
        return shape.rotary_dim * math.log(shape.window / (turns * 2 * math.pi)) / (2 * math.log(shape.theta))

    def _temperature(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return _log_scale(self.factor, self.mscale) / _log_scale(self.factor, self.mscale_all_dim)
        return _log_scale(self.factor, 1.0)

    def _native(self, shape: Shape) -> dict[str, object]:
        """Keys left at their defaults are left out: runtimes differ in the names they read for those."""
        keys = {
            "attention_factor": self.attention_factor,
            "mscale": self.mscale,
            "mscale_all_dim": self.mscale_all_dim,
            "beta_fast": self.beta_fast if self.beta_fast != 32.0 else None,
            "beta_slow": self.beta_slow if self.beta_slow != 1.0 else None,
            "truncate": None if self.truncate else False,
        }
        base = {"rope_type": "yarn", "factor": float(self.factor), "original_max_position_embeddings": shape.window}
        return base | {key: value for key, value in keys.items() if value is not None}


def _place_of(freq: float, trained: Sequence[float]) -> float:
    """Where `freq` lies among falling frequencies that follow no geometric law: between two, in proportion to their logarithms."""
    after = next((j for j, f in enumerate(trained) if f <= freq), len(trained))
    j = min(max(after - 1, 0), len(trained) - 2)  # outside, the law of the outermost two is continued
    return j + math.log(trained[j] / freq) / math.log(trained[j] / trained[j + 1])


def _log_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
