"""Step sizes on their way into the scan: the one place where a state-space layer's Delta can be changed on every path.

A mixer of Transformers hands dt, its bias and "take the softplus" to one of the functions below, looked up by name in its
modeling file. `wrap` puts an `Entry` in the place of each name: while a mixer runs that was given a module (`enter`, `leave`, called
by hooks on it), Delta = softplus(dt + bias), within the layer's limits, goes through the module and on to the scan, which is told
to take it as it is. Mixers without a module pass through unchanged.

The functions that fuse projections and scan never see dt by itself. They give None then, which is how Transformers says that
they are not there, and the mixer takes its other path. `mamba_selective_scan` is not here: `integration.state` has it already.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_running = threading.local()  # .steps: a stack, one entry a mixer that is running in this thread

Seen = list[tuple[int, str, Tensor, Tensor]]  # layer, function, Delta before and after the module


@dataclass(frozen=True)
class Step:
    """How the mixer that is running changes its step sizes.

    Attributes:
        module: `module(delta) -> delta`, float32 at least, [batch, tokens, channels or heads].
        layer: the mixer's.
        limit: the least and largest Delta before the module.
        seen: where to note what passed, or None.
    """

    module: nn.Module
    layer: int
    limit: tuple[float, float]
    seen: Seen | None = None

    def __call__(self, function: str, dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
        wide = torch.promote_types(dt.dtype, torch.float32)
        delta = dt.to(wide) if bias is None else dt.to(wide) + bias.to(wide)
        delta = (nn.functional.softplus(delta) if softplus else delta).clamp(*self.limit)
        changed = self.module(delta)
        if self.seen is not None:
            self.seen.append((self.layer, function, delta.detach(), changed.detach()))
        return changed


def enter(mixer: Any, module: nn.Module | None, seen: Seen | None = None) -> None:
    """Before a mixer runs: its step sizes go through `module`, None for as they are, and what passes is added to `seen`."""
    if not hasattr(_running, "steps"):
        _running.steps = []
    limit = getattr(mixer, "time_step_limit", None) or (0.0, float("inf"))  # Mamba-2's
    _running.steps.append(None if module is None else Step(module, mixer.layer_idx, tuple(limit), seen))


def leave() -> None:
    """After it, also when it failed."""
    _running.steps.pop()


def current() -> Step | None:
    """Of the mixer that is running."""
    steps = getattr(_running, "steps", None)
    return steps[-1] if steps else None


def wrap(modeling: Any) -> None:
    """Put an `Entry` in the place of each function of a modeling file that takes step sizes, once."""
    for name, change in _CHANGES.items():
        stock = getattr(modeling, name, None)
        if stock is not None and not isinstance(stock, Entry):
            setattr(modeling, name, Entry(stock, change))


class Entry:
    """A function of a modeling file, which gets changed step sizes if the mixer that calls it has a module."""

    def __init__(self, stock: Callable[..., Any], change: Callable[..., Any]) -> None:
        self.stock, self.change = stock, change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = current()
        return self.stock(*args, **kwargs) if step is None else self.change(step, self.stock, *args, **kwargs)


def selective_scan(
    step: Step, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, z: Tensor | None = None, delta_bias: Tensor | None = None,
    delta_softplus: bool = False, **rest: Any,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:  # fmt: skip
    """The arguments of Mamba-1's scan with changed step sizes; dt is [batch, channels, tokens]. One dtype, as its kernel wants it."""
    delta = step("scan", dt.transpose(1, 2), delta_bias, delta_softplus).transpose(1, 2)
    u, b, c, gate = (None if t is None else t.to(delta.dtype) for t in (u, b, c, z))  # type: ignore[assignment]
    return (u, delta.contiguous(), a, b, c), rest | {"z": gate, "delta_bias": None, "delta_softplus": False}


def _chunk_scan(
    step: Step, stock: Any, x: Tensor, dt: Tensor, *args: Any, dt_bias: Any = None, dt_softplus: bool = False, dt_limit: Any = None, **rest: Any
) -> Any:
    """Mamba-2's scan; dt is [batch, tokens, heads]."""
    return stock(x, step("scan", dt, dt_bias, dt_softplus), *args, dt_bias=None, dt_softplus=False, **rest)


def _update(step: Step, stock: Any, state: Tensor, x: Tensor, dt: Tensor, *args: Any, dt_bias: Any = None, dt_softplus: bool = False, **rest: Any) -> Any:
    """One token; dt is [batch, channels], in Mamba-2 [batch, heads, head_dim], where a head's is repeated."""
    heads = dt.dim() == 3
    sizes, bias = (dt[..., 0], None if dt_bias is None else dt_bias[..., 0]) if heads else (dt, dt_bias)
    delta = step("update", sizes[:, None], bias, dt_softplus)[:, 0]
    delta = delta[..., None].expand(dt.shape) if heads else delta
    zero = None if dt_bias is None else delta.new_zeros(()).expand(dt_bias.shape)  # the kernel asks for the strides of one
    return stock(state, x, delta, *args, dt_bias=zero, dt_softplus=False, **rest)


def _not_there(step: Step, stock: Any, *args: Any, **kwargs: Any) -> None:
    return None


_CHANGES: dict[str, Callable[..., Any]] = {
    "mamba_inner_fn": _not_there, "mamba_selective_state_update": _update,
    "mamba2_split_conv1d_scan_combined": _not_there, "mamba2_selective_state_update": _update, "mamba2_chunk_scan": _chunk_scan,
}  # fmt: skip
