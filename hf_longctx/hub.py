"""push: a model, an adapter or a patched checkpoint to the hub, with its card, and nothing else from its folder.

Sending is huggingface_hub's: one commit, large files as they are on disk, each request tried again where that helps, and what
the hub has already is not sent again, so that a broken push is repeated to go on.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from hf_longctx import __version__, checkpoint, files
from hf_longctx.card import PICTURES, Base, is_hub_id, looks_like_hub_id, make_card, public_recipe
from hf_longctx.recipe import Recipe, dump_recipe, read_recipe
from hf_longctx.reporting import check_results

logger = logging.getLogger(__name__)
README = "README.md"
_MODEL = ("model*.safetensors", "model*.safetensors.index.json")
_ADAPTER = (files.ADAPTER, "adapter_model.safetensors", files.SIDECAR)
# By name and not by kind: whatever else lies there (trainer_state.json, notes.txt, training_args.bin) stays at home.
_BOTH = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt",
    "merges.txt", "tekken.json", "chat_template.json", "*processor_config.json", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
# What a loader would take for this model: left from an earlier push, it would be loaded in its place.
_REPLACED = (*_MODEL, *_ADAPTER, files.RECIPE, f"{PICTURES}/*.png")
_PATH_KEYS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"}


def push(
    model: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None, create_pr: bool = False, base: str | None = None,
    results: str | Path | Sequence[str | Path] = (),
) -> str:  # fmt: skip
    """Upload what `patch`, `finetune` or `merge` wrote, with a model card, in one commit. The folder is left as it is.

    Only the files of a model go up. Copies go up without the paths of this machine: of recipe.yaml the values that are local
    paths become "(local)", and adapter_config.json and longctx.json name the base by its hub id. The card keeps what a person
    wrote: it starts from the folder's README.md, or else from the repository's. Weights that an earlier push left in the
    repository and that would be loaded instead are deleted in the same commit. The token is huggingface_hub's (`HF_TOKEN`,
    `hf auth login`).

    Args:
        model: a folder with a model or an adapter.
        repo_id: `name/model`; made if it is not there.
        private: make it private.
        revision: the branch; made if it is not there.
        create_pr: open a pull request against the default branch.
        base: the hub id of the base model: needed for an adapter that was trained on a local folder, and named in the card.
        results: folders of `longctx eval`, for the card.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: no model in the folder; a base that others cannot find; a token that the hub refuses; a wrong `repo_id`;
            `private` for a repository that is public.
        ConnectionError: the hub was not reached, or the upload broke off: the same call goes on.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{model} is not a folder; give one that patch, finetune or merge wrote")
    if create_pr and revision:
        raise ValueError(f"a pull request is opened against the default branch: leave out either it or the revision {revision!r}")
    files.local_folder(folder)
    measured = check_results([results] if isinstance(results, str | Path) else results)
    recipe = read_recipe(folder / files.RECIPE) if (folder / files.RECIPE).is_file() else None
    found, local = _find_base(folder, base, recipe)
    content = _model_files(folder, found.name)
    if recipe is not None:
        recipe = public_recipe(recipe, found.name)
        content[files.RECIPE] = _dumped(recipe)
    api = HfApi(library_name="hf_longctx", library_version=__version__)
    with _explained(folder, repo_id):
        if base is not None and not api.repo_exists(base):
            raise ValueError(f"base: there is no model {base!r} on the hub that you can see")
    repo_id = open_repository(repo_id, private, revision)
    with _explained(folder, repo_id):
        there = api.list_repo_files(repo_id, revision=revision)
        existing = _readme(folder, repo_id, revision, README in there)
    places = [place for place in (local, found.name) if place is not None]
    card = make_card(folder, repo_id, base=found, recipe=recipe, results=measured, revision=revision, license_from=places, existing=existing)
    content |= {README: card.text.encode()} | card.pictures
    stale = [name for name in there if name not in content and any(fnmatch(name, pattern) for pattern in _REPLACED)]
    additions = [CommitOperationAdd(name, data) for name, data in sorted(content.items())]
    with _explained(folder, repo_id):
        info = api.create_commit(
            repo_id, [*additions, *map(CommitOperationDelete, stale)], revision=revision, create_pr=create_pr,
            commit_message=f"Upload {'an adapter' if files.ADAPTER in content else 'a model'} with longctx {__version__}",
        )  # fmt: skip
    if found.name is None:
        logger.warning("the card names no base model; base (--base) gives its hub id")
    return info.pr_url or info.commit_url


def open_repository(repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Make sure that `repo_id` is there and can be written to, and `revision` in it; return its full id.

    Raises:
        ValueError: the hub refuses it, or `private` is asked for and it is public.
        ConnectionError: the hub was not reached.
    """
    api = HfApi()
    with _explained(None, repo_id):
        full = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(full).private:
            raise ValueError(f"{full} is there already and is public; make it private on the hub first, or give another name")
        if revision and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(full, branch=revision, exist_ok=True)
    return full


def trainer_options(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The arguments of `push` that `train: {push_to_hub: true, hub_...}` of a recipe stands for; none without push_to_hub.

    Raises:
        ValueError: what cannot work, before anything is trained.
    """
    train = recipe.train
    if train.get("hub_token"):
        raise ValueError("train: hub_token would be saved with the run; leave it out, and set HF_TOKEN or run `hf auth login`")
    if not train.get("push_to_hub"):
        return {}
    if train.get("hub_always_push") or str(train.get("hub_strategy", "end")) != "end":
        raise ValueError("train: the result is pushed once, at the end; leave out hub_strategy and hub_always_push")
    name = recipe.model.name
    if recipe.lora is not None and name and not is_hub_id(name):
        raise ValueError(f"train: push_to_hub needs a base that others can find, and model.name is {name}; leave it out, then `longctx push {out} ... --base HUB_ID`")
    return {"repo_id": train.get("hub_model_id") or out.resolve().name, "private": bool(train.get("hub_private_repo")), "revision": train.get("hub_revision")}


def _find_base(folder: Path, given: str | None, recipe: Recipe | None) -> tuple[Base, Path | None]:
    """The base to name, and its folder here if it has one."""
    if given is not None and not looks_like_hub_id(given):
        raise ValueError(f"base must be the hub id of a model, got {given!r}")
    adapter = (folder / files.ADAPTER).exists()
    note = checkpoint.read_sidecar(folder) if adapter else {}
    known, revision = (note["base"], note["revision"]) if note else (recipe.model.name, _trained_revision(folder, recipe)) if recipe else (None, None)
    # An adapter remembers a local base by its absolute path, a recipe in the words of its writer.
    named = known is None or (looks_like_hub_id(known) if note else is_hub_id(known))
    local = None if named or known is None else Path(known).expanduser()
    if given is not None:
        return Base(given, revision if given == known else None), local
    if local is None:
        return Base(known, revision), None
    if adapter:
        raise ValueError(f"{folder} was trained on {known}, which nobody else has; add --base HUB_ID, the hub id of the same model")
    return Base(), local


def _trained_revision(folder: Path, recipe: Recipe) -> str | None:
    """The commit of the base that was trained, or what the recipe calls it."""
    path = folder / files.TRAINING
    return (files.read_json(path).get("revision") if path.is_file() else None) or recipe.model.revision


def _model_files(folder: Path, base: str | None) -> dict[str, Path | bytes]:
    """The files that make up the model: as they are, or where they hold a local path, a copy without it."""
    patterns = (*_BOTH, *(_ADAPTER if (folder / files.ADAPTER).exists() else _MODEL))
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): _public(path, base) for path in paths}


def _public(path: Path, base: str | None) -> Path | bytes:
    if path.name not in (files.ADAPTER, files.SIDECAR) and not path.name.endswith("config.json"):
        return path
    before = files.read_json(path)
    after = {key: value for key, value in before.items() if key not in _PATH_KEYS or not set("/\\") & set(str(value)) or is_hub_id(value)}
    named = {files.ADAPTER: "base_model_name_or_path", files.SIDECAR: "base"}.get(path.name)
    if named:
        after[named] = base
    return path if after == before else (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()


def _dumped(recipe: Recipe) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        dump_recipe(recipe, Path(folder, files.RECIPE))
        return Path(folder, files.RECIPE).read_bytes()


def _readme(folder: Path, repo_id: str, revision: str | None, there: bool) -> str:
    path = folder / README
    if not path.is_file():
        if not there:
            return ""
        path = Path(hf_hub_download(repo_id, README, revision=revision))
    return path.read_bytes().decode("utf-8-sig")  # line ends as they are


@contextmanager
def _explained(folder: Path | None, repo_id: str) -> Iterator[None]:
    """Say in a line what the hub, or the way to it, had against a request."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError("HF_HUB_OFFLINE is set, and a push needs the hub: unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join(str(error.server_message or error).split())
        if status == 401:
            raise ValueError("the hub refuses your token, or there is none: run `hf auth login`, or set HF_TOKEN") from None
        if status == 403:
            raise ValueError(f"your token may not write to {repo_id}: {said}; give a name of your own, or a token that may write") from None
        if status < 500 and status not in (408, 429):
            raise ValueError(f"the hub refuses {repo_id}: {said}") from None
        raise ConnectionError(_again(folder, repo_id, said)) from error
    except HFValidationError:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository; give NAME/MODEL, of letters, digits, '-', '_' and '.'") from None
    except ValueError:
        raise
    except Exception as error:  # httpx's errors, of whichever generation, what huggingface_hub makes of them, and Xet's
        reason = error.__cause__ or error
        raise ConnectionError(_again(folder, repo_id, f"{type(reason).__name__} {reason}")) from error


def _again(folder: Path | None, repo_id: str, reason: str) -> str:
    how = f"; `longctx push {folder} {repo_id}` once more goes on: what has arrived is not sent again" if folder else ""
    return f"the hub was not reached, or broke off ({' '.join(reason.split())[:200]}){how}"
