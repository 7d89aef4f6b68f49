"""Several processes that evaluate together: who reads what, and how all learn of it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from hf_longctx.task import Cell

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # for the slowest of them: a share may take hours, and a default of minutes would end the run
_AS_DEAR = 8192  # tokens before a token whose attention costs about as much as all the rest


@dataclass(frozen=True)
class Processes:
    """This one and those that evaluate with it; by default it is alone.

    Attributes:
        rank: of this process, from 0.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_torchrun(cls) -> "Processes":
        """Join the others that torchrun started, and take the GPU of the local rank. Raises ValueError if torchrun started none."""
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("together: this process was not started by torchrun; start it so, or leave out together")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)  # only results are exchanged, and these lie on the CPU
        return cls(dist.get_rank(), dist.get_world_size())

    def gather(self, call: Callable[[], T]) -> list[T]:
        """What `call()` gives in each process, by rank; every process gets it.

        Raises:
            ValueError, RuntimeError: in every process, where `call` raises one (or runs out of memory) in one of them.
        """
        if self.count == 1:
            return [call()]
        value, error = None, None
        try:
            value = call()
        except (ValueError, RuntimeError, MemoryError) as problem:
            error = (isinstance(problem, ValueError), str(problem) or type(problem).__name__)
        everyone: list[tuple[T, tuple[bool, str] | None]] = [(None, None)] * self.count  # type: ignore[list-item]
        dist.all_gather_object(everyone, (value, error))
        for error in (each for _, each in everyone if each):
            raise (ValueError if error[0] else RuntimeError)(error[1])
        return [each for each, _ in everyone]

    def first(self, call: Callable[[], T]) -> T:
        """What `call()` gives in the first process, which alone calls it. Raises as `gather`."""
        return self.gather(call if self.rank == 0 else lambda: None)[0]  # type: ignore[arg-type, return-value]

    def share(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells of this process: in the order of ranks, the shares make up all of them.

        Neighbours stay together, which may have a beginning in common; the costs of the shares differ by that of a cell at most.
        """
        costs = np.array([float(cell.size) * (cell.size + _AS_DEAR) for cell in cells])
        owners = (np.cumsum(costs) - costs / 2) / costs.sum() * self.count
        return [cell for cell, owner in zip(cells, owners.astype(int), strict=True) if owner == self.rank]
