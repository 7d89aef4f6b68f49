"""`longctx`: parsing and printing only. Everything heavy is imported inside the command that needs it."""

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_longctx import __version__

app = typer.Typer(
    name="longctx", add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Give a language model a longer context window than it was trained with, cheaply, and prove it.",
)  # fmt: skip
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 1000)  # piped, tables are not squeezed
err = Console(stderr=True, soft_wrap=True, highlight=False)



def _method_names() -> list[str]:
    from hf_longctx.method import method_names

    return method_names()


def _task_names() -> list[str]:
    from hf_longctx.task import GROUPS, task_names

    return [*task_names(), *GROUPS]


def _recipe_names() -> list[str]:
    from hf_longctx.recipe import recipe_names

    return recipe_names()


def _complete(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """What the shell offers for a word begun."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, an adapter folder or a .gguf file.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "-m", "--method", metavar="NAME[:key=value,...]", autocompletion=_complete(_method_names),
        help="A method (`longctx methods` lists them); may be repeated. Values are YAML, or @file.",
    ),
]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub; default: the main branch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Base = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Where an adapter's base model is, if it has moved; default: what the adapter remembers.")]


_GOES_ON = "interrupted; the same command goes on"


def main() -> None:
    """Run the command line and exit: 0 done, 1 a run failed, 2 wrong input, 130 interrupted and resumable."""
    _quiet()
    try:
        status = app(standalone_mode=False)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        _fail(str(error), 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the parser
            _fail(error.format_message(), 2)
        if isinstance(error.__cause__, EOFError):  # the parser takes the end of any file for Ctrl-D
            error = error.__cause__
        elif type(error).__name__ == "Abort":  # what older parsers make of Ctrl-C
            _fail("interrupted", 130)
        _fail(f"{type(error).__name__}: {error} (LONGCTX_TRACEBACK=1 shows where)", 1)
    if status == 130:  # what the parser makes of Ctrl-C
        _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    if os.environ.get("LONGCTX_TRACEBACK"):
        traceback.print_exc()
    if status != 2 or _is_first():  # wrong input is so to every process
        err.print(f"longctx: {' '.join(message.split())}", markup=False)
    sys.exit(status)


def _is_first() -> bool:
    """Of several processes of torchrun, the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _quiet() -> None:
    """Libraries' progress bars and advice would bury the few lines that we print."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::UserWarning")
    logging.basicConfig(level=logging.WARNING, format="longctx: %(message)s")
    for noisy in ("httpx", "huggingface_hub", "datasets", "matplotlib", "torch", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@app.callback(invoke_without_command=True)
def _version(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)


def parse_spec(text: str) -> dict[str, Any]:
    """`yarn:factor=4,beta_fast=16` -> {"name": "yarn", "factor": 4, "beta_fast": 16}; commas inside [ ] and { } do not split."""
    from hf_longctx.recipe import parse_value

    name, _, rest = text.partition(":")
    values: dict[str, Any] = {"name": name.strip()}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: expected key=value, got {part!r}")
        key = key.strip()
        if key in values:
            raise ValueError(f"{text!r}: {key} is given twice" if key != "name" else f"{text!r}: the name goes before the colon")
        values[key] = parse_value(value)
    return values


def _split(text: str) -> Iterator[str]:
    """Parts between commas that stand outside brackets and quotes."""
    depth, part, quote = 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and part[-1:] in ("=", "[", "{", ",", ":", " "):  # elsewhere it is an apostrophe
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0 and not quote:
            yield part
            part = ""
        else:
            part += letter
    if part:
        yield part


def _specs(texts: list[str] | None) -> list[dict[str, Any]]:
    return [parse_spec(text) for text in texts or []]


def _lines(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for key, value in values.items():
        out.print(f"{key:{width}}  {value}", markup=False)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    shown = Table(box=None, pad_edge=False)
    for column in head:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    out.print(shown)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", autocompletion=_complete(_method_names), help="Describe one method, with --plot also NAME:key=value,...; default: list them all.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it for a common shape: bias and kernel by distance in tokens, factor on logits, vectors, frequencies or coverage.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or describe or draw one: fields, slot, formula, paper, picture."""
    from hf_longctx.method import describe, method_class, method_names

    if plot:
        _plot_method(name, plot, as_json)
        return
    if name and ":" in name:
        raise ValueError(f"{name!r}: values are for --plot FILE.png; to describe a method give its name alone")
    found = [describe(method_class(each)) for each in ([name] if name else method_names())]
    if as_json:
        out.print_json(json.dumps(found[0] if name else found))
    elif name:
        _describe(found[0])
    else:
        _table(("method", "slot", "fields", "paper"), [[each["name"], ", ".join(each["slots"]), ", ".join(each["fields"]), each["paper"]] for each in found])


def _plot_method(name: str | None, picture: Path, as_json: bool) -> None:
    from hf_longctx.method import load_method
    from hf_longctx.schema import format_size

    if name is None:
        raise ValueError("--plot draws one method: give NAME[:key=value,...]; `longctx methods` lists them")
    chosen = load_method(parse_spec(name))
    from hf_longctx.method_plot import plot_method  # costs torch

    found = plot_method(chosen, picture)
    if as_json:
        out.print_json(json.dumps(found))
        return
    if "receptive_field" in found:
        length = format_size(found["length"])
        out.print(f"receptive field: the distance within which 99 % of the kernel's mass lies, over distances below {length}", markup=False)
        out.print(f"the kernel's sum over all distances {'converges' if found['converges'] else 'does not converge'}", markup=False)
        fields = [f"beyond {length}" if field is None else f"{field:,}" for field in found["receptive_field"]]
        alike = [list(group) for _, group in groupby(enumerate(fields, start=1), key=itemgetter(1))]
        heads = [f"{run[0][0]}-{run[-1][0]}" if len(run) > 1 else str(run[0][0]) for run in alike]
        _table(("head", "receptive field (tokens)"), [[which, run[0][1]] for which, run in zip(heads, alike, strict=True)])
    out.print(str(picture), markup=False)


def _describe(found: dict[str, Any]) -> None:
    _lines({"method": found["name"], "slot": ", ".join(found["slots"]), "paper": found["paper"], "formula": found["formula"]})
    for field, default in found["fields"].items():
        out.print(f"  {field} = {'(required)' if field in found['required'] else default}", markup=False)


@app.command()
def inspect(model: Model, as_json: AsJson = False, revision: Revision = None) -> None:
    """Family, trained window, RoPE, methods applied, and who can load it."""
    _quiet_transformers()
    from hf_longctx.checkpoint import inspect_model
    from hf_longctx.evaluation import spelled
    from hf_longctx.method import load_methods

    facts = inspect_model(model, revision=revision)
    if as_json:
        out.print_json(json.dumps(facts))
        return
    methods = ", ".join(spelled(method) for method in load_methods(facts["methods"]))
    plain = facts | {"methods": methods or "none", "window": facts["window"] or "none", "loads_with": ", ".join(facts.get("loads_with", []))}
    _lines({key.replace("_", " "): _in_words(value) for key, value in plain.items()})


def _in_words(value: Any) -> str:
    """On one line: what a dictionary says, and of a long list of numbers from where to where they go."""
    if isinstance(value, dict):
        return ", ".join(f"{key} ({said})" if isinstance(each, dict) else f"{key} {said}" for key, each in value.items() for said in [_in_words(each)])
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"{min(value):g} to {max(value):g} ({len(value)} numbers)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


@app.command()
def patch(
    model: Model, method: Methods, out_folder: Out, overwrite: Overwrite = False, revision: Revision = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="For methods that are calibrated: training text (.txt .jsonl .parquet), token ids (.npz) or a hub dataset.")] = None,
) -> None:
    """Write MODEL with another position handling or other step sizes; weights are linked or copied, and loaded only to calibrate."""
    _quiet_transformers()
    from hf_longctx.checkpoint import inspect_model
    from hf_longctx.checkpoint import patch as run
    from hf_longctx.method import method_names
    from hf_longctx.schema import format_size

    run(model, _specs(method), out_folder, revision=revision, overwrite=overwrite, data=data)
    facts = inspect_model(out_folder)
    names = ", ".join(m["name"] for m in facts["methods"])
    if all(m["name"] in method_names("delta") for m in facts["methods"]):
        out.print(f"{out_folder}: step sizes changed by {names}; proved", markup=False)
        return
    out.print(f"{out_folder}: window {format_size(facts['trained_window'])} -> {format_size(facts['window'])} by {names}; proved", markup=False)


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", autocompletion=_complete(_recipe_names), help="A .yaml file, or the name of a shipped recipe.")],
    out_folder: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="The folder for checkpoints and the result; needed unless --dry-run.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, e.g. methods.0.factor=8; may be repeated. VALUE is YAML, or @file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve everything, show it (memory in GiB, lengths in tokens), with ./coverage.png where positions are chosen, and train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    overwrite: Overwrite = False,
    num_gpus: Annotated[int, typer.Option("--num-gpus", min=1, help="Start this many processes, one a GPU.")] = 1,
) -> None:
    """Train as RECIPE says: LoRA at a short window with skip-wise positions or passed states, or whatever the recipe asks for."""
    _quiet_transformers()
    from hf_longctx import hub, planning, training
    from hf_longctx.recipe import read_recipe

    found = read_recipe(recipe, changes or [])
    if dry_run:
        if num_gpus > 1:
            os.environ["WORLD_SIZE"] = str(num_gpus)  # as torchrun will: a step takes a batch from each process
        _show_plan(planning.dry_run(found))
        return
    if out_folder is None:
        raise ValueError("give --out FOLDER, or --dry-run")
    if resume and overwrite:
        raise ValueError("--resume goes on with what --out holds and --overwrite throws it away; give one of them")
    if num_gpus > 1 and "LOCAL_RANK" not in os.environ:
        _launch(num_gpus)
        return
    with _told():
        training.finetune(found, out_folder, resume=resume, overwrite=overwrite)
    if not _is_first():
        return
    out.print(f"{out_folder}: {'an adapter' if found.lora is not None else 'a model'}", markup=False)
    pushed = hub.trainer_options(found, out_folder)
    if pushed:
        out.print(f"{out_folder}: pushed to the hub", markup=False)
    if found.eval is None:
        return
    failed = _evaluate_after(found, out_folder)
    if pushed and (out_folder / "eval" / "results.json").is_file():
        hub.push(out_folder, results=out_folder / "eval", **pushed)
        out.print(f"{out_folder}: its evaluation is in the card", markup=False)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _told() -> Iterator[None]:
    """Say how to go on after what stops long runs: Ctrl-C and a full disk."""
    try:
        yield
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted", 130)
    except Exception as error:
        # safetensors says it in words, torch.save only that it is not where it should be in the file
        if getattr(error, "errno", None) != errno.ENOSPC and not any(words in str(error) for words in ("No space left", "unexpected pos")):
            raise
        err.print("longctx: the disk is full; earlier checkpoints are whole: free some room, then add --resume", markup=False)
        raise typer.Exit(1) from None


def _launch(processes: int, interrupted: str = "interrupted; add --resume to go on") -> None:
    """The same command under torchrun."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    before = ["", *sys.argv[1:]]
    arguments = [a for a, last in zip(before[1:], before, strict=False) if last != "--num-gpus" and a.partition("=")[0] != "--num-gpus"]
    try:
        torchrun(["--standalone", "--nproc-per-node", str(processes), "-m", "hf_longctx.cli", *arguments])
    except ChildFailedError as error:  # the processes have said why
        raise typer.Exit(2 if error.get_first_failure()[1].exitcode == 2 else 1) from None
    except SignalException:
        _fail(interrupted, 130)


def _evaluate_after(recipe: Any, folder: Path) -> bool:
    """Measure the result as the recipe's `eval` says, into FOLDER/eval; True if something failed."""
    from hf_longctx.checkpoint import inspect_model

    spec = recipe.eval
    facts = inspect_model(folder)
    lengths = list(spec.lengths) or _default_lengths(facts, recipe.window)
    try:
        return _run_evaluation(str(folder), list(spec.tasks), lengths, folder / "eval", data=spec.data, device=None)
    except Exception as error:  # the training is done and saved, whatever becomes of this
        if os.environ.get("LONGCTX_TRACEBACK"):
            traceback.print_exc()
        message = f"longctx: {folder} is saved; its evaluation failed: {' '.join(str(error).split()) or type(error).__name__}; `longctx eval {folder}` measures it"
        err.print(message, markup=False)
        return True


def _default_lengths(facts: dict[str, Any], training_window: int) -> list[int]:
    """From the trained window to the present one; where there is none, as in state-space models, to 16 times the training window."""
    high = facts["window"] or 16 * training_window
    lengths = [facts.get("trained_window") or facts["window"] or training_window]
    while lengths[-1] * 2 <= high:
        lengths.append(lengths[-1] * 2)
    return lengths


def _show_plan(found: dict[str, Any]) -> None:
    from hf_longctx.reporting import plot_coverage
    from hf_longctx.schema import format_size

    window, coverage = format_size(found["window"]), found["coverage"]
    trained = f"trained window {format_size(found['trained_window'])}" if found["trained_window"] else "no window"
    facts = {
        "model": f"{found['model']} ({found['family']}, {trained})",
        "methods": "; ".join(_short(m) for m in found["methods"]) or "none",
        "positions": _short(found["sampler"]) if found["sampler"] else None,
        "states": _states(found["state"]) if found["state"] else None,
        "window": f"{window} -> positions up to {format_size(found['target'])}" if coverage else window,
        "data": f"{found['documents']:,} documents, {found['windows']:,} windows, {found['dropped']:,} documents dropped as too short",
        "run": f"{found['steps']:,} steps x {found['batch']} windows = {found['tokens']:,} tokens, {found['epochs']:.2f} epochs",
        "memory": ", ".join(f"{name} {size:.2f}" for name, size in found["memory"].items()) + " GiB (estimate)",
    }
    _lines({key: value for key, value in facts.items() if value is not None})
    places = "positions" if found["sampler"] else "tokens"
    for number, sample in enumerate(found["samples"]):
        out.print(f"sample {number}  {sample['labels']} labels", markup=False)
        for chunk in sample["chunks"]:
            out.print(f"  {places} {chunk['positions'][0]:>7}-{chunk['positions'][1]:<7} {chunk['text']!r}", markup=False)
        if sample["more"]:
            out.print(f"  and {sample['more']} more chunks", markup=False)
    if coverage is None:
        return
    bins = " ".join(f"{share:.3f}" for share in coverage["bins"])
    out.print(f"coverage of relative distances: share of examples that contain them, in 16 equal bins\n  {bins}", markup=False)
    out.print(f"  last half window {coverage['last_window']:.4f}; never met in {coverage['draws']} draws {coverage['never']:.1%}; pairs beyond the window {coverage['far_pairs']:.1%}", markup=False)
    picture = Path.cwd() / "coverage.png"  # not in --out, which has to be free when the run starts
    plot_coverage(coverage, found["window"], picture, f"{found['sampler']['name']}, {window} -> {format_size(found['target'])}")
    out.print(f"  {picture}", markup=False)


def _states(found: dict[str, Any]) -> str:
    """How states are passed, in words."""
    order = f"{found['lanes']} lanes of {found['windows_per_lane']:,.1f} windows an epoch" if found["lanes"] else "windows in random order"
    return f"{_short(found['method'])}; {order}, of which {found['fresh']:.1%} begin a text"


def _short(spec: dict[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name" and not isinstance(value, list))
    return f"{spec['name']} ({options})" if options else str(spec["name"])


@app.command()
def merge(adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="What finetune wrote.")], out_folder: Out, base: Base = None, overwrite: Overwrite = False) -> None:
    """Fold an adapter into its base: a stock checkpoint with the scaled configuration."""
    _quiet_transformers()
    from hf_longctx.checkpoint import inspect_model
    from hf_longctx.checkpoint import merge as run
    from hf_longctx.schema import format_size

    run(adapter, out_folder, base=base, overwrite=overwrite)
    facts = inspect_model(out_folder)
    out.print(f"{out_folder}: {facts['family']}, window {format_size(facts['window'])}; loads with {', '.join(facts['loads_with'])}", markup=False)


@app.command("eval")
def evaluate(
    model: Model,
    lengths: Annotated[str, typer.Option("--lengths", metavar="SIZE,...", help="Context lengths in tokens, answers included, e.g. 2k,8k,32k (2k: 2048).")],
    out_folder: Out,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="NAME[:key=value,...]", autocompletion=_complete(_task_names),
            help="What to measure; may be repeated. Values are YAML, or @file. `ruler` stands for RULER's. Default: passkey and perplexity.",
        ),
    ] = None,
    method: Methods = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="For tasks that need text: text (.txt .jsonl .parquet), token ids (.npz) or a hub dataset; default: Python's own documentation.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", metavar="MODEL", help="A second model, on the same cells; differences are paired.")] = None,
    revision: Revision = None,
    base: Base = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cpu, ...; default: the accelerator if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; default: the checkpoint's, float32 on the CPU.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides keys, depths and resampling.")] = 0,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences a forward pass; default: as many as fill 65,536 tokens on a GPU, 4,096 on the CPU.")] = None,
    chunk: Annotated[str | None, typer.Option("--chunk", metavar="SIZE", help="Tokens of a sequence a forward pass, e.g. 4k; default: state-space models in chunks, others at once.")] = None,
    cache: Annotated[str, typer.Option("--cache", metavar="KIND", help="Where keys and values of chunks are held: dynamic (in the model's dtype), offloaded (host memory) or quantized (4 bits).")] = "dynamic",
    num_gpus: Annotated[int, typer.Option("--num-gpus", min=1, help="Start this many processes, one a GPU, that share the work.")] = 1,
) -> None:
    """Measure MODEL by tasks at lengths; a stopped run goes on where it stopped. Results tell time in seconds and memory in GiB."""
    _quiet_transformers()
    if num_gpus > 1 and "LOCAL_RANK" not in os.environ:
        _launch(num_gpus, _GOES_ON)
        return
    tasks = _specs(task) or [{"name": "passkey"}, {"name": "perplexity"}]
    lengths_asked = [part.strip() for part in lengths.split(",")]
    try:
        failed = _run_evaluation(
            model, tasks, lengths_asked, out_folder, data=data, methods=_specs(method), baseline=baseline, revision=revision, base=base, device=device,
            dtype=dtype, seed=seed, batch_size=batch_size, chunk=chunk, cache=cache, together=int(os.environ.get("WORLD_SIZE", "1")) > 1,
        )  # fmt: skip
    except KeyboardInterrupt:
        _fail(_GOES_ON, 130)
    if failed:
        raise typer.Exit(1)


def _run_evaluation(model: str, tasks: list[Any], lengths: list[Any], folder: Path, **options: Any) -> bool:
    """Evaluate with a progress bar, print the table; True if something failed."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from hf_longctx.evaluation import built_in_source
    from hf_longctx.evaluation import evaluate as run
    from hf_longctx.reporting import table
    from hf_longctx.task import load_tasks

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal or not _is_first()) as bar:
        shown: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                for old in shown.values():
                    bar.update(old, visible=False)
                shown[what] = bar.add_task(what, total=total)
            bar.update(shown[what], completed=done)

        rows = run(model, tasks, lengths, out=folder, progress=progress, **options)
    failed = any(row["metric"] == "failed" for row in rows)
    if not _is_first():
        return failed
    if not options.get("data") and any(task.needs_text for task in load_tasks(tasks)):
        out.print(f"text: {built_in_source()}", markup=False)
    head, *lines = table(rows)
    _table(head, lines)
    out.print(f"{folder}: results.json, results.csv, pictures", markup=False)
    return failed


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that eval wrote.")],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    kept: Annotated[float, typer.Option("--kept", metavar="SHARE", help="The effective length is the longest whose score is at least this share, 0 to 1, of the score at --reference.")] = 0.85,
    reference: Annotated[str, typer.Option("--reference", metavar="SIZE", help="See --kept; where it was not measured, the shortest length that was.")] = "2k",
) -> None:
    """Show evaluations side by side in one HTML file that needs no network: tables, heat maps, curves, what failed, what they were made from."""
    from hf_longctx.html_report import write_report

    written = write_report(folders, out_file, overwrite=overwrite, kept=kept, reference=reference)
    _show_effective_lengths(folders, kept, reference)
    out.print(f"{written}: {len(folders)} evaluation{'s' * (len(folders) > 1)}", markup=False)


def _show_effective_lengths(folders: list[Path], kept: float, reference: str) -> None:
    from hf_longctx.files import read_json
    from hf_longctx.reporting import effective_head, effective_lengths, effective_text
    from hf_longctx.schema import parse_size

    size, lines = parse_size(reference), []
    for folder in folders:
        found = effective_lengths(read_json(folder / "results.json"), kept, size)  # type: ignore[arg-type]
        lines += [[*key, effective_text(each, size)] for key, each in found.items()]
    if lines:
        _table(("model", "task", "metric", effective_head(kept, size)), lines)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model or an adapter: what patch, finetune or merge wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="name/model on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="The branch; made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of writing to the default branch.")] = False,
    base: Annotated[str | None, typer.Option("--base", metavar="HUB_ID", help="The base model on the hub, where the adapter was trained on a local copy.")] = None,
    results: Annotated[list[Path] | None, typer.Option("--results", help="A folder of `longctx eval`, for the model card; may be repeated.")] = None,
) -> None:
    """Upload DIR with a model card; a push that broke off goes on when it is repeated."""
    _quiet_transformers()
    from huggingface_hub.utils import disable_progress_bars

    from hf_longctx.hub import push as run

    if not err.is_terminal:
        disable_progress_bars()
    url = run(folder, repo_id, private=private, revision=revision, create_pr=create_pr, base=base, results=results or ())
    out.print(f"{folder}: {url}", markup=False)


@app.command()
def demo(out_folder: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("longctx-demo")) -> None:
    """The whole pipeline on a tiny built-in model: measure, patch, fine-tune, measure again. Minutes on a laptop CPU."""
    _quiet_transformers()
    from hf_longctx.demo import run

    run(out_folder, lambda line: out.print(line, markup=False))


@app.command()
def schema() -> None:
    """The recipe's JSON schema, for editors: `longctx schema > recipe.schema.json`."""
    from hf_longctx.recipe import json_schema

    out.print_json(json.dumps(json_schema()))
