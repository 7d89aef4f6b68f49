"""What the state methods share: rows that start from zeros, and random numbers. No torch at import."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_longctx.method import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Generator, Tensor

    States = list[tuple[Tensor, Tensor]]


@dataclass
class Source:
    """A `StateSource` that learns nothing: a subclass says in `draw` where rows start, `start` clears the fresh ones.

    Each row is fresh, with the given probability and independently of all others, and starts from zeros."""

    probability: float = 0.0
    order: Literal["stream", "any"] = "any"

    def start(self, final: "States", ended: "Tensor", rng: "np.random.Generator") -> "States":
        import torch

        rows = len(ended)
        with torch.no_grad():
            drawn = self.draw(final, ended, rng)
            fresh = torch.from_numpy(rng.random(rows) < self.probability)
            return clear(drawn, fresh)

    def from_zeros(self, first: bool, ended: "Sequence[bool]") -> bool:
        return first

    def draw(self, final: "States", ended: "Tensor", rng: "np.random.Generator") -> "States":
        """The states of the next window's rows, before fresh starts."""
        raise NotImplementedError

    def observe(self, final: "States") -> None:
        return

    def state_dict(self) -> "dict[str, Tensor]":
        return {}

    def load_state_dict(self, saved: "Mapping[str, Tensor]") -> None:
        require(not saved, f"this state method keeps nothing, but the checkpoint has {', '.join(sorted(saved))}")


def clear(states: "States", rows: "Tensor") -> "States":
    """A copy with zeros in the given rows [rows]; what stood there does not matter, even if it was not finite."""
    there = rows.to(states[0][0].device)  # once: each copy waits for the device

    def cleared(tensor: "Tensor") -> "Tensor":
        return tensor.masked_fill(there.view(-1, *[1] * (tensor.dim() - 1)), 0)

    return [(cleared(conv), cleared(ssm)) for conv, ssm in states]


def generator(rng: "np.random.Generator", tensor: "Tensor") -> "Generator":
    """Torch's source of normal numbers on the tensor's device, seeded by `rng`."""
    import torch

    return torch.Generator(tensor.device).manual_seed(int(rng.integers(2**63)))


def normal(like: "Tensor", rows: int, source: "Generator") -> "Tensor":
    """Standard normal numbers for `rows` rows of such a tensor, in float32 at least."""
    import torch

    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn((rows, *like.shape[1:]), generator=source, device=source.device, dtype=dtype).to(like.device)


def require_probability(probability: float) -> None:
    require(0 <= probability <= 1, f"probability is one, of a start from zeros: between 0 and 1, got {probability:g}")
