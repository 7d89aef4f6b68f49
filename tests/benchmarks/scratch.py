"""Methods from scratch: train each at a short window, read the same tokens under growing context.

    python tests/benchmarks/scratch.py --set model.tokenizer=SMOLLM2 --set data=[{path: train.npz}] --data validation.npz \\
        --rows rope,alibi,mep,mep_learned --seeds 3 --lengths 512,1k,2k,4k,8k,16k --baseline alibi --workers 4 --out scratch

and `--recipe scratch-mamba-512 --rows zero,carry,zero>carry --baseline zero` for state passing: `zero>carry` trains what `zero` left for
--more times as many steps, at a third of the learning rate. Prints four tables, mean over seeds and the half-width of its 95 %
interval (Student's t): perplexity by length; the change from `--baseline`, same seed, same tokens; the change from the shortest
length, same model, same tokens, with the largest upper end of its intervals over documents; the loss in training. A picture of the
first lies in --out. What is there already is not run again; `--table` runs nothing.
"""

import argparse
import json
import math
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
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
STATES: dict[str, list[dict[str, Any]]] = {name: [{"name": name}] for name in method_names("state")} | {"noise": [{"name": "noise", "sigma": 0.1}]}
T95 = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, by number of seeds


def methods_of(row: str, window: int) -> tuple[dict[str, Any], ...]:
    """The methods of a row; nope is told that the window stays."""
    return tuple(spec | {"target": window} if spec["name"] == "nope" else spec for spec in (ROWS | STATES)[row])


def recipe_of(row: str, seed: int, recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """Of a row: from scratch, or from the model of another row."""
    before, _, last = row.rpartition(">")
    changed = replace(recipe, methods=methods_of(last, recipe.window), seed=seed)
    if not before:
        return changed
    model = replace(recipe.model, config=None, name=str(options.out / f"{before}@{seed}/model"))
    train = {"max_steps": max(1, round(options.more * recipe.train["max_steps"])), "learning_rate": recipe.train["learning_rate"] / 3, "warmup_steps": 0}
    return replace(changed, model=model, train=recipe.train | train)


def measure(row: str, seed: int, recipe: Recipe, lengths: list[int], options: argparse.Namespace) -> None:
    """Train one model and read the documents with it."""
    folder, start = options.out / f"{row}@{seed}", time.perf_counter()
    if not (folder / "seconds").exists():
        finetune(recipe_of(row, seed, recipe, options), folder / "model", overwrite=True)
        log = json.loads((folder / "model/trainer_state.json").read_text())["log_history"]
        (folder / "losses.json").write_text(json.dumps({entry["step"]: entry["loss"] for entry in log if "loss" in entry}))
        (folder / "seconds").write_text(f"{time.perf_counter() - start:.0f}")
    task = {"name": "tail_perplexity", "spans": options.spans, "tokens": options.tokens}
    trained = time.perf_counter()
    rows = evaluate(folder / "model", [task], lengths, out=folder / "eval", data=options.data, dtype=options.dtype)
    values = [found["value"] for found in rows if found["metric"] in ("perplexity", "failed")]
    told = " / ".join("failed" if value is None else f"{value:.4g}" for value in values)
    print(f"{row}@{seed}: {told} (trained in {(folder / 'seconds').read_text()} s, read in {time.perf_counter() - trained:.0f} s)", flush=True)


def start_worker(number: Any, gpus: int) -> None:
    """In a process of the pool, before CUDA is: each has one of the GPUs."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[mine % gpus]
    torch.multiprocessing.set_start_method("fork", force=True)  # of DataLoader's workers, which would import everything anew
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def results(folder: Path) -> tuple[dict[int, float], dict[int, tuple[float, float]]]:
    """Perplexity by length; its change from the shortest one in percent, with the upper end of the interval. Empty where a run is not."""
    path = folder / "eval" / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    values = {found["length"]: found["value"] for found in rows if found["metric"] == "perplexity"}
    changed = [found for found in rows if found["metric"] == f"change_from_{min(values, default=0)}"]
    return values, {found["length"]: (100 * found["value"], 100 * found["ci_high"]) for found in changed}


def losses(folder: Path, parts: int = 8) -> list[float]:
    """Of training, the mean of each eighth of its steps; empty where a run is not."""
    path = folder / "losses.json"
    logged = list(json.loads(path.read_text()).values()) if path.exists() else []
    return [float(np.mean(part)) for part in np.array_split(logged, parts)] if len(logged) >= parts else []


def spread(values: list[float]) -> str:
    """Mean and half-width."""
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else ""
    return f"{np.mean(values):.4g} ± {T95[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values)):.2g}"


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for row, by_length in found.items():
        axis.plot(list(by_length), [np.mean(values) for values in by_length.values()], marker="o", label=row)
    lengths = sorted({length for by_length in found.values() for length in by_length})
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="perplexity of the same tokens")
    axis.set_xticks(lengths, [format_size(n) for n in lengths])
    axis.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def report(rows: list[str], lengths: list[int], options: argparse.Namespace) -> None:
    """The tables and the picture, of the runs that are there."""
    values: dict[str, dict[int, list[float]]] = {}
    table: list[dict[str, list[str]]] = [{}, {}, {}, {}]
    for row in rows:
        runs = [(results(options.out / f"{row}@{seed}"), results(options.out / f"{options.baseline}@{seed}")[0]) for seed in range(options.seeds)]
        runs = [run for run in runs if run[0][0]]
        values[row] = {n: there for n in lengths if (there := [found[n] for (found, _), _ in runs if n in found])}
        change = {n: [100 * (found[n] / beside[n] - 1) for (found, _), beside in runs if n in found and n in beside] for n in lengths}
        growth = {n: [grown[n] for (_, grown), _ in runs if n in grown] for n in lengths}
        table[0][row] = [spread(values[row].get(n, [])) for n in lengths]
        table[1][row] = [spread(change[n]) for n in lengths]
        table[2][row] = [spread([g for g, _ in growth[n]]) + (f" ({max(top for _, top in growth[n]):+.2f})" if growth[n] else "") for n in lengths[1:]]
        logged = [there for seed in range(options.seeds) if (there := losses(options.out / f"{row}@{seed}"))]
        table[3][row] = [spread(list(each)) for each in zip(*logged)] or [""] * 8
    names = [format_size(n) for n in lengths]
    titles = ("perplexity", names), (f"change from {options.baseline}, %", names), (f"change from {names[0]}, % (most)", names[1:])
    eighths = [f"{i}/8" for i in range(1, 9)]
    for (title, shown), cells in zip((*titles, ("loss, mean of each eighth of training", eighths)), table, strict=True):
        print(f"\n| {title} | " + " | ".join(shown) + " |\n|" + " --- |" * (len(shown) + 1))
        for row, each in cells.items():
            print(f"| {row} | " + " | ".join(each) + " |")
    if any(values.values()):
        draw(values, options.out / "perplexity.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="scratch-512")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lengths", default="512,1k,2k,4k,8k,16k")
    parser.add_argument("--dtype", help="of the weights that read; a state's decay wants float32")
    parser.add_argument("--spans", type=int, default=4, help="a document")
    parser.add_argument("--tokens", type=int, default=256, help="of a span")
    parser.add_argument("--baseline", default="alibi")
    parser.add_argument("--more", type=float, default=0.05, help="of the steps, for rows with >")
    parser.add_argument("--workers", type=int, default=1, help="processes, dealt to the GPUs")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    recipe = read_recipe(options.recipe, options.set)
    lengths, rows = [parse_size(length) for length in options.lengths.split(",")], options.rows.split(",")
    left = [(row, seed) for seed in range(options.seeds) for row in rows if not (options.out / f"{row}@{seed}/eval/results.json").exists()]
    spawn = torch.multiprocessing.get_context("spawn")
    if left and not options.table:
        about = spawn.Value("i", 0), torch.cuda.device_count()
        with ProcessPoolExecutor(options.workers, mp_context=spawn, initializer=start_worker, initargs=about) as pool:
            for depth in sorted({row.count(">") for row, _ in left}):  # what others begin with comes first
                for run in [pool.submit(measure, row, seed, recipe, lengths, options) for row, seed in left if row.count(">") == depth]:
                    if (problem := run.exception()) is not None:  # the others go on
                        print(f"{type(problem).__name__}: {problem}", flush=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{machine}, torch {torch.__version__}, transformers {transformers.__version__}; {recipe.train.get('max_steps')} steps, {options.seeds} seeds")
    report(rows, lengths, options)


if __name__ == "__main__":
    main()
