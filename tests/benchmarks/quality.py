"""What a recipe reaches, beside what it is compared with: the model as it is, the RoPE change alone, plain short-window training, other seeds and samplers.

    python tests/benchmarks/quality.py smollm2-135m-32k --set model.name=SMOLLM2 --set data=[{path: train.npz}] \\
        --data validation.npz --lengths 2k,8k,32k --rows base,rope,plain,recipe@0,recipe@1,recipe@2,cream --out quality

Prints one table: passkey pooled over 10 depths and its worst depth, a second retrieval format, perplexity of the same spans and its
change from `--reference` to the longest length with a 95 % interval, seconds of training. Each row has a folder in --out: what is
there already is not run again.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_longctx import evaluate, finetune
from hf_longctx.recipe import Recipe, read_recipe
from hf_longctx.schema import parse_size

SAMPLERS = {"pose", "cream", "random_positions"}


def variant(recipe: Recipe, kind: str, seed: int) -> Recipe:
    """The recipe with another sampler in the place of its own, or without one."""
    kept = tuple(spec for spec in recipe.methods if kind == "recipe" or spec["name"] not in SAMPLERS)
    return replace(recipe, seed=seed, methods=kept if kind in ("recipe", "plain") else (*kept, {"name": kind}))


def subject(row: str, recipe: Recipe, folder: Path) -> tuple[str, tuple[Mapping[str, Any], ...], float]:
    """What to evaluate for a row: a model, training-free methods, seconds of training."""
    kind, _, seed = row.partition("@")
    if kind == "base":
        return str(recipe.model.name), (), 0.0
    if kind == "rope":
        return str(recipe.model.name), tuple(spec for spec in recipe.methods if spec["name"] not in SAMPLERS), 0.0
    adapter = folder / "adapter"
    taken = folder / "seconds"
    if not taken.exists():
        start = time.perf_counter()
        finetune(variant(recipe, kind, int(seed or recipe.seed)), adapter, overwrite=True)
        taken.write_text(str(time.perf_counter() - start))
    return str(adapter), (), float(taken.read_text())


def cells(rows: list[dict[str, Any]], lengths: list[int], reference: int, seconds: float) -> dict[str, str]:
    """The columns of one row of the table."""

    def one(task: str, metric: str, length: int) -> dict[str, Any]:
        return next(r for r in rows if r["task"].startswith(task) and r["metric"] == metric and r["length"] == length and r["depth"] is None)

    def worst(length: int) -> float:
        return min(r["value"] for r in rows if r["task"].startswith("passkey") and r["length"] == length and r["depth"] is not None)

    change = one("tail_perplexity", f"change_from_{reference}", max(lengths))
    return {
        "passkey": " / ".join(f"{one('passkey', 'accuracy', n)['value']:.3f}" for n in lengths),
        "worst depth": " / ".join(f"{worst(n):.2f}" for n in lengths),
        "niah_single_2": " / ".join(f"{one('niah', 'accuracy', n)['value']:.2f}" for n in lengths),
        "perplexity": " / ".join(f"{one('tail_perplexity', 'perplexity', n)['value']:.2f}" for n in lengths),
        "change": f"{change['value']:+.1%} [{change['ci_low']:+.1%}, {change['ci_high']:+.1%}]",
        "training": f"{seconds:.0f} s",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", required=True)
    parser.add_argument("--lengths", default="2k,8k,32k")
    parser.add_argument("--reference", default="8k")
    parser.add_argument("--rows", default="base,rope,plain,recipe@0,recipe@1,recipe@2,cream")
    parser.add_argument("--keys", type=int, default=20, help="a depth; 10 depths")
    parser.add_argument("--spans", type=int, default=6, help="a document")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    recipe = read_recipe(options.recipe, options.set)
    lengths = [parse_size(length) for length in options.lengths.split(",")]
    tasks = [
        {"name": "passkey", "n": options.keys}, {"name": "tail_perplexity", "spans": options.spans},
        {"name": "niah_single_2", "n": max(1, options.keys // 4)},
    ]  # fmt: skip
    found = []
    for row in options.rows.split(","):
        folder = options.out / row
        folder.mkdir(parents=True, exist_ok=True)
        model, methods, seconds = subject(row, recipe, folder)
        start = time.perf_counter()
        measured = evaluate(model, tasks, lengths, out=folder / "eval", data=options.data, methods=methods)
        found.append({"": row} | cells(measured, lengths, parse_size(options.reference), seconds))
        print(f"{row}: {found[-1]} (evaluated in {time.perf_counter() - start:.0f} s)", flush=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{machine}, torch {torch.__version__}, transformers {transformers.__version__}; lengths {options.lengths}, {10 * options.keys} keys a length")
    print("| " + " | ".join(found[0]) + " |\n|" + " --- |" * len(found[0]))
    for line in found:
        print("| " + " | ".join(line.values()) + " |")


if __name__ == "__main__":
    main()
