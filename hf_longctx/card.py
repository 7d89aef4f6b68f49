"""The model card, README.md: what a checkpoint folder, its recipe and evaluations of it say, in text and in metadata.

The generated text stands between two markers. Everything outside of them, and metadata that is not generated, is kept.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from hf_longctx import __version__, files
from hf_longctx.checkpoint import inspect_model
from hf_longctx.evaluation import spelled
from hf_longctx.method import in_slot, load_methods, method_names
from hf_longctx.provenance import in_words
from hf_longctx.recipe import Recipe, parse_recipe
from hf_longctx.reporting import check_results, plot_results, table
from hf_longctx.schema import format_size

BEGIN = "<!-- longctx:begin (made by `longctx push`; changes down to longctx:end are lost, everything else is kept) -->"
END = "<!-- longctx:end -->"
PICTURES = "longctx"  # the folder of the repository for them
LOCAL = "(local)"
_DATA_FILES = (".npz", ".txt", ".jsonl", ".parquet", ".gguf", ".json", ".yaml")
_LICENSE = ("license", "license_name", "license_link")
_OURS = "longctx eval "  # begins the task name of generated evaluation results


class Base(NamedTuple):
    """The model that another was made from: its hub id and commit, as far as they are known."""

    name: str | None = None
    revision: str | None = None


class Evaluation(NamedTuple):
    """One folder of `longctx eval`, with names in the place of local paths."""

    rows: list[dict[str, Any]]
    about: str
    text: str
    pictures: dict[str, bytes]  # by their place in the repository


def looks_like_hub_id(name: str) -> bool:
    """Whether a hub repository can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith(_DATA_FILES)


def is_hub_id(name: str) -> bool:
    """Whether `name` means the same to others: the id of a hub repository, and not a file or folder here."""
    return looks_like_hub_id(name) and not Path(name).exists()


def public_recipe(recipe: Recipe, base: str | None) -> Recipe:
    """`recipe` as others may read it: local paths become "(local)", and what of `train` holds a path or is about the hub goes."""

    def public(name: str | None) -> str | None:
        return name if name is None or is_hub_id(name) else LOCAL

    values = recipe.to_dict()
    model, train = values["model"], values["train"]
    model["name"] = base if base and model["name"] else public(model["name"])
    model["tokenizer"] = public(model["tokenizer"])
    for source in values["data"]:
        source["path"] = public(source["path"])
    for key in ("eval", "probe"):
        if values[key]:
            values[key]["data"] = public(values[key]["data"])
    values["train"] = {key: value for key, value in train.items() if not key.startswith(("hub_", "push_")) and not set("/\\") & set(str(value))}
    return parse_recipe(values)


# --- evaluations


def _read_evaluations(folders: Sequence[Path], name: str, method: str) -> list[Evaluation]:
    """The results in `folders`, with `name` for the model that each is about, and plots drawn anew, since labels may hold paths.

    The model that an evaluation is about is the first of its run.json, if it has the same `method`; baselines keep their names.
    """
    found = []
    for number, folder in enumerate(folders, 1):
        run = files.read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
        rows: list[dict[str, Any]] = list(files.read_json(folder / "results.json"))  # type: ignore[arg-type]
        names = _public_labels(rows, run, name, method)
        rows = [row | {"model": names[row["model"]], "ours": names[row["model"]] == name} for row in rows]
        found.append(Evaluation(rows, _about(run, rows), _text_of(run), _pictures(rows, "" if len(folders) == 1 else f"{number}-")))
    return found


def _public_labels(rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any], name: str, method: str) -> dict[str, str]:
    """What each model of the rows is called in public; two never share a name."""
    subjects = run.get("arguments", {}).get("models") or [[None]]
    names: dict[str, str] = {}
    for label, used in {row["model"]: row["method"] for row in rows}.items():
        model, *methods = label.split(" + ")
        shown = model if is_hub_id(model.partition("@")[0]) else Path(model).name
        chosen = name if label == subjects[0][0] and used == method else " + ".join([shown, *methods])
        while chosen in names.values():
            chosen += "'"
        names[label] = chosen
    return names


def _text_of(run: Mapping[str, Any]) -> str:
    """The text of an evaluation: Python's documentation with its hash, a data set's id, or "(local)"."""
    data = run.get("arguments", {}).get("data")
    return str(data) if not isinstance(data, Mapping) else data["path"] if is_hub_id(data["path"]) else f"{LOCAL} {Path(data['path']).suffix}".strip()


def _about(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"text: {_text_of(run)}"] + [f"{key}: {', '.join(sorted({str(row[key]) for row in rows}))}" for key in ("seed", "dtype")]
    parts += [f"machine: {run['machine']}"] if "machine" in run else []
    return "; ".join(parts + in_words(run))


def _pictures(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {f"{PICTURES}/{prefix}{path.name}": path.read_bytes() for path in plot_results(rows, Path(folder))}


def _eval_results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """The overall numbers of this model as the hub's metadata."""
    kept = ("n", "seed", "ci_low", "ci_high", "dtype", "tokenizer")
    return [
        EvalResult(
            task_type="text-generation", task_name=_OURS + row["task"], dataset_type=row["task"], dataset_name=f"{row['task']}, text: {each.text}",
            dataset_config=f"{format_size(row['length'])} tokens", metric_type=row["metric"], metric_value=round(row["value"], 4),
            metric_name=f"{row['metric']} at {format_size(row['length'])}", metric_args={key: row[key] for key in kept if row[key] is not None},
        )
        for each in evaluations
        for row in each.rows
        if row["ours"] and row["depth"] is None and row["length"] and row["metric"] in ("accuracy", "perplexity")
    ]  # fmt: skip


# --- the card


class Card(NamedTuple):
    """A README.md and the pictures that it shows, by their place in the repository."""

    text: str
    pictures: dict[str, bytes]


def make_card(
    folder: str | Path, repo_id: str, *, base: Base | None = None, recipe: Recipe | None = None, results: Sequence[str | Path] = (),
    revision: str | None = None, license_from: Sequence[str | Path] = (), existing: str = "",
) -> Card:  # fmt: skip
    """The model card of a checkpoint folder.

    Args:
        folder: a model or an adapter.
        repo_id: where it will be.
        base: the model it was made from.
        recipe: what it was trained with, as `public_recipe` makes it.
        results: folders of `longctx eval`. Numbers belong to the weights that they were measured on: those of an earlier
            card are not kept.
        revision: the branch of `repo_id`, for the lines that load it.
        license_from: folders and hub ids whose card names the licence; the first that does counts.
        existing: the README.md to keep a person's parts of; without our markers it is kept whole, and ours is appended.

    Raises:
        ValueError: `folder` holds no model, a result is missing, `existing` has broken markers or metadata.
    """
    path, base = Path(folder), base or Base()
    facts = inspect_model(path)
    method = " + ".join(spelled(item) for item in load_methods(facts["methods"]))
    name = repo_id.rpartition("/")[2]
    found = _read_evaluations(check_results(results), name, method)
    sections = [
        _title(name, facts, base, method), _loading(facts, repo_id, revision), _making(path, facts, base, method, recipe), _evaluation(found), _limits(facts, found)
    ]  # fmt: skip
    data = ModelCardData(
        base_model=base.name, library_name="peft" if facts["kind"] == "adapter" else "transformers", pipeline_tag="text-generation",
        tags=["hf-longctx", "long-context", *(item["name"] for item in facts["methods"]), *(["lora"] if facts["kind"] == "adapter" else [])],
        datasets=[each.path for each in recipe.data if is_hub_id(each.path)] or None if recipe else None,
        model_name=name, eval_results=_eval_results(found) or None,
    )  # fmt: skip
    for key, value in _license(license_from).items():
        data[key] = value
    if base.name:
        data["base_model_relation"] = "adapter" if facts["kind"] == "adapter" else "finetune"
    return Card(_merge(existing, "\n\n".join(sections), data), {place: image for each in found for place, image in each.pictures.items()})


def _title(name: str, facts: Mapping[str, Any], base: Base, method: str) -> str:
    what = f"`{base.name}`" if base.name else f"A {facts['family']} model"
    if facts["state"] and facts["window"] is None:
        what = f"A LoRA adapter for {what}" if facts["kind"] == "adapter" else what
        return f"# {name}\n\n{what}" + (f" with `{method}`" if method else "") + ": a state-space model, which has no window and no positions."
    what = f"A LoRA adapter that gives {what}" if facts["kind"] == "adapter" else f"{what} with"
    window = f"a context window of {format_size(facts['window'])} tokens" if facts.get("window") else "a context window of its own"
    before = ""
    if "trained_window" in facts and method:
        moved = facts["window"] != facts["trained_window"]
        before = f" instead of {format_size(facts['trained_window'])}, by `{method}`" if moved else f" and with `{method}`"
    return f"# {name}\n\n{what} {window}{before}."


def _loading(facts: Mapping[str, Any], repo_id: str, revision: str | None) -> str:
    place = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    if facts["kind"] == "adapter":
        lines = ["import hf_longctx  # pip install hf-longctx", "", f"model, tokenizer = hf_longctx.load({place})  # base, patch and adapter"]
    else:
        plugin = ["import hf_longctx  # pip install hf-longctx; knows this model_type"] if facts["needs_plugin"] else []
        lines = [*plugin, "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f"{key} = {auto}.from_pretrained({place})" for key, auto in (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer"))]
    return "\n".join(["## How to load it", "", "```python", *lines, "```", "", f"Read by: {', '.join(facts['loads_with'])}."])


def _making(path: Path, facts: Mapping[str, Any], base: Base, method: str, recipe: Recipe | None) -> str:
    rows = {"base model": f"`{base.name}`" + (f" at `{base.revision}`" if base.revision else "") if base.name else None, "family": facts["family"]}
    rows |= {"method": f"`{method}`" if method else "none"}
    if "trained_window" in facts:
        rows["window"] = f"{format_size(facts['trained_window'])} -> {format_size(facts['window'])} tokens"
    if recipe is not None:
        rows |= _training(path, recipe)
    lines = ["| | |", "| --- | --- |", *(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value)]
    return "\n".join(["## How it was made", "", *lines, "", f"Written by hf-longctx {__version__}."])


def _training(path: Path, recipe: Recipe) -> dict[str, str]:
    """What the recipe says, and what became of it."""
    positions, source = (in_slot(recipe.load_methods(), slot) for slot in ("positions", "state"))
    lora = recipe.lora
    rows = {
        "trained": "every weight" if lora is None else "LoRA, " + ", ".join(f"{key} {lora[key]}" for key in ("r", "lora_alpha", "target_modules") if key in lora),
        "also trained": ", ".join(recipe.also_train), "training window": f"{format_size(recipe.window)} tokens",
        "training positions": f"`{spelled(positions)}`" if positions else "", "windows start from": f"`{spelled(source)}`" if source else "", "distillation": f"{recipe.distill:g}" if recipe.distill else "",
        "data": "; ".join(LOCAL if each.path == LOCAL else " ".join(filter(None, (each.path, each.name, each.split))) for each in recipe.data), "seed": str(recipe.seed),
        "recipe": f"[{files.RECIPE}]({files.RECIPE})",
    }  # fmt: skip
    if (path / files.TRAINING).is_file():
        run = files.read_json(path / files.TRAINING)
        rows["tokens"] = f"{run['steps']:,} steps, {run['tokens']:,} tokens"
        rows["hardware"] = f"{run['processes']} x {run['machine']}; " + ", ".join(in_words(run))
    return rows


def _evaluation(found: Sequence[Evaluation]) -> str:
    parts = ["## Evaluation"]
    for each in found:
        head, *lines = (" | ".join(map(_cell, line)) for line in table(each.rows))
        parts.append("\n".join([f"| {head} |", "|" + " --- |" * (head.count(" | ") + 1), *(f"| {line} |" for line in lines)]))
        parts += [f"In brackets: 95 % intervals. {each.about}.", *(f"![{Path(place).stem}]({place})" for place in each.pictures)]
    return "\n\n".join(parts if found else [*parts, "No evaluation came with this upload."])


def _limits(facts: Mapping[str, Any], found: Sequence[Evaluation]) -> str:
    lines = []
    window = facts.get("window")
    measured = max((row["length"] or 0 for each in found for row in each.rows if row["ours"] and row["value"] is not None), default=0)
    if window and measured < window:
        lines.append(f"Measured up to {format_size(measured)} of {format_size(window)} tokens." if measured else f"Not measured at {format_size(window)} tokens.")
    if any(not item.static for item in load_methods(facts["methods"])):
        lines.append("Its frequencies depend on the length seen: keys in a cache were rotated by those of their time.")
    if facts["kind"] == "adapter" and facts["methods"]:
        steps = all(item.slots == ("delta",) for item in load_methods(facts["methods"]))
        carries, old = ("no step sizes", "ones") if steps else ("no RoPE", "window")
        lines.append(f"A LoRA adapter carries {carries}: `PeftModel.from_pretrained` on the unpatched base silently runs with the old {old}. Load it as above, or merge it.")
    lines.append("A longer window says nothing about what the model does with it on tasks that are not listed here; biases of the base model remain.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _license(places: Sequence[str | Path]) -> dict[str, str]:
    """The licence keys of the first card that has any."""
    for place in places:
        readme = Path(place) / "README.md"
        if isinstance(place, Path) and not readme.is_file():
            continue
        try:
            card = ModelCard.load(readme if isinstance(place, Path) else place, ignore_metadata_errors=True)
        except Exception:  # somebody else's card: missing, unreachable or broken, it must not stop ours
            continue
        found = {key: value for key in _LICENSE if (value := card.data.get(key))}
        if found:
            return found
    return {}


def _merge(existing: str, body: str, data: ModelCardData) -> str:
    """`existing` with the part between the markers replaced, or appended, and generated metadata brought up to date."""
    try:
        card = ModelCard(existing if REGEX_YAML_BLOCK.search(existing) else f"---\n\n---\n{existing}")
    except Exception as error:  # YAML's errors share no base with ours
        raise ValueError(f"README.md: its metadata cannot be read: {str(error).splitlines()[0]}") from None
    markers = re.findall(r"<!-- longctx:(begin|end)\b.*?-->", card.text)
    if markers not in ([], ["begin", "end"]):
        raise ValueError("README.md: <!-- longctx:begin --> and <!-- longctx:end --> must stand there once each, in this order; repair them, or remove both")
    block = f"{BEGIN}\n\n{body}\n\n{END}"
    if markers:
        card.text = re.sub(r"<!-- longctx:begin\b.*?<!-- longctx:end\b.*?-->", lambda _: block, card.text, flags=re.S)
    else:
        card.text = f"{card.text.rstrip()}\n\n{block}\n" if card.text.strip() else f"{block}\n"
    _update(card.data, data)
    return str(card)


def _update(old: CardData, new: CardData) -> None:
    """What a person may have set better (licence, pipeline, name) stays; lists are united; the rest is replaced."""
    theirs = [each for each in old.get("eval_results", []) if not str(each.task_name).startswith(_OURS)]
    has_license = any(old.get(key) for key in _LICENSE)
    for key, value in new.__dict__.items():
        if value is None or key == "eval_results" or (key in _LICENSE and has_license) or (key in ("pipeline_tag", "model_name") and old.get(key)):
            continue
        if key in ("tags", "datasets"):
            before = old.get(key, [])
            stale = {"lora", *method_names("rope"), *method_names("delta")} - set(value)  # tags of an earlier card
            value = list(dict.fromkeys([*(each for each in ([before] if isinstance(before, str) else before) if each not in stale), *value]))
        old[key] = value
    old["eval_results"] = theirs + (new.get("eval_results") or []) or None
    if old["eval_results"] is None:
        old.pop("model_name")
