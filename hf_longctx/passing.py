"""The states of a training run: where each window starts from, what it leaves, and both across a restart."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_longctx.integration import state
from hf_longctx.integration.configs import family
from hf_longctx.lora import base_model
from hf_longctx.method import Method

_FILE = "states-{process}-of-{processes}.safetensors"


class Passing:
    """The states of the rows that one process trains.

    In lanes (a method whose order is `stream`) each micro-batch of an optimizer step has its own; otherwise a micro-batch starts from
    the states of the one before it.

    Args:
        model: of a family with a state, wrapped by PEFT or not; it is prepared to start from states.
        method: fills the `state` slot.
        micro_batches: of an optimizer step (`gradient_accumulation_steps`).
        seed: of the run.
        process, processes: which one this is, of how many.
    """

    def __init__(self, model: nn.Module, method: Method, *, micro_batches: int, seed: int, process: int = 0, processes: int = 1):
        self.model, self.source, self.seed = base_model(model), method.state(), seed
        self.process, self.processes = process, processes
        state.prepare(self.model)
        self.argument = state.CACHE_ARGUMENT[family(self.model.config)]
        self.left: list[state.States | None] = [None] * (micro_batches if self.source.order == "stream" else 1)  # by the last windows
        self.count = 0  # micro-batches so far

    @contextmanager
    def window(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The arguments of a forward pass on a batch of `lanes.collate_rows`; afterwards the states that it left are kept.

        Raises ValueError if the rows do not continue those of the last such micro-batch.
        """
        inputs = {key: value for key, value in batch.items() if key not in ("fresh", "example")}
        if "example" in batch:
            self._check_order(batch["example"])
        place = self.count % len(self.left)
        cache = state.StatePassingCache(self.model.config, self._start(self.left[place], batch["fresh"]))
        yield inputs | {self.argument: cache}
        final = cache.states()
        self.source.observe(final)
        self.left[place] = final
        self.count += 1

    def _start(self, before: state.States | None, fresh: Sequence[bool]) -> state.States | None:
        """What the source says; None where that is zeros in all rows, since a scan that is given no state is faster."""
        if self.source.from_zeros(before is None, fresh):
            return None
        rng = np.random.default_rng([self.seed, self.count, self.process, 0, 0, 1])  # zeros: apart from what draws the data
        return self.source.start(state.zeros(self.model, len(fresh)) if before is None else before, torch.tensor(fresh), rng)

    def _check_order(self, examples: Sequence[int]) -> None:
        first = (self.count * self.processes + self.process) * len(examples)
        if list(examples) != list(range(first, first + len(examples))):
            raise ValueError(
                f"the data loader gave examples {examples[0]}-{examples[-1]} in place of {first}-{first + len(examples) - 1}, "
                "so rows would not continue their texts; leave out of train what changes the order or the size of batches"
            )

    def save(self, folder: str | Path) -> None:
        """Write the states of this process into a checkpoint."""
        tensors = {f"source.{name}": tensor.contiguous() for name, tensor in self.source.state_dict().items()}
        for place, states in enumerate(self.left):
            tensors |= {f"{place}/{name}": tensor for name, tensor in state.to_tensors(states or []).items()}
        path = Path(folder) / _FILE.format(process=self.process, processes=self.processes)
        path.parent.mkdir(parents=True, exist_ok=True)  # another process may be about to make it
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"count": str(self.count)})
        partial.replace(path)

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote. Raises ValueError if another number of processes wrote it."""
        path = Path(folder) / _FILE.format(process=self.process, processes=self.processes)
        if not path.exists():
            wrote = next((p.stem.rpartition("-")[2] for p in Path(folder).glob(_FILE.format(process=0, processes="*"))), "no")
            raise ValueError(f"{folder} holds the states of {wrote} processes, and this is a run of {self.processes}; resume with as many as before")
        with safe_open(path, "pt", device=str(next(self.model.parameters()).device)) as opened:
            self.count = int(opened.metadata()["count"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self.source.load_state_dict(_under("source.", tensors))
        self.left = [state.from_tensors(_under(f"{place}/", tensors)) or None for place in range(len(self.left))]


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def is_whole(checkpoint: Path) -> bool:
    """Whether every process wrote its states into a checkpoint."""
    found = [path.stem.split("-") for path in checkpoint.glob(_FILE.format(process="*", processes="*"))]
    return bool(found) and len(found) == int(found[0][-1])
