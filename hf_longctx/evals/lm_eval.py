"""Any task of lm-evaluation-harness (Gao et al. 2021) on the loaded model: is what it could do at short context still there?"""

import contextlib
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from hf_longctx.schema import nearest
from hf_longctx.stats import Z95, wilson
from hf_longctx.task import ModelTask, Result, Task, accuracy, all_or_nothing

_SLACK = 1024  # tokens that the harness may add to the length that it was asked for, without cutting the text


@dataclass(frozen=True)
class LmEval(ModelTask):
    """`lm_eval/hellaswag` is the harness's hellaswag: its prompts, its metrics, its seeds, its cutting of what exceeds the window.

    It is measured once, at no length in particular. Tasks whose metrics are lengths (RULER's) are measured at each length asked
    for, as "accuracy"; the harness makes 500 samples at each, whatever the limit. Other metrics have the harness's names, with a
    filter behind a slash if there is one. Intervals are Wilson's where every sample is right or wrong, else 1.96 of the harness's
    standard errors. The first metric is paired with the baseline's, sample by sample.

    Texts come from where the task has them, mostly the hub. Needs `pip install 'hf-longctx[lm-eval]'`."""

    source = "EleutherAI/lm-evaluation-harness"
    needs_text = False
    inner: ClassVar[str] = "task"
    task: str  # of the harness, or a group of it that has a metric of its own
    limit: PositiveInt | None = None  # samples; of a group, of each of its tasks
    shots: NonNegativeInt | None = None  # examples before each question; by default the task's own number
    chat: bool = False  # ask within the tokenizer's chat template
    path: str | None = None  # a folder of tasks in the harness's YAML, which are then the only ones

    def __post_init__(self) -> None:
        if find_spec("lm_eval") is None:
            raise ValueError("the harness is not installed: pip install 'hf-longctx[lm-eval]'")

    @property
    def name(self) -> str:
        return f"lm_eval/{self.task}"

    def for_lengths(self, lengths: Sequence[int]) -> Task:
        """Itself. Raises ValueError, with the nearest name, if the harness has no such task."""
        found, known = self._entry(), _manager(self.path).task_index
        if found is None:
            raise ValueError(f"lm-evaluation-harness has no task {self.task!r}" + (f" in {self.path}" if self.path else "") + nearest(self.task, known))
        members = sorted(found.tags) if found.kind.name == "TAG" else []
        if found.kind.name == "GROUP" and not _metrics(found.cfg, "aggregate_metric_list") - {"4096"}:
            members = [str(each) for each in found.cfg.get("task", []) if isinstance(each, str)]
        if members:
            raise ValueError(f"lm_eval/{self.task} is several tasks without a number of their own; give them by name: {', '.join(members)}")
        return self

    def at(self, lengths: Sequence[int]) -> Sequence[int | None]:
        return lengths if self._takes_lengths() else [None]

    def run(self, model: Any, tokenizer: Any, length: int | None, batch_size: int | None) -> tuple[list[Result], str]:
        try:
            with _quiet():
                found = self._evaluated(model, tokenizer, length, batch_size)
        except Exception as problem:  # of a library, its tasks' own code and the hub: the evaluation goes on
            raise RuntimeError(f"lm_eval/{self.task}: {type(problem).__name__}: {' '.join(str(problem).split())}") from problem
        samples = sorted(found.get("samples", {}).get(self.task, []), key=lambda sample: sample["doc_id"])
        targets = hashlib.sha256(json.dumps([[s["doc_hash"], s["target_hash"]] for s in samples]).encode()).hexdigest()[:16]
        if length is not None:
            return accuracy([], [sample[str(length)] for sample in samples]), targets
        results = _results(found["results"][self.task], samples, found["n-samples"])
        if not results:
            raise RuntimeError(f"lm_eval/{self.task}: the harness gave no number")
        return results, targets

    def _evaluated(self, model: Any, tokenizer: Any, length: int | None, batch_size: int | None) -> Mapping[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager, longest = _manager(self.path), {}
        if length is not None:  # such tasks make their texts when they are built
            about = {"max_seq_lengths": [length], "tokenizer": tokenizer.name_or_path}
            manager = TaskManager(include_path=str(Path(self._entry().yaml_path).parent), include_defaults=False, metadata=about)
            longest = {"max_length": length + _SLACK}
        size = batch_size or ("auto" if model.device.type == "cuda" else 1)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, **longest)
        options = {"limit": self.limit, "num_fewshot": self.shots, "apply_chat_template": self.chat}
        return dict(simple_evaluate(harness, tasks=[self.task], task_manager=manager, **options))

    def _entry(self) -> Any:
        return _manager(self.path).task_index.get(self.task)

    def _takes_lengths(self) -> bool:
        metrics = _metrics(self._entry().cfg, "metric_list")
        return bool(metrics) and all(metric.isdigit() for metric in metrics)


@cache
def _manager(path: str | None) -> Any:
    """The harness's index of tasks; of all of its own it takes ten seconds to make."""
    from lm_eval.tasks import TaskManager

    if path is not None and not Path(path).is_dir():
        raise ValueError(f"lm_eval: path {path} is no folder")
    return TaskManager(include_path=path, include_defaults=path is None)


def _metrics(config: Mapping[str, Any] | None, key: str) -> set[str]:
    return {str(each["metric"]) for each in (config or {}).get(key) or []}


def _results(found: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> list[Result]:
    """One a metric, of {"acc,none": 0.4, "acc_stderr,none": 0.01, ...}; the first holds its samples."""
    results: list[Result] = []
    total = sum(each["effective"] for each in counts.values())
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if chosen == "none" else f"{metric}/{chosen}"
        error = found.get(f"{metric}_stderr,{chosen}")
        half = Z95 * error if isinstance(error, int | float) else float("nan")
        said: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        mean = said and all(isinstance(each, int | float) for each in said) and np.isclose(np.mean(said), value)
        result = _mean(name, said, half) if mean else Result(name, float(value), total, value - half, value + half)
        results.append(replace(result, values=(), weights=(), clusters=()) if results else result)
    return results


def _mean(metric: str, values: Sequence[float], half: float) -> Result:
    """Of samples, with a Wilson interval if each is right or wrong."""
    mean, size = float(np.mean(values)), len(values)
    low, high = wilson(round(sum(values)), size) if all_or_nothing(values) else (mean - half, mean + half)
    return Result(metric, mean, size, low, high, values=tuple(map(float, values)), weights=(1,) * size, clusters=tuple(range(size)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness and its tasks remark and print, and with its progress bars only on a terminal."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with contextlib.redirect_stdout(io.StringIO()), bars:
            yield
    finally:
        logger.setLevel(before)
