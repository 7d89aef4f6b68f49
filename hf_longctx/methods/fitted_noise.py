"""A random initial state like the final ones: Ruiz & Gu 2025, "Understanding and improving length generalization".

They draw from an IID Gaussian with the mean and standard deviation of final states, a pair a layer and head, and use it where
real final states would mislead (a passkey's answer is in them). Ours: statistics run along with the training, over all windows
seen so far or about the last `horizon`; Mamba-1, which has no heads, has a pair a channel; so has the convolution's state;
`probability`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, StateSource, require, require_positive
from hf_longctx.methods._state import Source, generator, normal, require_probability

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Generator, Tensor

    from hf_longctx.methods._state import States


@dataclass(frozen=True)
class FittedNoise(Method):
    """h_0 ~ N(m, s^2), m and s the mean and standard deviation of the final states so far, by layer and head (or channel).

    0 in the first window. With `horizon`, a window's weight falls by 1 / horizon with each one after it. With `probability`,
    a row starts from 0 instead."""

    paper = "arXiv:2507.02782"
    horizon: float | None = None  # windows; default: all weigh the same
    probability: float = 0.0  # of a fresh start, a row and window

    def __post_init__(self) -> None:
        require_positive(horizon=self.horizon)
        require(self.horizon is None or self.horizon >= 1, f"horizon must be at least one window, got {self.horizon}")
        require_probability(self.probability)

    def state(self) -> StateSource:
        return Fitted(self.horizon, self.probability)


class Fitted(Source):
    """Mean and variance of everything but layer and second dimension, in float64, merged as Chan, Golub & LeVeque do."""

    def __init__(self, horizon: float | None, probability: float) -> None:
        super().__init__(probability)
        self.keep = 1.0 if horizon is None else 1 - 1 / horizon
        self.statistics: dict[str, Tensor] = {}  # "LAYER.PART": [weight, mean, variance] by head, [3, heads]

    def observe(self, final: "States") -> None:
        import torch

        for i, state in enumerate(final):
            for part, tensor in zip(("conv", "ssm"), state, strict=True):
                seen = tensor.detach().double().transpose(0, 1).flatten(1)
                new = torch.stack([torch.full_like(seen[:, 0], seen.shape[1]), seen.mean(1), seen.var(1, correction=0)])
                old = self.statistics.get(f"{i}.{part}")
                self.statistics[f"{i}.{part}"] = new if old is None else self._merged(old.to(new.device), new)

    def _merged(self, old: "Tensor", new: "Tensor") -> "Tensor":
        import torch

        weight = self.keep * old[0] + new[0]
        share = new[0] / weight
        apart = new[1] - old[1]
        return torch.stack([weight, old[1] + share * apart, (1 - share) * old[2] + share * new[2] + share * (1 - share) * apart**2])

    def from_zeros(self, first: bool, ended: "Sequence[bool]") -> bool:
        return not self.statistics

    def draw(self, final: "States", ended: "Tensor", rng: "np.random.Generator") -> "States":
        source = generator(rng, final[0][1])
        return [(self._draw(f"{i}.conv", conv, len(ended), source), self._draw(f"{i}.ssm", ssm, len(ended), source)) for i, (conv, ssm) in enumerate(final)]

    def _draw(self, name: str, like: "Tensor", rows: int, source: "Generator") -> "Tensor":
        if name not in self.statistics:
            return like.new_zeros(rows, *like.shape[1:])
        _, mean, variance = (t.view(-1, *[1] * (like.dim() - 2)).to(like.device) for t in self.statistics[name])
        return (mean + variance.sqrt() * normal(like, rows, source)).to(like.dtype)

    def state_dict(self) -> "dict[str, Tensor]":
        return dict(self.statistics)

    def load_state_dict(self, saved: "Mapping[str, Tensor]") -> None:
        self.statistics = dict(saved)
