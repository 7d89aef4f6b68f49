"""What a model says about cells: one pass over each, whole or in chunks of tokens, and over what several begin with only once."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig

from hf_longctx.integration import configs, state
from hf_longctx.integration.cache import TextCache, check_cache, fast_over_cache, make_cache, queries_at_once
from hf_longctx.integration.configs import family
from hf_longctx.lora import base_model
from hf_longctx.task import Cell, Scored

logger = logging.getLogger(__name__)
_TOKENS_AT_ONCE = {"cuda": 65536, "cpu": 4096}
_LOGITS_AT_ONCE = 2**26  # elements of one block of logits: 256 MiB in float32
_ROWS = 16  # long sequences that are read beside each other in chunks: each has a state of its own
_WORTH = 8  # cells share a beginning of at least this part of them; what a batch computes twice is less than that of it
_SHAPES = 256  # places at which a text can be taken up
Logits = Callable[[Tensor], Tensor]
Pieces = Iterator[tuple[int, Tensor, Any]]
Batch = tuple[list[int], int]  # cells that are read beside each other, and how many tokens they have in common


def score_cells(
    model: nn.Module, cells: Sequence[Cell], batch_size: int | None = None, on_tokens: Callable[[int], None] | None = None, chunk: int | None = None,
    share: bool = True, cache: str = "dynamic",
) -> list[Scored]:  # fmt: skip
    """Read each cell once; only the scored tokens meet the output embedding.

    What cells begin with in common is read once (`share`): its keys and values stay, and each cell goes on from there. That
    takes a model that can be read in chunks, and one cache; where memory does not suffice for it, these cells are read whole.

    A model with states (`integration.state`) is prepared to pass them on and read in chunks: what is held at a time does not
    grow with the length, but for token ids and scores, and for the keys and values of a hybrid. Others are read whole, with
    memory linear in length, or in chunks over a growing cache if `chunk` says so. The numbers are those of one whole forward
    pass, but for a quantised cache.

    Cells of equal length share a batch. Without a cache and without an attention mask, every backend takes its causal path;
    over a cache, SDPA does (`integration.cache`).

    Args:
        model: in eval mode, wrapped by PEFT or not.
        batch_size: sequences in one forward pass; by default as many as make 65,536 tokens on a GPU, 4,096 elsewhere.
        on_tokens: called after each forward pass with the number of tokens that it read, and after a cell with what it
            shared; negative where cells have to be read again. It adds up to the tokens of all cells.
        chunk: tokens of a sequence in one forward pass.
        share: whether cells share the computation of a common beginning.
        cache: where keys and values are held when a text is read in chunks: "dynamic" in the model's dtype, "offloaded" to the
            host's memory, or "quantized" to 4 bits, which rounds the numbers and shares nothing. With the last two, chunks are
            of 4,096 tokens unless `chunk` says otherwise.

    Raises:
        ValueError: a `chunk` or `cache` for a model that cannot be read in chunks, a cache that cannot be had, or a cell asks
            for the states of a model without.
    """
    base = base_model(model)
    reader = Reader(base, batch_size, chunk, cache)
    if any(cell.states_at for cell in cells):
        state.check_supported(base.config)
    outputs: dict[int, Scored] = {}
    with torch.no_grad(), fast_over_cache(base) if reader.in_chunks else nullcontext(False) as fast:
        for group in _groups(cells) if share and reader.shares else []:
            outputs |= reader.score_group(cells, group, fast, on_tokens)
        alone = [i for i in range(len(cells)) if i not in outputs]
        for batch in batches([cells[i] for i in alone], reader.rows):
            indices = [alone[i] for i in batch]
            outputs |= zip(indices, reader.score_alone([cells[i] for i in indices], fast, on_tokens), strict=True)
    return [outputs[i] for i in range(len(cells))]


def attempts(config: PretrainedConfig, cells: Sequence[Cell], batch_size: int | None, chunk: int | None, device: str) -> list[tuple[int | None, int | None]]:
    """Batch size and chunk to read cells with, then what to try where memory did not suffice: one by one, and in small chunks."""
    found = [(batch_size, chunk)]
    beside = batches(cells, lambda alike: batch_size or _rows(config, len(alike[0].ids), chunk, device))
    if max(map(len, beside), default=1) > 1 or (batch_size is None and len(cells) > 1 and any(cell.free for cell in cells)):
        found.append((1, chunk))
    small = _at_once(device) // 64
    if _why_at_once(config) is None and small < min(chunk or small + 1, max(len(cell.ids) for cell in cells)):
        found.append((1, small))
    return found


def _check_chunks(config: PretrainedConfig) -> None:
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


def batches(cells: Sequence[Cell], rows: Callable[[Sequence[Cell]], int]) -> Iterator[list[int]]:
    """Indices of cells that are read together: of equal length, with the same things asked of each, `rows(those)` of them at a time."""
    alike: dict[Any, list[int]] = {}
    for i, cell in enumerate(cells):
        alike.setdefault((len(cell.ids), cell.states_at, cell.distribution), []).append(i)
    for _, indices in sorted(alike.items()):
        size = rows([cells[i] for i in indices])
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


# --- common beginnings


def _groups(cells: Sequence[Cell]) -> list[list[tuple[int, int]]]:
    """Cells that begin alike, in an order in which each has most in common with the one before: (cell, tokens in common)."""
    order = sorted(range(len(cells)), key=lambda i: cells[i].ids.astype(">i4").tobytes())
    found: list[list[tuple[int, int]]] = []
    for before, i in zip([None, *order], order):
        common = 0 if before is None else _common(cells[before], cells[i])
        if not common:
            found.append([])
        found[-1].append((i, common))
    return [group for group in found if len(group) > 1]


def _common(a: Cell, b: Cell) -> int:
    """Tokens that both begin with, less those that scores are read off; 0 if they are too few to be worth it. Rounded down, so
    that cells that differ by a token or two have passes of the same shape: kernels are made ready for each."""
    longest = max(len(a.ids), len(b.ids))
    found = min(_same(a.ids, b.ids), a.start - 1, b.start - 1)
    return found - found % max(1, longest // _SHAPES) if found * _WORTH >= longest else 0


def _same(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with in common."""
    size = min(len(a), len(b))
    differing = np.append(a[:size] != b[:size], True)
    return int(differing.argmax())


def _beside(cells: Sequence[Cell], group: Sequence[tuple[int, int]], rows: Callable[[int, int], int]) -> Iterator[Batch]:
    """Cut a group into batches that go on from one beginning: of equal length, and nearly all that any two have in common.

    Args:
        rows: how many can be read beside each other, by tokens in common and tokens left.
    """
    start = 0
    while start < len(group):
        first, common = cells[group[start][0]], group[start][1]
        size = len(first.ids)
        stop, low, high = start + 1, size, 0
        for end in range(start + 2, len(group) + 1):
            cell, shared = cells[group[end - 1][0]], group[end - 1][1]
            low, high = min(low, shared), max(high, shared)
            slack = (size - low) // _WORTH
            if (len(cell.ids), cell.distribution) != (size, first.distribution) or high - low > slack or end - start > rows(low, size - low):
                break
            if end == len(group) or group[end][1] <= low + slack:  # the last of them does not go on with the next one
                stop, common = end, low
        yield [i for i, _ in group[start:stop]], common
        start = stop


# --- reading


class Reader:
    """Reads cells with one model, as far as memory is meant to go.

    Attributes:
        in_chunks: keys and values may be held between passes.
        shares: so that cells can go on from one beginning.
    """

    def __init__(self, base: Any, batch_size: int | None, chunk: int | None, cache: str) -> None:
        self.base, self.config, self.batch_size, self.cache = base, base.config, batch_size, cache
        self.device = next(base.parameters()).device
        if state.has_state(self.config):
            if cache != "dynamic":
                raise ValueError(f"{family(self.config)} passes states on, not keys and values; leave out cache")
            state.prepare(base)
        elif chunk is not None or cache != "dynamic":
            _check_chunks(self.config)
        if cache != "dynamic":
            check_cache(cache, self.config, self.device.type)
            chunk = chunk or self.at_once // _ROWS
        self.chunk = chunk
        self.in_chunks = not state.has_state(self.config) and _why_at_once(self.config) is None
        self.shares = self.in_chunks and (cache == "dynamic" or (cache == "offloaded" and not _slides(self.config)))

    @property
    def at_once(self) -> int:
        return _at_once(self.device.type)

    def rows(self, cells: Sequence[Cell]) -> int:
        """Of cells of one length in one pass."""
        return self.batch_size or _rows(self.config, len(cells[0].ids), self.chunk, self.device.type)

    def tokens(self, length: int, rows: int) -> int:
        """Of a sequence in one pass."""
        return self.chunk or _chunk(self.config, length, rows, self.device.type)

    def score_alone(self, cells: Sequence[Cell], fast: bool, on_tokens: Callable[[int], None] | None) -> list[Scored]:
        """Of a batch of one length."""
        length = len(cells[0].ids)
        ids = self.ids(cells, 0)
        if self.in_chunks and self.chunk is not None and self.chunk < length:
            pieces = self.over(make_cache(self.cache, self.config, length, self.device.type), ids, fast)
        else:
            pieces = _read(self.base, ids, self.tokens(length, len(cells)), cells[0].states_at)
        return _score(self.base, cells, ids, 0, pieces, on_tokens)

    def score_group(self, cells: Sequence[Cell], group: Sequence[tuple[int, int]], fast: bool, on_tokens: Callable[[int], None] | None) -> dict[int, Scored]:
        """Of cells that begin alike, as many as memory suffices for."""
        counted, found = 0, dict[int, Scored]()

        def count(tokens: int) -> None:
            nonlocal counted
            counted += tokens
            if on_tokens is not None:
                on_tokens(tokens)

        try:
            for i, scored in self.group(cells, group, fast, count):
                found[i] = scored
            return found
        except torch.OutOfMemoryError:
            logger.warning("out of memory: %d cells are read whole, without sharing what they begin with", len(group) - len(found))
        count(sum(len(cells[i].ids) for i in found) - counted)
        return found

    def group(self, cells: Sequence[Cell], group: Sequence[tuple[int, int]], fast: bool, count: Callable[[int], None]) -> Iterator[tuple[int, Scored]]:
        room = max(len(cells[i].ids) for i, _ in group)
        cache = make_cache(self.cache, self.config, room, self.device.type)
        held = np.zeros(0, np.int64)

        def rows(common: int, left: int) -> int:
            """By what a pass may hold: of tokens, and of masks or of copies of the cache where attention is not `fast`."""
            found = (self.batch_size or self.at_once // (left if fast else left + common)) if isinstance(cache, TextCache) else 1
            while found > 1 and left > min(self.chunk or left, queries_at_once(cache, found, common + left, masked=not fast)):
                found //= 2
            return found

        for indices, common in _beside(cells, group, rows):
            mine = [cells[i] for i in indices]
            kept = min(_same(held, mine[0].ids), common)
            cache.crop(kept - cache.get_seq_length())
            if len(mine) > 1:
                for _, hidden, _ in self.over(cache, self.ids(mine[:1], kept, common), fast):
                    count(hidden.shape[1])
            start = common if len(mine) > 1 else kept
            ids = self.ids(mine, start)
            yield from zip(indices, _score(self.base, mine, ids, start, self.over(cache, ids, fast), count), strict=True)
            held = mine[0].ids[: cache.get_seq_length()]
            count(kept + (len(mine) - 1) * common)

    def ids(self, cells: Sequence[Cell], start: int, stop: int | None = None) -> Tensor:
        """Token ids [cells, tokens] of cells of one length."""
        return torch.from_numpy(np.stack([cell.ids[start:stop] for cell in cells])).to(self.device)

    def over(self, cache: Cache, ids: Tensor, fast: bool) -> Pieces:
        """As `_read`, from where the cache ends. A text of one row is added to it; several rows are if it is empty."""
        start, (rows, length) = cache.get_seq_length(), ids.shape
        given = {}
        if isinstance(cache, TextCache):
            cache.keep, cache.apart = rows == 1 or start == 0, fast  # several rows that go on from one text are read in one piece
            given = {"text": cache} if fast else {}
        kept_apart = isinstance(cache, TextCache) and not cache.keep
        size = length if kept_apart else min(self.chunk or self.at_once // rows, queries_at_once(cache, rows, start + length, masked=not fast))
        for first in range(0, length, max(1, size)):
            piece = ids[:, first : first + size]
            yield start + first, self.base.get_decoder()(input_ids=piece, past_key_values=cache, use_cache=True, **given).last_hidden_state, None


def _slides(config: PretrainedConfig) -> bool:
    """Whether a layer forgets keys that are outside of its window."""
    return True in TextCache(config, 0).is_sliding


def _score(base: Any, cells: Sequence[Cell], ids: Tensor, start: int, pieces: Pieces, on_tokens: Callable[[int], None] | None) -> list[Scored]:
    """Of cells of one length. Nothing is fetched from the device before the last chunk is under way.

    Args:
        ids: [cells, tokens], from token `start` on, before which nothing is scored.
        pieces: what the decoder says of them.
    """
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    size = max(16, _LOGITS_AT_ONCE // base.config.get_text_config().vocab_size)
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in cells]
    norms: list[Tensor] = []
    logits_of: Logits | None = None
    for first, hidden, left in pieces:
        last = first + hidden.shape[1]
        spans = [slice(max(cell.start - 1, first), min(cell.stop - 1, last)) for cell in cells]
        rows = [row for row, span in enumerate(spans) if span.start < span.stop]
        if rows:
            states = torch.cat([hidden[row, spans[row].start - first : spans[row].stop - first] for row in rows])
            wanted = torch.cat([labels[row, spans[row].start - start : spans[row].stop - start] for row in rows])
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


def _read(base: Any, ids: Tensor, chunk: int, states_at: Sequence[int]) -> Pieces:
    """Last hidden states [batch, tokens, width] piece by piece: the place of the first, they, and the cache where there is one.

    Whole, or over states: pieces end every `chunk` tokens and where the state is asked for.
    """
    decoder, length = base.get_decoder(), ids.shape[1]
    places = sorted({*range(0, length, chunk), *states_at, length})
    if len(places) == 2 and not states_at:
        yield 0, decoder(input_ids=ids, use_cache=False).last_hidden_state, None
        return
    cache = state.StatePassingCache(base.config, keys="carry")
    for first, last in pairwise(places):
        piece = ids[:, first:last]
        yield first, decoder(input_ids=piece, use_cache=True, **_as_arguments(cache, base.config, piece)).last_hidden_state, cache
        cache = cache.next()


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
