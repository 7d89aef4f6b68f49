"""What a model writes after prompts: Transformers' `generate`, greedy, on batches of equal length."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from hf_longctx.integration import state
from hf_longctx.integration.cache import TextCache, fast_over_cache, make_cache
from hf_longctx.integration.configs import family
from hf_longctx.lora import base_model
from hf_longctx.scoring import Reader, batches
from hf_longctx.task import Cell, Scored

OnTokens = Callable[[int], None]
_HELD = 2**30  # bytes of keys and values beside each other where there is no GPU


def decode_cells(
    model: nn.Module, cells: Sequence[Cell], batch_size: int | None = None, on_tokens: OnTokens | None = None, chunk: int | None = None,
    cache: str = "dynamic",
) -> list[Scored]:  # fmt: skip
    """Let the model go on with each prompt by its most likely token until it ends the text or may write no more.

    Prompts of equal length share a batch, so that nothing is padded. They are read some at a time, and then written on all at
    once, as far as half of the free memory holds their keys and values: a step costs nearly the same for one as for a hundred.
    Of a prompt only the last token meets the output embedding: memory is linear in length. The end-of-sequence tokens are
    those of the model's generation settings; nothing else in these (penalties, forbidden tokens, sampling) counts.

    Args:
        model: in eval mode, wrapped by PEFT or not.
        cells: free ones.
        batch_size: prompts in one forward pass; by default they are read as in `score_cells`.
        on_tokens: called with the number of tokens that were read, or that were written or need not be.
        chunk, cache: of prompts, as in `score_cells`.

    Raises:
        ValueError: as `score_cells`.
    """
    base = base_model(model)
    reader = Reader(base, batch_size, chunk, cache)
    outputs: dict[int, Scored] = {}
    with torch.no_grad(), _settings_aside(base) as own:
        for batch in batches(cells, partial(_rows, reader)):
            mine = [cells[i] for i in batch]
            assert all(cell.free and cell.start == len(cell.ids) for cell in mine)
            outputs |= zip(batch, _write(reader, mine, _ends(own), on_tokens or (lambda _: None)), strict=True)
    return [outputs[i] for i in range(len(cells))]


@contextmanager
def _settings_aside(base: Any) -> Iterator[GenerationConfig]:
    """The model's generation settings, which `generate` would take everything from that it is not told."""
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield own
    finally:
        base.generation_config = own


def _ends(settings: GenerationConfig) -> list[int]:
    ends = settings.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _rows(reader: Reader, cells: Sequence[Cell]) -> int:
    """Of cells of one length that are written on together."""
    if not _grows(reader) or reader.batch_size is not None:
        return reader.rows(cells)
    return max(reader.rows(cells), _held(reader.device) // (_bytes_a_token(reader) * max(cell.stop for cell in cells)))


def _grows(reader: Reader) -> bool:
    """Whether prompts are read into a cache that has room for what is written."""
    return reader.in_chunks and reader.cache == "dynamic"


def _bytes_a_token(reader: Reader) -> int:
    """Of keys and values of one text."""
    cache = TextCache(reader.config, 1)
    reader.base.get_decoder()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=reader.device), past_key_values=cache, use_cache=True)
    return cache.nbytes


def _held(device: torch.device) -> int:
    """Bytes that keys and values may take."""
    if device.type != "cuda":
        return _HELD
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free // 2


def _write(reader: Reader, cells: Sequence[Cell], ends: list[int], on_tokens: OnTokens) -> list[Scored]:
    """After prompts of one length."""
    ids = reader.ids(cells, 0)
    most = [cell.stop - cell.start for cell in cells]
    settings = GenerationConfig(do_sample=False, max_new_tokens=max(most), eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
    reader.base.get_decoder()(input_ids=ids[:1, :1], use_cache=False)  # RoPE that remembers the longest text forgets the batch before
    prompt = _prompt(reader, cells, ids, max(most), on_tokens)
    watch = _Watch(len(cells), max(most), on_tokens)
    on_tokens(prompt["input_ids"].numel())
    made = reader.base.generate(**prompt, generation_config=settings, logits_processor=LogitsProcessorList([watch]))
    written = made[:, prompt["input_ids"].shape[1] :].cpu().numpy()
    watch.finish()
    nll = torch.stack(watch.nll, 1).cpu().numpy()
    return [_scored(*row, ends) for row in zip(written, nll, most, strict=True)]


def _prompt(reader: Reader, cells: Sequence[Cell], ids: Tensor, new: int, on_tokens: OnTokens) -> dict[str, Any]:
    """Arguments of `generate`: what is left of the prompts, and the cache of what was read before where they are read in pieces.

    `generate` itself does that only with a cache called `past_key_values`."""
    config, (rows, length) = reader.config, ids.shape
    if _grows(reader) and length > 1:
        return {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids), "past_key_values": _read(reader, cells, length + new, on_tokens)}
    *pieces, last = ids.split(reader.tokens(length, rows), dim=1)
    if not pieces and reader.cache == "dynamic":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = DynamicCache(config=config) if reader.cache == "dynamic" else make_cache(reader.cache, config, length + new, reader.device.type)
    name, done = state.CACHE_ARGUMENT.get(family(config), "past_key_values"), 0
    with fast_over_cache(reader.base) if reader.in_chunks else nullcontext():
        for piece in pieces:
            places = torch.arange(done, done + piece.shape[1], device=ids.device)[None]
            given = {"position_ids": places} if name == "past_key_values" else {}
            reader.base.get_decoder()(input_ids=piece, use_cache=True, **{name: cache}, **given)
            done += piece.shape[1]
            on_tokens(piece.numel())
    return {"input_ids": last, "attention_mask": torch.ones_like(ids if name == "past_key_values" else last), name: cache}


def _read(reader: Reader, cells: Sequence[Cell], room: int, on_tokens: OnTokens) -> Cache:
    """Keys and values of prompts of one length but for their last tokens, read as many at a time as fill a pass."""
    ids, cache, size = reader.ids(cells, 0, -1), TextCache(reader.config, room, len(cells)), reader.rows(cells)
    with fast_over_cache(reader.base) as fast:
        for first in range(0, len(cells), size):
            cache.rows = slice(first, min(first + size, len(cells)))
            cache.crop(cache.get_seq_length())
            for _, hidden, _ in reader.over(cache, ids[cache.rows], fast):
                on_tokens(hidden[..., 0].numel())
    cache.rows, cache.apart = slice(None), False
    return cache


class _Watch(LogitsProcessor):
    """Changes nothing; keeps -log p of the most likely token of each step, and counts tokens."""

    def __init__(self, rows: int, steps: int, on_tokens: OnTokens) -> None:
        self.rows, self.left, self.on_tokens = rows, steps, on_tokens
        self.nll: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.nll.append(scores.logsumexp(-1) - scores.amax(-1))
        if self.left:
            self.left -= 1
            self.on_tokens(self.rows)
        return scores

    def finish(self) -> None:
        self.on_tokens(self.rows * self.left)


def _scored(written: np.ndarray, nll: np.ndarray, most: int, ends: list[int]) -> Scored:
    """Of one row: what comes before the first end; the probability of the end too."""
    written = written[:most]
    last = np.flatnonzero(np.isin(written, ends))
    size = int(last[0]) if len(last) else len(written)
    return Scored(nll[: min(size + 1, len(written))], written[:size])
