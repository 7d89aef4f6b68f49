"""Methods from scratch: train each at a short window, read the same tokens under growing context.

    python tests/benchmarks/scratch.py --set model.tokenizer=SMOLLM2 --set data=[{path: train.npz}] --data validation.npz \\
        --rows rope,alibi,mep,mep_learned --seeds 3 --lengths 512,1k,2k,4k,8k,16k --baseline alibi --out scratch

and `--recipe scratch-mamba-512 --rows zero,carry --baseline zero` for state passing. Prints three tables, mean over seeds and the
half-width of its 95 % interval (Student's t): perplexity by length; the change from `--baseline`, same seed, same tokens; the change
from the shortest length, same model, same tokens, with the largest upper end of its intervals over documents. A picture of the first
lies in --out. What is there already is not run again.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from hf_longctx import evaluate, finetune, method_names
from hf_longctx.recipe import Recipe, read_recipe
from hf_longctx.schema import format_size, parse_size

NOPE = {"name": "nope"}  # what stands in the place of RoPE below
ROWS: dict[str, list[dict[str, Any]]] = {
    "rope": [],
    "nope": [NOPE],
    **{name: [NOPE, {"name": name}] for name in ("alibi", "kerple", "sandwich", "fire", "t5")},
    "kerple_power": [NOPE, {"name": "kerple", "form": "power"}],
    "wavelet_bias": [NOPE, {"name": "wavelet_bias"}],
    "mep": [NOPE, {"name": "mkl_alibi", "preset": "mep"}],
    "mep_learned": [NOPE, {"name": "mkl_alibi", "preset": "mep_learned"}],
    "mep_weights": [NOPE, {"name": "mkl_alibi", "kernels": ["exponential", "half_exponential", "gaussian"], "learn_weights": True}],
    **{name: [NOPE, {"name": name, "gain": 1.0}] for name in ("sinusoidal", "learned", "legendre", "wavelet")},
    "log_n": [{"name": "log_n"}],
    "ssmax": [{"name": "ssmax"}],
    "key_norm_sum": [{"name": "key_norm"}],
    "key_norm_mean": [{"name": "key_norm", "by": "mean", "learn_gain": True}],
}
STATES: dict[str, list[dict[str, Any]]] = {name: [{"name": name}] for name in method_names("state")}
T95 = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, by number of seeds


def methods_of(row: str, window: int) -> tuple[dict[str, Any], ...]:
    """The methods of a row; nope is told that the window stays."""
    return tuple(spec | {"target": window} if spec["name"] == "nope" else spec for spec in (ROWS | STATES)[row])


def model_of(row: str, recipe: Recipe, seed: int, out: Path) -> Path:
    """The trained model, from an earlier run if there is one."""
    folder = out / f"{row}@{seed}"
    if not (folder / "done").exists():
        start = time.perf_counter()
        finetune(replace(recipe, methods=methods_of(row, recipe.window), seed=seed), folder / "model", overwrite=True)
        (folder / "done").write_text(f"{time.perf_counter() - start:.0f}")
        print(f"{row}@{seed}: trained in {(folder / 'done').read_text()} s", flush=True)
    return folder / "model"


def spread(values: list[float]) -> str:
    """Mean and half-width."""
    half = T95[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.4g} ± {half:.2g}" if len(values) > 1 else f"{values[0]:.4g}"


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for row, by_length in found.items():
        axis.plot(list(by_length), [np.mean(values) for values in by_length.values()], marker="o", label=row)
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="perplexity of the same tokens")
    axis.set_xticks(list(next(iter(found.values()))), [format_size(n) for n in next(iter(found.values()))])
    axis.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="scratch-512")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lengths", default="512,1k,2k,4k,8k,16k")
    parser.add_argument("--spans", type=int, default=4, help="a document")
    parser.add_argument("--tokens", type=int, default=256, help="of a span")
    parser.add_argument("--baseline", default="alibi")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    recipe = read_recipe(options.recipe, options.set)
    lengths = [parse_size(length) for length in options.lengths.split(",")]
    rows = options.rows.split(",")
    rows.sort(key=lambda row: row != options.baseline)
    task = {"name": "tail_perplexity", "spans": options.spans, "tokens": options.tokens}
    values: dict[str, dict[int, list[float]]] = {row: {n: [] for n in lengths} for row in rows}
    changes: dict[str, dict[int, list[float]]] = {row: {n: [] for n in lengths} for row in rows}
    growth: dict[str, dict[int, list[float]]] = {row: {n: [] for n in lengths[1:]} for row in rows}
    highest = {row: dict.fromkeys(lengths[1:], -math.inf) for row in rows}
    for seed in range(options.seeds):
        beside = model_of(options.baseline, recipe, seed, options.out)
        for row in rows:
            model = model_of(row, recipe, seed, options.out)
            baseline = None if row == options.baseline else beside
            for found in evaluate(model, [task], lengths, out=options.out / f"{row}@{seed}/eval", data=options.data, baseline=baseline):
                if found["model"] == str(model) and found["metric"] == "perplexity":
                    values[row][found["length"]].append(found["value"])
                if found["metric"] == "change_from_baseline":
                    changes[row][found["length"]].append(100 * found["value"])
                if found["model"] == str(model) and found["metric"] == f"change_from_{lengths[0]}":
                    growth[row][found["length"]].append(100 * found["value"])
                    highest[row][found["length"]] = max(highest[row][found["length"]], 100 * found["ci_high"])
            print(f"{row}@{seed}: " + " / ".join(f"{v[-1]:.4g}" if v else "failed" for v in values[row].values()), flush=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{machine}, torch {torch.__version__}, transformers {transformers.__version__}; {recipe.train.get('max_steps')} steps, {options.seeds} seeds")
    tables = {"perplexity": values, f"change from {options.baseline}, %": changes, f"change from {format_size(lengths[0])}, % (most)": growth}
    for title, table in tables.items():
        shown = lengths if table is not growth else lengths[1:]
        print(f"\n| {title} | " + " | ".join(format_size(n) for n in shown) + " |\n|" + " --- |" * (len(shown) + 1))
        for row, by_length in table.items():
            most = {n: f" ({highest[row][n]:+.2f})" if table is growth else "" for n in shown}
            print(f"| {row} | " + " | ".join(spread(v) + most[n] if v else "" for n, v in by_length.items()) + " |")
    draw(values, options.out / "perplexity.png")


if __name__ == "__main__":
    main()
