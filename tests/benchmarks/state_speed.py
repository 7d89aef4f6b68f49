"""What passing states costs: a training step that carries them beside one that starts from zeros, and long texts in constant memory.

    python tests/benchmarks/state_speed.py [--only steps scans evaluation] [--families mamba mamba2] [--width 768] [--layers 24] [--batch 8]
        [--window 2048] [--tokens 1048576]

Random weights of the shape of mamba-130m, bfloat16 autocast. Prints from one run, by family: milliseconds of a training step of the
stock model (no cache), of `zero` and of `carry`, with ratios and peak memory; for Mamba-1 the scan from a state beside the one from
zeros, forward and with backward, completed in torch and by the Triton kernel in each of its launches, with what the latter's output
and gradients are off the former's (norms); tokens/s and peak memory of an evaluation of `--tokens` tokens. Kernels are named:
mamba-ssm's and causal-conv1d's where they are installed, torch otherwise.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longctx import method
from hf_longctx.integration import state
from hf_longctx.kernels import carried_state
from hf_longctx.passing import Passing
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(*what: object, sep: str = " ") -> None:
    print(*what, sep=sep, flush=True)


def build(name: str, options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": options.width, "num_hidden_layers": options.layers, "vocab_size": options.vocabulary}
    if name == "mamba2":
        sizes |= {"head_dim": 64, "num_heads": 2 * options.width // 64, "n_groups": 1, "state_size": 128}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), dtype=torch.float32).to(DEVICE).train()


def clock(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds, the median; two calls before are not counted."""
    taken = []
    for i in range(repeats + 2):
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
        start = time.perf_counter()
        call()
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
        taken += [1000 * (time.perf_counter() - start)] * (i >= 2)
    return statistics.median(taken)


def peak() -> str:
    if DEVICE.type != "cuda":
        return ""
    gib = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return f"{gib:.2f} GiB"


def steps(name: str, options: argparse.Namespace) -> None:
    """Forward and backward of one batch: the cost of the optimizer is the same for all."""
    ids = torch.randint(0, options.vocabulary, (options.batch, options.window), device=DEVICE)
    times: dict[str, float] = {}
    lines: list[str] = []
    for kind in ("stock", "zero", "carry"):
        model = build(name, options)
        passing = None if kind == "stock" else Passing(model, method(kind), micro_batches=1, seed=0)

        def step(model: Any = model, passing: Passing | None = passing) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                if passing is None:
                    model(input_ids=ids, labels=ids).loss.backward()
                else:
                    with passing.window({"input_ids": ids, "labels": ids, "fresh": [False] * len(ids)}) as window:
                        model(**window).loss.backward()
            model.zero_grad()

        peak()
        times[kind] = clock(step, options.repeats)
        lines.append(f"{name:12} {kind:6} {times[kind]:9.1f} ms {times[kind] / times['stock']:6.2f}x stock  {peak()}")
        del model, passing, step
    say(f"{name:12} carry / zero {times['carry'] / times['zero']:.3f}", *lines, sep="\n")


def scans(options: argparse.Namespace) -> None:
    """Mamba-1's scan of one layer, from zeros and from a state."""
    from transformers.models.mamba import modeling_mamba

    inner, states = 2 * options.width, 16
    made = torch.Generator(DEVICE).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=made, device=DEVICE)

    u, dt, z = (random(options.batch, inner, options.window).bfloat16().requires_grad_() for _ in range(3))
    b, c = (random(options.batch, states, options.window).bfloat16().requires_grad_() for _ in range(2))
    a, d, bias = (t.requires_grad_() for t in (-random(inner, states).exp(), random(inner), random(inner) - 4))
    start = random(options.batch, inner, states)
    stock = getattr(modeling_mamba, state._SCAN)
    stock = stock.stock if isinstance(stock, state._Scan) else stock
    kernel = stock if state.has_kernel(u) or carried_state.interpreted() else None  # in the interpreter, Transformers' loop plays its part
    say(f"mamba scan: {'mamba-ssm' if kernel else 'torch'}")
    kinds: dict[str, tuple[torch.Tensor | None, Any]] = {"from zeros": (None, None), "from a state, in torch": (start, None)}
    if carried_state.serves(u, dt, a, c, z):
        kinds |= {f"from a state, {launch}": (start, launch) for launch in carried_state.LAUNCHES}
    stocks: list[float] = []
    ones = torch.ones_like(u)
    inputs = {"u": u, "dt": dt, "a": a, "b": b, "c": c, "D": d, "z": z, "bias": bias}
    wanted: dict[str, torch.Tensor] = {}  # by torch
    for kind, (initial, launch) in kinds.items():

        def forward(initial: torch.Tensor | None = initial) -> torch.Tensor:
            return state.scan_from(initial, kernel, u, dt, a, b, c, D=d, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True)[0]

        def both() -> None:
            forward().backward(ones)

        with _completed_by(launch):
            with torch.no_grad():
                times = [clock(forward, options.repeats)]
            times.append(clock(both, options.repeats))
            for tensor in inputs.values():
                tensor.grad = None
            out = forward()
            out.backward(ones)
        stocks = stocks or times
        found = [f"{name} {taken:8.3f} ms {taken / stock:6.2f}x" for name, taken, stock in zip(("forward", "with backward"), times, stocks, strict=True)]
        got = {"out": out.detach()} | {name: tensor.grad.clone() for name, tensor in inputs.items() if tensor.grad is not None}
        if launch is not None:
            found += ["off torch by", *(f"{name} {float((got[name] - each).norm() / each.norm()):.1e}" for name, each in wanted.items())]
        wanted = got if launch is None else wanted
        say(f"  {kind:75}", *found)


@contextmanager
def _completed_by(launch: carried_state.Launch | None) -> Iterator[None]:
    """The part of the state by Triton with these launches, or without by torch."""
    serves, add = carried_state.serves, carried_state.add_carried
    carried_state.serves = lambda *given: launch is not None and serves(*given)
    carried_state.add_carried = lambda *given: add(*given, launch=launch)
    try:
        yield
    finally:
        carried_state.serves, carried_state.add_carried = serves, add


def evaluation(name: str, options: argparse.Namespace) -> None:
    model = build(name, options).to(torch.bfloat16).eval()
    for length in (options.tokens // 16, options.tokens):
        ids = np.random.default_rng(0).integers(0, options.vocabulary, length)
        peak()
        start = time.perf_counter()
        score_cells(model, [Cell(ids, 1, length)])
        say(f"{name:12} evaluation of {length:,} tokens: {length / (time.perf_counter() - start):,.0f} tokens/s  {peak()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["steps", "scans", "evaluation"], default=["steps", "scans", "evaluation"])
    parser.add_argument("--families", nargs="*", default=["mamba", "mamba2"])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=50280)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    there = {name: importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d")}
    say(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", "torch", torch.__version__, "transformers", transformers.__version__, there)
    for name in options.families:
        if "steps" in options.only:
            steps(name, options)
        if "scans" in options.only and name == "mamba":
            scans(options)
        if "evaluation" in options.only:
            evaluation(name, options)


if __name__ == "__main__":
    main()
