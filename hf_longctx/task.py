"""Evaluation tasks: the folder `hf_longctx/evals/` is the registry, one file a task.

A task makes *cells* (token ids and which of them are scored) from a tokenizer, documents, a length and a seed, and turns what
a model said about them into results. Both steps work without a model.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np

from hf_longctx import evals as _folder
from hf_longctx.chat import around_question
from hf_longctx.schema import STRICT_KEYS, build, nearest
from hf_longctx.stats import bootstrap, bootstrap_means, wilson

TURN = "\x1e"  # in a prompt, between question and answer
GROUPS = {  # one name for several tasks
    "ruler": (  # all that need no files: without qa_1 and qa_2
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery",
        "vt", "cwe", "fwe",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One sequence to read once, or one that the model goes on with.

    Attributes:
        ids: prompt and answer, int64.
        start, stop: tokens `start ... stop-1` are scored, each from what precedes it; `stop` may be `len(ids) + 1`, which asks
            for the model's choice after the last token. Beyond that the cell is `free`: `start` is `len(ids)`, and the model
            writes up to `stop - start` tokens by greedy decoding, fewer where it ends by itself.
        depth: where in the context the answer lies, 0 (start) to 1 (end).
        cluster: the document it comes from, for the interval.
        distribution: whether the probabilities of all tokens are wanted, beside those of the scored ones; keep these few.
        states_at: after how many tokens, 1 to len(ids), the norm of the model's state is wanted.
        answers: of a free cell, what is looked for in the text that the model writes.
    """

    ids: np.ndarray
    start: int
    stop: int
    depth: float | None = None
    cluster: int = 0
    distribution: bool = False
    states_at: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def free(self) -> bool:
        """Whether the model decides how the sequence goes on."""
        return self.stop > len(self.ids) + 1

    @property
    def size(self) -> int:
        """Its tokens, those that the model may write included."""
        return self.stop if self.free else len(self.ids)

    @property
    def targets(self) -> np.ndarray:
        """The tokens that are scored."""
        return self.ids[self.start : self.stop]


@dataclass(frozen=True)
class Scored:
    """What a model said about a cell.

    Attributes:
        nll: for each scored token -log p, NaN past the end; of a free cell, for each token that was chosen.
        best: for each scored token the most likely one; of a free cell what was written: without the token that ends it.
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
    """A way to measure a model at a length: a subclass is one file in `hf_longctx/evals/`, its fields are its options.

    Attributes:
        inner: the field that takes what follows a slash in the name, where a task is a door to others.
    """

    __pydantic_config__: ClassVar[Any] = STRICT_KEYS
    source: ClassVar[str] = ""
    needs_text: ClassVar[bool] = True
    inner: ClassVar[str] = ""

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        """Cells of exactly, or for text at most, `length` tokens.

        Args:
            tokenizer: of the model.
            documents: token ids.
            length: tokens of a cell, the answer or what the model may write included.
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

    def sample(self) -> "Task":
        """This task with as few cells as show that there can be any."""
        return replace(self, **{f.name: 1 for f in fields(self) if f.name in ("n", "depths", "windows", "spans")})

    def at(self, lengths: Sequence[int]) -> Sequence[int | None]:
        """At which it is measured of the lengths asked for; [None] where it has no length."""
        return lengths

    @property
    def name(self) -> str:
        """The name of the file it lives in."""
        return type(self).__module__.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., **fields}`; `load_task` reads it back."""
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


class ModelTask(Task):
    """A task that reads the model by itself, rather than through cells."""

    def run(self, model: Any, tokenizer: Any, length: int | None, batch_size: int | None) -> tuple[list[Result], str]:
        """Overall results at a length of `at`, and a hash of what was asked: models that share it can be paired.

        Raises:
            RuntimeError, ValueError: it cannot be measured; the message is one line.
        """
        raise NotImplementedError

    def cells(self, tokenizer: Any, documents: Sequence[np.ndarray], length: int, seed: int) -> list[Cell]:
        raise ValueError(f"{self.name} reads the model by itself: it can be evaluated, but it has no cells for other uses")


def task_names() -> list[str]:
    """Every task, without importing one."""
    return sorted(m.name for m in pkgutil.iter_modules(_folder.__path__) if not m.name.startswith("_"))


@cache
def task_class(name: str) -> type[Task]:
    """The class in `hf_longctx/evals/NAME.py`. Raises ValueError, with the nearest name, if there is none."""
    if name not in task_names():
        raise ValueError(f"unknown task {name!r}" + nearest(name, [*task_names(), *GROUPS]))
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
    outer, _, inner = name.partition("/")
    field = task_class(outer).inner if outer in task_names() else ""
    if field and not inner and field not in values:
        raise ValueError(f"{outer} needs a name after a slash, as in {outer}/hellaswag, got {name!r}")
    return build(task_class(outer), {field: inner} | values, name) if field else build(task_class(name), values, name)


def load_tasks(specs: Sequence[Task | str | Mapping[str, Any]]) -> list[Task]:
    """As `load_task`, of each; the name of a group stands for its tasks, with options that all of them have."""
    return [load_task(each) for spec in specs for each in _members(spec)]


def _members(spec: Task | str | Mapping[str, Any]) -> Sequence[Task | str | Mapping[str, Any]]:
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    group = GROUPS.get(str(options.pop("name", "")))
    return [spec] if group is None else [{"name": name} | options for name in group]


class InChat:
    """A tokenizer whose prompts are a user's message in its chat template: what stands behind `TURN` begins the answer.

    Raises ValueError if there is no template, or it refuses."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before, self.behind = around_question(tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)


def for_prompts(tokenizer: Any, chat: bool) -> Any:
    """The tokenizer, or where `chat` says so the one `InChat`, for `encode` and what is built on it."""
    return InChat(tokenizer) if chat else tokenizer


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a piece of text, without special tokens but those of the chat template where it turns to the answer."""
    text = text.replace(TURN, tokenizer.behind if isinstance(tokenizer, InChat) else "")
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def opening(tokenizer: Any) -> np.ndarray:
    """The beginning-of-sequence token as the tokenizer itself would put it: once, or not at all; in a chat, how its template opens."""
    if isinstance(tokenizer, InChat):
        return encode(tokenizer, tokenizer.before)
    ids = tokenizer("")["input_ids"]
    return np.array(ids[:1] if ids and ids[0] == tokenizer.bos_token_id else [], dtype=np.int64)


def question_and_answer(tokenizer: Any, question: str, answer: str) -> tuple[np.ndarray, int]:
    """Ids of question + answer, and how many of them the answer has: what follows the longest prefix that the question alone
    gives too, so that a tokenizer that merges over the seam is scored on the merged token."""
    whole, alone = encode(tokenizer, question + answer), encode(tokenizer, question)
    size = min(len(whole), len(alone))
    same = int(np.argmin(np.append(whole[:size] == alone[:size], False)))
    return whole, len(whole) - same


def room_for(length: int, new: int) -> int:
    """Tokens of a prompt after which `new` tokens may be written. Raises ValueError if there are none."""
    if length <= new:
        raise ValueError(f"a length of {length} tokens is too short: the answer alone may have {new}")
    return length - new


def pad_before(tail: np.ndarray, blank: np.ndarray, parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """`parts`, as many `blank` tokens as make the length exact, and the tail. Raises ValueError if it is longer without them."""
    spare = length - len(tail) - sum(map(len, parts))
    if spare < 0:
        raise ValueError(f"a prompt of {length} tokens is too short: the task itself takes {length - spare}")
    return np.concatenate([*parts, np.repeat(blank, spare), tail])


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


def answers_found(cell: Cell, output: Scored, tokenizer: Any) -> list[bool]:
    """For each answer whether it stands anywhere in what the model wrote, whatever the case: RULER's string match."""
    said = tokenizer.decode(output.best, skip_special_tokens=True).lower()
    return [answer.lower() in said for answer in cell.answers]


def accuracy(cells: Sequence[Cell], hits: Sequence[float]) -> list[Result]:
    """Mean of hits, each from 0 to 1, over all cells and by depth, with 95 % intervals: Wilson's, or where a hit can be partial,
    a bootstrap over cells."""
    trials = len(hits)
    paired = {"values": tuple(map(float, hits)), "weights": (1,) * trials, "clusters": tuple(range(trials))}
    rows = [_share(hits, None, **paired)]
    for depth in sorted({c.depth for c in cells if c.depth is not None}):
        rows.append(_share([h for c, h in zip(cells, hits, strict=True) if c.depth == depth], depth))
    return rows


def all_or_nothing(hits: Sequence[float]) -> bool:
    """Whether none of them is partial."""
    return {*hits} <= {0, 1}


def _share(hits: Sequence[float], depth: float | None, **paired: Any) -> Result:
    values = np.array(hits, dtype=np.float64)
    low, high = wilson(int(values.sum()), len(hits)) if all_or_nothing(hits) else (float(end[0]) for end in bootstrap_means(values[:, None], range(len(hits))))
    return Result("accuracy", float(values.mean()), len(hits), low, high, depth=depth, **paired)


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
