"""What a model says about cells: one pass over each, whole or in chunks of tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from hf_longctx.integration import configs, state
from hf_longctx.integration.configs import family
from hf_longctx.lora import base_model
from hf_longctx.task import Cell, Scored

_TOKENS_AT_ONCE = {"cuda": 65536, "cpu": 4096}
_LOGITS_AT_ONCE = 2**26  # elements of one block of logits: 256 MiB in float32
_ROWS = 16  # long sequences that are read beside each other in chunks: each has a state of its own
Logits = Callable[[Tensor], Tensor]


def score_cells(
    model: nn.Module, cells: Sequence[Cell], batch_size: int | None = None, on_tokens: Callable[[int], None] | None = None, chunk: int | None = None
) -> list[Scored]:
    """Read each cell once; only the scored tokens meet the output embedding.

    A model with states (`integration.state`) is prepared to pass them on and read in chunks: what is held at a time does not
    grow with the length, but for token ids and scores, and for the keys and values of a hybrid. Others are read whole, with
    memory linear in length, or in chunks over a growing cache if `chunk` says so: less memory, but no longer the fastest
    attention. The numbers are those of one whole forward pass.

    Cells of equal length share a batch. Without a cache and without an attention mask, every backend takes its causal path.

    Args:
        model: in eval mode, wrapped by PEFT or not.
        batch_size: sequences in one forward pass; by default as many as make 65,536 tokens on a GPU, 4,096 elsewhere.
        on_tokens: called after each forward pass with the number of tokens that it read.
        chunk: tokens of a sequence in one forward pass.

    Raises:
        ValueError: a `chunk` for a model that cannot be read in chunks, or a cell asks for the states of a model without.
    """
    base = base_model(model)
    if state.has_state(base.config):
        state.prepare(base)
    elif chunk is not None:
        check_chunks(base.config)
    if any(cell.states_at for cell in cells):
        state.check_supported(base.config)
    device = next(base.parameters()).device
    outputs: dict[int, Scored] = {}
    with torch.no_grad():
        for batch in _batches(cells, base.config, batch_size, chunk, device.type):
            mine = [cells[i] for i in batch]
            tokens = chunk or _chunk(base.config, len(mine[0].ids), len(mine), device.type)
            outputs |= zip(batch, _score(base, mine, tokens, on_tokens), strict=True)
    return [outputs[i] for i in range(len(cells))]


def attempts(config: PretrainedConfig, cells: Sequence[Cell], batch_size: int | None, chunk: int | None, device: str) -> list[tuple[int | None, int | None]]:
    """Batch size and chunk to read cells with, then what to try where memory did not suffice: one by one, and in small chunks."""
    found = [(batch_size, chunk)]
    if max(map(len, _batches(cells, config, batch_size, chunk, device)), default=1) > 1:
        found.append((1, chunk))
    small = _at_once(device) // 64
    if _why_at_once(config) is None and small < min(chunk or small + 1, max(len(cell.ids) for cell in cells)):
        found.append((1, small))
    return found


def check_chunks(config: PretrainedConfig) -> None:
    """Raise ValueError, naming the reason, unless a text read in chunks is known to be the text read at once."""
    if reason := _why_at_once(config):
        raise ValueError(reason)


def _why_at_once(config: PretrainedConfig) -> str | None:
    """What keeps a model from being read in chunks; the laws of states and of cached decoding say for which families nothing does."""
    name = family(config)
    if state.has_state(config):
        return None
    if name not in configs.FAMILIES:
        known = ", ".join(sorted({*configs.FAMILIES, *state.CACHE_ARGUMENT}))
        return f"{name} is not known to give the same numbers when it is read in chunks; leave out chunk (families that do: {known})"
    parameters = config.rope_parameters or {}
    kinds = {each["rope_type"] for each in (parameters, *parameters.values()) if isinstance(each, dict) and "rope_type" in each}
    changing = kinds & {"dynamic", "longrope"}
    return f"with rope_type {changing.pop()} the first chunk would not know the length of the text; leave out chunk" if changing else None


# --- batches


def _at_once(device: str) -> int:
    return _TOKENS_AT_ONCE.get(device, _TOKENS_AT_ONCE["cpu"])


def _batches(cells: Sequence[Cell], config: PretrainedConfig, batch_size: int | None, chunk: int | None, device: str) -> Iterator[list[int]]:
    """Indices of cells that are read together: of equal length, with the same things asked of each."""
    alike: dict[Any, list[int]] = {}
    for i, cell in enumerate(cells):
        alike.setdefault((len(cell.ids), cell.states_at, cell.distribution), []).append(i)
    for (length, *_), indices in sorted(alike.items()):
        size = batch_size or _rows(config, length, chunk, device)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _rows(config: PretrainedConfig, length: int, chunk: int | None, device: str) -> int:
    """Sequences that are read together: as many as fill a pass, in chunks only where nothing but a state is kept of each."""
    whole = max(1, _at_once(device) // length)
    if not state.has_state(config) or _has_keys(config):
        return whole
    return max(whole, min(_ROWS, _at_once(device) // (chunk or _at_once(device) // _ROWS)))


def _chunk(config: PretrainedConfig, length: int, rows: int, device: str) -> int:
    """Tokens of a sequence that are read at a time."""
    if not state.has_state(config):
        return length
    if _has_keys(config) and length * rows > _at_once(device):
        return _at_once(device) // _ROWS  # attention over a cache may need a mask of chunk x length
    return max(1, _at_once(device) // rows)


def _has_keys(config: PretrainedConfig) -> bool:
    return set(config.layer_types) != {"linear_attention"}


# --- a batch


def _score(base: Any, cells: Sequence[Cell], chunk: int, on_tokens: Callable[[int], None] | None) -> list[Scored]:
    """Of cells of one length. Nothing is fetched from the device before the last chunk is under way."""
    ids = torch.from_numpy(np.stack([cell.ids for cell in cells])).to(next(base.parameters()).device)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    size = max(16, _LOGITS_AT_ONCE // base.config.get_text_config().vocab_size)
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in cells]
    norms: list[Tensor] = []
    logits_of: Logits | None = None
    for first, hidden, left in _read(base, ids, chunk, cells[0].states_at):
        last = first + hidden.shape[1]
        spans = [slice(max(cell.start - 1, first), min(cell.stop - 1, last)) for cell in cells]
        rows = [row for row, span in enumerate(spans) if span.start < span.stop]
        if rows:
            states = torch.cat([hidden[row, spans[row].start - first : spans[row].stop - first] for row in rows])
            wanted = torch.cat([labels[row, spans[row]] for row in rows])
            sizes = [spans[row].stop - spans[row].start for row in rows]
            logits_of = logits_of or _head(base)
            scores = [each.split(sizes) for each in _token_scores(logits_of, states, wanted, size, cells[0].distribution)]
            for row, *mine in zip(rows, *scores, strict=True):
                parts[row].append(tuple(mine))
        if left is not None and last in cells[0].states_at:
            norms.append(torch.stack([torch.linalg.vector_norm(ssm.flatten(1), dim=1, dtype=torch.float32) for _, ssm in left.states()], 1))
        if on_tokens is not None:
            on_tokens(hidden[..., 0].numel())
        del hidden, left  # not to be held while the next ones are computed
    grown = torch.stack(norms, 1).cpu().numpy() if norms else [None] * len(cells)
    return [_scored(mine, norm) for mine, norm in zip(parts, grown, strict=True)]


def _scored(parts: Sequence[tuple[Tensor, ...]], norms: Any) -> Scored:
    if not parts:
        return Scored(np.zeros(0, np.float32), np.zeros(0, np.int64), None, norms)
    nll, best, *more = (torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True))
    return Scored(nll, best, more[0] if more else None, norms)


def _read(base: Any, ids: Tensor, chunk: int, states_at: Sequence[int]) -> Iterator[tuple[int, Tensor, Any]]:
    """Last hidden states [batch, tokens, width] piece by piece: the place of the first, they, and the cache where there is one.

    Pieces end every `chunk` tokens and where the state is asked for.
    """
    decoder, length = base.get_decoder(), ids.shape[1]
    places = sorted({*range(0, length, chunk), *states_at, length})
    if len(places) == 2 and not states_at:
        yield 0, decoder(input_ids=ids, use_cache=False).last_hidden_state, None
        return
    passes = state.has_state(base.config)
    cache: Any = state.StatePassingCache(base.config, keys="carry") if passes else DynamicCache(config=base.config)
    for first, last in pairwise(places):
        piece = ids[:, first:last]
        given = _as_arguments(cache, base.config, piece) if passes else {"past_key_values": cache}
        yield first, decoder(input_ids=piece, use_cache=True, **given).last_hidden_state, cache
        cache = cache.next() if passes else cache


def _as_arguments(cache: state.StatePassingCache, config: PretrainedConfig, ids: Tensor) -> dict[str, Any]:
    name = state.CACHE_ARGUMENT[family(config)]
    return {name: cache} | ({"position_ids": cache.positions(ids)} if name == "past_key_values" else {})


# --- the output embedding


def _token_scores(logits_of: Logits, states: Tensor, labels: Tensor, size: int, distribution: bool) -> list[Tensor]:
    """-log p(label), NaN where it is -100, and the most likely token, for each of `states` [tokens, width], in blocks of `size`;
    with `distribution`, also the probabilities of all tokens."""
    blocks = []
    for start in range(0, len(states), size):
        logits, wanted = logits_of(states[start : start + size]).float(), labels[start : start + size]
        nll = F.cross_entropy(logits, wanted, reduction="none", ignore_index=-100).masked_fill(wanted < 0, math.nan)
        blocks.append((nll, logits.argmax(-1), *([logits.softmax(-1)] if distribution else [])))
    return [torch.cat(each) for each in zip(*blocks, strict=True)]


def _head(model: Any) -> Logits:
    """A function from last hidden states [tokens, width] to the model's logits.

    Families scale, cap or shift what the output embedding gives, each in its own way, so the model's own `forward` does it,
    while something that says what it is told stands in the place of its decoder. What the decoder says of one token is the
    form of that; asked after the text, it also makes RoPE that remembers the longest text forget it.
    """
    decoder = model.get_decoder()
    owner, name = next((owner, name) for owner in model.modules() for name, child in owner.named_children() if child is decoder)
    one = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    output = decoder(input_ids=one, use_cache=False)
    stand_in = _StandIn(decoder, output)

    def logits_of(states: Tensor) -> Tensor:
        output.last_hidden_state = states[None]
        setattr(owner, name, stand_in)
        try:
            return model(input_ids=one, use_cache=False).logits[0]
        finally:
            setattr(owner, name, decoder)

    return logits_of


class _StandIn(nn.Module):
    """Looks like a decoder and always gives the same output."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["decoder"] = decoder  # not as a submodule of this one
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)
