"""LongPPL (Fang et al. 2024): perplexity of the tokens that need the long context, found by what it gains over a short one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from hf_longctx.evals._windows import whole_windows
from hf_longctx.schema import Size
from hf_longctx.stats import bootstrap
from hf_longctx.task import Cell, Result, Scored, Task, opening


@dataclass(frozen=True)
class LongPpl(Task):
    """exp of the mean -log p of the key tokens: those with log p(long) - log p(short) > alpha and log p(long) > beta.

    "Long" is a whole window of `length` tokens, read in one pass. "Short" is the same token behind at least `context` and less
    than `context + stride` tokens: pieces of `context + stride` tokens that advance by `stride`, of which the last `stride` are
    scored. The first `context` tokens of a window are not scored. Thresholds, context and stride are the paper's; where the
    tokenizer has an opening token it stands before every piece, which the authors' code leaves out.

    Which tokens are key is the model's own judgement, so each model has other ones; with `by` another model judges, and all are
    measured, and paired with the baseline, on the same tokens. It needs the same tokenizer, and is loaded beside the model.

    Three overall results: "perplexity" of the key tokens, `n` of them; "perplexity_of_all" tokens from `context` on; "key_share",
    the share of key tokens among those. Intervals are bootstraps over documents. Each length has other tokens: compare models
    at one length. `context` should lie within the trained window, or the gain is that of any text over a broken one."""

    source = "arXiv:2410.23771"
    context: Size = 4096  # the short one
    stride: Size = 1024  # tokens that share it
    alpha: NonNegativeFloat = 2.0  # nats
    beta: float = -2.0  # nats
    by: str | None = None  # a model that chooses the key tokens; by default the one that is measured
    windows: PositiveInt = 2  # a document
    documents: PositiveInt = 20  # at most

    def for_lengths(self, lengths: Sequence[int]) -> Task:
        self._check(min(lengths))
        if self.by is not None:
            from hf_longctx.checkpoint import inspect_model

            inspect_model(self.by)
        return self

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        before = len(opening(tokenizer)) + self.context
        self._check(length - len(opening(tokenizer)))
        found = []
        for ids, number in whole_windows(self.name, tokenizer, documents, length, self.windows, self.documents):
            whole = Cell(ids, before, length, cluster=number)
            found += [whole] if self.by else [whole, *self._short(whole)]
        return found

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        size = 1 if self.by else 1 + len(self._short(cells[0]))
        clusters = tuple(cell.cluster for cell in cells[::size])
        losses = np.array([output.nll for output in outputs[::size]], dtype=np.float64)  # [windows, tokens]
        if self.by:
            long, short = self._judged(cells, tokenizer)
        else:
            pieces = [np.concatenate([output.nll for output in outputs[i + 1 : i + size]]) for i in range(0, len(outputs), size)]
            long, short = losses, np.array(pieces, dtype=np.float64)
        key = (short - long > self.alpha) & (-long > self.beta)
        if not key.any():
            raise ValueError(f"none of {key.size} tokens gains more than {self.alpha:g} nats from the long context: there is no LongPPL")
        sums, counts, sizes = np.where(key, losses, 0.0).sum(1), key.sum(1), np.full(len(losses), losses.shape[1])
        results = [
            _ratio("perplexity", sums, counts, clusters, int(key.sum())),
            _ratio("perplexity_of_all", losses.sum(1), sizes, clusters, losses.size),
            _ratio("key_share", counts, sizes, clusters, losses.size),
        ]
        if self.by:
            some = np.flatnonzero(counts).tolist()
            paired = tuple((sums[some] / counts[some]).tolist()), tuple(counts[some].tolist()), tuple(clusters[i] for i in some)
            results[0] = replace(results[0], values=paired[0], weights=paired[1], clusters=paired[2])
        return results

    def _check(self, tokens: int) -> None:
        if tokens <= self.context:
            raise ValueError(f"longppl needs more than the {self.context} tokens of its short context, got {tokens}; leave out such lengths or set context lower")

    def _short(self, whole: Cell) -> list[Cell]:
        """The pieces that score the tokens of a window behind a short context."""
        opens = whole.start - self.context
        first, text = whole.ids[:opens], whole.ids[opens:]
        found = []
        for start in range(0, len(text) - self.context, self.stride):
            ids = np.concatenate([first, text[start : start + self.context + self.stride]])
            found.append(Cell(ids, whole.start, len(ids), cluster=whole.cluster))
        return found

    def _judged(self, cells: Sequence[Cell], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
        """-log p of the tokens [windows, tokens] behind the long and the short context, as the model `by` has them."""
        from hf_longctx.checkpoint import load
        from hf_longctx.scoring import score_cells

        judge, its_tokenizer = load(str(self.by))
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{self.by} has another tokenizer than the model, so it cannot choose its key tokens; give a model with the same")
        size = len(self._short(cells[0]))
        said = [output.nll.astype(np.float64) for output in score_cells(judge, [*cells, *(piece for cell in cells for piece in self._short(cell))])]
        short = [np.concatenate(said[i : i + size]) for i in range(len(cells), len(said), size)]
        return np.array(said[: len(cells)]), np.array(short)


def _ratio(metric: str, sums: np.ndarray, counts: np.ndarray, clusters: Sequence[int], n: int) -> Result:
    """Sum over count of all windows, or its exponential, with a bootstrap interval over documents."""

    def value(index: Any) -> float:
        if not counts[index].sum():
            return float("nan")
        ratio = sums[index].sum() / counts[index].sum()
        return float(np.exp(ratio) if metric.startswith("perplexity") else ratio)

    return Result(metric, value(slice(None)), n, *bootstrap(value, clusters))
