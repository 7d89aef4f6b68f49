"""What an evaluation costs: a passkey grid whose cells share their haystack, a model of 8B shape, the default suite. One CUDA GPU.

    python tests/benchmarks/evaluation_speed.py SMOLLM2 [--length 131072] [--only attention grid big suite] [--contender-cells 10] [--toy]

Prints from one run, each with peak memory:
  attention  milliseconds of attention of half of the tokens to all of them: in two parts (ours), by causal_lower_right, and SDPA's whole
             causal square for comparison; largest difference from float32 at 2,048 tokens, and the kernel that SDPA chooses
  grid       passkey, 10 depths x 10 keys: with shared beginnings; one forward pass a cell; `model.generate` a cell. The last two read
             --contender-cells of the cells, spread over all depths, and are extrapolated. Verdicts and -log p are compared cell by
             cell; those of three cells by another kernel show what rounding alone does. Once more at the model's own window, where
             it finds the key
  big        random weights of the shape of Llama-3.1-8B, bfloat16: perplexity of a whole text, the same in chunks, and forced passkey;
             FLOPs and their share of what a matrix product of 8,192^3 reaches in the same run
  suite      `evaluate` with its default tasks and RULER's, at --lengths

FLOPs of a pass over q tokens behind p others: linear layers 2 q x (their weights), attention 4 x layers x heads x head_dim x
(q p + q (q + 1) / 2): what causality leaves, so that a kernel gets no credit for what it masks; output embedding 2 x width x
vocabulary a scored token. Norms, RoPE and activations count as nothing. --toy runs everything in small, on a CPU too.
"""

import argparse
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_longctx import checkpoint, evaluate
from hf_longctx.integration.cache import over_past
from hf_longctx.scoring import score_cells
from hf_longctx.task import Cell, Scored, exact_match, load_task

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SECTIONS = ("attention", "grid", "big", "suite")
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
TOY_8B = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152}


def say(*what: object) -> None:
    print(*what, flush=True)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure(call: Callable[[], Any]) -> tuple[Any, float, str]:
    """What it returns, seconds, and peak memory, the model included."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    seconds = time.perf_counter() - start
    return result, seconds, f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if CUDA else "-"


def milliseconds(call: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
    """The median, two calls before not counted; and the first call."""
    taken = []
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[2:]), taken[0]


# --- attention


def attention(options: argparse.Namespace) -> None:
    for heads, kv_heads, dim in ((3, 1, 64), (8, 2, 128)) if options.toy else ((9, 3, 64), (32, 8, 128)):
        attention_of(heads, kv_heads, dim, options.length)


def attention_of(heads: int, kv_heads: int, dim: int, length: int) -> None:
    def inputs(tokens: int) -> list[torch.Tensor]:
        """Queries, keys and values, laid out as a model's projections leave them."""
        made = torch.Generator(DEVICE).manual_seed(0)
        dtype = torch.bfloat16 if CUDA else torch.float32
        return [torch.randn(1, tokens, n, dim, generator=made, device=DEVICE, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]

    def in_two(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        past = key.shape[2] - query.shape[2]
        return over_past(query, (key[:, :, past:], value[:, :, past:]), (key[:, :, :past], value[:, :, :past]), dim**-0.5)

    def lower_right(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, causal_lower_right(query.shape[2], key.shape[2]))

    query, key, value = inputs(min(2048, length))
    some = (query[:, :, query.shape[2] // 2 :], key, value)
    exact = lower_right(*(t.float() for t in some))
    errors = [float((found.float() - exact).abs().max()) for found in (in_two(*some), lower_right(*some))]
    say(f"\n{heads} heads of {dim}, {kv_heads} key heads: largest error {errors[0]:.1e} in two parts, {errors[1]:.1e} by causal_lower_right")
    query, key, value = inputs(length)
    half = (query[:, :, length // 2 :], key, value)
    wide = [t.repeat_interleave(heads // kv_heads, 1) for t in (key, value)]
    kernel = SDPBackend(torch._fused_sdp_choice(query, *wide, None, 0.0, True)).name
    rows: dict[str, tuple[Callable[[], Any], int]] = {
        "second half, in two parts": (lambda: in_two(*half), length - length // 2),
        "second half, causal_lower_right": (lambda: lower_right(*half), length - length // 2),
        f"whole, SDPA ({kernel})": (lambda: F.scaled_dot_product_attention(query, *wide, is_causal=True), length),
    }
    for name, (call, queries) in rows.items():
        taken, first = milliseconds(call)
        flops = 4 * heads * dim * pairs(queries, length - queries)
        say(f"  {name:44} {taken:9.2f} ms  {flops / taken / 1e9:7.1f} TFLOP/s  first call {first:8.1f} ms")


def pairs(queries: int, before: int) -> int:
    return queries * before + queries * (queries + 1) // 2


# --- grid


def grid(options: argparse.Namespace) -> None:
    window = AutoConfig.from_pretrained(options.model).max_position_embeddings
    for length in dict.fromkeys((options.length, min(window, options.length))):
        grid_at(length, window, options)


def grid_at(length: int, window: int, options: argparse.Namespace) -> None:
    """The contenders read a part of the cells: each costs the same, since all have the same length."""
    factor = max(1.0, length / window)
    methods = [{"name": "yarn", "factor": factor}] if factor > 1 else []
    model, tokenizer = checkpoint.load(options.model, methods=methods, dtype="bfloat16" if CUDA else "float32", device=DEVICE.type)
    cells = load_task({"name": "passkey", "n": options.keys, "depths": options.depths}).cells(tokenizer, [], length, 0)
    some = list(range(0, len(cells), max(1, len(cells) // options.contender_cells)))
    say(f"\npasskey grid, {options.depths} depths x {options.keys} keys at {length:,} tokens, {options.model} + {methods}")
    score_cells(model, cells[:1])  # what a first call costs is nobody's
    ours, taken, memory = measure(lambda: score_cells(model, cells))
    say(f"  {'shared beginnings':28} {taken:9.1f} s for {len(cells)} cells            {memory:>10}  {hits(cells, ours, tokenizer)} of {len(cells)} right")
    contenders: dict[str, tuple[list[int], Callable[[list[Cell]], list[Scored]]]] = {
        "one forward pass a cell": (some, lambda asked: score_cells(model, asked, batch_size=1, share=False)),
        "another kernel": (some[:3], lambda asked: by_flash(model, asked)),
        "model.generate a cell": (some, lambda asked: [generate(model, cell) for cell in asked]),
    }
    found = {"shared beginnings": dict(enumerate(ours))}
    for name, (chosen, call) in contenders.items():
        asked = [cells[i] for i in chosen]
        try:
            outputs, seconds, memory = measure(lambda call=call, asked=asked: call(asked))
        except torch.OutOfMemoryError:
            say(f"  {name:28} out of memory")
            continue
        found[name] = dict(zip(chosen, outputs, strict=True))
        whole = seconds * len(cells) / len(asked)
        say(
            f"  {name:28} {whole:9.1f} s extrapolated from {len(asked):3} cells {memory:>10}  {hits(asked, outputs, tokenizer)} of {len(asked)} right;"
            f" ours is {whole / taken:.2f}x faster"
        )
        for other in found:
            compare(cells, name, found[name], other, found[other], tokenizer)


def by_flash(model: Any, cells: list[Cell]) -> list[Scored]:
    """As one forward pass a cell: how far it is off the fastest kernel is what rounding alone does to such a text."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return score_cells(model, cells, batch_size=1, share=False)


def compare(cells: Sequence[Cell], name: str, here: dict[int, Scored], other: str, there: dict[int, Scored], tokenizer: Any) -> None:
    both = [i for i in here if i in there]
    if name == other or not both:
        return
    same = sum(verdict(cells[i], here[i], tokenizer) == verdict(cells[i], there[i], tokenizer) for i in both)
    away = [float(np.nanmax(np.abs(here[i].nll - there[i].nll))) for i in both if len(here[i].nll) == len(there[i].nll)]
    told = f", -log p within {max(away):.3f}, {np.median(away):.3f} in the median" if away else ""
    say(f"    verdict as {other} in {same} of {len(both)}{told}")


def generate(model: Any, cell: Cell) -> Scored:
    """Greedy decoding as a user would call it, as many tokens as decide about the answer."""
    prompt = torch.from_numpy(cell.ids[None, : cell.start]).to(DEVICE)
    with torch.no_grad():
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=cell.stop - cell.start, do_sample=False, pad_token_id=0)
    return Scored(np.zeros(0), made[0, cell.start :].cpu().numpy())


def verdict(cell: Cell, output: Scored, tokenizer: Any) -> bool:
    return exact_match(cell, output, tokenizer)


def hits(cells: Sequence[Cell], outputs: Sequence[Scored], tokenizer: Any) -> int:
    return sum(verdict(cell, output, tokenizer) for cell, output in zip(cells, outputs, strict=True))


# --- big


class Flops:
    """Counts what a model computes, by the formula above, while it is open."""

    def __init__(self, model: Any) -> None:
        self.model, self.total = model, 0
        config, head = model.config, model.get_output_embeddings()
        self.linear = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        self.attention = 4 * config.num_hidden_layers * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
        self.head = 2 * head.weight.numel()

    def __enter__(self) -> "Flops":
        self.handle = self.model.get_decoder().register_forward_pre_hook(self.count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def count(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, queries = kwargs["input_ids"].shape
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else cache.get_seq_length()
        self.total += rows * (self.linear * queries + self.attention * pairs(queries, before))


def big(options: argparse.Namespace) -> None:
    peak = matmul_peak(256 if options.toy else 8192)
    say(f"\nLlama-3.1-8B's shape, random weights, at {options.length:,} tokens; a matrix product reaches {peak / 1e12:.1f} TFLOP/s")
    with torch.device(DEVICE):
        config = AutoConfig.for_model("llama", **(TOY_8B if options.toy else LLAMA_8B))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if CUDA else torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = np.random.default_rng(0).integers(3, 49152, options.length)
    passkey = load_task({"name": "passkey", "n": options.big_keys, "depths": options.big_depths}).cells(tokenizer, [], options.length, 0)
    score_cells(model, [Cell(text[: options.length // 8], 1, options.length // 8)])
    chunk = options.length // 4
    rows: dict[str, tuple[list[Cell], dict[str, Any]]] = {
        "perplexity, whole": ([Cell(text, 1, options.length)], {}),
        f"perplexity, chunks of {chunk:,}": ([Cell(text, 1, options.length)], {"chunk": chunk}),
        f"passkey, {options.big_depths} depths x {options.big_keys}": (passkey, {}),
    }
    for name, (cells, given) in rows.items():
        try:
            with Flops(model) as flops:
                _, seconds, memory = measure(lambda cells=cells, given=given: score_cells(model, cells, **given))
        except torch.OutOfMemoryError:
            say(f"  {name:28} out of memory")
            continue
        total = flops.total + flops.head * sum(cell.stop - cell.start for cell in cells)
        say(
            f"  {name:28} {len(cells):3} cells {seconds:8.2f} s  {total / 1e12:9.1f} TFLOP  {total / seconds / 1e12:7.1f} TFLOP/s"
            f"  {100 * total / seconds / peak:5.1f} % of the product  {memory:>10}"
        )


def matmul_peak(size: int) -> float:
    """FLOP/s of a bfloat16 matrix product on random data."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b, 20)[0] / 1000)


# --- suite


def suite(options: argparse.Namespace) -> None:
    tasks = toy_tasks() if options.toy else [{"name": "passkey"}, {"name": "perplexity"}, {"name": "ruler"}]
    say(f"\n{', '.join(task['name'] for task in tasks)} at {options.lengths}, {options.model}")
    with tempfile.TemporaryDirectory() as folder:
        rows, seconds, _ = measure(lambda: evaluate(options.model, tasks, options.lengths.split(","), out=folder))
    say(f"  {'all of it':44} {seconds:8.1f} s")
    for row in {(row["task"], row["length"]): row for row in reversed(rows) if row["depth"] is None}.values():
        value = row["error"] if row["value"] is None else f"{row['value']:.4f}"
        say(f"  {row['task']:24} {row['length']:7,} {row['metric']:11} {row['seconds'] or 0:8.1f} s  {value}")


def toy_tasks() -> list[dict[str, Any]]:
    return [{"name": "passkey", "n": 2, "depths": 3}, {"name": "perplexity", "documents": 1, "stride": 256}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="SmolLM2-135M: a folder or a hub id")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--contender-cells", type=int, default=10)
    parser.add_argument("--big-depths", type=int, default=3)
    parser.add_argument("--big-keys", type=int, default=1)
    parser.add_argument("--lengths", default="4k,8k,16k,32k")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    if options.toy:
        vars(options).update(length=384, depths=3, keys=2, contender_cells=3, lengths="256,384")
    transformers.logging.set_verbosity_error()
    say(torch.cuda.get_device_name() if CUDA else "CPU", "torch", torch.__version__, "transformers", transformers.__version__)
    for name in SECTIONS:
        if name in options.only:
            try:
                globals()[name](options)
            except Exception:  # the others may still run
                traceback.print_exc()


if __name__ == "__main__":
    main()
