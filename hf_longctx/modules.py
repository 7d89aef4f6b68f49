"""The torch modules that methods return: a formula of the method, and the parameters and constants it reads.

Method files import this inside their slots only, so that listing methods costs no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Values = Mapping[str, Tensor]


def without_autocast(x: Tensor) -> torch.autocast:
    """Where products of tensors on the device of `x` keep their dtype."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # it knows no meta device


class Formula(nn.Module):
    """`formula(values, ...)` with its parameters and constants, in float32 whatever the model's dtype.

    Args:
        formula: called with `values`, the tensors of all of these by name, and what the slot passes.
        learned: initial values of the parameters, by name; numbers, or a function that returns them.
        fixed: constants, by name, likewise; they are not saved.
        measured: what calibration finds, by name, NaN until then; saved, and not trained.
    """

    def __init__(
        self, formula: Callable[..., Any], *, learned: Mapping[str, Any] | None = None, fixed: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.formula = formula
        self.learned, self.fixed, self.measured = dict(learned or {}), dict(fixed or {}), dict(measured or {})
        for name, value in self.start(self.learned):
            self.register_parameter(name, nn.Parameter(value))
        for name, value in [*self.start(self.fixed), *self.start(self.measured)]:
            self.register_buffer(name, value, persistent=name in self.measured)

    @staticmethod
    def start(values: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        """What parameters and constants are at first. They are made anew where a checkpoint was loaded into an empty module."""
        return [(name, torch.as_tensor(value() if callable(value) else value, dtype=torch.float32)) for name, value in values.items()]

    def values(self) -> dict[str, Tensor]:
        """Parameters and constants, as the formula reads them."""
        return {name: getattr(self, name) for name in self.initial}

    @property
    def initial(self) -> dict[str, Any]:
        """What parameters and constants are at first, by name."""
        return self.learned | self.fixed | self.measured

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {[*value.shape]}" for name, value in self.values().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Formula":
        """Moves to another device, but not to half precision: positions need all of float32."""
        before = {name: getattr(self, name).data for name in self.initial}
        super()._apply(fn, recurse)  # type: ignore[arg-type]
        for name, value in before.items():
            tensor = getattr(self, name)
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = value.to(tensor.device)
        return self


class Bias(Formula):
    """A bias on attention logits: `module(head, q_pos, k_pos)` -> float32, of broadcasting integer tensors.

    The formula is pointwise, `formula(values, head, q_pos, k_pos)`, and indexes `values` by `head`. Pairs with `k_pos > q_pos`
    are masked afterwards, but it must be finite there too, with finite gradients.

    Args:
        by_distance: the value depends on `head` and on `q_pos - k_pos` alone, and the formula is called as
            `formula(values, head, distance)` with distances >= 0.
    """

    def __init__(self, formula: Callable[..., Tensor], *, by_distance: bool = True, **values: Any):
        super().__init__(formula, **values)
        self.by_distance = by_distance

    def forward(self, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        if self.by_distance:
            return self.formula(self.values(), head, (q_pos - k_pos).clamp(min=0))
        return self.formula(self.values(), head, q_pos, k_pos)


class Scaling(Formula):
    """Queries and keys rescaled: `module(q, k, q_pos, q_index, k_valid) -> (q, k)`; shapes: `Method.attention`."""

    def forward(self, q: Tensor, k: Tensor, q_pos: Tensor, q_index: Tensor, k_valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.formula(self.values(), q, k, q_pos, q_index, k_valid)


class Embedding(Formula):
    """`module(embeds, positions) -> embeds + gain * formula(values, positions)`; `gain` is learned, and 0 leaves a model as it is.

    The formula returns float32 [batch, tokens, hidden] for integer positions [batch, tokens].
    """

    def __init__(self, formula: Callable[..., Tensor], *, gain: float = 0.0, learned: Mapping[str, Any] | None = None, **values: Any):
        super().__init__(formula, learned={"gain": gain, **(learned or {})}, **values)

    def forward(self, embeds: Tensor, positions: Tensor) -> Tensor:
        values = self.values()
        return embeds + (values["gain"] * self.formula(values, positions)).to(embeds.dtype)


class StepSize(Formula):
    """Changed step sizes: `module(delta)`; shape: `Method.delta`."""

    def forward(self, delta: Tensor) -> Tensor:
        return self.formula(self.values(), delta)


class PerLayer(nn.Module):
    """One module a layer, or one that all layers share."""

    def __init__(self, modules: Sequence[Formula]):
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def of(self, layer: int) -> Any:
        return self.layers[layer if len(self.layers) > 1 else 0]

    def forward(self, *args: Any) -> Any:
        raise NotImplementedError("call module.of(layer)")
