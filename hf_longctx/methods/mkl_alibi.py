"""MEP: multiple kernel learning for ALiBi (Gao 2024).

Follows the author's code (vangogh0318/MEP, ParallelSNOPE and ParallelSNOPEKerpleLog), which adds the logarithm of the mean
kernel to the logits. It takes that logarithm of a float32 mean, which is -inf from d = 290 on for a slope of 0.7; here the
logarithms are added, and the bias is finite at every distance.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator

from hf_longctx.method import Method, Shape, require, require_positive
from hf_longctx.methods._relative import head_slopes, kerple_draw, log_polynomial, require_slopes, t5_buckets, t5_lookup, xavier_normal
from hf_longctx.schema import STRICT_KEYS, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longctx.modules import Bias, Values

KindName = Literal["exponential", "half_exponential", "gaussian", "polynomial", "tanh", "t5"]
BUCKETS, MAX_DISTANCE = 32, 128  # of the t5 kernel


def _known_kind(kind: Any) -> Any:
    kinds = get_args(KindName)
    require(kind in kinds, f"unknown kernel {kind!r}" + nearest(kind, kinds))
    return kind


def _named(kernel: Any) -> Any:
    """`gaussian` is short for `{kind: gaussian}`."""
    return {"kind": kernel} if isinstance(kernel, str) else kernel


@dataclass(frozen=True)
class Kernel:
    """One kernel of the distance.

    Attributes:
        slopes: one a head; ALiBi's unless given.
        multiplier: of the slopes.
    """

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    kind: Annotated[KindName, BeforeValidator(_known_kind)]
    slopes: tuple[float, ...] | None = None
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        require_slopes(self.slopes)
        require_positive(multiplier=self.multiplier)
        if self.kind in ("polynomial", "t5"):
            require(self.slopes is None and self.multiplier == 1, f"a {self.kind} kernel has no slopes: its shape is learned; leave slopes and multiplier out")

    def scaled_slopes(self, heads: int) -> list[float]:
        factor = self.multiplier / 2 if self.kind == "half_exponential" else self.multiplier
        return [factor * m for m in head_slopes(self.slopes, heads, f"mkl_alibi: {self.kind}")]


PRESETS = {
    "mep": (Kernel("exponential"), Kernel("half_exponential"), Kernel("gaussian")),
    "mep_learned": (Kernel("gaussian"), Kernel("exponential"), Kernel("t5"), Kernel("polynomial")),
}


@dataclass(frozen=True)
class MklAlibi(Method):
    """The logarithm of a weighted mean of several kernels of the distance: b_h(d) = log(sum over k of w_k K_kh(d)).

    d is the distance, h the head; the weights w_k are positive with sum 1, equal unless given. Kernels: exponential:
    exp(-m_h d), ALiBi's; half_exponential: exp(-m_h d / 2); gaussian: exp(-m_h d^2); tanh: 1 + 1e-6 + tanh(-m_h d); m_h
    are ALiBi's slopes unless a kernel brings its own. Learned: polynomial: (1 + a_h d)^(-p_h); t5: exp(sqrt(D)
    W[bucket(d), h]) with 32 buckets up to distance 128, D the head's dimension. With `learn_weights`, w is the softmax
    of learned logits, per head. `preset: mep` is exponential, half_exponential, gaussian; `mep_learned` is gaussian,
    exponential, t5, polynomial. The sum of exp(b) over all distances converges unless there is a tanh or t5 kernel, a
    polynomial with p_h <= 1, or a slope of 0."""

    paper = "arXiv:2403.17698"
    preset: Literal["mep", "mep_learned"] | None = None  # default: mep, if no kernels are given
    kernels: tuple[Annotated[Kernel, BeforeValidator(_named, json_schema_input_type=Kernel | KindName)], ...] = ()
    weights: tuple[float, ...] | None = None  # one a kernel; scaled to sum 1
    learn_weights: bool = False  # from `weights`
    seed: int = 0  # of the initial a, p and W
    per_layer: bool = False  # one module a layer instead of one shared by all

    def __post_init__(self) -> None:
        require(not (self.preset and self.kernels), f"preset {self.preset} is a list of kernels already; keep preset or kernels")
        kernels, weights = self.chosen, self.weights
        if weights is not None:
            require(len(weights) == len(kernels), f"{len(weights)} weights for {len(kernels)} kernels ({', '.join(k.kind for k in kernels)}); give one a kernel")
            require(all(math.isfinite(w) and w > 0 for w in weights), f"weights must be positive numbers, got {', '.join(str(w) for w in weights)}")
        require(not self.learn_weights or len(kernels) > 1, "learn_weights needs two kernels or more: the weight of a single one is 1")

    @property
    def chosen(self) -> tuple[Kernel, ...]:
        """The kernels, spelled out or of the preset."""
        return self.kernels or PRESETS[self.preset or "mep"]

    @property
    def log_weights(self) -> list[float]:
        weights = self.weights or (1.0,) * len(self.chosen)
        return [math.log(w / sum(weights)) for w in weights]

    def bias(self, shape: Shape) -> "Bias":
        from hf_longctx.modules import Bias

        learned: dict[str, object] = {}
        fixed: dict[str, object] = {}
        for i, kernel in enumerate(self.chosen):
            if kernel.kind == "polynomial":
                learned |= {f"{name}{i}": value for name, value in self._draw(i, shape).items()}
            elif kernel.kind == "t5":
                learned[f"table{i}"] = xavier_normal(BUCKETS, shape.heads, Random(self.seed + i))
                fixed["bucket"] = t5_buckets(BUCKETS, MAX_DISTANCE)
            else:
                fixed[f"slopes{i}"] = kernel.scaled_slopes(shape.heads)
        if self.learn_weights:
            learned["logits"] = [[w] * shape.heads for w in self.log_weights]
        return Bias(partial(self._log_sum, math.sqrt(shape.head_dim)), learned=learned, fixed=fixed)

    def converges(self, shape: Shape) -> bool:
        """At the initial p of a polynomial; training moves it."""
        return all(self._kernel_converges(i, shape) for i in range(len(self.chosen)))

    def _kernel_converges(self, i: int, shape: Shape) -> bool:
        kernel = self.chosen[i]
        if kernel.kind in ("t5", "tanh"):
            return False
        if kernel.kind == "polynomial":
            return min(self._draw(i, shape)["p"]) > 1
        return min(kernel.scaled_slopes(shape.heads)) > 0

    def _draw(self, i: int, shape: Shape) -> dict[str, list[float]]:
        return kerple_draw(shape.heads, Random(self.seed + i))

    def _log_sum(self, scale: float, values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
        count = len(self.chosen)
        kernels = [self._log_kernel(i, scale, values, head, distance) for i in range(count)]
        if not self.learn_weights:
            return _log_add([w + k for w, k in zip(self.log_weights, kernels)])
        # head * 0 + i: FlexAttention returns gradients only of tensors that a tensor indexes.
        logits = [values["logits"][head * 0 + i, head] for i in range(count)]
        return _log_add([w + k for w, k in zip(logits, kernels)]) - _log_add(logits)

    def _log_kernel(self, i: int, scale: float, values: "Values", head: "Tensor", distance: "Tensor") -> "Tensor":
        kind = self.chosen[i].kind
        if kind == "polynomial":
            return log_polynomial(values[f"a{i}"][head], values[f"p{i}"][head], distance)
        if kind == "t5":
            return scale * t5_lookup(values[f"table{i}"], values["bucket"], head, distance)
        slope = values[f"slopes{i}"][head]
        d = distance.to(slope.dtype)  # the square of a 32-bit integer overflows from 46341 on
        if kind == "gaussian":
            return -slope * d * d
        if kind == "tanh":  # 1 + tanh(-x) = 2 sigmoid(-2x), without the cancellation
            return (2 * (-2 * slope * d).sigmoid() + 1e-6).log()
        return -slope * d


def _log_add(terms: "list[Tensor]") -> "Tensor":
    """log of the sum of exp, pair by pair: pointwise, and safe from underflow."""
    return reduce(lambda x, y: x.logaddexp(y), terms)
