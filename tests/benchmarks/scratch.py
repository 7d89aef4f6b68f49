"""Methods from scratch: train each at a short window, read the same tokens under growing context.

    python tests/benchmarks/scratch.py --set model.tokenizer=SMOLLM2 --set data=[{path: train.npz}] --data validation.npz \\
        --rows rope,alibi,mep,mep_learned --seeds 3 --lengths 512,1k,2k,4k,8k,16k --baseline alibi --workers 4 --out scratch

and `--recipe scratch-mamba-512 --rows zero,carry,zero>carry --baseline zero` for state passing: `zero>carry` trains what `zero` left for
--more times as many steps, at a third of the learning rate. Prints four tables, mean over seeds and the half-width of its 95 %
interval (Student's t): perplexity by length; the change from `--baseline`, same seed, same tokens; the change from the shortest
length, same model, same tokens, with the largest upper end of its intervals over documents; the loss in training. With `--keys`,
two: passkeys found, and the loss. What `--runs` holds already is not run again; `--table` runs nothing.
"""

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
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
    "learned": [NOPE, {"name": "learned", "gain": 1.0}],  # its table begins as wide as token embeddings do, 0.02
    **{name: [NOPE, {"name": name, "gain": 0.02}] for name in ("sinusoidal", "legendre", "wavelet")},
    **{f"{name}_1": [NOPE, {"name": name, "gain": 1.0}] for name in ("sinusoidal", "legendre", "wavelet")},
    "log_n": [{"name": "log_n"}],
    "ssmax": [{"name": "ssmax"}],
    "key_norm_sum": [{"name": "key_norm"}],
    "key_norm_mean": [{"name": "key_norm", "by": "mean", "learn_gain": True}],
}
STATES: dict[str, list[dict[str, Any]]] = {
    **{name: [{"name": name}] for name in method_names("state")},
    "noise": [{"name": "noise", "sigma": 0.1}],
    "zero_in_order": [{"name": "carry", "probability": 1.0}],  # carry's order of texts, each window from zeros: what of carry is order
}
PARTS = 8  # of training, for its loss
BySeed = dict[str, list[dict[int, Any]]]  # of each row, by seed, by length
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


def train(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train a model into `folder`/model, unless one is there; how long that took, and its losses."""
    about = folder / "trained.json"
    if not about.exists():
        start = time.perf_counter()
        torch.compiler.reset()  # what other rows compiled counts against the number of graphs that a layer may have
        finetune(recipe, folder / "model", overwrite=True)
        seconds, log = round(time.perf_counter() - start), json.loads((folder / "model/trainer_state.json").read_text())["log_history"]
        logged = np.array_split([entry["loss"] for entry in log if "loss" in entry], PARTS)
        about.write_text(json.dumps({"train_seconds": seconds, "losses": [round(float(part.mean()), 4) for part in logged if len(part)]}))
    return json.loads(about.read_text())


def measure(row: str, seed: int, recipe: Recipe, lengths: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and read the documents with it; what `--runs` keeps of that."""
    folder = options.out / f"{row}@{seed}"
    trained, start = train(recipe_of(row, seed, recipe, options), folder), time.perf_counter()
    tasks = [{"name": "passkey", "n": options.keys} if options.keys else {"name": "tail_perplexity", "spans": options.spans, "tokens": options.tokens}]
    found = evaluate(folder / "model", tasks, lengths, out=folder / "eval", data=options.data, dtype=options.dtype)
    whole = [entry for entry in found if entry["depth"] is None]
    value = {entry["length"]: entry["value"] and round(entry["value"], 4) for entry in whole if entry["metric"] in ("perplexity", "accuracy", "failed")}
    change = {entry["length"]: [round(100 * entry[which], 4) for which in ("value", "ci_high")] for entry in whole if entry["metric"] == f"change_from_{min(lengths)}"}
    read = {"passkey": value} if options.keys else {"perplexity": value, "change": change}
    return trained | {"read_seconds": round(time.perf_counter() - start)} | read | {"machine": machine()}


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def start_worker(number: Any, gpus: int) -> None:
    """In a process of the pool, before CUDA is: each has one of the GPUs."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[mine % gpus]
    torch.multiprocessing.set_start_method("fork", force=True)  # of DataLoader's workers, which would import everything anew
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


class Runs:
    """A JSON file of what was measured, by row@seed, and of the settings that runs of one table share."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": {}, "runs": {}}

    def expect(self, settings: dict[str, Any]) -> None:
        """Runs with other settings do not belong into the same table."""
        if self.found["runs"] and self.found["settings"] != settings:
            raise SystemExit(f"{self.path} was measured with {self.found['settings']}, not with {settings}; choose another --runs")
        self.found["settings"] = settings

    def add(self, name: str, run: dict[str, Any]) -> None:
        self.found["runs"] = dict(sorted((self.found["runs"] | {name: run}).items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.found["runs"].items()]
        self.path.write_text(f'{{"settings": {json.dumps(self.found["settings"])},\n"runs": {{\n' + ",\n".join(lines) + "\n}}\n")

    def __contains__(self, name: str) -> bool:
        return name in self.found["runs"]

    def of(self, name: str, what: str) -> dict[int, Any]:
        """By length; empty where a run is not."""
        return {int(length): value for length, value in self.found["runs"].get(name, {}).get(what, {}).items() if value is not None}

    def machines(self) -> list[str]:
        return sorted({run["machine"] for run in self.found["runs"].values()})

    def losses(self, name: str) -> list[float]:
        return self.found["runs"].get(name, {}).get("losses", [])


def spread(values: list[float]) -> str:
    """Mean and half-width."""
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else ""
    return f"{np.mean(values):.4g} ± {T95[len(values)] * np.std(values, ddof=1) / math.sqrt(len(values)):.2g}"


def print_table(title: str, head: list[str], cells: dict[str, list[str]]) -> None:
    print(f"\n| {title} | " + " | ".join(head) + " |\n|" + " --- |" * (len(head) + 1))
    for row, each in cells.items():
        print(f"| {row} | " + " | ".join(each) + " |")


def results(going: dict[Future, str], runs: Runs) -> Iterator[tuple[str, dict[str, Any]]]:
    """What jobs measured, as they end, each kept at once; of one that failed the reason is printed, and the others go on."""
    for done in as_completed(going):
        if (problem := done.exception()) is not None:
            print(f"{going[done]}: {type(problem).__name__}: {problem}", flush=True)
            continue
        runs.add(going[done], done.result())
        yield going[done], done.result()


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for number, (row, by_length) in enumerate(found.items()):
        axis.plot(list(by_length), [np.mean(values) for values in by_length.values()], marker="osv^"[number // 10], label=row)
    lengths = sorted({length for by_length in found.values() for length in by_length})
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="perplexity of the same tokens")
    low = min(min(values) for by_length in found.values() for values in by_length.values())
    axis.set_ylim(0.9 * low, 15 * low)  # what is far off is off anyway
    axis.set_xticks(lengths, [format_size(n) for n in lengths])
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def report(rows: list[str], lengths: list[int], runs: Runs, options: argparse.Namespace) -> None:
    """The tables and the picture, of the runs that are there."""
    what = "passkey" if options.keys else "perplexity"
    there = {row: [seed for seed in range(options.seeds) if f"{row}@{seed}" in runs] for row in rows}
    found = {row: [runs.of(f"{row}@{seed}", what) for seed in seeds] for row, seeds in there.items()}
    values = {row: {n: kept for n in lengths if (kept := [each[n] for each in all_seeds if n in each])} for row, all_seeds in found.items()}
    names = [format_size(n) for n in lengths]
    print_table(what, names, {row: [spread(values[row].get(n, [])) for n in lengths] for row in rows})
    if what == "perplexity":
        beside = {row: [runs.of(f"{options.baseline}@{seed}", what) for seed in seeds] for row, seeds in there.items()}
        report_changes(lengths, found, beside, {row: [runs.of(f"{row}@{seed}", "change") for seed in seeds] for row, seeds in there.items()}, options)
    losses = {row: [spread(list(each)) for each in zip(*(runs.losses(f"{row}@{seed}") for seed in seeds))] or [""] * PARTS for row, seeds in there.items()}
    print_table("loss, mean of each eighth of training", [f"{i}/{PARTS}" for i in range(1, PARTS + 1)], losses)
    if options.plot and any(values.values()):
        draw(values, options.plot)


def report_changes(lengths: list[int], found: BySeed, beside: BySeed, grown: BySeed, options: argparse.Namespace) -> None:
    """From the baseline with the same seed, and from the shortest length."""

    def from_baseline(row: str, n: int) -> str:
        return spread([100 * (mine[n] / other[n] - 1) for mine, other in zip(found[row], beside[row], strict=True) if n in mine and n in other])

    def from_shortest(row: str, n: int) -> str:
        changes = [each[n] for each in grown[row] if n in each]
        return spread([change for change, _ in changes]) + (f" ({max(top for _, top in changes):+.2f})" if changes else "")

    names = [format_size(n) for n in lengths]
    print_table(f"change from {options.baseline}, %", names, {row: [from_baseline(row, n) for n in lengths] for row in found})
    print_table(f"change from {names[0]}, % (most)", names[1:], {row: [from_shortest(row, n) for n in lengths[1:]] for row in found})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="scratch-512")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", help="to read; needed but for --table and --keys")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lengths", default="512,1k,2k,4k,8k,16k")
    parser.add_argument("--dtype", help="of the weights that read; a state's decay wants float32")
    parser.add_argument("--spans", type=int, default=4, help="a document")
    parser.add_argument("--tokens", type=int, default=256, help="of a span")
    parser.add_argument("--keys", type=int, help="a depth, of 10: find passkeys in the place of reading --data")
    parser.add_argument("--baseline", default="alibi")
    parser.add_argument("--more", type=float, default=0.05, help="of the steps, for rows with >")
    parser.add_argument("--workers", type=int, default=1, help="processes, dealt to the GPUs")
    parser.add_argument("--table", action="store_true", help="only print what --runs holds")
    parser.add_argument("--plot", type=Path, help="a picture of the first table")
    parser.add_argument("--runs", type=Path, help="JSON file of what was measured; runs.json in --out by default")
    parser.add_argument("--out", type=Path, default=Path("scratch"), help="folder of the models")
    options = parser.parse_args(arguments)
    lengths, rows = [parse_size(length) for length in options.lengths.split(",")], options.rows.split(",")
    runs = Runs(options.runs or options.out / "runs.json")
    if not options.table:
        if options.data is None and not options.keys:
            parser.error("--data is missing")
        measure_all(rows, lengths, runs, options)
    print(f"\n{options.seeds} seeds; {json.dumps(runs.found['settings'])}; {' and '.join(runs.machines())}")
    report(rows, lengths, runs, options)


def measure_all(rows: list[str], lengths: list[int], runs: Runs, options: argparse.Namespace) -> None:
    """What is not there yet, seed by seed."""
    recipe = read_recipe(options.recipe, options.set)
    of_training = {key: recipe.train[key] for key in ("max_steps", "per_device_train_batch_size", "learning_rate")}
    task = {"keys": options.keys} if options.keys else {"spans": options.spans, "tokens": options.tokens}
    of_reading = {"lengths": lengths} | task | {"dtype": options.dtype}
    runs.expect({"recipe": options.recipe, "window": recipe.window} | of_training | of_reading)
    left = [(row, seed) for seed in range(options.seeds) for row in rows if f"{row}@{seed}" not in runs]
    spawn = torch.multiprocessing.get_context("spawn")
    about = spawn.Value("i", 0), torch.cuda.device_count()
    with ProcessPoolExecutor(options.workers, mp_context=spawn, initializer=start_worker, initargs=about) as pool:
        for depth in sorted({row.count(">") for row, _ in left}):  # what others begin with comes first
            going = {pool.submit(measure, *run, recipe, lengths, options): f"{run[0]}@{run[1]}" for run in left if run[0].count(">") == depth}
            for name, run in results(going, runs):
                told = " / ".join("failed" if value is None else f"{value:.4g}" for value in run["passkey" if options.keys else "perplexity"].values())
                print(f"{name}: {told} (trained in {run['train_seconds']} s, read in {run['read_seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
