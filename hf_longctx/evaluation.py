"""evaluate: run tasks at lengths on a model, append each result as it comes, go on where a stopped run stopped."""

import csv
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_longctx import __version__, checkpoint, files
from hf_longctx.data import Documents, load_documents
from hf_longctx.loss import token_losses
from hf_longctx.method import load_methods
from hf_longctx.recipe import DataSource
from hf_longctx.schema import parse_size
from hf_longctx.stats import bootstrap
from hf_longctx.task import Cell, Result, Scored, Task, load_task

logger = logging.getLogger(__name__)
COLUMNS = (
    "model", "revision", "method", "task", "length", "depth", "metric", "value", "n", "seed", "ci_low", "ci_high", "seconds",
    "peak_memory", "tokens", "tokenizer", "dtype",
)  # fmt: skip
BUILT_IN = "pydoc_data.topics"
_TOKENS_AT_ONCE = {"cuda": 65536, "cpu": 4096}


@dataclass(frozen=True)
class Subject:
    """One model under evaluation."""

    label: str
    revision: str | None
    methods: tuple[Any, ...]
    model: torch.nn.Module
    tokenizer: Any


def evaluate(
    model: str | Path, tasks: Sequence[Task | str | Mapping[str, Any]] = ("passkey", "perplexity"), lengths: Sequence[int | str] = (2048,), *,
    out: str | Path, data: str | Path | DataSource | None = None, methods: checkpoint.Specs = (), baseline: str | Path | None = None, revision: str | None = None,
    base: str | None = None, dtype: str | None = None, device: str | None = None, attn_implementation: str | None = None, seed: int = 0, batch_size: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure a model, and a baseline beside it, by tasks at lengths.

    Args:
        model: a hub id, a folder, an adapter folder or a .gguf file.
        tasks: names, `{"name": ..., **options}`, or Task objects.
        lengths: tokens of a cell, or sizes such as "32k".
        out: `results.jsonl` grows there as results come; at the end `results.json`, `results.csv` and a PNG a task are made.
            A call with the same arguments goes on where an earlier one stopped.
        data: text or token ids for tasks that need them (as a recipe's `data`); by default Python's own `pydoc_data.topics`.
        methods: a training-free change to evaluate the model with.
        baseline: a second model for the same cells; differences are paired.
        revision, base, dtype, device, attn_implementation: as `load`.
        seed: of cells and intervals.
        batch_size: sequences in one forward pass; by default as many as fill 65,536 tokens on a GPU, 4,096 on a CPU.
        progress: called with (what, done, total) in tokens.

    Returns:
        The rows of results.json. A task that failed at a length is a row whose metric is "failed".

    Raises:
        ValueError: an unknown task or model, or an `out` that holds another evaluation.
    """
    sizes = sorted({parse_size(length) for length in lengths})
    chosen = [task.for_lengths(sizes) for task in map(load_task, tasks)]
    folder = Path(out)
    rows: list[dict[str, Any]] = []
    wanted = [(str(model), methods, revision, base)] + ([(str(baseline), (), None, None)] if baseline else [])
    described = {
        "models": [[name, [m.to_dict() for m in load_methods(specs)], at] for name, specs, at, _ in wanted], "tasks": [task.to_dict() for task in chosen],
        "lengths": sizes, "data": str(data.path if isinstance(data, DataSource) else data or BUILT_IN), "seed": seed, "dtype": dtype,
    }  # fmt: skip
    _claim(folder, described)
    done = _read_rows(folder)
    for name, specs, at, other in wanted:
        label = _label(name, specs)
        plan = [(task, length) for task in chosen for length in sizes if (label, _title(task), length) not in _finished(done)]
        rows += [row for row in done if row["model"] == label]
        if not plan:
            continue
        loaded = checkpoint.load(name, methods=specs, revision=at, base=other, dtype=dtype, device=device, attn_implementation=attn_implementation)
        subject = Subject(label, at, tuple(m.to_dict() for m in load_methods(specs)), loaded.model, loaded.tokenizer)
        documents = _documents(data, loaded.tokenizer) if any(task.needs_text for task in chosen) else []
        for new in _measure(subject, plan, documents, seed, batch_size, progress):
            _append(folder, new)
            rows += new
        del loaded, subject
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    rows += _changes(rows, seed)
    _finish(folder, rows)
    return [{k: v for k, v in row.items() if k not in ("values", "clusters")} for row in rows]


def score_cells(model: torch.nn.Module, cells: Sequence[Cell], batch_size: int | None = None, on_tokens: Callable[[int], None] | None = None) -> list[Scored]:
    """One forward pass a cell; only the scored tokens meet the output embedding, so memory is linear in length.

    Cells of equal length share a batch. Without a cache and without an attention mask, every backend takes its causal path.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(base.parameters()).device
    outputs: list[Scored | None] = [None] * len(cells)
    for batch in _batches(cells, batch_size, device.type):
        ids = torch.from_numpy(np.stack([cells[i].ids for i in batch])).to(device)
        with torch.no_grad():
            hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            for row, i in enumerate(batch):
                outputs[i] = _score(base, hidden[row], cells[i])
        if on_tokens is not None:
            on_tokens(ids.numel())
    return [output for output in outputs if output is not None]


def _score(model: Any, hidden: torch.Tensor, cell: Cell) -> Scored:
    labels = torch.from_numpy(np.append(cell.ids, -100)[cell.start : cell.stop]).to(hidden.device)
    states = hidden[cell.start - 1 : cell.stop - 1]
    head = model.get_output_embeddings()
    config = model.config
    if _plain_head(config, head):
        nll, best = token_losses(states, head.weight, labels)
    else:  # the family scales or caps its logits: only the model itself knows how
        nll, best = _through_head(model, states, labels)
    nll = torch.where(labels < 0, torch.full_like(nll, torch.nan), nll)
    return Scored(nll.cpu().numpy(), best.cpu().numpy())


def _plain_head(config: Any, head: torch.nn.Module) -> bool:
    scaled = any(getattr(config, key, None) not in (None, 1, 1.0) for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    return not scaled and getattr(head, "bias", None) is None


def _through_head(model: Any, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model.get_output_embeddings()(states.to(model.get_output_embeddings().weight.dtype)).float()
    config = model.config
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100), logits.argmax(-1)


def _batches(cells: Sequence[Cell], batch_size: int | None, device: str) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, cell in enumerate(cells):
        by_length.setdefault(len(cell.ids), []).append(i)
    for length, indices in sorted(by_length.items()):
        size = batch_size or max(1, _TOKENS_AT_ONCE.get(device, 4096) // length)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _measure(
    subject: Subject, plan: Sequence[tuple[Task, int]], documents: Sequence[np.ndarray], seed: int, batch_size: int | None, progress: Callable[[str, int, int], None] | None
) -> Iterator[list[dict[str, Any]]]:
    for task, length in plan:
        what = f"{subject.label}: {task.name} at {length}"
        before = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            cells = task.cells(subject.tokenizer, documents, length, seed)
            total, seen = sum(len(c.ids) for c in cells), 0

            def report(tokens: int, what: str = what, total: int = total) -> None:
                nonlocal seen
                seen += tokens
                if progress is not None:
                    progress(what, seen, total)

            results = task.score(cells, score_cells(subject.model, cells, batch_size, report), subject.tokenizer)
        except (RuntimeError, ValueError) as error:  # out of memory, or text too short: the other cells go on
            logger.error("%s failed: %s", what, str(error).splitlines()[0])
            total = 0
            results = [Result("failed", float("nan"), 0, float("nan"), float("nan"))]
        yield [_row(subject, task, length, result, seed, time.perf_counter() - before, total) for result in results]


def _row(subject: Subject, task: Task, length: int, result: Result, seed: int, seconds: float, tokens: int) -> dict[str, Any]:
    model = subject.model
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    row = {
        "model": subject.label, "revision": subject.revision, "method": "+".join(m["name"] for m in subject.methods), "task": _title(task),
        "length": length, "depth": result.depth, "metric": result.metric, "value": result.value, "n": result.n, "seed": seed,
        "ci_low": result.ci_low, "ci_high": result.ci_high, "seconds": round(seconds, 3), "peak_memory": None if peak is None else round(peak, 3),
        "tokens": tokens, "tokenizer": type(subject.tokenizer).__name__, "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    if result.values is not None:
        row |= {"values": [float(v) for v in result.values], "clusters": [int(c) for c in result.clusters or ()]}  # type: ignore[call-overload]
    return row


def _title(task: Task) -> str:
    """The task's name with the options that differ from its defaults."""
    changed = {k: v for k, v in asdict(task).items() if v != getattr(type(task), k, None) and k not in ("longest",)}
    if task.name in ("perplexity", "tail_perplexity"):
        changed.pop("tokens", None)
    return task.name + (":" + ",".join(f"{k}={v}" for k, v in changed.items()) if changed else "")


def _label(name: str, specs: checkpoint.Specs) -> str:
    chosen = load_methods(specs)
    return name if not chosen else f"{name} + {', '.join(m.name for m in chosen)}"


def _documents(data: str | Path | DataSource | None, tokenizer: Any) -> Sequence[np.ndarray]:
    if data is None:
        return [np.array(tokenizer(built_in_text(), add_special_tokens=False, verbose=False)["input_ids"])]
    source = data if isinstance(data, DataSource) else DataSource(str(data))
    found: Documents = load_documents(source, tokenizer)
    return [found[i] for i in range(len(found))]


def built_in_text() -> str:
    """The documentation topics that every Python ships, as one text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def built_in_source() -> str:
    """What `built_in_text` is on this machine: Python's version and a hash."""
    digest = hashlib.sha256(built_in_text().encode()).hexdigest()[:12]
    return f"{BUILT_IN} of Python {platform.python_version()} (sha256 {digest})"


def _claim(folder: Path, described: dict[str, Any]) -> None:
    """Make `folder` this evaluation's, or raise ValueError if it belongs to another one."""
    path = folder / "run.json"
    plain = json.loads(json.dumps(described))
    if path.exists():
        before = files.read_json(path)
        differing = [key for key in plain if before.get("arguments", {}).get(key) != plain[key]]
        if differing:
            raise ValueError(f"{folder} holds an evaluation with other {', '.join(differing)}; choose another --out")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds something that is not an evaluation; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    note = {"arguments": plain, "versions": versions | {"hf_longctx": __version__, "python": platform.python_version()}, "machine": machine}
    if plain["data"] == BUILT_IN:
        note["text"] = built_in_source()
    files.write_json(path, note)


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of an earlier, stopped call; failed ones are tried again, a line cut short is dropped."""
    path = folder / "results.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["metric"] != "failed":
            rows.append(row)
    return rows


def _finished(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, int]]:
    return {(row["model"], row["task"], row["length"]) for row in rows}


def _append(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows of one task and length in one write, so that a stop leaves none of them or all."""
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def _changes(rows: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Paired differences: tail perplexity against each shorter length of the same model, everything against the baseline."""
    main = [row for row in rows if row.get("values") and row["depth"] is None]
    found = []
    for row in main:
        for other in main:
            if row["task"] != other["task"] or len(row["values"]) != len(other["values"]):
                continue
            same_model = row["model"] == other["model"]
            if same_model and row["task"].startswith("tail_perplexity") and other["length"] < row["length"]:
                found.append(_change(row, other, f"change_from_{other['length']}", seed))
            elif not same_model and row["length"] == other["length"] and row["model"] == rows[0]["model"]:
                found.append(_change(row, other, "change_from_baseline", seed))
    return found


def _change(row: Mapping[str, Any], other: Mapping[str, Any], metric: str, seed: int) -> dict[str, Any]:
    """The mean paired difference; for perplexities the relative change of the perplexity."""
    difference = np.array(row["values"]) - np.array(other["values"])
    relative = row["metric"] == "perplexity"

    def statistic(index: np.ndarray) -> float:
        mean = float(difference[index].mean())
        return float(np.expm1(mean)) if relative else mean

    low, high = bootstrap(statistic, row["clusters"], seed)
    value = statistic(np.arange(len(difference)))
    kept = {k: v for k, v in row.items() if k not in ("values", "clusters")}
    return kept | {"metric": metric, "value": value, "ci_low": low, "ci_high": high, "n": len(difference), "seconds": 0.0}


def _finish(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from hf_longctx.reporting import plot_results

    plain = [{column: row.get(column) for column in COLUMNS} for row in rows]
    files.write_json(folder / "results.json", plain)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(plain)
    plot_results(plain, folder)
