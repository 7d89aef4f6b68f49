"""Reading a text piece by piece over keys and values that stay: the cache, and attention to it that keeps the fastest kernels.

Stock SDPA over a cache builds a mask of queries x keys and leaves the kernels that know causality by themselves, which align
it to the upper left or want as many queries as keys. Here the keys of a piece are cut in two: those before it, which all of
its queries see, and its own, where causality is plain. Both go to the kernel that SDPA itself would choose; softmax over both
is then exp(lse) weighted, as in ring attention (arXiv:2310.01889). Several pieces that go on from one text are rows of a batch
and meet its keys once, without a copy of these (arXiv:2402.05099).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PretrainedConfig, PreTrainedModel, QuantizedCache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_longctx.integration.attention import FULL_ROWS
from hf_longctx.schema import nearest

OVER_CACHE = "sdpa_over_cache"
KINDS = ("dynamic", "offloaded", "quantized")
KeyValues = tuple[Tensor, Tensor]
_ALL = slice(None)
_BLOCK = 2**24  # query-key pairs of a head, where a kernel without causality may hold them all


# --- the cache


def check_kind(kind: str) -> None:
    """Raise ValueError, with the nearest name, for an unknown kind of cache."""
    if kind not in KINDS:
        raise ValueError(f"unknown cache {kind!r}" + nearest(kind, KINDS))


def check_cache(kind: str, config: PretrainedConfig, device: str) -> None:
    """Raise ValueError unless keys and values can be held that way on this kind of device."""
    make_cache(kind, config, 0, device)


def make_cache(kind: str, config: PretrainedConfig, room: int, device: str) -> Cache:
    """A cache for a text of up to `room` tokens.

    Raises:
        ValueError: an unknown kind; offloading without a GPU; quantisation without optimum-quanto, or of a sliding window.
    """
    check_kind(kind)
    if kind == "dynamic":
        return TextCache(config, room)
    if kind == "offloaded":
        if device != "cuda":
            raise ValueError(f"an offloaded cache moves keys and values off a CUDA GPU, but the model is on {device}; leave out cache")
        return _OffloadedCache(config=config, offloading=True)
    try:
        return QuantizedCache("quanto", config)
    except ImportError:
        raise ValueError("a quantized cache needs optimum-quanto 0.2.6 or later: pip install optimum-quanto") from None
    except ValueError:
        raise ValueError(f"a quantized cache takes full attention in every layer, which {config.model_type} has not; leave out cache") from None


class _OffloadedCache(DynamicCache):
    """An offloaded cache whose layers are fetched only once they have left the device.

    In Transformers 5.17 (5.23 does as here) the stream that fetches does not wait for the one that computes and copies to the host:
    where nothing else waits for the device between two passes, keys are fetched before they have arrived.
    """

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(layer_idx, only_non_sliding)


class TextCache(Cache):
    """Keys and values of one text, or of a batch of them, in buffers that have room for all of it: nothing is copied as it grows.

    `crop` only moves the end, so that texts with a common beginning are read one after another, each from where it differs.
    With `keep` off, a piece sees what is there and leaves it as it was; it may have several rows where the text has one.
    With `texts`, so many of one length are read some at a time (`rows`, each time from an empty cache) and then go on together.

    Attributes:
        keep: whether the tokens of the next pass are added.
        apart: whether attention takes the keys before a piece from the cache (`past_of`) and not from its arguments.
        rows: which of the texts the next pass reads.
    """

    layers: Any

    def __init__(self, config: PretrainedConfig, room: int, texts: int | None = None) -> None:
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        super().__init__(layers=[_Layer(room, window, texts) for window in windows])
        self.keep, self.apart, self.rows = True, False, slice(None)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValues:
        return self.layers[layer_idx].update(key_states, value_states, keep=self.keep, apart=self.apart, rows=self.rows)

    @property
    def nbytes(self) -> int:
        """Of its buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def past_of(self, layer_idx: int) -> KeyValues | None:
        """The keys and values that stood there before the pass that is under way, if `update` left them out."""
        return self.layers[layer_idx].past


class _Layer(CacheLayerMixin):
    """One layer of it: `keys` and `values` are [texts, heads, room, head_dim], of which `filled` tokens count.

    A sliding window is cut out when it is read: what it once left is needed again after a `crop`.
    """

    def __init__(self, room: int, sliding_window: int | None, texts: int | None) -> None:
        super().__init__()
        self.room, self.sliding_window, self.texts, self.filled = room, sliding_window, texts, 0
        self.is_sliding = sliding_window is not None
        self.past: KeyValues | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (t.new_empty(self.texts or len(t), t.shape[1], self.room, t.shape[3]) for t in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, keep: bool = True, apart: bool = False, rows: slice = _ALL, **kwargs: Any
    ) -> KeyValues:
        """What the queries of this pass see, [rows, heads, tokens, head_dim], less `past` where that is apart."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[rows], self.values[rows]
        start, stop = self.filled, self.filled + key_states.shape[2]
        first = self._first()
        self.past = None
        if keep:
            keys[:, :, start:stop], values[:, :, start:stop] = key_states, value_states
            self.filled = stop
        if apart and start and not self.is_sliding:
            self.past = keys[:, :, :start], values[:, :, :start]
            return key_states, value_states
        if keep:
            return keys[:, :, first:stop], values[:, :, first:stop]
        size = (key_states.shape[0], -1, -1, -1)
        return (
            torch.cat([keys[:, :, first:start].expand(size), key_states], 2),
            torch.cat([values[:, :, first:start].expand(size), value_states], 2),
        )

    def _first(self) -> int:
        """The first key that the next token sees."""
        return 0 if self.sliding_window is None else max(0, self.filled - self.sliding_window + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled - self._first() + query_length, self._first()

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.room

    def crop(self, tokens_to_remove: int) -> None:
        self.filled -= abs(tokens_to_remove)


# --- attention


@contextmanager
def fast_over_cache(model: PreTrainedModel) -> Iterator[bool]:
    """Within it a model that uses SDPA builds no mask over a full cache. Yields whether it does."""
    before = model.config._attn_implementation
    if before not in ("sdpa", FULL_ROWS):
        yield False
        return
    model.set_attn_implementation(OVER_CACHE)
    try:
        yield True
    finally:
        model.set_attn_implementation(before)


def mask_over_cache(
    *, q_length: int, kv_length: int, q_offset: int = 0, attention_mask: Tensor | None = None, local_size: int | None = None,
    allow_is_causal_skip: bool = True, **rest: Any,
) -> Tensor | None:  # fmt: skip
    """The mask of SDPA; none where a query sees all keys up to its own, however many stand before the first query."""
    if allow_is_causal_skip and attention_mask is None and local_size is None and kv_length == q_offset + q_length:
        return None
    skip = allow_is_causal_skip and q_length == kv_length
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=skip, **rest
    )


def attend_over_cache(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    text: TextCache | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of a piece to itself and to what stands before it.

    query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim]; returns [batch, queries, heads, head_dim].

    Args:
        text: holds the keys before the piece if they are not in `key`.
    """
    past, before = None if text is None else text.past_of(module.layer_idx), key.shape[2] - query.shape[2]
    if past is None and attention_mask is None and before > 0:
        past, key, value = (key[:, :, :before], value[:, :, :before]), key[:, :, before:], value[:, :, before:]
    if past is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return over_past(query, (key, value), past, scale).transpose(1, 2).contiguous(), None


def over_past(query: Tensor, own: KeyValues, past: KeyValues, scale: float) -> Tensor:
    """Causal attention of query [batch, heads, queries, head_dim] to as many `own` keys, and to all of `past`.

    `past` is [batch or less, kv_heads, keys, head_dim]: of one row, all rows see it; otherwise batch / rows of them see each.
    """
    batch, heads, length, _ = query.shape
    shared, groups = batch // past[0].shape[0], heads // past[0].shape[1]
    key, value = (repeat_kv(t, groups) for t in own)
    folded = query.unflatten(1, (-1, groups)).unflatten(0, (-1, shared)).transpose(1, 2).flatten(2, 4)  # [rows, kv_heads, queries of all, head_dim]
    inner, outer = _kernel(query, key, value, causal=True), _kernel(folded, *past, causal=False)
    if inner is None or outer is None:
        keys, values = (torch.cat([repeat_kv(p.repeat_interleave(shared, 0), groups), t], 2) for p, t in zip(past, (key, value)))
        return _in_blocks(query, keys, values, scale)
    here, here_lse = inner(query, key, value, scale)
    there, there_lse = (
        t.unflatten(2, (shared, groups, length)).transpose(1, 2).flatten(2, 3).flatten(0, 1) for t in outer(folded, *past, scale)
    )  # [batch, heads, queries, ...]
    weight = torch.sigmoid(there_lse - here_lse)
    size = max(1, _BLOCK // (batch * heads * query.shape[3]))
    for start in range(0, length, size):  # not all of it in float32 at once
        part = slice(start, start + size)
        near, far = (t[:, :, part].to(weight.dtype) for t in (here, there))
        here[:, :, part] = torch.lerp(near, far, weight[:, :, part])
    return here


def _kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Any:
    """The kernel that SDPA would choose, as a function that gives output and log-sum-exp [batch, heads, queries, 1]; None if it gives no such."""
    aten, on_cpu = torch.ops.aten, query.device.type == "cpu"
    choice = SDPBackend(torch._fused_sdp_choice(query, key, value, None, 0.0, causal))
    if choice in (SDPBackend.MATH, SDPBackend.OVERRIDEABLE) or (not on_cpu and (query.shape[3] % 8 or value.shape[3] % 8)):  # SDPA would pad these
        return None

    def run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> KeyValues:
        if on_cpu:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        elif choice == SDPBackend.FLASH_ATTENTION:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        elif choice == SDPBackend.CUDNN_ATTENTION:
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal, False, scale=scale)
        else:
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, causal, scale=scale)
        return out, lse.reshape(*query.shape[:2], -1, 1)[:, :, : query.shape[2]]  # some have the last dimension, some pad the one before

    return run


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Without log-sum-exp: a block of queries after another, each over all keys up to it."""
    length, before, parts = query.shape[2], key.shape[2] - query.shape[2], []
    size = max(1, _BLOCK // (query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, length, size):
        stop = min(start + size, length)
        mask = causal_lower_right(stop - start, before + stop)
        parts.append(F.scaled_dot_product_attention(query[:, :, start:stop], key[:, :, : before + stop], value[:, :, : before + stop], mask, scale=scale))
    return torch.cat(parts, 2)


def queries_at_once(cache: Cache, rows: int, keys: int, masked: bool) -> int:
    """How many queries a pass over up to `keys` keys may have for its masks not to need more than 2**28 bytes.

    Args:
        masked: whether layers with full attention have one; those with a sliding window always do.
    """
    pairs = 2**28 // rows
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    sizes = [(math.isqrt(w * w + 4 * pairs) - w) // 2 for w in windows if w is not None]
    return max(1, min([*sizes, pairs // keys if masked and None in windows else pairs]))


AttentionInterface.register(OVER_CACHE, attend_over_cache)
AttentionMaskInterface.register(OVER_CACHE, mask_over_cache)
