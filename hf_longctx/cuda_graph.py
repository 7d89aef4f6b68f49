"""A training step as a CUDA graph. The step of a small model is thousands of kernels, and launching them one by one takes the
CPU longer than computing them takes the GPU; a graph launches them at once."""

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
Step = Callable[[dict[str, Any], Tensor], Tensor]
_WARM = 3  # steps run as they are first: they compile, choose kernels and fill caches


class RecordedStep:
    """Runs `step(inputs, items)`, which computes a loss and adds to the gradients of `parameters`, and from the fourth call on replays it.

    Args:
        step: depends on its tensors alone, draws no random numbers, and reads nothing back to the CPU.
        parameters: those that it trains.

    Inputs of another shape than the recorded ones are run as they are. So is everything if the recording fails.
    """

    def __init__(self, step: Step, parameters: Iterable[nn.Parameter]):
        self.step, self.parameters = step, [p for p in parameters if p.requires_grad]
        self.warm = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = False

    def __call__(self, inputs: dict[str, Any], items: Tensor) -> Tensor:
        if self.graph is None and not self.failed and self.warm == _WARM:
            self._record(inputs, items)
        if self.graph is None or not self._fits(inputs):
            self.warm = min(self.warm + 1, _WARM)
            return self.step(inputs, items)
        return self._replay(inputs, items)

    def _record(self, inputs: dict[str, Any], items: Tensor) -> None:
        """Record one step; nothing is computed."""
        self.inputs = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
        self.items = items.clone()
        before = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None  # so that the recorded backward pass makes gradients of its own
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: DataLoader's pinning thread may allocate meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.loss = self.step(dict(self.inputs), self.items)
        except RuntimeError as error:
            self.failed = True
            _close_recording()
            logger.warning("training without a CUDA graph: %s", str(error).partition("\n")[0])
        else:
            self.graph = graph
            self.trained = [p for p in self.parameters if p.grad is not None]
            self.grads: list[Tensor] = [p.grad for p in self.trained if p.grad is not None]
        for p, grad in zip(self.parameters, before, strict=True):
            p.grad = grad

    def _fits(self, inputs: dict[str, Any]) -> bool:
        def signature(values: dict[str, Any]) -> dict[str, Any]:
            return {key: (value.shape, value.dtype) if isinstance(value, Tensor) else value for key, value in values.items()}

        return signature(inputs) == signature(self.inputs)

    def _replay(self, inputs: dict[str, Any], items: Tensor) -> Tensor:
        assert self.graph is not None
        held = [p.grad for p in self.trained]
        if any(grad is kept for grad, kept in zip(held, self.grads, strict=True)):  # gradient accumulation: a replay would overwrite them
            held = [None if grad is None else grad.clone() for grad in held]
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[key].copy_(value, non_blocking=True)
        self.items.copy_(items, non_blocking=True)
        self.graph.replay()
        for p, grad, new in zip(self.trained, held, self.grads, strict=True):
            p.grad = new if grad is None else grad.add_(new)
        return self.loss.clone()


def _close_recording() -> None:
    """A recording that broke off leaves torch's random numbers waiting for its end, and every later draw would fail. An empty
    recording brings that end about."""
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        pass
