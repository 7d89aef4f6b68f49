"""What goes on beside the training: the progress line, coverage for trackers, Ctrl-C."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from hf_longctx.planning import Plan, coverage_of

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """One line: steps, ETA, loss, tokens/s, peak memory."""

    def __init__(self, tokens_per_step: int):
        self.tokens = tokens_per_step
        self.bar: Any = None
        self.since = (0, time.perf_counter())

    def speed(self, step: int) -> dict[str, float]:
        """Tokens per second since the last call, tokens seen, peak memory."""
        before, then = self.since
        self.since = (step, time.perf_counter())
        values: dict[str, float] = {
            "tokens_per_second": round(self.tokens * (step - before) / max(self.since[1] - then, 1e-9)),
            "tokens_seen": step * self.tokens,
        }
        if torch.cuda.is_available():
            values["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return values

    def leave_out(self, seconds: float) -> None:
        """Time that was not training."""
        self.since = (self.since[0], self.since[1] + seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        self.since = (state.global_step, time.perf_counter())
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs is not None and "loss" in logs:
            memory = f", {logs['peak_memory_gib']} GiB" if "peak_memory_gib" in logs else ""
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,} tok/s{memory}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class Coverage(TrainerCallback):
    """Log once how well the positions cover the target, where a tracker listens; `--dry-run` shows the same numbers."""

    def __init__(self, what: Plan, log: Callable[[dict[str, float]], None]):
        self.what, self.log = what, log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.report_to and state.global_step == 0 and state.is_world_process_zero:
            found = coverage_of(self.what)
            if found is not None:
                self.log({f"coverage/{key}": found[key] for key in ("last_window", "never", "far_pairs")})


class Interrupt(TrainerCallback):
    """First Ctrl-C: finish the step, save, stop. Second: stop at once."""

    def __init__(self) -> None:
        self.asked = False
        self.when = 0.0

    def __enter__(self) -> "Interrupt":
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody handle signals
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.when > 1:  # torchrun passes on the signal that the terminal has sent already
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.when = True, time.monotonic()
            logger.warning("interrupted: saving after this step (press again to stop at once)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # the signal reaches the processes at different steps; they must stop at the same one
            flag = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.asked = bool(flag)
        if self.asked and state.global_step < state.max_steps and not control.should_training_stop:
            control.should_save = control.should_training_stop = True
        elif self.asked:
            self.asked = False  # it was the last step: there is nothing to resume
