"""Attention with a bias of the distance, learned or not: the Triton kernels beside SDPA and FlexAttention. One CUDA GPU.

    python tests/benchmarks/biased_attention.py [--lengths 32768 65536 131072] [--skip flex_alibi dense ...] [--only-check] [--only-pose] [--parts] [--sweep]

32 heads of 128, 8 key heads, bfloat16, batch 1. First errors against dense float32 attention at 1,024 tokens; then, by length,
milliseconds of a forward and of a forward with its backward (median), peak memory, and both as ratios to causal FlexAttention
of the same run. What a first call costs, compilation above all, is printed apart. Rows of ours make their table in each call.

`--parts` times each kernel by itself, `--sweep` each with other tiles. `--only-pose` times 8 x 2,048 tokens at PoSE's positions up to
32,768 with a learned bias: the kernels, the blocks of SDPA that serve where they do not, and the kernels at plain positions.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_longctx import method
from hf_longctx.integration import attention
from hf_longctx.kernels import biased_attention as kernel
from hf_longctx.kernels.biased_attention import Launch, biased_attention
from hf_longctx.method import Frequencies, Shape
from hf_longctx.modules import PerLayer

HEADS, KV_HEADS, DIM = 32, 8, 128
SHAPE = Shape("llama", HEADS * DIM, 1, HEADS, KV_HEADS, DIM, DIM, 10000.0, Frequencies((1.0,)), "default", 4096)
METHODS = {
    "ours_alibi": {"name": "alibi"},
    "ours_mep": {"name": "mkl_alibi"},
    "ours_mep_learned": {"name": "mkl_alibi", "preset": "mep_learned", "learn_weights": True},
    "ours_kerple": {"name": "kerple"},
}
ROWS = ["sdpa", "flex", "flex_alibi", *METHODS, "ours_random"]
SWEEP = {
    "forward": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2)],
    "dq": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3), (128, 128, 8, 2)],
    "dkv": [(64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 3), (32, 64, 4, 3)],
    "dtable": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2), (128, 32, 4, 2), (128, 64, 8, 1), (128, 128, 8, 1)],
}


def say(*what: object) -> None:
    print(*what, flush=True)


def inputs(length: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> tuple[torch.Tensor, ...]:
    """q, k, v that take gradients, and a gradient of the output."""
    made = torch.Generator("cuda").manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, g = (torch.randn(1, h, length, DIM, generator=made, device="cuda", dtype=torch.bfloat16) for h in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


def table_of(bias: torch.nn.Module, length: int) -> torch.Tensor:
    """float32 [H, length]."""
    distance = torch.arange(length, device="cuda")[None]
    return bias(torch.arange(HEADS, device="cuda")[:, None], distance, torch.zeros_like(distance))


def fixed_tables(length: int) -> dict[str, torch.Tensor]:
    found = {name: table_of(method(**spec).bias(SHAPE).cuda(), length).detach() for name, spec in METHODS.items()}
    made = torch.Generator("cuda").manual_seed(1)
    return found | {"ours_random": torch.randn(HEADS, length, generator=made, device="cuda")}


# --- errors ---


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    tq, tk = q.shape[2], k.shape[2]
    distance = torch.arange(tq, device="cuda")[:, None] + tk - tq - torch.arange(tk, device="cuda")
    logits = (q @ k.mT) / math.sqrt(DIM) + table[:, distance.clamp(min=0)]
    return logits.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v


def check(length: int) -> None:
    """Largest difference over largest value, of out, dq, dk, dv, dtable; the same for SDPA in bfloat16, which rounds as much."""
    torch.backends.cuda.matmul.allow_tf32 = False
    say(f"\nerrors at {length} tokens against dense float32, relative to the largest value")
    for tq in (length, length - 77):
        for name, table in fixed_tables(length).items():
            q, k, v, g = inputs(length)
            q, g = q.detach()[:, :, -tq:].requires_grad_(), g[:, :, -tq:]
            leaves = [q, k, v, table.requires_grad_()]
            exact = [x.detach().float().requires_grad_() for x in leaves]
            want = dense(*exact)
            theirs = (want, *torch.autograd.grad(want, exact, g.float()))
            out = biased_attention(*leaves)
            ours = (out, *torch.autograd.grad(out, leaves, g))
            say(f"  {name:18} tq {tq:5}", _errors(ours, theirs))
            if name == "ours_alibi" and tq == length:
                mask = torch.full((length, length), -torch.inf, device="cuda").triu(1)
                distance = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")
                out = F.scaled_dot_product_attention(q, k, v, (table.detach()[:, distance.clamp(min=0)] + mask).bfloat16()[None], enable_gqa=True)
                say(f"  {'sdpa, dense alibi':18} tq {tq:5}", _errors((out, *torch.autograd.grad(out, leaves[:3], g)), theirs))


def _errors(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> str:
    names = ("out", "dq", "dk", "dv", "dtable")
    return "  ".join(f"{n} {((a.float() - b).abs().max() / b.abs().max()).item():.1e}" for n, a, b in zip(names, ours, theirs))


# --- times ---


def clock(run: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median milliseconds, peak GiB, and seconds of the first call."""
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30, first


def contender(name: str, length: int) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """(q, k, v) -> out, and the parameters that learn besides."""
    if name == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), []
    if name.startswith("flex"):
        slopes = method("alibi").bias(SHAPE).cuda().slopes
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda", _compile=True)
        add = (lambda score, b, h, i, j: score - slopes[h] * (i - j)) if name == "flex_alibi" else None
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, score_mod=add, block_mask=mask, enable_gqa=True), []
    if name == "ours_random":
        table = fixed_tables(length)[name]
        return lambda q, k, v: biased_attention(q, k, v, table), []
    bias = method(**METHODS[name]).bias(SHAPE).cuda()
    return lambda q, k, v: biased_attention(q, k, v, table_of(bias, length)), list(bias.parameters())


def time_length(length: int, skip: list[str], repeats: int) -> None:
    say(f"\n{length:,} tokens{'':9}forward ms   ratio     GiB  ratio | with backward ms   ratio     GiB  ratio | first calls s")
    base: tuple[float, ...] | None = None
    q, k, v, g = inputs(length)
    for name in ROWS:
        if name in skip:
            continue
        try:
            attend, parameters = contender(name, length)
            with torch.no_grad():
                forward = clock(lambda: attend(q, k, v), repeats)  # noqa: B023
            both = clock(lambda: torch.autograd.grad(attend(q, k, v), [q, k, v, *parameters], g), repeats)  # noqa: B023
        except Exception as error:  # one contender that cannot run must not cost the others
            say(f"  {name:18} {type(error).__name__}: {str(error)[:300]}")
            continue
        found = (*forward[:2], *both[:2])
        base = found if name == "flex" else base
        ratios = [f"{a / b:6.2f}x" for a, b in zip(found, base)] if base else ["       "] * 4
        say(
            f"  {name:18} {found[0]:10.2f} {ratios[0]} {found[1]:7.2f} {ratios[1]} | {found[2]:13.2f}    {ratios[2]} {found[3]:7.2f} {ratios[3]}"
            f" | {forward[2]:.1f} + {both[2]:.1f}"
        )
        torch._dynamo.reset()


def time_dense(length: int, repeats: int) -> None:
    """What the kernel replaces: SDPA with the bias as a tensor of logits."""
    q, k, v, g = inputs(length)
    distance = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")

    def attend() -> torch.Tensor:
        bias = table_of(method("alibi").bias(SHAPE).cuda(), length)[:, distance.clamp(min=0)].masked_fill_(distance < 0, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, bias.bfloat16()[None], enable_gqa=True)

    with torch.no_grad():
        forward = clock(attend, repeats)
    both = clock(lambda: torch.autograd.grad(attend(), [q, k, v], g), repeats)
    say(f"\ndense bias with SDPA at {length:,} tokens: forward {forward[0]:.2f} ms, {forward[1]:.2f} GiB; with backward {both[0]:.2f} ms, {both[1]:.2f} GiB")
    for name in ("ours_alibi", "ours_mep_learned"):
        ours, parameters = contender(name, length)
        with torch.no_grad():
            forward = clock(lambda: ours(q, k, v), repeats)  # noqa: B023
        both = clock(lambda: torch.autograd.grad(ours(q, k, v), [q, k, v, *parameters], g), repeats)  # noqa: B023
        say(f"  {name} at {length:,}: forward {forward[0]:.2f} ms, {forward[1]:.2f} GiB; with backward {both[0]:.2f} ms, {both[1]:.2f} GiB")


# --- kernels by themselves ---


class Parts:
    """Each launch with the same inputs, and tiles of one's own."""

    def __init__(self, length: int, table: torch.Tensor):
        self.q, self.k, self.v, self.g = (x.detach() for x in inputs(length))
        self.table = kernel.Table(table)
        self.starts = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.blocks = kernel.blocks_for(DIM, torch.bfloat16)
        p = self.problem(self.blocks)
        self.out, self.lse = kernel._run_forward(p, self.q, self.k, self.v, kernel._fits_of(p, self.blocks.forward, 0))
        self.delta = kernel._run_row_dot(p, self.out, self.g)

    def problem(self, blocks: kernel.Blocks) -> kernel._Problem:
        return kernel._problem(self.table, self.starts, None, DIM**-0.5, kernel.TOLERANCE[torch.bfloat16], blocks)

    def run(self, name: str, launch: Launch, repeats: int) -> str:
        p = self.problem(self.blocks._replace(**{name: launch}))
        fits = kernel._fits_of(p, launch, 0)
        rest = (self.q, self.k, self.v) if name == "forward" else (self.q, self.k, self.v, self.g, self.lse, self.delta)
        function = getattr(kernel, f"_run_{name}")
        try:
            ms, _, first = clock(lambda: function(p, *rest, fits), repeats)
        except Exception as error:
            return f"{name:8} {tuple(launch)!s:18} {type(error).__name__}: {str(error)[:120]}"
        share = fits[1].float().mean().item() / fits[0].shape[1]
        return f"{name:8} {tuple(launch)!s:18} {ms:8.2f} ms; {share:4.0%} of diagonals near; first call {first:.1f} s"


def time_parts(length: int, repeats: int, sweep: bool, kinds: list[str]) -> None:
    for kind in kinds:
        parts = Parts(length, fixed_tables(length)[kind])
        p = parts.problem(parts.blocks)
        say(f"\nkernels at {length:,} tokens, {kind}")
        say(f"  fit      {clock(lambda: kernel._fits_of(p, parts.blocks.forward, 0), repeats)[0]:27.2f} ms")  # noqa: B023
        say(f"  row_dot  {clock(lambda: kernel._run_row_dot(p, parts.out, parts.g), repeats)[0]:27.2f} ms")  # noqa: B023
        for name, candidates in SWEEP.items():
            for launch in candidates if sweep else [getattr(parts.blocks, name)]:
                say("  " + parts.run(name, Launch(*launch), repeats))


# --- positions that skip ---

POSE_ROWS, POSE_LENGTH, POSE_TARGET = 8, 2048, 32768
POSE_SHAPES = {"32 heads of 128, 8 key heads": (32, 8, 128), "SmolLM2-135M, 9 heads of 64, 3 key heads": (9, 3, 64)}


class Pass:
    """Attention of one layer as a model calls it, with a learned `kerple`; the positions are read once, as by the many layers of a pass."""

    def __init__(self, heads: int, kv_heads: int, dim: int, chunks: int):
        """chunks: 1 for plain positions."""
        made = torch.Generator("cuda").manual_seed(0)
        sizes = (heads, kv_heads, kv_heads, heads)
        self.q, self.k, self.v, self.g = (torch.randn(POSE_ROWS, h, POSE_LENGTH, dim, generator=made, device="cuda").bfloat16() for h in sizes)
        self.bias = method("kerple").bias(dataclasses.replace(SHAPE, heads=heads, kv_heads=kv_heads, head_dim=dim)).cuda()
        self.tokens = attention.locate(POSE_LENGTH, torch.device("cuda"), torch.ones(POSE_ROWS, POSE_LENGTH, device="cuda"), self.positions(chunks), None, 0)
        self.tokens.bias, self.tokens.layers = PerLayer([self.bias]), frozenset([0])
        assert self.tokens.layout is not None
        assert (self.tokens.layout.chunks is None) == (chunks == 1)

    @staticmethod
    def positions(chunks: int) -> torch.Tensor:
        """[rows, tokens], the same in each call."""
        drawn = np.random.default_rng(0)
        if chunks == 1:
            return torch.arange(POSE_LENGTH, device="cuda").expand(POSE_ROWS, -1)
        rows = [method("pose", chunks=chunks, target=POSE_TARGET).positions(POSE_LENGTH, POSE_TARGET, drawn)[1] for _ in range(POSE_ROWS)]
        return torch.from_numpy(np.stack(rows)).cuda()

    def forward(self, *qkv: torch.Tensor) -> torch.Tensor:
        module = SimpleNamespace(layer_idx=0)
        return attention.attend(module, *(qkv or (self.q, self.k, self.v)), None, longctx=self.tokens)[0].transpose(1, 2)

    def gradients(self, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
        """The output, and the gradients of queries, keys, values and the bias's parameters."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out = self.forward(*leaves)
        return out, *torch.autograd.grad(out, [*leaves, *self.bias.parameters()], self.g.to(dtype))


def in_blocks() -> AbstractContextManager[object]:
    """Within it, the kernels serve nobody."""
    return patch.object(kernel, "serves", lambda x: False)


def time_pose(repeats: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, sizes in POSE_SHAPES.items():
        say(f"\n{POSE_ROWS} x {POSE_LENGTH:,} tokens to {POSE_TARGET:,}, kerple learned; {name}")
        skips = Pass(*sizes, chunks=2)
        with in_blocks():
            want, rounded = skips.gradients(torch.float32), skips.gradients()
        errors = {}
        for label, got in (("blocks", rounded), ("kernels", skips.gradients())):
            errors[label] = [((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want)]
            names = ["out", "dq", "dk", "dv", *["parameter"] * len(want)]
            say(f"  {label:7} in bfloat16, off float32 blocks: " + "  ".join(f"{n} {e:.1e}" for n, e in zip(names, errors[label])))
        if any(ours > max(0.03, 2 * theirs) for ours, theirs in zip(errors["kernels"], errors["blocks"])):
            raise SystemExit("the kernels are further off than bfloat16 explains; no times")
        del want, rounded, got
        say(f"  {'':24}forward ms   ratio | with backward ms   ratio     GiB")
        base: tuple[float, float] | None = None
        for label, chunks in (("kernels, plain positions", 1), ("kernels, 2 chunks", 2), ("kernels, 4 chunks", 4), ("blocks, 2 chunks", 2)):
            run = Pass(*sizes, chunks)
            with in_blocks() if "blocks" in label else patch.object(kernel, "serves", kernel.serves):
                with torch.no_grad():
                    forward = clock(run.forward, repeats)[0]
                both, memory, _ = clock(run.gradients, repeats)
            base = base or (forward, both)
            say(f"  {label:24} {forward:9.2f} {forward / base[0]:6.2f}x | {both:16.2f} {both / base[1]:6.2f}x {memory:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768, 65536, 131072])
    parser.add_argument("--skip", nargs="*", default=[], choices=[*ROWS, "check", "dense", "times"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-check", action="store_true")
    parser.add_argument("--only-pose", action="store_true", help="positions that skip, and nothing else")
    parser.add_argument("--parts", action="store_true", help="each kernel by itself, at the first length")
    parser.add_argument("--sweep", action="store_true", help="each kernel with other tiles, at the first length")
    parser.add_argument("--kinds", nargs="*", default=["ours_alibi", "ours_random"], choices=[*METHODS, "ours_random"], help="tables of --parts and --sweep")
    options = parser.parse_args()
    say(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", kernel.triton.__version__)
    if options.only_pose:
        return time_pose(options.repeats)
    if "check" not in options.skip:
        start = time.perf_counter()
        check(1024)
        say(f"  in {time.perf_counter() - start:.1f} s, compilation included")
    if options.only_check:
        return
    if options.parts or options.sweep:
        time_parts(options.lengths[0], options.repeats, options.sweep, options.kinds)
    if "times" not in options.skip:
        for length in options.lengths:
            time_length(length, options.skip, options.repeats)
    if "dense" not in options.skip:
        time_dense(8192, options.repeats)


if __name__ == "__main__":
    main()
