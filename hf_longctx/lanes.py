"""Windows for models with a state: contiguous text without positions, at random or in lanes, where each row continues its own text.

A batch of `lanes` rows reads `lanes` texts at once: example i is the window of lane i mod lanes at time i div lanes, a function of
(recipe, seed, number of lanes, i). Trainer deals whole micro-batches in turn to its processes, so that a lane always comes to the
same process, in the same micro-step of the gradient accumulation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_longctx.data import IGNORE, Documents, Windows
from hf_longctx.method import method


class StateWindows(Windows):
    """The full windows of one source. A row is `input_ids` [window], `labels` [window + 1] and `fresh`: whether it begins a text.

    The label after the window's last token is that of the next window's first, which otherwise nothing would predict. What is left of
    a document behind its last full window is not trained on.
    """

    def __init__(self, documents: Documents, window: int, seed: Sequence[int], short: str = "pack", first_token: int | None = None):
        super().__init__(documents, window, method("plain"), seed, short, first_token)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _count(self, lengths: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.minimum(lengths // self.window, -(-last // self.window))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Example i in random order, each once before any comes again; i counts on past the first epoch."""
        return self._row(*self._start(self._item(*divmod(i, len(self)))), fresh=True)

    def in_lane(self, lane: int, lanes: int, time: int) -> dict[str, Any]:
        """The window that a lane reads at a time.

        In every epoch the documents, in a new order, are cut into strips of windows, one a lane. Strips differ by at most one window,
        and each lane begins its next epoch when it has read its strip.
        """
        first = lane * self.full // lanes
        epoch, place = divmod(time, (lane + 1) * self.full // lanes - first)
        document, start = self._nth(epoch, first + place)
        return self._row(document, start, fresh=place == 0 or start == 0)

    def share_fresh(self, lanes: int) -> float:
        """The share of rows that begin a text: a document, or a strip. In the first epoch; others differ little."""
        documents = np.append(0, self._ordered(0)[1][:-1])
        strips = np.arange(lanes) * self.full // lanes
        return len(np.union1d(documents, strips)) / self.full

    def _nth(self, epoch: int, number: int) -> tuple[int, int]:
        """Document and start of window `number` of an epoch."""
        documents, ends = self._ordered(epoch)
        at = int(np.searchsorted(ends, number, side="right"))
        return int(documents[at]), (number - (int(ends[at - 1]) if at else 0)) * self.window

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the order of an epoch, and how many windows there are up to the end of each."""
        if epoch not in self._orders:
            order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.long))
            recent = list(self._orders.items())[-3:]  # at one time lanes are in two epochs at most, as strips have two lengths
            self._orders = dict(recent) | {epoch: (self.long[order], np.cumsum(np.diff(self.ends, prepend=0)[order]))}
        return self._orders[epoch]

    def _row(self, document: int, start: int, fresh: bool) -> dict[str, Any]:
        span = slice(start, start + self.window + 1)
        text = self.documents[document][span].astype(np.int64)
        ids = text[: self.window].copy()
        labels = np.full(self.window + 1, IGNORE)  # of the token itself: the first is predicted by the row before
        labels[1 : len(text)] = text[1:]
        trained = self.documents.trained
        if trained is not None:
            labels[: len(text)][~trained[self.documents.starts[document] :][span][: len(text)]] = IGNORE
        if self.first_token is not None and fresh and (trained is None or start):  # a conversation begins as its template begins it
            ids[0] = self.first_token
        return {"input_ids": ids, "labels": labels, "fresh": fresh}


class Lanes(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """`total` examples in lanes, divided among sources by weight; example i is the same whatever `total` is."""

    def __init__(self, sources: Sequence[StateWindows], weights: Sequence[float], lanes: int, total: int):
        self.sources, self.lanes, self.total = list(sources), lanes, total
        self.given = divide(lanes, weights)
        self.ends = np.cumsum(self.given)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i as a `StateWindows` gives it, with `example`: i itself."""
        if not 0 <= i < self.total:
            raise IndexError(i)
        time, lane = divmod(i, self.lanes)
        at = int(np.searchsorted(self.ends, lane, side="right"))
        own = self.given[at]
        return self.sources[at].in_lane(lane - int(self.ends[at]) + own, own, time) | {"example": i}

    @property
    def share_fresh(self) -> float:
        """The share of rows that begin a text."""
        return sum(own * source.share_fresh(own) for source, own in zip(self.sources, self.given, strict=True)) / self.lanes


def divide(lanes: int, weights: Sequence[float]) -> list[int]:
    """How many lanes each source gets: largest remainders."""
    wanted = lanes * np.asarray(weights, float) / sum(weights)
    given = np.floor(wanted).astype(int)
    given[np.argsort(given - wanted, kind="stable")[: lanes - given.sum()]] += 1
    return [int(count) for count in given]


def collate_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack rows into tensors: `input_ids` [batch, window], `labels` [batch, window + 1]; `fresh` and `example` as lists.

    There is no mask and there are no positions: a row is one text from its first token to its last.
    """
    batch: dict[str, Any] = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in ("input_ids", "labels")}
    return batch | {key: [row[key] for row in rows] for key in ("fresh", "example") if key in rows[0]}
