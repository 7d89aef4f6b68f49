"""Skip-wise positions in a training loop that is not ours: Trainer, TRL's SFTTrainer, a loop over a DataLoader."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from hf_longctx.data import IGNORE, drop_labels, fit_sampler
from hf_longctx.method import Method, load_method
from hf_longctx.schema import format_size, parse_size


class SkipWiseCollator(TrainerCallback):
    """Data collator, callback and dataset transform that give rows of token ids skip-wise positions, drawn anew in every epoch.

    In Trainer, or in TRL's SFTTrainer with whatever it makes of text and chats:

        hf_longctx.patch(model, {"name": "yarn", "factor": 4})
        skips = hf_longctx.SkipWiseCollator(model, {"name": "pose", "chunks": 2}, window="2k")
        trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, data_collator=skips, callbacks=[skips])

    A row is `input_ids` and perhaps `labels` (else the tokens themselves) and `attention_mask` (whose zeros are cut away). The
    sampler chooses `window` of its tokens, or all of a shorter row, and their positions below the model's patched window.
    TRL cuts rows at `SFTConfig.max_length`, by default 1024; one above `window` lets the sampler choose text from further on. It
    refuses collators for `padding_free` and the packing that goes with it; `packing_strategy="wrapped"` works, each row being one text.

    Guaranteed: positions are a function of (seed, epoch, token ids of the row) and of nothing else, so that they differ between
    epochs, and batch size, order, workers (persistent ones too), processes and resuming do not change them. Equal rows get equal
    positions within an epoch. The attention mask is always there and all ones, also over padding, which is on the right, where
    no token sees it: without a mask Transformers takes each jump of positions for a new packed document and cuts attention there.

    Trainer makes evaluation batches with the same collator. A row that brings `position_ids` keeps them, so an `eval_dataset` with
    such a column stays plain (SFTTrainer drops it: measure with `hf_longctx.evaluate` instead).

    Args:
        model: the patched model, wrapped by PEFT or not, or its configuration.
        sampler: a method of the `positions` slot; its target is the model's window.
        window: tokens of a training example, or "2k".
        seed: decides every draw.
        mask_seams: leave out the label just after a skip.

    Raises:
        ValueError: a method that fills another slot; a target that is not the model's window; a window that leaves nothing to skip;
            frequencies that depend on the length seen.
    """

    def __init__(
        self, model: PreTrainedModel | PretrainedConfig | Any, sampler: Method | str | Mapping[str, Any] = "pose", *,
        window: int | str, seed: int = 0, mask_seams: bool = False,
    ):  # fmt: skip
        config: Any = getattr(model, "config", model)
        self.window, self.seed, self.mask_seams = parse_size(window), seed, mask_seams
        chosen = load_method(sampler)
        if chosen.slots != ("positions",):
            raise ValueError(f"{chosen.name} does not choose positions: give pose, cream or random_positions, and patch the model with {chosen.name}")
        self.sampler = fit_sampler(chosen, self.window, config)
        if getattr(self.sampler, "target", None) == self.window:
            raise ValueError(
                f"window {format_size(self.window)} is the model's own, so there is nothing to skip: patch the model first (hf_longctx.patch), or set a smaller one"
            )
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # DataLoader workers that outlive an epoch must see the next one

    @property
    def epoch(self) -> int:
        """The epoch that positions are drawn for, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """What the callback does in Trainer: to be called before each epoch of a loop of your own."""
        self._epoch.fill_(epoch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._next = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.set_epoch(self._next)
        self._next += 1  # `state.epoch` counts no epochs where a dataset has no length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows as a batch: `input_ids`, `position_ids`, `labels`, `attention_mask`, each [rows, tokens of the longest], int64."""
        examples = [self._example(row) for row in rows]
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {name: _padded([example[name] for example in examples], longest, fill) for name, fill in _FILLS.items()}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    def transform(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[np.ndarray]]:
        """For `datasets.Dataset.set_transform`, where the collator must be another one: the same columns as a batch has.

        `map` instead would draw once, for all epochs. SFTTrainer takes such a dataset with `skip_prepare_dataset` only.
        """
        examples = [self._example(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        columns = {name: [example[name] for example in examples] for name in _FILLS}
        return columns | {"attention_mask": [np.ones_like(ids) for ids in columns["input_ids"]]}

    def _example(self, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
        given = {name: np.asarray(row[name], np.int64) for name in (*_FILLS, "attention_mask") if name in row}
        keep = given.pop("attention_mask", np.ones_like(given["input_ids"])) != 0
        given = {name: value[keep] for name, value in given.items()}
        ids = given["input_ids"]
        if not len(ids):
            raise ValueError("a row has no tokens; filter such rows out of the dataset")
        labels = given.get("labels", ids)
        if "position_ids" in given:
            return given | {"labels": labels}
        rng = np.random.default_rng([self.seed, self.epoch, _digest(ids)])
        tokens, positions = self.sampler.positions(min(self.window, len(ids)), len(ids), rng)
        return {"input_ids": ids[tokens], "position_ids": positions, "labels": drop_labels(labels[tokens], positions, self.mask_seams)}


_FILLS = {"input_ids": 0, "position_ids": 0, "labels": IGNORE}


def _padded(rows: Sequence[np.ndarray], size: int, fill: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.pad(row, (0, size - len(row)), constant_values=fill) for row in rows]))


def _digest(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
