"""LongRoPE (Ding et al. 2024): a rescaling factor for each pair of dimensions, found by search or given by the vendor."""

import math
from dataclasses import dataclass

from hf_longctx.method import Frequencies, Method, RopeChange, Shape, require, require_factor, require_positive


@dataclass(frozen=True)
class Longrope(Method):
    """A factor of its own for each rotary pair, from a list.

    theta'_j = theta_j / long_factor_j once a position lies past the trained window, theta_j / short_factor_j before;
    cos and sin times sqrt(1 + ln factor / ln L).

    The lists have one entry a rotary pair: `-m longrope:factor=8,long_factor=@factors.json`. With `short_factor` left out
    both regimes use `long_factor`: frequencies are then static, and training positions may skip."""

    paper = "arXiv:2402.13753"
    factor: float
    long_factor: tuple[float, ...]
    short_factor: tuple[float, ...] | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        require_factor(self.factor)
        require_positive(attention_factor=self.attention_factor)
        for name, values in (("long_factor", self.long_factor), ("short_factor", self.short_factor or ())):
            bad = next((v for v in values if not (math.isfinite(v) and v > 0)), None)
            require(bad is None, f"{name} must hold positive numbers, got {bad}")

    @property
    def static(self) -> bool:  # type: ignore[override]
        return self.short_factor is None or self.short_factor == self.long_factor

    def rope(self, shape: Shape) -> RopeChange:
        require(shape.plain, f"longrope needs a model trained with plain RoPE; this one was trained with {shape.rope_type}")
        short = self.short_factor or self.long_factor
        pairs = shape.rotary_dim // 2
        for name, values in (("long_factor", self.long_factor), ("short_factor", short)):
            require(len(values) == pairs, f"{name} needs one number for each of {pairs} rotary pairs, got {len(values)}")
        temperature = self.attention_factor or math.sqrt(1 + math.log(self.factor) / math.log(shape.window))
        window = round(shape.window * self.factor)
        native = {
            "rope_type": "longrope", "factor": float(self.factor), "short_factor": list(short), "long_factor": list(self.long_factor),
            "original_max_position_embeddings": shape.window, "attention_factor": temperature,
        }  # fmt: skip
        regimes = {window: self.long_factor} if self.static else {shape.window: short, window: self.long_factor}
        at = {
            length: Frequencies(tuple(f / s for f, s in zip(shape.trained.inv_freq, factors, strict=True)), temperature)
            for length, factors in regimes.items()
        }
        return RopeChange(at, window, native)
