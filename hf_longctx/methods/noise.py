"""A random initial state, one size for the whole model: Ruiz & Gu 2025, "Understanding and improving length generalization".

They find it too weak: it stops helping from 780M parameters on, where real states still do. Ours: the convolution's state stays
zero, since it holds inputs and not a state that grows; `probability`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, StateSource, require_positive
from hf_longctx.methods._state import Source, generator, normal, require_probability

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from hf_longctx.methods._state import States


@dataclass(frozen=True)
class Noise(Method):
    """h_0 ~ N(0, sigma^2), independent in every number of every layer.

    With `probability`, a row starts from 0 instead."""

    paper = "arXiv:2507.02782"
    sigma: float
    probability: float = 0.0  # of a fresh start, a row and window

    def __post_init__(self) -> None:
        require_positive(sigma=self.sigma)
        require_probability(self.probability)

    def state(self) -> StateSource:
        return Gaussian(self.sigma, self.probability)


class Gaussian(Source):
    def __init__(self, sigma: float, probability: float) -> None:
        super().__init__(probability)
        self.sigma = sigma

    def from_zeros(self, first: bool, ended: "Sequence[bool]") -> bool:
        return False

    def draw(self, final: "States", ended: "Tensor", rng: "np.random.Generator") -> "States":
        rows = len(ended)
        source = generator(rng, final[0][1])
        return [(conv.new_zeros(rows, *conv.shape[1:]), (self.sigma * normal(ssm, rows, source)).to(ssm.dtype)) for conv, ssm in final]
