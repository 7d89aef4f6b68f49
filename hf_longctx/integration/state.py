"""The state slot: start a state-space model from a given state, and get the state that it leaves, exactly and with gradients.

`prepare(model)` once, then a `StatePassingCache` a forward pass:

    cache = StatePassingCache(model.config, states)                  # None: from zeros
    loss = model(ids, labels=ids, **{CACHE_ARGUMENT[family]: cache}).loss
    states = cache.states()                                          # detached; [(convolution, SSM)] by layer

What stock Transformers does otherwise, found on 5.17 and 5.23: Mamba-1 and FalconMamba use the cached convolution state and
start the SSM from zero whenever a call has more than one token; DynamicCache is written in place, so gradient checkpointing,
which runs a layer twice, gives Mamba-2 wrong gradients without a word; hybrids lose the cache under checkpointing altogether.

Mamba-1's scan kernel takes no initial state, and drops the gradient of the last one. Its recurrence h_t = exp(dt_t A) h_{t-1} +
dt_t B_t x_t, y_t = C_t h_t is linear in h, so the scan from zero is completed by y_t += C_t exp(A cumsum(dt)_t) h_0 and h_T +=
exp(A sum dt) h_0, before the gate: in Triton (`kernels.carried_state`) where there is Triton, in torch elsewhere. Where there is
no kernel the scan is our own, in torch: blocks of time, and within a block a parallel prefix scan.

No code of Transformers is copied. `prepare` hangs hooks on the mixers, which say from which state the scan of this layer
starts, and puts a function that asks them in the place of the module-level name `mamba_selective_scan`; models that were not
prepared pass through it unchanged.
"""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_longctx.integration import steps
from hf_longctx.integration.configs import family
from hf_longctx.kernels import carried_state
from hf_longctx.modules import without_autocast

State = tuple[Tensor, Tensor]  # of a layer: convolution [batch, channels, kernel], SSM [batch, channels or heads, ...]
States = list[State]  # by layer, layers without a state left out
KeyValues = list[State | None]  # of a hybrid's attention layers: keys and values, [batch, heads, tokens, head_dim]

# The argument of `forward` that takes the cache.
CACHE_ARGUMENT = {
    "mamba": "cache_params", "falcon_mamba": "cache_params", "mamba2": "cache_params",
    "bamba": "past_key_values", "granitemoehybrid": "past_key_values",
}  # fmt: skip
_SCAN = "mamba_selective_scan"  # Mamba-1's and FalconMamba's; Mamba-2's takes an initial state by itself
_BLOCK = 1 << 21  # elements of a scan's largest tensor on a CPU, which should stay in its caches; a GPU gets 16 times that
_FEWEST = 16  # tokens of a block, whatever that makes of its size
_running = threading.local()  # .starts: a stack of initial states, one entry a mixer that is running in this thread


def has_state(config: PretrainedConfig) -> bool:
    """Whether models of this configuration can start from a given state."""
    return family(config) in CACHE_ARGUMENT and "linear_attention" in config.layer_types


def check_supported(config: PretrainedConfig) -> None:
    """Raise ValueError, naming the reason, unless `has_state`."""
    name = family(config)
    if name not in CACHE_ARGUMENT:
        raise ValueError(f"{name} has no state that state methods can pass on; families that have: {', '.join(sorted(CACHE_ARGUMENT))}")
    if not has_state(config):
        raise ValueError(f"no layer of this {name} is a state-space layer, so there is no state to pass on")


# --- The states, as plain data ---------------------------------------------------------------------------------------


def zeros(model: nn.Module, batch: int) -> States:
    """The states before any text. Convolution states have the model's dtype, SSM states are float32 at least."""
    return [(conv.weight.new_zeros(batch, conv.weight.shape[0], mixer.conv_kernel_size), _empty_ssm(mixer, batch)) for mixer, conv in mixers(model)]


def _empty_ssm(mixer: Any, batch: int) -> Tensor:
    """[batch, channels, state] in Mamba-1, [batch, heads, head_dim, state] in Mamba-2, whose decay is one number a head."""
    sizes = tuple(mixer.A_log.shape) if mixer.A_log.dim() == 2 else (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
    return torch.zeros(batch, *sizes, dtype=_wide(mixer.A_log.dtype), device=mixer.A_log.device)


def map_states(function: Callable[[Tensor], Tensor], states: States) -> States:
    """`function` of every tensor."""
    return [(function(conv), function(ssm)) for conv, ssm in states]


def detach(states: States) -> States:
    """Without history: gradients end here."""
    return map_states(Tensor.detach, states)


def select_rows(states: States, rows: Tensor) -> States:
    """The given rows of the batch, in the given order."""
    return map_states(lambda t: t.index_select(0, rows.to(t.device)), states)


def zero_rows(states: States, ended: Tensor) -> States:
    """Zeros in the rows where `ended` [batch] is True: their documents ended. NaN and infinity do not survive it either."""
    return map_states(lambda t: torch.where(ended.to(t.device).view(-1, *[1] * (t.dim() - 1)), torch.zeros_like(t), t), states)


def move(states: States, like: States) -> States:
    """On the device and in the dtypes of `like`."""
    _check_layers(states, len(like))
    return [(conv.to(c.device, c.dtype), ssm.to(s.device, s.dtype)) for (conv, ssm), (c, s) in zip(states, like, strict=True)]


def to_tensors(states: States) -> dict[str, Tensor]:
    """Names and tensors as safetensors wants them; `from_tensors` reads them back."""
    named = {f"{i}.{part}": t for i, state in enumerate(states) for part, t in zip(("conv", "ssm"), state, strict=True)}
    return {name: t.detach().contiguous() for name, t in named.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> States:
    """What `to_tensors` named."""
    return [(tensors[f"{i}.conv"], tensors[f"{i}.ssm"]) for i in range(len(tensors) // 2)]


def _check_layers(states: Sequence[Any], layers: int) -> None:
    if len(states) != layers:
        raise ValueError(f"states of {len(states)} layers for a model with {layers}")


# --- The cache -------------------------------------------------------------------------------------------------------


class StatePassingCache(DynamicCache):
    """Start a forward pass from given states, and keep the states that it leaves.

    The given ones are never written to and what a layer leaves depends on them alone, so that a layer may run twice
    (gradient checkpointing) or a cache be used for two forward passes. Gradients reach the given states if these require
    them; what a pass leaves is detached, so that they never cross to the window before. (`detach=False`: they do, which
    gradient checkpointing does not go with.)

    A hybrid's attention layers either start afresh, `keys="restart"`: they see this window only, and positions start at 0;
    memory is constant, and a sequence cut in two is not the sequence in one. Or they go on, `keys="carry"`: `next()` hands
    keys and values on, positions go on where the family takes them from the cache (granitemoehybrid; bamba takes
    `position_ids`, see `positions`), two halves equal one whole, and memory grows with length.
    """

    def __init__(
        self, config: PretrainedConfig, states: States | None = None, *, keys: Literal["restart", "carry"] = "restart",
        past: KeyValues | None = None, detach: bool = True,
    ) -> None:  # fmt: skip
        check_supported(config)
        super().__init__(config=config)
        self._config, self._keys, self._detach = config, keys, detach
        self.layers = [_layer(each, keys == "carry", detach) for each in self.layers]
        if states is not None:
            _check_layers(states, len(self._state_layers))
            for layer, (conv, ssm) in zip(self._state_layers, states, strict=True):
                layer.start(conv, ssm)
        if past is not None:
            for attention, start in zip(self._key_layers, past, strict=True):
                attention.start(start)

    @property
    def _state_layers(self) -> list["_StateLayer"]:
        return [layer for layer in self.layers if isinstance(layer, _StateLayer)]

    @property
    def _key_layers(self) -> list["_KeyLayer"]:
        return [layer for layer in self.layers if isinstance(layer, _KeyLayer)]

    def states(self) -> States:
        """What the forward pass left. Raises RuntimeError if there was none."""
        return [layer.final() for layer in self._state_layers]

    def next(self, states: States | None = None) -> "StatePassingCache":
        """For the tokens that follow: from `states`, by default `states()`, and from the keys so far where they are carried."""
        past = [layer.last for layer in self._key_layers] if self._keys == "carry" else None
        return StatePassingCache(self._config, self.states() if states is None else states, keys=self._keys, past=past, detach=self._detach)

    def positions(self, ids: Tensor) -> Tensor:
        """`position_ids` of the next tokens `ids`, [1, tokens]."""
        start = next((layer.get_seq_length() for layer in self._key_layers), 0)
        return torch.arange(start, start + ids.shape[1], device=ids.device)[None]


class _StateLayer(LinearAttentionLayer):
    """Convolution and SSM state of one layer: read only at the start, write only at the end."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.record_past = True  # otherwise one token updates the convolution state in place
        self.initial: State | None = None
        self.recurrent_states = _Handout()  # type: ignore[assignment]
        self._last_conv: Tensor | None = None
        self._last_ssm: Tensor | None = None

    def start(self, conv: Tensor, ssm: Tensor) -> None:
        if conv.shape[0] != ssm.shape[0]:
            raise ValueError(f"a convolution state of {conv.shape[0]} rows beside an SSM state of {ssm.shape[0]}")
        self.initial = (conv, ssm)
        self.conv_states[0] = conv
        self.recurrent_states = _Handout(ssm)  # type: ignore[assignment]
        self.has_previous_state[0] = self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any) -> Tensor:
        """The inputs of the convolution, those that came before them in front."""
        assert conv_kernel_size is not None
        full = conv_states
        if self.initial is not None:
            if self.initial[0].shape[0] != conv_states.shape[0]:
                raise ValueError(f"states of {self.initial[0].shape[0]} rows for a batch of {conv_states.shape[0]}")
            full = torch.cat([self.initial[0].to(conv_states.dtype), conv_states], dim=-1)
            if conv_states.shape[-1] == 1:  # the one-token path writes the SSM state in place, into what was handed out
                if torch.is_grad_enabled() and conv_states.requires_grad:
                    raise ValueError("a window of one token cannot be trained on: Transformers updates the state in place; use torch.no_grad()")
                handed_out = self.recurrent_states.out  # type: ignore[attr-defined]
                self._last_ssm = self._ended(handed_out)
        kept = self._ended(full[..., -conv_kernel_size:])
        self._last_conv = nn.functional.pad(kept, (conv_kernel_size - kept.shape[-1], 0)).clone()  # a view would keep all of `full`
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        self._last_ssm = self._ended(recurrent_states)
        return recurrent_states

    def _ended(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self.detach else tensor

    def final(self) -> State:
        if self._last_conv is None or self._last_ssm is None:
            raise RuntimeError("this cache has not been through a model yet, so there are no final states")
        return self._last_conv, self._last_ssm


class _Handout(dict[int, Tensor | None]):
    """`recurrent_states` of a layer: a fresh copy a request, since the one-token path writes into what it gets.

    `out` is the copy handed out last. It must not become the final state in any other case: a checkpointed layer that
    runs again may stop before it has computed one.
    """

    def __init__(self, initial: Tensor | None = None) -> None:
        super().__init__({0: initial})
        self.out: Tensor | None = None

    def __getitem__(self, index: int) -> Tensor | None:
        initial = super().__getitem__(index)
        self.out = None if initial is None else initial.clone()
        return self.out


class _KeyLayer(DynamicLayer):
    """Keys and values of one attention layer: returned, but never written to what later calls start from."""

    def __init__(self, carry: bool, detach: bool) -> None:
        super().__init__()
        self.carry, self.detach = carry, detach
        self.last: State | None = None

    def start(self, past: State | None) -> None:
        if past is not None:
            self.keys, self.values = past
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            key_states, value_states = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        if self.carry:
            self.last = (key_states.detach(), value_states.detach()) if self.detach else (key_states, value_states)
        return key_states, value_states


def _layer(stock: Any, carry: bool, detach: bool) -> Any:
    """Ours in place of a layer of DynamicCache."""
    if type(stock) is LinearAttentionLayer and stock.number_of_states == 1:
        return _StateLayer(detach)
    if type(stock) is DynamicLayer:
        return _KeyLayer(carry, detach)
    raise ValueError(f"a layer of kind {type(stock).__name__} has a state that state methods cannot pass on")


# --- The model -------------------------------------------------------------------------------------------------------


def prepare(model: nn.Module) -> None:
    """Make a live model start from the states of a cache, exactly, in training and evaluation. Twice does what once does.

    Ordinary caches are served too: `generate` on a prepared Mamba-1 may be given a cache and more than one new token.
    """
    check_supported(model.config)  # type: ignore[arg-type]
    for mixer, _ in mixers(model):
        if _dispatch(sys.modules[stock_class(mixer).__module__]):
            _hook(mixer, _enter, _leave)
    if CACHE_ARGUMENT[family(model.config)] == "past_key_values":
        _hook(model.get_decoder(), _keep_cache, _drop_cache)  # type: ignore[operator]


def _hook(module: Any, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call `before` and `after` around every forward pass of the module, `after` also when it fails; once, however often asked."""
    if not getattr(module, "_longctx_state", False):
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, always_call=True)
        module._longctx_state = True


def mixers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Every state-space mixer with its convolution, in the order of the layers."""
    found = [m for m in model.modules() if all(hasattr(m, name) for name in ("A_log", "conv1d", "layer_idx"))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no state-space layer, so there is no state to pass on")
    for mixer in sorted(found, key=lambda m: int(m.layer_idx)):  # type: ignore[arg-type]
        yield mixer, mixer.conv1d


def stock_class(mixer: nn.Module) -> type:
    """Transformers' class of a mixer, also where a library made a subclass of it."""
    return next(base for base in type(mixer).__mro__ if base.__module__.startswith("transformers."))


def _enter(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a mixer runs: the SSM state that its scan starts from, None for zeros."""
    cache = kwargs.get("cache_params", args[1] if len(args) > 1 else None)
    layer = cache.layers[mixer.layer_idx] if cache is not None else None
    start: Tensor | None = None
    if isinstance(layer, _StateLayer):
        start = None if layer.initial is None else layer.initial[1]
    elif layer is not None and layer.has_previous_state[0]:
        start = layer.recurrent_states[0].clone()  # the stock cache is about to be written in place
    if not hasattr(_running, "starts"):
        _running.starts = []
    _running.starts.append(start)


def _leave(mixer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _running.starts.pop()


def _keep_cache(core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Under gradient checkpointing, layers drop a cache that they would write to twice; ours is made for that."""
    if isinstance(kwargs.get("past_key_values"), StatePassingCache):
        _set_keeping(core, True)


def _drop_cache(core: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _set_keeping(core, False)


def _set_keeping(core: nn.Module, keep: bool) -> None:
    for layer in core.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._can_checkpoint_with_cache = keep


def _dispatch(module: Any) -> bool:
    """Put `_Scan` in the place of a modeling file's scan, once. False if it has none that needs it."""
    stock = getattr(module, _SCAN, None)
    if stock is not None and not isinstance(stock, _Scan):
        setattr(module, _SCAN, _Scan(stock))
    return stock is not None


class _Scan:
    """`mamba_selective_scan` of Transformers; in a prepared model, from the state that its mixer is given."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        starts = getattr(_running, "starts", None)
        if not starts:  # no prepared mixer is running
            return self.stock(*args, **kwargs)
        step = steps.current()
        if step is not None:
            args, kwargs = steps.selective_scan(step, *args, **kwargs)
        return scan_from(starts[-1], self.stock if has_kernel(args[0]) else None, *args, **kwargs)


def has_kernel(tensor: Tensor) -> bool:
    """Whether Transformers' scan of this tensor is mamba-ssm's kernel and not a loop over time."""
    return tensor.is_cuda and importlib.util.find_spec("mamba_ssm") is not None


# --- The scan --------------------------------------------------------------------------------------------------------


def scan_from(
    start: Tensor | None, kernel: Callable[..., Any] | None, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """mamba-ssm's `selective_scan_fn` with an initial state `start` [batch, channels, state].

    With a `kernel`, a scan of the same signature, that does the work and the part of `start` is added; without, `scan` does.
    u, dt, z [batch, channels, tokens]; a [channels, state]; b, c [batch, state, tokens]; D, delta_bias [channels].
    """
    wide = _wide(u.dtype)
    start = None if start is None else start.to(wide)
    with without_autocast(u):
        if kernel is not None:
            u = u.contiguous()  # beside a cache it is the end of longer rows, and the kernel reads 16 bytes at a time from where a row begins
            gate = z if start is None else None
            y, last = kernel(u, dt, a, b, c, D=D, z=gate, delta_bias=delta_bias, delta_softplus=delta_softplus, return_last_state=True, **options)
            last = _KernelState.apply(last.detach(), u, dt, a, b, delta_bias, delta_softplus)  # type: ignore[no-untyped-call]
            if start is not None:
                y, decayed = _completed(y, dt, a, c, start, z, delta_bias, delta_softplus)
                last = last + decayed
        else:
            zero = u.new_zeros(u.shape[0], *a.shape, dtype=wide)
            delta = _delta(dt, delta_bias, delta_softplus)
            y, last = scan(u.to(wide), delta, a.to(wide), b.to(wide), c.to(wide), zero if start is None else start)
            y = _gated(y if D is None else y + u * D[:, None], z)
    return (y, last) if return_last_state else y


def _completed(
    y: Tensor, dt: Tensor, a: Tensor, c: Tensor, start: Tensor, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Outputs of a scan from zero with the part of `start`, then gated; and what is left of `start` after the last token."""
    if carried_state.serves(y, dt, a, c, z):
        y, elapsed = carried_state.add_carried(y, dt, a, c, start, z, delta_bias, delta_softplus)
        return y, torch.exp(a.to(start.dtype) * elapsed[..., None]) * start
    more, decayed = carried(_delta(dt, delta_bias, delta_softplus), a.to(start.dtype), c.to(start.dtype), start)
    return _gated(y + more, z), decayed


def _delta(dt: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Step sizes, in float32 at least."""
    wide = _wide(dt.dtype)
    delta = dt.to(wide) if delta_bias is None else dt.to(wide) + delta_bias.to(wide)[:, None]
    return nn.functional.softplus(delta) if delta_softplus else delta


def _gated(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * nn.functional.silu(z.to(y.dtype))


def scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t a) h_{t-1} + delta_t b_t u_t from `start`; returns y_t = c_t h_t [batch, channels, tokens] and h_T.

    In blocks of time, so that no tensor has a state for every token. The backward pass computes a block's states again,
    from the one that the block started from.
    """
    return _SelectiveScan.apply(u, delta, a, b, c, start)  # type: ignore[no-untyped-call]


def carried(delta: Tensor, a: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """What the state `start` adds to a scan that started from zero: c_t exp(a cumsum(delta)_t) start, and exp(a sum delta) start."""
    elapsed = delta.cumsum(-1)
    return _Carried.apply(elapsed, a, c, start), torch.exp(a * elapsed[:, :, -1:]) * start  # type: ignore[no-untyped-call]


class _KernelState(torch.autograd.Function):
    """The last state of mamba-ssm's kernel, whose backward pass drops the gradient of it without a word.

    It is sum_t exp(a (delta_{t+1} + .. + delta_T)) delta_t b_t u_t, so that its gradients are those of `_Carried`, back in time.
    """

    @staticmethod
    def forward(ctx: Any, last: Tensor, u: Tensor, dt: Tensor, a: Tensor, b: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
        ctx.save_for_backward(u, dt, a, b, delta_bias)
        ctx.delta_softplus = delta_softplus
        return last.view_as(last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlast: Tensor) -> tuple[Tensor | None, ...]:
        leaves: list[Any] = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1:6], strict=True)]
        u, dt, a, b, delta_bias = leaves
        with torch.enable_grad(), without_autocast(dlast):
            delta = _delta(dt, delta_bias, ctx.delta_softplus)
            remaining = delta.flip(-1).cumsum(-1).flip(-1) - delta
            weights = _Carried.apply(remaining, a.to(delta.dtype), b.to(delta.dtype), dlast.to(delta.dtype))  # type: ignore[no-untyped-call]
            value = (u * delta * weights).sum()
            needed = [t for t in leaves if t is not None and t.requires_grad]
            found = dict(zip(map(id, needed), torch.autograd.grad(value, needed), strict=True))
        return None, *(found.get(id(t)) for t in leaves), None


class _SelectiveScan(torch.autograd.Function):
    """See `scan`. Within a block, tensors are [tokens, batch, channels, state]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        y, state, starts = torch.empty_like(u), start, []
        for span in _spans(start, u.shape[-1]):
            starts.append(state)
            _, h = _states(u[..., span], delta[..., span], b[..., span], a, state)
            y[..., span] = _contract(h, c[..., span])
            state = h[-1].clone()
        ctx.save_for_backward(u, delta, a, b, c, *starts)
        return y, state if starts else start.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(dy):
            return _SelectiveScan._gradients(dy, dlast, *ctx.saved_tensors)

    @staticmethod
    def _gradients(dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *starts: Tensor) -> tuple[Tensor, ...]:
        du, ddelta, da, db, dc = (torch.zeros_like(t) for t in (u, delta, a, b, c))
        later = dlast  # of the loss with respect to the state at the block's end, by way of what follows the block
        for start, span in reversed(list(zip(starts, _spans(dlast, u.shape[-1]), strict=True))):
            u_, delta_, b_, c_, dy_ = (t[..., span].permute(2, 0, 1) for t in (u, delta, b, c, dy))
            decay, h = _states(u[..., span], delta[..., span], b[..., span], a, start)
            dc[..., span] = (dy_[:, :, None] @ h).squeeze(2).permute(1, 2, 0)
            g = dy_[..., None] * c_[:, :, None]
            g[-1] += later
            g = _prefix(torch.cat([decay[:1], decay[1:].flip(0)]), g.flip(0)).flip(0)
            later = decay[0] * g[0]
            ddt_a = g * torch.cat([start[None], h[:-1]]).mul_(decay)  # with respect to delta_t a
            gb = (g @ b_[..., None]).squeeze(-1)
            du[..., span] = (gb * delta_).permute(1, 2, 0)
            ddelta[..., span] = (gb * u_ + (ddt_a * a).sum(-1)).permute(1, 2, 0)
            db[..., span] = ((delta_ * u_)[:, :, None] @ g).squeeze(2).permute(1, 2, 0)
            da += (ddt_a * delta_[..., None]).sum((0, 1))
        return du, ddelta, da, db, dc, later


class _Carried(torch.autograd.Function):
    """See `carried`: y_t = sum_n c_tn exp(a_n elapsed_t) start_n, with elapsed [batch, channels, tokens]."""

    @staticmethod
    def forward(ctx: Any, elapsed: Tensor, a: Tensor, c: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(elapsed, a, c, start)
        y = torch.empty_like(elapsed)
        for span in _spans(start, elapsed.shape[-1]):
            y[..., span] = _contract(_decayed(elapsed[..., span], a) * start, c[..., span])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(dy):
            return _Carried._gradients(dy, *ctx.saved_tensors)

    @staticmethod
    def _gradients(dy: Tensor, elapsed: Tensor, a: Tensor, c: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        delapsed, da, dc, dstart = (torch.zeros_like(t) for t in (elapsed, a, c, start))
        for span in _spans(start, elapsed.shape[-1]):
            dy_, c_, elapsed_ = (t[..., span].permute(2, 0, 1) for t in (dy, c, elapsed))
            decay = _decayed(elapsed[..., span], a)
            dc[..., span] = (dy_[:, :, None] @ (decay * start)).squeeze(2).permute(1, 2, 0)
            g = dy_[..., None] * c_[:, :, None] * decay
            dstart += g.sum(0)
            g *= start
            delapsed[..., span] = (g * a).sum(-1).permute(1, 2, 0)
            da += (g * elapsed_[..., None]).sum((0, 1))
        return delapsed, da, dc, dstart


def _states(u: Tensor, delta: Tensor, b: Tensor, a: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens of one block: exp(delta_t a), and h_t."""
    decay = _decayed(delta, a)
    inputs = (delta * u).permute(2, 0, 1)[..., None] * b.permute(2, 0, 1)[:, :, None]
    inputs[0] += decay[0] * start
    return decay, _prefix(decay, inputs)


def _decayed(time: Tensor, a: Tensor) -> Tensor:
    """exp(a time): [tokens, batch, channels, state]."""
    return torch.exp(time.permute(2, 0, 1)[..., None] * a)


def _contract(h: Tensor, c: Tensor) -> Tensor:
    """sum over the state of c_t h_t: [batch, channels, tokens]."""
    return (h @ c.permute(2, 0, 1)[..., None]).squeeze(-1).permute(1, 2, 0)


def _prefix(decay: Tensor, inputs: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + inputs_t along the first dimension, from h_{-1} = 0; `decay[0]` is not looked at.

    Pairs of steps are merged into one, the half as long sequence is solved, the steps between are filled in: the work of
    about three loops over time in log2(tokens) operations, and nothing but products of decays, so it is as stable as the loop.
    """
    tokens = len(inputs)
    if tokens == 1:
        return inputs
    even, odd = decay[0 : tokens - 1 : 2], decay[1::2]
    at_odd = _prefix(even * odd, odd * inputs[0 : tokens - 1 : 2] + inputs[1::2])
    h = torch.empty_like(inputs)
    h[0] = inputs[0]
    h[1::2] = at_odd
    h[2::2] = decay[2::2] * at_odd[: (tokens - 1) // 2] + inputs[2::2]
    return h


def _spans(state: Tensor, tokens: int) -> Iterator[slice]:
    """Blocks of time in which a tensor with one state a token has at most `_BLOCK` elements, or `_FEWEST` tokens."""
    most = _BLOCK if state.device.type == "cpu" else 16 * _BLOCK
    size = max(_FEWEST, most // state.numel())
    return (slice(first, min(first + size, tokens)) for first in range(0, tokens, size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
