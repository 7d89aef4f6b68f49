"""Method, Shape and the registry. The folder `hf_longctx/methods/` is the registry: one file, one method.

A `Method` is a frozen dataclass. Its fields are the keys a recipe may set, its class docstring is the formula, its
module docstring names the paper, and the *slots* it overrides are the only places where it touches a model or its
training data. Nothing here imports torch.
"""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from hf_longctx import methods as _folder
from hf_longctx.schema import STRICT_KEYS, build, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

SLOTS = ("rope", "bias", "attention", "embedding", "positions", "state", "delta")


@dataclass(frozen=True)
class Frequencies:
    """What a rotary embedding is made of.

    Attributes:
        inv_freq: rotation per position of each pair of dimensions, in radians; float64, `rotary_dim / 2` of them.
        attention_factor: multiplies cos and sin, hence attention logits by its square.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Shape:
    """What a method may know of a model, read once from its configuration.

    Attributes:
        family: the configuration's `model_type`.
        hidden, layers, heads, kv_heads, head_dim: sizes; `head_dim` is of one attention head.
        rotary_dim: how many of a head's dimensions rotate.
        theta: the base of the trained rotary frequencies.
        trained: the frequencies that the model was trained with, whatever has been patched since.
        rope_type: the trained `rope_type`; "default" unless the vendor already scaled the model.
        window: how many positions it was trained on.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    theta: float
    trained: Frequencies
    rope_type: str
    window: int

    @property
    def plain(self) -> bool:
        """True if the model was trained with unscaled RoPE."""
        return self.rope_type == "default"


@dataclass(frozen=True)
class RopeChange:
    """What the `rope` slot returns.

    Attributes:
        at: frequencies by the longest position seen plus one. A static method has one entry; the patch is proved at each.
        window: how many positions the model is meant for afterwards.
        native: keys of `rope_parameters` with which Transformers computes the same frequencies from the trained base,
            `rope_theta` left out unless it changes; None where Transformers has no such type.
        raise_limit: write `window` to `max_position_embeddings`.
    """

    at: Mapping[int, Frequencies]
    window: int
    native: Mapping[str, Any] | None = None
    raise_limit: bool = True

    @classmethod
    def static(
        cls, inv_freq: Sequence[float], window: float, native: Mapping[str, Any] | None, attention_factor: float = 1.0
    ) -> "RopeChange":
        """One set of frequencies for every length."""
        size = round(window)
        return cls({size: Frequencies(tuple(inv_freq), attention_factor)}, size, native)


class StateSource(Protocol):
    """What the `state` slot returns. States are `[(convolution, SSM), ...]` by layer, tensors whose first dimension is the row.

    Attributes:
        order: `stream` if row b of a window must continue row b of the window before it, `any` if rows may be unrelated.
    """

    order: Literal["stream", "any"]

    def start(self, final: Any, ended: "Tensor", rng: "np.random.Generator") -> Any:
        """The states that the next window starts from, without gradients.

        Args:
            final: what the window before left (never written to); zeros before the first.
            ended: [rows of the next window], True where the row's document ended, so that it starts another one now.
            rng: the only source of randomness.
        """

    def from_zeros(self, first: bool, ended: Sequence[bool]) -> bool:
        """Whether all rows of the next window start from zeros, as far as is known without asking the device; `start` is not called then.

        Args:
            first: no window came before.
            ended: as for `start`.
        """

    def observe(self, final: Any) -> None:
        """Called after each window with what it left."""

    def state_dict(self) -> "dict[str, Tensor]":
        """What it has learned from the windows so far, to be saved with a checkpoint; empty where that is nothing."""

    def load_state_dict(self, saved: "Mapping[str, Tensor]") -> None:
        """Go on from what `state_dict` gave."""


@dataclass(frozen=True)
class StateShape:
    """What a `delta` method may know of a state-space model. A hybrid's attention layers are none of its layers.

    Attributes:
        family: the configuration's `model_type`.
        layers: how many state-space layers.
        channels: step sizes that a token has in each of them: one a channel in Mamba-1, one a head in Mamba-2.
    """

    family: str
    layers: int
    channels: int


class StepSizes(Protocol):
    """A model's step sizes on the text that a `delta` method is calibrated on, windows of equal length."""

    shape: StateShape

    def perplexity(self, method: "Method") -> float:
        """Of the windows, each from an empty state, with `method` in the model; infinite where it is not a number."""

    def layers(self) -> "Iterator[tuple[Tensor, Tensor]]":
        """By state-space layer: Delta as it is without any method, [windows, tokens, channels], and A, [channels, states] (Mamba-2: 1 state)."""


class Calibrated(NamedTuple):
    """What calibration found: the method to remember, and by state-space layer the tensors that its modules measure, if any."""

    method: "Method"
    tensors: "Sequence[Mapping[str, Tensor]]" = ()


@dataclass(frozen=True)
class Method:
    """One way past a model's trained window: a subclass is one file in `hf_longctx/methods/`."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    paper: ClassVar[str] = ""
    packs: ClassVar[bool] = True  # False: it sums over all keys of a row, so documents must not share one
    static: ClassVar[bool] = True  # False: frequencies depend on the length seen, so skipped positions would change them

    def rope(self, shape: Shape) -> RopeChange:
        """The rotary frequencies to use in place of `shape.trained`."""
        raise NotImplementedError

    def bias(self, shape: Shape) -> "nn.Module":
        """What is added to attention logits: `module(head, q_pos, k_pos)`, broadcasting integer tensors to float32.

        Each pair by itself, in float32 under autocast too; finite wherever `k_pos <= q_pos`. See `hf_longctx.modules.Bias`.
        """
        raise NotImplementedError

    def converges(self, shape: Shape) -> bool:
        """For a bias: whether sum over d of exp(b(d)) is finite, without which far tokens together outweigh near ones in the end."""
        return True

    def attention(self, shape: Shape) -> "nn.Module":
        """What rescales queries and keys after RoPE and cache: `module(q, k, q_pos, q_index, k_valid) -> (q, k)`.

        q [batch, heads, queries, head_dim], k [batch, kv_heads, keys, head_dim]; `q_pos` [batch, queries] positions, `q_index`
        [batch, queries] how many keys each query sees, itself included; `k_valid` [batch, keys] False at padding, or None.
        """
        raise NotImplementedError

    def embedding(self, shape: Shape) -> "nn.Module":
        """What is added to token embeddings: `module(embeds, positions) -> embeds`, [batch, tokens, hidden] and [batch, tokens].

        On a pretrained model its gain starts at zero, so that nothing changes before training.
        """
        raise NotImplementedError

    def positions(
        self, window: int, document_length: int, rng: "np.random.Generator"
    ) -> "tuple[np.ndarray, np.ndarray]":
        """Choose the tokens of one training example and the positions they are given.

        Args:
            window: how many tokens the example has.
            document_length: how many tokens the document offers, at least `window`.
            rng: fresh for this example; the only source of randomness.

        Returns:
            `token_index[window]`, strictly increasing, below `document_length`; `position_ids[window]`, strictly increasing.
        """
        raise NotImplementedError

    def runs(self, window: int) -> int:
        """In how many runs of consecutive positions the tokens of a training example lie, at most. A single one begins at 0."""
        return window

    def state(self) -> "StateSource":
        """Where a state-space model's windows start from: a new object for each training run, see `StateSource`."""
        raise NotImplementedError

    def delta(self, shape: StateShape, layer: int) -> "nn.Module":
        """What changes the step sizes of a state-space layer: `module(delta) -> delta`, [batch, tokens, channels], float32 at least.

        `layer`, below `shape.layers`, is its place among the state-space layers.
        After the softplus, before anything is discretised; see `hf_longctx.modules.StepSize`.
        """
        raise NotImplementedError

    @property
    def calibration(self) -> tuple[int, int] | None:
        """For a `delta` method: how many windows of how many tokens it has yet to be calibrated on; None if on none."""
        return None

    def calibrate(self, steps: StepSizes) -> Calibrated:
        """For a `delta` method: find what it needs, from text for training."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The name of the file it lives in."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots that this method fills."""
        return tuple(slot for slot in SLOTS if getattr(type(self), slot) is not getattr(Method, slot))

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., **fields}`: what a recipe and `config.longctx` hold; `load_method` reads it back."""
        values = dataclasses.asdict(self)
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


def method_names(slot: str | None = None) -> list[str]:
    """Every method, or those that fill `slot`, by name; without a slot, no method is imported."""
    names = sorted(m.name for m in pkgutil.iter_modules(_folder.__path__) if not m.name.startswith("_"))
    return names if slot is None else [name for name in names if hasattr_slot(method_class(name), slot)]


def hasattr_slot(cls: type[Method], slot: str) -> bool:
    """True if the class overrides `slot`."""
    return getattr(cls, slot) is not getattr(Method, slot)


@cache
def method_class(name: str) -> type[Method]:
    """The class in `hf_longctx/methods/NAME.py`. Raises ValueError, with the nearest name, if there is none."""
    if name not in method_names():
        raise ValueError(f"unknown method {name!r}" + nearest(name, method_names()))
    module = importlib.import_module(f"{_folder.__name__}.{name}")
    (found,) = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__ and issubclass(v, Method))
    return found


def method(name: str, **fields: Any) -> Method:
    """Build a method from its name and fields: `method("yarn", factor=8)`.

    Raises:
        ValueError: an unknown name or field (with the nearest one), or a value that the method refuses.
    """
    return build(method_class(name), fields, name)


def load_method(spec: "Method | str | Mapping[str, Any]") -> Method:
    """A method from itself, from `"nope"`, or from `{"name": "yarn", "factor": 8}`."""
    if isinstance(spec, Method):
        return spec
    values = {"name": spec} if isinstance(spec, str) else dict(spec)
    if not isinstance(values.get("name"), str):
        raise ValueError(f"a method needs a name, got {dict(values)}; there is: {', '.join(method_names())}")
    return method(values.pop("name"), **values)


def load_methods(specs: "Sequence[Method | str | Mapping[str, Any]] | Method | str | Mapping[str, Any]") -> tuple[Method, ...]:
    """Several methods, each slot filled at most once. Raises ValueError naming the two that collide."""
    if isinstance(specs, Method | str | Mapping):
        specs = [specs]
    found = tuple(load_method(spec) for spec in specs)
    owner: dict[str, str] = {}
    for item in found:
        for slot in item.slots:
            if slot in owner:
                raise ValueError(f"{owner[slot]} and {item.name} both fill the {slot} slot; keep one of them")
            owner[slot] = item.name
    return found


def in_slot(found: Sequence[Method], slot: str) -> Method | None:
    """The one of `found` that fills `slot`, or None."""
    return next((item for item in found if slot in item.slots), None)


def require(condition: bool, message: str) -> None:
    """For `__post_init__`: raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_factor(factor: float) -> None:
    """A scaling factor is a finite number of at least 1."""
    require(math.isfinite(factor) and factor >= 1, f"factor must be at least 1 (1 leaves the window as it is), got {factor:g}")


def require_positive(**values: float | None) -> None:
    """Each of the values, by its key, is a finite number above zero, or None."""
    for key, value in values.items():
        require(value is None or (math.isfinite(value) and value > 0), f"{key} must be a positive number, got {value}")


def describe(cls: type[Method]) -> dict[str, Any]:
    """Name, slots, formula, paper and fields of a method, for listings."""
    slots = [slot for slot in SLOTS if hasattr_slot(cls, slot)]
    fields = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)}
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    name = cls.__module__.rpartition(".")[2]
    formula = " ".join((cls.__doc__ or "").split())
    return {"name": name, "slots": slots, "paper": cls.paper, "formula": formula, "fields": fields, "required": required}


__all__ = [
    "SLOTS", "Calibrated", "Frequencies", "Method", "RopeChange", "Shape", "StateShape", "StateSource", "StepSizes", "describe", "field", "in_slot", "load_method", "load_methods",
    "method", "method_class", "method_names", "require", "require_factor", "require_positive",
]  # fmt: skip
