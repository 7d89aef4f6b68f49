"""Attention through Transformers' AttentionInterface and AttentionMaskInterface: the bias and attention slots.

A forward pre-hook on the decoder works out where the tokens of a pass stand (`locate`) and hands it down as the keyword
`longctx`, which Transformers passes on to the attention function of every layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_longctx.kernels import biased_attention as kernel
from hf_longctx.modules import Bias, PerLayer

FULL_ROWS = "sdpa_full_rows"
LONGCTX = "longctx_sdpa"
LONGCTX_FULL_ROWS = "longctx_sdpa_full_rows"
BLOCK = 2**24  # logits that are held at once where a bias is added to them; fewer on a CPU, where memory is slow and a formula makes dozens of such tensors
CHUNKS = 8  # of a row, at most, that the kernel takes: its third pass launches programs for every pair
REACH = 2**21  # the longest table of distances made for skips: 256 MiB with 32 heads, and a few copies of it


def mask_of_full_rows(*, q_length: int, kv_length: int, local_size: int | None = None, allow_is_causal_skip: bool = True, **rest: Any) -> Tensor | None:
    """The mask of SDPA, for rows known to hold no padding: none at all where causality says everything.

    Stock SDPA finds that out by reading the mask back, which makes the CPU wait for the GPU in every step and is not allowed
    while a CUDA graph is recorded: there it builds the whole mask and loses the flash kernel.
    """
    if allow_is_causal_skip and q_length == kv_length and (local_size is None or kv_length <= local_size):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **rest)


class Rows(NamedTuple):
    """What is known of every row that comes with a 2-D mask, beside that it holds no padding.

    Attributes:
        runs: of consecutive positions, at most; a single one begins at 0.
        reach: positions lie below it.
    """

    runs: int
    reach: int


def expect_full_rows(model: Any, rows: Rows) -> bool:
    """Promise that every 2-D attention mask is all ones, and `rows`; 4-D ones are read as they are. True if the model uses SDPA, or a bias, and took it."""
    kind = {"sdpa": FULL_ROWS, LONGCTX: LONGCTX_FULL_ROWS}.get(model.config._attn_implementation)
    if kind is None or (kind == LONGCTX_FULL_ROWS and (rows.runs > CHUNKS or rows.reach > REACH)):
        return False
    model.set_attn_implementation(kind)
    model._longctx_rows = rows
    return True


class _once:
    """A property that is computed once. That of functools holds a lock before Python 3.12, which torch.compile cannot trace."""

    def __init__(self, compute: Callable[[Any], Any]):
        self.compute = compute

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = self.compute(instance)
        setattr(instance, self.compute.__name__, value)  # from now on found before this
        return value


@dataclass
class Tokens:
    """Where the queries and keys of one forward pass stand, and what a model's methods do with them.

    Attributes:
        q_pos, k_pos: positions, [batch or 1, queries] and [batch or 1, keys].
        q_index: how many keys each query sees, itself included, [batch or 1, queries].
        k_valid: False at padding and where a static cache is not filled yet, [batch or 1, keys]; None if every key counts.
        causal: the last query sees all valid keys, the one before it all but the last key, and so on.
        plain: the position of a key is its index, and the last query stands at the last one; known without a look at the device.
        bias, scaling: modules of the `bias` and the `attention` slot.
        layers: which layers they belong to.
        rows: what was promised of them; without it, and where it does not hold, they are looked at.
        table: the bias at each distance, where it is one for all layers and the kernel reads it.
        seen: where to note the layers that ask, or None.
    """

    q_pos: Tensor
    k_pos: Tensor
    q_index: Tensor
    k_valid: Tensor | None
    causal: bool
    plain: bool = False
    bias: PerLayer | None = None
    scaling: PerLayer | None = None
    layers: frozenset[int] = frozenset()
    rows: Rows | None = None
    table: kernel.Table | None = None
    seen: list[int] | None = None

    @_once
    def places(self) -> tuple[Tensor, Tensor]:
        """`q_pos` and `k_pos`, of one row where all rows stand alike: a bias is then computed once and not for each.

        It waits for the device, once a pass; not in decoding, whose steps are short and may be recorded, nor where rows were promised.
        """
        one_row = len(self.q_pos) == len(self.k_pos) == 1
        if one_row or self.rows or self.q_pos.shape[1] == 1:
            return self.q_pos, self.k_pos
        alike = bool((self.q_pos == self.q_pos[:1]).all() & (self.k_pos == self.k_pos[:1]).all())
        return (self.q_pos[:1], self.k_pos[:1]) if alike else (self.q_pos, self.k_pos)

    @_once
    def reach(self) -> int | None:
        """How many distances there are between queries and the keys before them; None where those are more than the pairs, as in decoding.

        It waits for the device, once a pass, unless rows were promised or positions are plain.
        """
        queries, keys = self.q_pos.shape[1], self.k_pos.shape[1]
        if queries == 1 or self.q_pos.is_meta:
            return None
        if self.plain:
            reach = keys
        elif self.rows:
            reach = self.rows.reach
        else:
            first = self.k_pos if self.k_valid is None else self.k_pos.where(self.k_valid, self.k_pos.amax())
            reach = int(self.q_pos.amax() - first.amin()) + 1
        return reach if 0 < reach <= min(queries * keys, REACH) else None

    @_once
    def layout(self) -> "Layout | None":
        """How keys and positions lie, if nothing else sets the pass apart from a plain causal one; None if the kernel does not compute it.

        Rows may be padded on the left, not between tokens. Positions may skip upward, in self-attention and with a 2-D mask: without
        one Transformers takes any skip for the beginning of a packed document. It waits for the device, once a pass, unless rows were promised
        or positions are plain and no key is hidden.
        """
        if not self.causal:
            return None
        keys, queries = self.k_pos.shape[1], self.q_pos.shape[1]
        none_hidden = torch.zeros(1, dtype=torch.long, device=self.q_pos.device)
        if self.plain and self.k_valid is None:
            return Layout(none_hidden, None)
        steps = (self.q_pos - torch.arange(queries, device=self.q_pos.device)).diff()
        if self.rows:
            return Layout(none_hidden, _chunks(steps, self.rows.runs, self.rows.reach))
        valid = torch.ones_like(self.k_pos, dtype=torch.bool) if self.k_valid is None else self.k_valid
        steps = steps * valid[:, -queries:][:, :-1]  # those out of padding are none
        holes, back = (valid[:, 1:] < valid[:, :-1]).any(), (steps < 0).any()
        jumps, reach = (x.sum(-1).amax() for x in (steps > 0, steps))
        broken, jumps, reach = torch.stack([(holes | back).long(), jumps, reach]).tolist()
        start = (~valid).sum(-1)
        if broken or jumps == 0:
            return None if broken else Layout(start, None)
        if keys > queries or self.k_valid is None or jumps >= CHUNKS or keys + reach > REACH:
            return None
        return Layout(start, _chunks(steps, jumps + 1, keys + reach))


class Layout(NamedTuple):
    """How the keys of a causal pass lie.

    Attributes:
        start: the first valid key of each row, [batch or 1].
        chunks: where positions skip; None where a distance of positions is one of keys.
    """

    start: Tensor
    chunks: kernel.Chunks | None

    def reach(self, keys: int) -> int:
        """How many distances there are."""
        return keys if self.chunks is None else self.chunks.reach


def _chunks(steps: Tensor, count: int, reach: int) -> kernel.Chunks:
    """Chunks from how far each token but the first of a row jumps, [batch, tokens - 1], none of them back and at most count - 1 ahead."""
    length = steps.shape[1] + 1
    index = torch.arange(1, length, device=steps.device)
    cuts = pad(index.where(steps > 0, length).sort().values[:, : count - 1], (1, 0))
    skips = pad(steps.cumsum(-1), (1, 0)).gather(1, cuts.clamp(max=length - 1))
    return kernel.Chunks(pad(cuts, (0, 1), value=length).int(), skips.int(), reach)


def locate(length: int, device: torch.device, mask: Any, position_ids: Tensor | None, cache: Any, layer: int, rows: Rows | None = None) -> Tokens:
    """Read positions and visible keys off the arguments of a decoder.

    Without cached keys, keys stand where queries do, skips included. With them, positions are taken to be consecutive, padding left
    out: a cache does not remember positions, and `generate` counts on.

    Args:
        mask: 2-D, 4-D (bool, or float with 0 where a key is seen), a dictionary of such by layer type, or None.
        cache: the `past_key_values` of the call, or None.
        layer: a layer with full attention; sliding ones cut their keys.
        rows: what was promised of those with a 2-D mask.
    """
    start = cache.get_query_offset(layer) if cache is not None else 0
    keys, first = cache.get_mask_sizes(length, layer) if cache is not None else (length, 0)
    index = torch.arange(keys, device=device) + first
    queries = torch.arange(length, device=device) + start
    q_pos = queries[None] if position_ids is None else position_ids
    fresh = keys == length  # nothing cached, nothing allocated ahead
    two_dim = isinstance(mask, Tensor) and mask.dim() == 2
    whole = keys == start + length
    causal, plain = whole and (mask is None or two_dim), whole and position_ids is None
    if rows and two_dim and cache is None and length <= rows.reach:
        q_pos = queries[None] if rows.runs == 1 else q_pos
        return Tokens(q_pos, q_pos, queries[None] + 1, None, True, rows.runs == 1, rows=rows)
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        q_index, k_valid = queries[None] + 1, (index < start + length)[None]
    elif mask.dim() == 4:
        visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        q_index, k_valid = visible.sum(-1), visible.any(-2)
    else:
        k_valid = pad(mask.bool(), (0, max(0, keys - mask.shape[1])))[:, :keys]
        q_index = k_valid.cumsum(-1)[:, queries - first]
    if fresh:
        return Tokens(q_pos, q_pos, q_index, None if mask is None else k_valid, causal, plain)
    # A query that is no padding tells where the keys before it stand; `generate` gives padding any position.
    ahead = (q_pos - queries).where(k_valid[:, queries - first], 2**31).amin(-1, keepdim=True)
    return Tokens(q_pos, index[None] + ahead, q_index, k_valid, causal, plain)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    longctx: Tokens | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention with the methods of a model's `bias` and `attention` slots.

    query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim]; returns [batch, queries, heads, head_dim].
    """
    if longctx is None:
        raise RuntimeError(f"{type(module).__name__} was called without the keyword longctx, so its bias and scaling would be lost; call the model, not its layers")
    return (_attend_uncompiled if module.training else _attend)(module, query, key, value, attention_mask, scaling, dropout, longctx, rest)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None, dropout: float, longctx: Tokens, rest: dict[str, Any]
) -> tuple[Tensor, None]:
    layer = module.layer_idx
    if longctx.seen is not None:
        longctx.seen.append(layer)
    if layer in longctx.layers and longctx.scaling is not None:
        query, key = longctx.scaling.of(layer)(query, key, longctx.q_pos, longctx.q_index, longctx.k_valid)
    if layer not in longctx.layers or longctx.bias is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)
    if rest.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} caps its logits (softcap), which a bias cannot be combined with")
    bias = longctx.bias.of(layer)
    layout, reach = _distances(longctx, bias, query, dropout)
    table = None if reach is None else _shared(longctx, reach) or _table(bias, query.shape[1], reach, query.device)
    if table is not None and layout is not None:
        return _by_kernel(query, key, value, table, scaling, layout).transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    at = bias if table is None else partial(_look_up, table.values)
    blocks = _biased_blocks(query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, scaling, dropout, longctx, at)
    return torch.cat(list(blocks), dim=2).transpose(1, 2).contiguous(), None


def share_table(tokens: Tokens, heads: int, query: Tensor) -> None:
    """Before the layers of a pass, and outside of what gradient checkpointing runs again: make the table of a bias that they share, if they do.

    query: any tensor with the dtype, device and head dimension of queries.
    """
    if tokens.bias is None:
        return
    bias = tokens.bias.of(0)
    _, reach = _distances(tokens, bias, query)  # looked up by every layer: what waits for the device, and breaks a graph, is over before them
    if reach is not None and len(tokens.bias.layers) == 1:
        tokens.table = _table(bias, heads, reach, query.device)


def _distances(tokens: Tokens, bias: Bias, query: Tensor, dropout: float = 0.0) -> tuple["Layout | None", int | None]:
    """What the kernel has to know of the keys, if it computes the pass, and how many distances a table holds, if there is to be one."""
    if not bias.by_distance or tokens.q_pos.shape[1] == 1:
        return None, None
    ordered = torch.are_deterministic_algorithms_enabled() and _learns(bias)  # the kernel adds up the gradient of a table as it comes
    layout = tokens.layout if not (dropout or ordered) and kernel.serves(query) else None
    return layout, tokens.reach if layout is None else layout.reach(tokens.k_pos.shape[1])


def _learns(bias: Bias) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in bias.parameters())


def _shared(tokens: Tokens, reach: int) -> kernel.Table | None:
    """The table of the pass, unless checkpointing is reentrant: each layer's backward pass is then one of its own, and would free the graph."""
    if tokens.table is not None and tokens.table.values.requires_grad and not torch.is_grad_enabled():
        tokens.table = None
    return tokens.table if tokens.table is not None and tokens.table.values.shape[1] == reach else None


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, table: kernel.Table, scaling: float | None, layout: Layout) -> Tensor:
    """[batch, heads, queries, head_dim]"""
    device = query.device
    if torch.is_autocast_enabled(device.type):  # as SDPA does by itself: RoPE may have left queries and keys in float32
        query, key, value = (t.to(torch.get_autocast_dtype(device.type)) for t in (query, key, value))
    batch, chunks = query.shape[0], layout.chunks
    if chunks is not None:
        cuts, skips = (x.expand(batch, -1).contiguous().to(device) for x in chunks[:2])
        chunks = chunks._replace(cuts=cuts, skips=skips)
    return kernel.biased_attention(query, key, value, table, scaling, k_start=layout.start.expand(batch), chunks=chunks)


def _table(bias: Bias, heads: int, length: int, device: torch.device) -> kernel.Table:
    """The bias at each distance, [heads, length]; backward computes it again, so that the steps to it are not kept."""
    head, distance = torch.arange(heads, device=device)[:, None], torch.arange(length, device=device)[None]
    if not _learns(bias):
        return kernel.Table(bias(head, distance, torch.zeros_like(distance)))
    return kernel.Table(checkpoint(bias, head, distance, torch.zeros_like(distance), use_reentrant=False, preserve_rng_state=False))


def _look_up(table: Tensor, head: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """What the bias itself gives for all heads, [rows, heads, queries, keys], from its values at each distance: an exponential costs ten times that."""
    distance = (q_pos - k_pos).clamp(0, table.shape[1] - 1)
    found = table.index_select(1, distance.flatten())
    return found.view(len(table), len(distance), *distance.shape[2:]).transpose(0, 1)


def _biased_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float, tokens: Tokens, bias: Any
) -> Iterator[Tensor]:
    """[batch, heads, some queries, head_dim] after another, so that no heads x queries x keys table is ever there, backward neither."""
    batch, heads, length, _ = query.shape
    if mask is None and length > 1:  # causal from the upper left, as SDPA's own is_causal; a static cache may hold more than it is filled
        key, value = key[:, :, :length], value[:, :, :length]
    most = BLOCK // 8 if query.device.type == "cpu" else BLOCK
    size = max(1, most // (batch * heads * key.shape[2]))
    q_pos, k_pos = tokens.places
    for begin in range(0, length, size):
        end = min(begin + size, length)
        seen = end if mask is None and length > 1 else key.shape[2]
        part = (query[:, :, begin:end], key[:, :, :seen], value[:, :, :seen], None if mask is None else mask[:, :, begin:end, :seen])
        where = (q_pos[:, begin:end], k_pos[:, :seen], begin if length > 1 else seen)
        if torch.is_grad_enabled() and size < length:
            yield checkpoint(_biased, *part, *where, bias, scaling, dropout, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            yield _biased(*part, *where, bias, scaling, dropout)


def _biased(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, first: int, bias: Any, scaling: float | None, dropout: float
) -> Tensor:
    """Attention of the queries from index `first` on; without a mask, to keys up to each of them."""
    head = torch.arange(query.shape[1], device=query.device)[:, None, None]
    logits = bias(head, q_pos[:, None, :, None], k_pos[:, None, None, :]).to(query.dtype)
    if mask is None:
        rows = torch.arange(query.shape[2], device=query.device) + first
        mask = torch.arange(key.shape[2], device=query.device) <= rows[:, None]
    # Not -inf: a row of padding that sees nothing would turn into NaN.
    logits = torch.where(mask, logits, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    return scaled_dot_product_attention(query, key, value, attn_mask=logits, dropout_p=dropout, scale=scaling)


# It asks for its layer's number: compiled along, each layer would need graphs of its own, where `compile_layers` has one set for all.
_attend_uncompiled = torch.compiler.disable(_attend)

AttentionInterface.register(FULL_ROWS, sdpa_attention_forward)
AttentionMaskInterface.register(FULL_ROWS, mask_of_full_rows)
AttentionInterface.register(LONGCTX, attend)
AttentionMaskInterface.register(LONGCTX, sdpa_mask)
AttentionInterface.register(LONGCTX_FULL_ROWS, attend)
AttentionMaskInterface.register(LONGCTX_FULL_ROWS, mask_of_full_rows)
