"""Position interpolation (Chen et al. 2023; also kaiokendev, 2023)."""

from dataclasses import dataclass

from hf_longctx.method import Method, RopeChange, Shape, require_factor


@dataclass(frozen=True)
class Linear(Method):
    """Divides every position by the factor: theta'_j = theta_j / factor."""

    paper = "arXiv:2306.15595"
    factor: float

    def __post_init__(self) -> None:
        require_factor(self.factor)

    def rope(self, shape: Shape) -> RopeChange:
        scaled = [f / self.factor for f in shape.trained.inv_freq]
        native = {"rope_type": "linear", "factor": float(self.factor)} if shape.plain else None
        return RopeChange.static(scaled, shape.window * self.factor, native, shape.trained.attention_factor)
