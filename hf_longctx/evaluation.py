"""evaluate: run tasks at lengths on a model, append each result as it comes, go on where a stopped run stopped."""

import csv
import gc
import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig

from hf_longctx import checkpoint, files
from hf_longctx.data import check_source, load_documents
from hf_longctx.decoding import decode_cells
from hf_longctx.integration.cache import check_kind
from hf_longctx.lora import base_model
from hf_longctx.method import Method, load_methods
from hf_longctx.processes import Processes
from hf_longctx.provenance import provenance
from hf_longctx.recipe import DataSource
from hf_longctx.reporting import is_share, plot_results
from hf_longctx.schema import parse_size
from hf_longctx.scoring import Reader, attempts, score_cells
from hf_longctx.stats import bootstrap, paired_shares
from hf_longctx.task import Cell, ModelTask, Result, Scored, Task, all_or_nothing, load_tasks

logger = logging.getLogger(__name__)
COLUMNS = (
    "model", "revision", "method", "task", "length", "depth", "metric", "value", "n", "seed", "ci_low", "ci_high", "seconds",
    "peak_memory", "tokens", "tokenizer", "dtype", "error",
)  # fmt: skip
BUILT_IN = "pydoc_data.topics"
_DESCRIBES_MODEL = ("*.safetensors", "config.json", files.ADAPTER, files.SIDECAR, "tokenizer.json", "tokenizer.model")
Progress = Callable[[str, int, int], None]
Row = dict[str, Any]
Key = tuple[str, str, int | None]  # model, task, length


class Passes(NamedTuple):
    """Sequences, and tokens of a sequence, in one forward pass, and how keys and values are held; see `scoring.score_cells`."""

    batch_size: int | None
    chunk: int | None
    cache: str


@dataclass(frozen=True)
class Subject:
    """One model under evaluation, before it is loaded."""

    name: str
    methods: tuple[Method, ...]
    revision: str | None
    base: str | None

    @property
    def label(self) -> str:
        """How the rows call it: two subjects of one evaluation never share it."""
        name = str(Path(self.name)) if Path(self.name).exists() else self.name
        at = f"@{self.revision}" if self.revision else ""
        return " + ".join([name + at, *map(spelled, self.methods)])

    def parts(self) -> list[Path]:
        """The files that decide its outputs. Raises ValueError if there is no such model."""
        if checkpoint.is_gguf(self.name):
            return [Path(self.name)]
        folder = files.local_folder(self.name, self.revision)
        return [path for pattern in _DESCRIBES_MODEL for path in folder.glob(pattern)]

    def tokenizer(self) -> tuple[Any, Any] | None:
        """Of the model, with its configuration; None where they cannot be had without its weights."""
        if checkpoint.is_gguf(self.name):
            return None
        folder = files.local_folder(self.name, self.revision)
        if not all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
            return None  # an adapter: its base has them
        return checkpoint.load_tokenizer(folder, None), AutoConfig.from_pretrained(folder)

    def trained_window(self) -> int | None:
        """Of the model, as far as its configuration tells it."""
        return None if checkpoint.is_gguf(self.name) else checkpoint.inspect_model(self.name, revision=self.revision).get("trained_window")

    def commit(self) -> str | None:
        """The commit of a hub model, whatever branch or tag it was asked for by."""
        return self.revision if checkpoint.is_gguf(self.name) else files.commit_of(files.local_folder(self.name, self.revision)) or self.revision


def evaluate(
    model: str | Path, tasks: Sequence[Task | str | Mapping[str, Any]] = ("passkey", "perplexity"), lengths: Sequence[int | str] = (2048,), *,
    out: str | Path, data: str | Path | DataSource | None = None, methods: checkpoint.Specs = (), baseline: str | Path | None = None, revision: str | None = None,
    base: str | None = None, dtype: str | None = None, device: str | None = None, attn_implementation: str | None = None, seed: int = 0, batch_size: int | None = None,
    chunk: int | str | None = None, cache: str = "dynamic", progress: Progress | None = None, together: bool = False,
) -> list[Row]:  # fmt: skip
    """Measure a model, and a baseline beside it, by tasks at lengths.

    Args:
        model: a hub id, a folder, an adapter folder or a .gguf file.
        tasks: names, `{"name": ..., **options}`, or Task objects; "ruler" stands for the tasks of RULER that need no files.
        lengths: tokens of a cell, or sizes such as "32k".
        out: `results.jsonl` grows there as results come; at the end `results.json`, `results.csv` and a PNG a task are made.
            A call with the same arguments goes on where an earlier one stopped, and tries again what failed.
        data: text or token ids for tasks that need them (as a recipe's `data`); by default Python's own `pydoc_data.topics`.
        methods: a training-free change to evaluate the model with.
        baseline: a second model for the same cells; differences are paired.
        revision: of a hub model; the baseline has it too if it is the same model without `methods`.
        base, dtype, device, attn_implementation: as `load`, for both models.
        seed: of cells.
        batch_size: sequences in one forward pass; by default as many as fill 65,536 tokens on a GPU, 4,096 on a CPU.
        chunk: tokens of a sequence in one forward pass, or a size such as "4k": over states, or keys and values, the numbers stay the
            same. By default state-space models are read so that memory does not grow with length, and others at once.
        cache: how keys and values are held where a text is read in chunks: "dynamic" in the model's dtype, "offloaded" to the host's
            memory, "quantized" to 4 bits, which rounds the numbers (optimum-quanto). With the last two, all texts are read in chunks.
        progress: called with (what, done, total) in tokens.
        together: torchrun started this process and others, each of which makes this call: they share the cells, the first one writes.

    Returns:
        The rows of results.json. A task that failed at a length is a row whose metric is "failed" and whose `error` says why.
        `seconds`, `tokens` and `peak_memory` (GiB allocated on the GPU, the model included) are of all depths together.

    Raises:
        ValueError: an unknown task or model, a length that a task or the text is too short for, an `out` that holds another evaluation, or a `chunk` or `cache` that the
            model cannot be read with.
    """
    sizes = sorted({parse_size(length) for length in _several(lengths)})
    check_kind(cache)
    passes = Passes(batch_size, None if chunk is None else parse_size(chunk), cache)
    asked = load_tasks(_several(tasks))
    if not asked or not sizes:
        raise ValueError("give at least one task and one length")
    chosen = {spelled(task): task.for_lengths(sizes) for task in asked}
    subjects = _subjects(str(model), load_methods(methods), revision, base, None if baseline is None else str(baseline))
    source = data if isinstance(data, DataSource) or data is None else DataSource(str(data))
    arguments = {
        "models": [[s.label, _digest(s.parts())] for s in subjects], "tasks": [task.to_dict() for task in chosen.values()], "lengths": sizes,
        "data": _described(source), "seed": seed, "dtype": dtype, "attn_implementation": attn_implementation,
        "cache": cache if cache == "quantized" else None,  # the others change no number
    }  # fmt: skip
    folder = Path(out)
    processes = Processes.of_torchrun() if together else Processes()
    if not (folder / "results.jsonl").exists():
        for subject in subjects:
            _check(subject, chosen, sizes, source, seed)
    done = processes.first(lambda: _resume(folder, arguments, subjects))
    options = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    for subject in subjects:
        plan = {(subject.label, title, length): chosen[title] for title in chosen for length in chosen[title].at(sizes) if (subject.label, title, length) not in done}
        for key, rows in _measure(subject, plan, source, options, seed, passes, progress, processes):
            if processes.rank == 0:
                _append(folder, rows)
            done[key] = rows
    found = [row for s in subjects for title in chosen for length in chosen[title].at(sizes) for row in done[s.label, title, length]]
    found += _changes(found, *(s.label for s in subjects))
    return processes.first(lambda: _finish(folder, found))


def _several(given: Any) -> Sequence[Any]:
    """A list of one where the user gave the thing itself."""
    return [given] if isinstance(given, str | int | Mapping | Task) else given


def _subjects(name: str, methods: tuple[Method, ...], revision: str | None, base: str | None, baseline: str | None) -> list[Subject]:
    found = [Subject(name, methods, revision, base)]
    if baseline is not None:
        found.append(Subject(baseline, (), revision if baseline == name else None, base))
        if found[0].label == found[1].label:
            raise ValueError(f"the baseline is the model itself: {found[0].label}")
    return found


def spelled(item: Task | Method) -> str:
    """As on the command line, without what is left at its default: `yarn:factor=4`."""
    changed = {f.name: getattr(item, f.name) for f in fields(item) if getattr(item, f.name) != f.default and f.name != getattr(item, "inner", "")}
    return item.name + (":" + ",".join(f"{k}={_brief(v)}" for k, v in changed.items()) if changed else "")


def _brief(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"{len(value)} numbers {hashlib.sha256(repr(tuple(value)).encode()).hexdigest()[:6]}"
    if isinstance(value, str) and "/" in value and Path(value).expanduser().exists():  # results may be shown to others, and a file may change
        return f"{Path(value).name}#{_digest(_files(Path(value).expanduser()))[:6]}"
    return str(value).removesuffix(".0")


def _check(subject: Subject, tasks: Mapping[str, Task], lengths: Sequence[int], source: DataSource | None, seed: int) -> None:
    """Raise ValueError, before any weights are loaded, if a task cannot be measured at a length: too short, or longer than the text."""
    found = subject.tokenizer()
    if found is None:
        return
    documents = read_documents(source, *found) if any(task.needs_text for task in tasks.values()) else []
    for title, task in tasks.items():
        for length in task.at(lengths):
            if length is None or isinstance(task, ModelTask):
                continue
            try:
                task.sample().cells(found[0], documents, length, seed)
            except ValueError as error:
                raise ValueError(f"{title} at {length}: {error}") from None


# --- one model


def _measure(
    subject: Subject, plan: Mapping[Key, Task], source: DataSource | None, options: Mapping[str, Any], seed: int, passes: Passes, progress: Progress | None,
    processes: Processes,
) -> Iterator[tuple[Key, list[Row]]]:
    """Load the model, score each task at each length of `plan`, and free it."""
    if not plan:
        return
    _free()  # what a training before left behind
    model, tokenizer = checkpoint.load(subject.name, methods=subject.methods, revision=subject.revision, base=subject.base, **options)
    Reader(base_model(model), *passes)  # refuses what does not go with the model
    documents = read_documents(source, tokenizer, model.config) if any(task.needs_text for task in plan.values()) else []
    about = {
        "model": subject.label, "revision": subject.commit(), "method": " + ".join(map(spelled, subject.methods or _methods_in(model))), "seed": seed,
        "tokenizer": f"{type(tokenizer).__name__} {len(tokenizer)}", "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    for key, task in plan.items():
        _, title, length = key
        what = f"{subject.label}: {title}" + (f" at {length}" if length else "")
        rows, error = [], ""
        try:
            if isinstance(task, ModelTask):
                start = time.perf_counter()
                results, targets = processes.first(partial(task.run, model, tokenizer, length, passes.batch_size))
                cost: Row = {"seconds": round(time.perf_counter() - start, 3)}
            else:
                assert length is not None  # cells always have one
                cells = task.cells(tokenizer, documents, length, seed)
                parts = processes.gather(partial(_score, model, processes.share(cells), passes, what, progress))
                outputs, cost = [output for said, _ in parts for output in said], _summed([each for _, each in parts])
                results, targets = task.score(cells, outputs, tokenizer), _same_text(cells)
            rows = [about | cost | _numbers(result, targets) for result in results]
        except (RuntimeError, ValueError, MemoryError) as problem:  # out of memory, or text too short: the others go on
            error = next(iter(str(problem).splitlines()), "") or type(problem).__name__
            if processes.rank == 0:  # all of them know
                logger.error("%s failed: %s", what, error)
        if error:  # outside of the handler, which keeps the tensors of the failed call alive
            rows = [about | {"metric": "failed", "n": 0, "error": error}]
            _free()
        yield key, [row | {"task": title, "length": length} for row in rows]
    del model
    _free()


def _score(model: Any, cells: Sequence[Cell], passes: Passes, what: str, progress: Progress | None) -> tuple[list[Scored], Row]:
    """Outputs, all of them finite, and what they cost. Where memory does not suffice, less is read at a time."""
    if not cells:  # fewer than there are processes
        return [], {"seconds": 0.0, "tokens": 0, "peak_memory": None}
    device = next(model.parameters()).device
    tokens = sum(cell.size for cell in cells)
    read = decode_cells if any(cell.free for cell in cells) else score_cells
    tried = attempts(model.config, cells, passes.batch_size, passes.chunk, device.type)
    for size, chunk in tried:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        try:
            outputs = read(model, cells, size, _counter(progress, what, tokens), chunk, cache=passes.cache)  # its results lie on the CPU: nothing is pending
            break
        except torch.OutOfMemoryError:
            if (size, chunk) == tried[-1]:
                raise
        logger.warning("%s: out of memory; once more with less at a time", what)
        _free()
    seconds = time.perf_counter() - start
    if not all(map(_is_finite, cells, outputs)):
        raise ValueError("the model gives probabilities that are not finite")
    peak = round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None
    return outputs, {"seconds": round(seconds, 3), "tokens": tokens, "peak_memory": peak}


def _summed(costs: Sequence[Row]) -> Row:
    """Of processes that worked at the same time."""
    peaks = [cost["peak_memory"] for cost in costs if cost["peak_memory"] is not None]
    return {"seconds": max(cost["seconds"] for cost in costs), "tokens": sum(cost["tokens"] for cost in costs), "peak_memory": max(peaks, default=None)}


def _is_finite(cell: Cell, output: Scored) -> bool:
    said = [output.nll if cell.free else output.nll[: len(cell.targets)], *([] if output.probabilities is None else [output.probabilities])]
    return all(np.isfinite(each).all() for each in said)


def _counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(what, done, total)

    return count


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _methods_in(model: Any) -> tuple[Method, ...]:
    """The methods that a checkpoint was patched with when it was saved."""
    return load_methods((getattr(model.config, "longctx", None) or {}).get("methods", []))


def _numbers(result: Result, targets: str) -> Row:
    row: Row = {"metric": result.metric, "n": result.n, "depth": result.depth}
    row |= {key: number if math.isfinite(number := getattr(result, key)) else None for key in ("value", "ci_low", "ci_high")}
    if result.values:
        row["paired"] = {"values": result.values, "weights": result.weights, "clusters": result.clusters, "targets": targets}
    return row


def _same_text(cells: Sequence[Cell]) -> str:
    """A hash of the tokens that are scored, or read where none is: models that share it were asked the same."""
    digest = hashlib.sha256()
    for cell in cells:
        digest.update((cell.targets if len(cell.targets) else cell.ids).tobytes() + b"|")
    return digest.hexdigest()[:16]


# --- text


def read_documents(source: DataSource | None, tokenizer: Any, config: Any) -> Sequence[np.ndarray]:
    """Token ids of the documents of a source, or of the built-in text. Raises ValueError as `load_documents`, and for tokens that a model of `config` does not know."""
    if source is None:
        return [np.array(tokenizer(built_in_text(), add_special_tokens=False, verbose=False)["input_ids"])]
    found = load_documents(source, tokenizer)
    known = config.get_text_config().vocab_size
    if source.path.endswith(".npz") and found.ids.max() >= known:
        raise ValueError(f"{source.path} holds token id {found.ids.max()}, but the model knows only {known} tokens")
    return [found[i] for i in range(len(found))]


def built_in_text() -> str:
    """The documentation topics that every Python ships, as one text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def built_in_source() -> str:
    """What `built_in_text` is on this machine: Python's version and a hash."""
    digest = hashlib.sha256(built_in_text().encode()).hexdigest()[:12]
    return f"{BUILT_IN} of Python {platform.python_version()} (sha256 {digest})"


def _described(source: DataSource | None) -> Any:
    if source is None:
        return built_in_source()
    check_source(source)  # before `out` is taken, and also where no task reads it
    found = _files(Path(source.path).expanduser())
    kept = {key: value for key, value in asdict(source).items() if key not in ("weight", "short")}
    return kept | ({"files": _digest(found)} if found else {})


def _files(path: Path) -> list[Path]:
    """A file, those below a folder, or none."""
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path] if path.is_file() else []


def _digest(paths: Iterable[Path], samples: int = 16, size: int = 4096) -> str:
    """Names, sizes and evenly spaced samples of files: another checkpoint at the same place is noticed without reading it all."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        length = path.stat().st_size
        digest.update(f"{path.name} {length} ".encode())
        with path.open("rb") as file:
            for i in range(samples if length > samples * size else 1):
                file.seek(i * (length - size) // (samples - 1) if length > samples * size else 0)
                digest.update(file.read(size if length > samples * size else -1))
    return digest.hexdigest()[:16]


# --- the folder


def _resume(folder: Path, arguments: Row, subjects: Sequence[Subject]) -> dict[Key, list[Row]]:
    """Make `folder` this evaluation's and return the rows that it already has; ValueError if it holds another one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for --out")
    path, plain = folder / "run.json", json.loads(json.dumps(arguments))
    if path.exists():
        before = files.read_json(path).get("arguments", {})
        differing = [key for key in plain if before.get(key) != plain[key]]
        done = _read_rows(folder / "results.jsonl")
        if not differing:
            return done
        if done or not before:
            raise ValueError(f"{folder} holds an evaluation with other {', '.join(differing)}; choose another --out")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds something that is not an evaluation; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"arguments": plain, "trained_windows": {s.label: s.trained_window() for s in subjects}} | provenance())
    return {}


def _read_rows(path: Path) -> dict[Key, list[Row]]:
    """What an earlier, stopped call finished. The file is left with exactly that: no failed row, no line or group cut short."""
    groups: dict[Key, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["metric"] != "failed":
            groups.setdefault((row["model"], row["task"], row["length"]), []).append(row)
    whole = {key: rows[::-1] for key, rows in groups.items() if rows[-1].get("rows") == len(rows)}
    if path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(map(_lines, whole.values())), encoding="utf-8")
        partial.replace(path)
    return whole


def _lines(rows: Sequence[Row]) -> str:
    """The rows of one task at one length, each with their number: it tells whether all are there. The overall one is the last."""
    blank = dict.fromkeys(COLUMNS) | {"rows": len(rows)}
    return "".join(json.dumps(blank | row, allow_nan=False) + "\n" for row in reversed(rows))


def _append(folder: Path, rows: Sequence[Row]) -> None:
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(_lines(rows))


def _finish(folder: Path, rows: Sequence[Row]) -> list[Row]:
    plain = [{column: row.get(column) for column in COLUMNS} for row in rows]
    files.write_json(folder / "results.json", plain)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(plain)
    plot_results(plain, folder)
    return plain


# --- comparisons


def _changes(rows: Sequence[Row], model: str, baseline: str | None = None) -> list[Row]:
    """Paired differences: tail perplexity against each shorter length of the same model, everything against the baseline."""
    paired = {(row["model"], row["task"], row["length"], row["depth"]): row for row in rows if "paired" in row}
    found = []
    for (name, task, length, depth), row in paired.items():
        shorter = [key for key in paired if key[:2] == (name, task) and key[2] < length] if task.startswith("tail_perplexity") else []
        found += [_change(row, paired[key], f"change_from_{key[2]}") for key in shorter]
        other = paired.get((baseline, task, length, depth)) if baseline is not None and name == model else None
        if other is None:
            continue
        if row["paired"]["targets"] == other["paired"]["targets"]:
            found.append(_change(row, other, "change_from_baseline"))
        elif depth is None:
            logger.warning("%s at %s is not compared: %s and %s tokenise its text differently", task, length, model, baseline)
    return found


def _change(row: Row, other: Row, metric: str) -> Row:
    """The paired difference of accuracies or distances, or the relative change of a perplexity over the same tokens."""
    here, there = (np.array(r["paired"]["values"]) for r in (row, other))
    weights, clusters = np.array(row["paired"]["weights"]), row["paired"]["clusters"]

    def difference(index: Any) -> float:
        return float(np.average((here - there)[index], weights=weights[index]))

    def relative(index: Any) -> float:
        return math.expm1(difference(index))

    statistic = relative if row["metric"] in ("perplexity", "nll") else difference
    shares = is_share(row["metric"]) and all_or_nothing([*here, *there])
    interval = paired_shares(here.tolist(), there.tolist()) if shares else bootstrap(statistic, clusters)
    low, high = (None if math.isnan(end) else end for end in interval)
    kept = {key: item for key, item in row.items() if key not in ("paired", "seconds", "peak_memory", "tokens")}
    return kept | {"metric": metric, "value": statistic(slice(None)), "ci_low": low, "ci_high": high}
