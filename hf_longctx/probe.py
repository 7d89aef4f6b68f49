"""A probe: evaluation tasks at long lengths on the live model, while it trains at the short window."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback

from hf_longctx.decoding import decode_cells
from hf_longctx.evaluation import read_documents
from hf_longctx.loss import evaluating
from hf_longctx.recipe import DataSource, ProbeSpec
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell, Result, Task, load_tasks

logger = logging.getLogger(__name__)
SECONDS = "probe/seconds"


@dataclass(frozen=True)
class Probed:
    """One task at one length, with the cells that every probe scores."""

    task: Task
    length: int
    cells: Sequence[Cell]

    @property
    def name(self) -> str:
        """Under which the log has it: `probe/passkey_32768`."""
        return f"probe/{self.task.name}_{self.length}"


def make_cells(spec: ProbeSpec, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, far: int, seed: int) -> tuple[Probed, ...]:
    """The cells of a probe of a model with the (patched) `config`, by default at `far` tokens. ValueError where a task cannot be had at a length."""
    lengths = spec.lengths or (far,)
    tasks = [task.for_lengths(lengths) for task in load_tasks(spec.tasks)]
    source = None if spec.data is None else DataSource(spec.data)
    documents = read_documents(source, tokenizer, config) if any(task.needs_text for task in tasks) else []
    try:
        return tuple(Probed(task, length, task.cells(tokenizer, documents, length, seed)) for task in tasks for length in lengths)
    except ValueError as error:
        raise ValueError(f"probe: {error}") from None


class Probe(TrainerCallback):
    """Every so many steps, score cells on the model in training; log the numbers; stop the training once they are good enough.

    The weights come out as without it: the random numbers and the model's mode are put back.
    Of several processes the first one probes, and all of them learn whether to stop.

    Args:
        probed: what to measure.
        every: optimizer steps from one probe to the next.
        stop_at: stop once every accuracy reaches it; None: never.
        tokenizer: of the model.
        log: takes the numbers, as `Trainer.log`.
        autocast: the precision of training, as `Accelerator.autocast`.
    """

    def __init__(
        self, probed: Sequence[Probed], every: int, stop_at: float | None, tokenizer: PreTrainedTokenizerBase,
        log: Callable[[dict[str, float]], None], autocast: Callable[[], AbstractContextManager[Any]],
    ):  # fmt: skip
        self.probed, self.every, self.stop_at = list(probed), every, stop_at
        self.tokenizer, self.log, self.autocast = tokenizer, log, autocast

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        asked = control.should_log  # logging takes this back, and the training loss would miss its turn
        enough = state.is_world_process_zero and self._reached(self._measure(model))
        control.should_log = asked
        if args.world_size > 1:
            flag = torch.tensor(int(enough), device=args.device)
            torch.distributed.broadcast(flag, src=0)
            enough = bool(flag)
        if enough:
            logger.warning("stopped at step %d: every probed accuracy has reached %g", state.global_step, self.stop_at)
            control.should_training_stop = True
            control.should_save = False  # resuming from a checkpoint of this step would go on past it

    def _measure(self, model: Any) -> list[Result]:
        """The overall result of each task at each length, logged."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still running is the step, not the probe
        start = time.perf_counter()
        with _aside(model), self.autocast():
            found = {each.name: self._score(model, each) for each in self.probed}
        measured = {name: result for name, result in found.items() if result is not None}
        self.log({name: result.value for name, result in measured.items()} | {SECONDS: round(time.perf_counter() - start, 3)})
        return list(measured.values())

    def _score(self, model: Any, each: Probed) -> Result | None:
        """None where memory does not suffice: the training is worth more than its probe."""
        try:
            read = decode_cells if any(cell.free for cell in each.cells) else score_cells
            outputs = read(model, each.cells, batch_size=1)  # beside the optimizer memory is scarce
        except torch.OutOfMemoryError:
            logger.warning("%s: out of memory; not measured", each.name)
            return None
        return each.task.score(each.cells, outputs, self.tokenizer)[0]

    def _reached(self, results: Sequence[Result]) -> bool:
        accuracies = [result.value for result in results if result.metric == "accuracy"]
        return self.stop_at is not None and len(results) == len(self.probed) and bool(accuracies) and min(accuracies) >= self.stop_at


@contextmanager
def _aside(model: Any) -> Iterator[None]:
    """Use a model in training, and leave it as it was.

    Its compiled layers run as they are: each is compiled for the one shape of training, and would be once more for each length.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), evaluating(model), torch.compiler.set_stance("force_eager"):
        yield
