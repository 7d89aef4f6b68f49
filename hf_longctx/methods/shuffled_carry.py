"""State passing between unrelated texts: SP in Ruiz & Gu 2025, "Understanding and improving length generalization".

They take the final states of the previous batch, whose sequences have nothing to do with this one's. Ours: rows are shuffled
besides, by one cycle through all of them, so that a row never continues itself, however the batches were read; `probability`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_longctx.method import Method, StateSource
from hf_longctx.methods._state import Source, require_probability

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hf_longctx.methods._state import States


@dataclass(frozen=True)
class ShuffledCarry(Method):
    """h_0 of a window = h_T of another row's previous window: a real state, but of another text.

    The rows of each batch are put in one random cycle, and each takes the state of the row before it there. With
    `probability`, a row starts from 0 instead."""

    paper = "arXiv:2507.02782"
    probability: float = 0.0  # of a fresh start, a row and window

    def __post_init__(self) -> None:
        require_probability(self.probability)

    def state(self) -> StateSource:
        return Shuffled(self.probability)


class Shuffled(Source):
    def draw(self, final: "States", ended: "Tensor", rng: "np.random.Generator") -> "States":
        import numpy as np
        import torch

        cycle = rng.permutation(len(final[0][0]))
        source = np.empty_like(cycle)
        source[cycle] = np.roll(cycle, 1)
        rows = torch.from_numpy(np.resize(source, len(ended))).to(final[0][0].device)
        return [(conv.index_select(0, rows), ssm.index_select(0, rows)) for conv, ssm in final]
