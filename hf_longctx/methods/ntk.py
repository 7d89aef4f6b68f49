"""NTK-aware interpolation, static (bloc97, 2023; equation as in YaRN, Peng et al. 2023, section 3.1)."""

from dataclasses import dataclass

from hf_longctx.method import Method, RopeChange, Shape, require, require_factor


@dataclass(frozen=True)
class Ntk(Method):
    """Slows the slow pairs and keeps the fast ones: theta'_j = theta_j factor^(-2j/(D-2)).

    That is base' = base factor^(D/(D-2)) with D the rotary dimension: the fastest pair stays, the slowest is divided by the factor. The usable factor lies below the nominal one."""

    paper = "arXiv:2309.00071"
    factor: float

    def __post_init__(self) -> None:
        require_factor(self.factor)

    def rope(self, shape: Shape) -> RopeChange:
        dim = shape.rotary_dim
        require(dim > 2, "ntk stretches the pairs against each other; this model rotates only one")
        scaled = [f * self.factor ** (-2 * j / (dim - 2)) for j, f in enumerate(shape.trained.inv_freq)]
        base = shape.theta * self.factor ** (dim / (dim - 2))
        native = {"rope_type": "default", "rope_theta": base} if shape.plain else None
        return RopeChange.static(scaled, shape.window * self.factor, native, shape.trained.attention_factor)
