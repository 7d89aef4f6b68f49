"""A pretrained RoPE model with a bias beside RoPE or in its place: what training it costs, and what it then reads and finds.

    python tests/benchmarks/conversion.py --set model.name=SMOLLM2 --set data=[{path: train.npz}] --data validation.npz \\
        --rows base,beside,beside_lora,beside_full,instead_lora,instead_full --runs conversion.json

Rows are named by where the bias stands and what is trained: nothing, the recipe's adapter and norms (`_lora`), or all weights (`_full`).
Prints perplexity of the same spans by context with its change from the shortest, passkeys found, and seconds of training: mean over
seeds and the half-width of its 95 % interval (Student's t). What `--runs` holds already is not run again; `--table` runs nothing.
"""

import argparse
import json
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from scratch import Runs, machine, print_table, results, spread, train

from hf_longctx import evaluate
from hf_longctx.recipe import Recipe, read_recipe
from hf_longctx.schema import format_size, parse_size

INSTEAD = {"name": "nope", "target": "64k"}
MEP = {"name": "mkl_alibi", "preset": "mep"}
BIASES: dict[str, tuple[dict[str, Any], ...]] = {
    "base": (),
    "beside": (MEP,),
    "instead": (INSTEAD, MEP),
    "learned_beside": ({"name": "mkl_alibi", "preset": "mep_learned"},),
    "learned_instead": (INSTEAD, {"name": "mkl_alibi", "preset": "mep_learned"}),
}
FULL = {"lora": None, "also_train": ()}
FULL_RATE = 4  # the learning rate of an adapter over that of all weights


def recipe_of(methods: tuple[dict[str, Any], ...], trained: str, seed: int, recipe: Recipe) -> Recipe:
    changed = replace(recipe, methods=methods, seed=seed)
    if trained == "lora":
        return changed
    return replace(changed, **FULL, train=recipe.train | {"learning_rate": recipe.train["learning_rate"] / FULL_RATE})


def measure(row: str, seed: int, recipe: Recipe, lengths: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Train, if the row is one that is trained, and evaluate: what `--runs` keeps of it."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    name, _, trained = row.rpartition("_") if row.endswith(("_lora", "_full")) else (row, "", "")
    folder, methods = options.out / f"{row}@{seed}", BIASES[name]
    about = train(recipe_of(methods, trained, seed, recipe), folder) if trained else {"train_seconds": 0}
    tasks = [{"name": "tail_perplexity", "spans": options.spans}, {"name": "passkey", "n": options.keys}]
    (model, change), start = (folder / "model", ()) if trained else (str(recipe.model.name), methods), time.perf_counter()
    found = evaluate(model, tasks, lengths, methods=change, out=folder / "eval", data=options.data)
    whole = [entry for entry in found if entry["depth"] is None]
    for problem in (entry for entry in whole if entry["metric"] == "failed"):
        raise RuntimeError(f"{problem['task']} at {problem['length']}: {problem['error']}")
    grown = {e["length"]: [round(100 * e[which], 3) for which in ("value", "ci_low", "ci_high")] for e in whole if e["metric"] == f"change_from_{lengths[0]}"}
    return about | {
        "read_seconds": round(time.perf_counter() - start), "change": grown,
        "perplexity": {e["length"]: round(e["value"], 4) for e in whole if e["metric"] == "perplexity"},
        "passkey": {e["length"]: e["value"] for e in whole if e["metric"] == "accuracy"}, "machine": machine(),
    }  # fmt: skip


def report(rows: list[str], lengths: list[int], runs: Runs, seeds: int) -> None:
    names = [format_size(n) for n in lengths]
    there = {row: [f"{row}@{seed}" for seed in range(seeds) if f"{row}@{seed}" in runs] for row in rows}
    for what in ("perplexity", "passkey"):
        found = {row: [runs.of(name, what) for name in kept] for row, kept in there.items()}
        print_table(what, names, {row: [spread([each[n] for each in kept if n in each]) for n in lengths] for row, kept in found.items()})
    grown = {row: [runs.of(name, "change").get(lengths[-1]) for name in kept] for row, kept in there.items()}
    told = {row: " / ".join(f"{c[0]:+.1f} [{c[1]:+.1f}, {c[2]:+.1f}]" for c in kept if c) for row, kept in grown.items()}
    seconds = {row: " / ".join(str(runs.found["runs"][name]["train_seconds"]) for name in kept) for row, kept in there.items()}
    print_table("a seed each", [f"{names[0]} to {names[-1]}, %", "training, s"], {row: [told[row], seconds[row]] for row in rows})


def measure_all(rows: list[str], lengths: list[int], runs: Runs, options: argparse.Namespace) -> None:
    """What is not there yet, seed by seed."""
    recipe = read_recipe(options.recipe, options.set)
    of_training = {key: recipe.train[key] for key in ("max_steps", "per_device_train_batch_size", "learning_rate")}
    runs.expect({"recipe": options.recipe, "window": recipe.window} | of_training | {"lengths": lengths, "spans": options.spans, "keys": options.keys})
    left = [(row, seed) for seed in range(options.seeds) for row in rows if f"{row}@{seed}" not in runs]
    with ProcessPoolExecutor(options.workers, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        going = {pool.submit(measure, *run, recipe, lengths, options): f"{run[0]}@{run[1]}" for run in left}
        for name, run in results(going, runs):
            print(f"{name}: {json.dumps(run)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smollm2-135m-mkl-alibi")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", help="to read; needed but for --table")
    parser.add_argument("--rows", default="base,beside,beside_lora,beside_full,instead_lora,instead_full")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lengths", default="2k,4k,8k,16k,32k,64k")
    parser.add_argument("--spans", type=int, default=2, help="a document, of 1,024 tokens")
    parser.add_argument("--keys", type=int, default=2, help="a depth; 10 depths")
    parser.add_argument("--workers", type=int, default=1, help="processes, which share the GPU")
    parser.add_argument("--table", action="store_true", help="only print what --runs holds")
    parser.add_argument("--runs", type=Path, default=Path("conversion.json"), help="JSON file of what was measured")
    parser.add_argument("--out", type=Path, default=Path("conversion"), help="folder of the models")
    options = parser.parse_args(arguments)
    lengths, rows, runs = sorted(parse_size(n) for n in options.lengths.split(",")), options.rows.split(","), Runs(options.runs)
    if not options.table:
        if options.data is None:
            parser.error("--data is missing")
        measure_all(rows, lengths, runs, options)
    print(f"\n{options.seeds} seeds; {json.dumps(runs.found['settings'])}; {' and '.join(runs.machines())}")
    report(rows, lengths, runs, options.seeds)


if __name__ == "__main__":
    main()
