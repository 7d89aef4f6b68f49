"""Methods that have to be calibrated, and the text on which they are: a few windows, read in forward passes alone."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_longctx.data import Documents, load_documents
from hf_longctx.integration import delta, state
from hf_longctx.method import Method, in_slot
from hf_longctx.patching import patch_config
from hf_longctx.recipe import DataSource
from hf_longctx.schema import format_size
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell

_RECORDED = 2**28  # step sizes that are held at once


def check_data(methods: Sequence[Method], data: Any) -> None:
    """Raise ValueError if a method needs text and there is none, or there is and no method needs it."""
    needy = next((item for item in methods if item.calibration), None)
    if needy is not None and data is None:
        other = ", or scales" if hasattr(needy, "scales") else ""
        raise ValueError(f"{needy.name} has to be calibrated: give training text as data (--data FILE){other}")
    if needy is None and data is not None:
        raise ValueError(f"data is for methods that have to be calibrated, and {', '.join(item.name for item in methods)} has nothing to calibrate")


def calibrate(
    model: PreTrainedModel, tokenizer: Any, methods: Sequence[Method], data: DataSource | str | Path | None
) -> tuple[tuple[Method, ...], Sequence[Mapping[str, Tensor]]]:
    """The methods with what was found, and tensors by layer for `patching.patch_model`. The model is left as it is.

    Args:
        model: a live model, patched or not: what an earlier patch does to step sizes does not count.
        tokenizer: for `data` that is text.
        methods: those that need nothing are returned as they are.
        data: text or token ids, as in a recipe; text for training, not the one that the model will be judged by.

    Raises:
        ValueError: no data, or no document in it that is long enough; a family that the method does not work on.
    """
    check_data(methods, data)
    if data is None:
        return tuple(methods), ()
    patch_config(copy.deepcopy(model.config), methods)  # refuses what does not fit
    item = in_slot(methods, "delta")
    assert item is not None, "only delta methods are calibrated"
    assert item.calibration is not None
    count, length = item.calibration
    source = data if isinstance(data, DataSource) else DataSource(str(data))
    if tokenizer is None and not source.path.endswith(".npz"):
        raise ValueError(f"{source.path} is text, and a live model has no tokenizer: give tokenizer, or token ids (.npz)")
    windows = torch.from_numpy(choose_windows(load_documents(source, tokenizer), count, length, source.path))
    if windows.max() >= model.config.vocab_size:
        raise ValueError(f"{source.path} holds token id {windows.max()}, but the model knows only {model.config.vocab_size} tokens")
    steps = TextSteps(model, windows)
    with steps.bar:
        found = item.calibrate(steps)
    return tuple(found.method if each is item else each for each in methods), found.tensors


def choose_windows(documents: Documents, count: int, length: int, name: str) -> np.ndarray:
    """[count, length] token ids, int64: starts spread evenly over all places where a window fits into a document."""
    room = (documents.lengths - length + 1).clip(min=0)
    ends = room.cumsum()
    if not ends.size or ends[-1] == 0:
        raise ValueError(
            f"no document of {name} has {format_size(length)} tokens, which a calibration window has: the longest has {max(documents.lengths, default=0)}"
        )
    places = (np.arange(count) * ends[-1]) // count
    which = np.searchsorted(ends, places, side="right")
    starts = places - (ends - room)[which]
    return np.stack([documents[i][start : start + length].astype(np.int64) for i, start in zip(which, starts, strict=True)])


class TextSteps:
    """`StepSizes` of a live model on windows of token ids [windows, tokens]."""

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.model, self.windows = model, windows
        self.shape = delta.read_shape(model.config)
        self.bar = tqdm(desc="calibrating", unit=" tokens", unit_scale=True, disable=None, leave=False)  # how many it takes, the method decides

    def perplexity(self, method: Method) -> float:
        modules = [method.delta(self.shape, place).to(self.model.device) for place in range(self.shape.layers)]
        cells = [Cell(row.numpy(), 1, len(row)) for row in self.windows]
        with delta.using(self.model, modules.__getitem__):
            scored = score_cells(self.model, cells, on_tokens=lambda tokens: self.bar.update(tokens))
        mean = float(np.mean(np.concatenate([each.nll for each in scored]), dtype=np.float64))
        return math.exp(mean) if mean < 700 else math.inf  # NaN too

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        mixers = [mixer for mixer, _ in state.mixers(self.model)]
        size = max(1, _RECORDED // (self.windows.numel() * self.shape.channels))
        for first in range(0, len(mixers), size):
            group = mixers[first : first + size]
            for mixer, recorded in zip(group, self._record([mixer.layer_idx for mixer in group]), strict=True):
                yield recorded, -mixer.A_log.detach().float().exp().reshape(len(mixer.A_log), -1)

    def _record(self, layers: Sequence[int]) -> list[Tensor]:
        """[windows, tokens, channels] of each of the layers, in one reading of all windows."""
        seen: Any = []
        with torch.no_grad(), delta.using(self.model, lambda layer: nn.Identity(), seen):
            kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            decoder: Any = self.model.get_decoder()
            for row in self.windows:
                decoder(input_ids=row[None].to(self.model.device), use_cache=False)
                for layer, _, before, _ in seen:
                    if layer in kept:
                        kept[layer].append(before)
                seen.clear()
                self.bar.update(len(row))
        return [torch.cat(parts) for parts in kept.values()]
