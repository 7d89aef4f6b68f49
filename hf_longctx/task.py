"""Evaluation tasks: the folder `hf_longctx/evals/` is the registry, one file a task.

A task makes *cells* (token ids and which of them are scored) from a tokenizer, documents, a length and a seed, and turns what
a model said about them into results. Both steps work without a model.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from hf_longctx import evals as _folder
from hf_longctx.schema import STRICT_KEYS, build, nearest
from hf_longctx.stats import bootstrap, wilson


@dataclass(frozen=True)
class Cell:
    """One sequence to read once.

    Attributes:
        ids: prompt and answer, int64.
        start, stop: tokens `start ... stop-1` are scored, each from what precedes it; `stop` may be `len(ids) + 1`, which asks
            for the model's choice after the last token.
        depth: where in the context the answer lies, 0 (start) to 1 (end).
        cluster: the document it comes from, for the interval.
        distribution: whether the probabilities of all tokens are wanted, beside those of the scored ones; keep these few.
        states_at: after how many tokens, 1 to len(ids), the norm of the model's state is wanted.
    """

    ids: np.ndarray
    start: int
    stop: int
    depth: float | None = None
    cluster: int = 0
    distribution: bool = False
    states_at: tuple[int, ...] = ()

    @property
    def targets(self) -> np.ndarray:
        """The tokens that are scored."""
        return self.ids[self.start : self.stop]


@dataclass(frozen=True)
class Scored:
    """What a model said about a cell.

    Attributes:
        nll: for each scored token -log p, NaN past the end.
        best: for each scored token the most likely one.
        probabilities: [scored tokens, vocabulary], if the cell asks for the distribution.
        norms: [places, layers], the Euclidean norms of the SSM states at `states_at`, if the cell has some.
    """

    nll: np.ndarray
    best: np.ndarray
    probabilities: np.ndarray | None = None
    norms: np.ndarray | None = None


@dataclass(frozen=True)
class Result:
    """One number, with a 95 % interval (NaN where there is too little for one).

    The overall result of a task also holds one entry a cell, so that it can be paired with that of another run:

    Attributes:
        values: hits, or mean -log p.
        weights: scored tokens; the mean of `values` with these weights is the result, or its logarithm.
        clusters: documents; cells of one are not independent.
    """

    metric: str
    value: float
    n: int
    ci_low: float
    ci_high: float
    depth: float | None = None
    values: tuple[float, ...] = ()
    weights: tuple[int, ...] = ()
    clusters: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """A way to measure a model at a length: a subclass is one file in `hf_longctx/evals/`, its fields are its options."""

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    source: ClassVar[str] = ""
    needs_text: ClassVar[bool] = True

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        """Cells of exactly, or for text at most, `length` tokens.

        Args:
            tokenizer: of the model.
            documents: token ids.
            length: tokens of a cell, the answer included.
            seed: decides everything that is random.

        Raises:
            ValueError: no document is long enough, or the length too short for the prompt.
        """
        raise NotImplementedError

    def score(self, cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> list[Result]:
        """Results over all cells of one length, the overall one first."""
        raise NotImplementedError

    def for_lengths(self, lengths: Sequence[int]) -> "Task":
        """This task, once it is known which lengths will be compared."""
        return self

    @property
    def name(self) -> str:
        """The name of the file it lives in."""
        return type(self).__module__.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., **fields}`; `load_task` reads it back."""
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


def task_names() -> list[str]:
    """Every task, without importing one."""
    return sorted(m.name for m in pkgutil.iter_modules(_folder.__path__) if not m.name.startswith("_"))


@cache
def task_class(name: str) -> type[Task]:
    """The class in `hf_longctx/evals/NAME.py`. Raises ValueError, with the nearest name, if there is none."""
    if name not in task_names():
        raise ValueError(f"unknown task {name!r}" + nearest(name, task_names()))
    module = importlib.import_module(f"{_folder.__name__}.{name}")
    (found,) = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__ and issubclass(v, Task))
    return found


def load_task(spec: Task | str | Mapping[str, Any]) -> Task:
    """A task from itself, from "passkey", or from `{"name": "passkey", "n": 20}`. Raises ValueError for what it refuses."""
    if isinstance(spec, Task):
        return spec
    values = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a task needs a name, got {spec!r}; there is: {', '.join(task_names())}")
    return build(task_class(name), values, name)


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a piece of text, without special tokens."""
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def opening(tokenizer: Any) -> np.ndarray:
    """The beginning-of-sequence token as the tokenizer itself would put it: once, or not at all."""
    ids = tokenizer("")["input_ids"]
    return np.array(ids[:1] if ids and ids[0] == tokenizer.bos_token_id else [], dtype=np.int64)


def question_and_answer(tokenizer: Any, question: str, answer: str) -> tuple[np.ndarray, int]:
    """Ids of question + answer, and how many of them the answer has: what follows the longest prefix that the question alone
    gives too, so that a tokenizer that merges over the seam is scored on the merged token."""
    whole, alone = encode(tokenizer, question + answer), encode(tokenizer, question)
    size = min(len(whole), len(alone))
    same = int(np.argmin(np.append(whole[:size] == alone[:size], False)))
    return whole, len(whole) - same


def hide_several(
    tokenizer: Any, ends: tuple[np.ndarray, np.ndarray], needles: Sequence[tuple[float, np.ndarray]], filler: np.ndarray, length: int
) -> np.ndarray:
    """`head + filler + needle + filler ... + tail`, exactly `length` tokens, each needle at its own depth of the filler.

    Args:
        ends: head and tail.
        needles: depth and tokens of each; those of one depth keep their order.
        filler: at least as many tokens as will be needed.

    Raises:
        ValueError: head, needles and tail alone are longer than `length`, or the filler is too short.
    """
    first, (head, tail) = opening(tokenizer), ends
    room = length - sum(map(len, [first, head, tail])) - sum(len(needle) for _, needle in needles)
    if room < 0:
        raise ValueError(f"a prompt of {length} tokens is too short: the task itself takes {length - room}")
    if room > len(filler):
        raise ValueError(f"the haystack has {len(filler)} tokens, but {length} need {room}; give --data with longer documents")
    pieces, before = [first, head], 0
    for depth, needle in sorted(needles, key=lambda needle: needle[0]):
        cut = round(depth * room)
        pieces += [filler[before:cut], needle]
        before = cut
    return np.concatenate([*pieces, filler[before:room], tail])


def exact_match(cell: Cell, output: Scored, tokenizer: Any, prolongs: Callable[[str], bool] = str.isdigit) -> bool:
    """Greedy decoding would give exactly the answer, and after it no character that would prolong it: by default, a digit."""
    answer = cell.targets.tolist()
    best = output.best.tolist()
    if best[: len(answer)] != answer:
        return False
    key, more = tokenizer.decode(answer), tokenizer.decode(best[: len(answer) + 1])
    return not prolongs(more[len(key) :][:1])


def accuracy(cells: Sequence[Cell], hits: Sequence[bool]) -> list[Result]:
    """Share of hits, over all cells and by depth, with 95 % Wilson intervals."""
    trials = len(hits)
    paired = {"values": tuple(map(float, hits)), "weights": (1,) * trials, "clusters": tuple(range(trials))}
    rows = [_share(hits, None, **paired)]
    for depth in sorted({c.depth for c in cells if c.depth is not None}):
        rows.append(_share([h for c, h in zip(cells, hits, strict=True) if c.depth == depth], depth))
    return rows


def _share(hits: Sequence[bool], depth: float | None, **paired: Any) -> Result:
    return Result("accuracy", float(np.mean(hits)), len(hits), *wilson(sum(hits), len(hits)), depth=depth, **paired)


def perplexity_result(cells: Sequence[Cell], outputs: Sequence[Scored]) -> Result:
    """exp of the mean -log p over every scored token of every cell, with a bootstrap interval over documents."""
    sums = np.array([o.nll.sum(dtype=np.float64) for o in outputs])
    counts = np.array([len(o.nll) for o in outputs])
    clusters = tuple(c.cluster for c in cells)

    def perplexity(index: Any) -> float:
        return float(np.exp(sums[index].sum() / counts[index].sum()))

    low, high = bootstrap(perplexity, clusters)
    means, weights = (sums / counts).tolist(), counts.tolist()
    return Result("perplexity", perplexity(slice(None)), sum(weights), low, high, values=tuple(means), weights=tuple(weights), clusters=clusters)
