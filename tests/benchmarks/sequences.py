"""Position methods on sequence tasks, in and beyond the trained length: copy at an offset, reverse, sort, modular sum.

    python tests/benchmarks/sequences.py --rows sinusoidal,learned,legendre,wavelet,alibi,mep,rope --seeds 3 --workers 8 --runs sequences.json

A llama of two layers, 128 wide, reads `n symbols, =` and writes the answer; lengths from 4 to 32 in training, then 32 and beyond.
Absolute positions reach to the longest length tested (legendre and wavelet are spread over it; learned ones beyond 32 are never trained).
Prints the share of answer tokens that are right, given the right ones before, on 512 fresh sequences a length: mean over seeds and the
half-width of its 95 % interval (Student's t). What `--runs` holds already is not run again; `--table` runs nothing.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scratch import ROWS, Runs, machine, print_table, results, spread
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longctx import patch

SYMBOLS, EQUALS, END, IGNORE = 16, 16, 17, -100
SHORTEST, TRAINED = 4, 32
OFFSET = 3


def copy(x: torch.Tensor) -> torch.Tensor:
    """Every symbol, turned by three places: what stands OFFSET ahead."""
    return x.roll(-OFFSET, 1)


def reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


def sort(x: torch.Tensor) -> torch.Tensor:
    return x.sort(1).values


def modular_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums of the symbols so far, modulo their number."""
    return x.cumsum(1) % SYMBOLS


TASKS = {"copy": copy, "reverse": reverse, "sort": sort, "modular_sum": modular_sum}


def batch(task: str, rows: int, length: int, made: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `x = y`, [rows, 2 length + 1], and labels that leave all but y out."""
    x = torch.randint(0, SYMBOLS, (rows, length), generator=made)
    y = TASKS[task](x)
    middle = torch.full((rows, 1), EQUALS)
    return torch.cat([x, middle, y], 1), torch.cat([torch.full_like(x, IGNORE), middle.fill_(IGNORE), y], 1)


def build(row: str, seed: int, longest: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=SYMBOLS + 2, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=2 * longest + 1, tie_word_embeddings=False, bos_token_id=EQUALS, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    methods = [spec | {"target": 2 * longest + 1} if spec["name"] == "nope" else spec for spec in ROWS[row]]
    return patch(model, methods) if methods else model


def run(row: str, task: str, seed: int, lengths: list[int], steps: int, rows: int, number: int) -> dict[str, Any]:
    """Train and test one model, on GPU `number` modulo those there: what `--runs` keeps of it."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    device = torch.device(f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    model = build(row, seed, max(lengths)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    made = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        length = int(torch.randint(SHORTEST, TRAINED + 1, (1,), generator=made))
        ids, labels = (t.to(device, non_blocking=True) for t in batch(task, rows, length, made))
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    fresh = torch.Generator().manual_seed(10_000)
    shares = {}
    for length in lengths:
        right = []
        for _ in range(8):
            ids, labels = batch(task, 64, length, fresh)
            with torch.no_grad():
                best = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
            right.append((best == labels[:, 1:])[labels[:, 1:] != IGNORE].float().mean().item())
        shares[length] = round(100 * float(np.mean(right)), 3)
    return {"right": shares, "machine": machine()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="sinusoidal,learned,legendre,wavelet,alibi,mep,rope,nope")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--lengths", type=int, nargs="*", default=[32, 48, 64, 128])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print what --runs holds")
    parser.add_argument("--runs", type=Path, default=Path("sequences.json"), help="JSON file of what was measured")
    options = parser.parse_args(arguments)
    rows, tasks, runs = options.rows.split(","), options.tasks.split(","), Runs(options.runs)
    if not options.table:
        measure_all(rows, tasks, runs, options)
    print(f"\n{options.seeds} seeds; {json.dumps(runs.found['settings'])}; {' and '.join(runs.machines())}")
    for task in tasks:
        found = {row: [runs.of(f"{row} {task}@{seed}", "right") for seed in range(options.seeds)] for row in rows}
        cells = {row: [spread([each[n] for each in kept if n in each]) for n in options.lengths] for row, kept in found.items()}
        print_table(f"{task}, % right", [str(n) for n in options.lengths], cells)


def measure_all(rows: list[str], tasks: list[str], runs: Runs, options: argparse.Namespace) -> None:
    """What is not there yet, seed by seed."""
    runs.expect({"steps": options.steps, "batch": options.batch, "trained": TRAINED, "lengths": options.lengths})
    left = [(r, t, s) for s in range(options.seeds) for r in rows for t in tasks if f"{r} {t}@{s}" not in runs]
    with ProcessPoolExecutor(options.workers, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        going = {pool.submit(run, r, t, s, options.lengths, options.steps, options.batch, i): f"{r} {t}@{s}" for i, (r, t, s) in enumerate(left)}
        for name, found in results(going, runs):
            print(f"{name}: {found['right']}", flush=True)


if __name__ == "__main__":
    main()
