"""Checkpoint folders as files: where they are, what belongs to a model, how a new one appears whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

SIDECAR = "longctx.json"
RECIPE = "recipe.yaml"  # of the run that made a folder
TRAINING = "training.json"  # and what became of it: steps, tokens, machine, versions
ADAPTER = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


def local_folder(name: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder that holds a checkpoint: `name` itself, or a snapshot of the hub repository of that name.

    Raises:
        ValueError: nothing of that name here or on the hub; a folder without a configuration; weights in pickle only.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"{name} is a file; give a folder, a hub id or a .gguf file")
    folder = path if path.exists() else _download(str(name), revision, weights)
    if not (folder / "config.json").exists() and not (folder / ADAPTER).exists():
        raise ValueError(f"{name} holds no model: there is neither config.json nor {ADAPTER} in it")
    if weights and not list(folder.glob("*.safetensors")):
        pickled = next((p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]), None)
        if pickled:
            raise ValueError(f"{name} has its weights only as {pickled} (pickle); convert it to safetensors first")
        raise ValueError(f"{name} has no *.safetensors weights")
    return folder


def check_whole(folder: Path) -> None:
    """Raises ValueError for weights that a copy or a download left unfinished; reads headers only."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); download or copy it again") from None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    patterns = [*COMPANIONS, *(WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r} on the hub") from None
    except GatedRepoError:
        raise ValueError(f"{name} is gated: accept its terms on the hub, then run `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(f"{name!r} is neither a folder here nor a repository on the hub (or it is private: `hf auth login`)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"{name!r} is no folder here, and the hub cannot be reached: {str(error).splitlines()[0]}") from None


def commit_of(folder: Path) -> str | None:
    """The hub commit of a snapshot folder, None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache else None


def companions(folder: Path) -> list[Path]:
    """Everything of a model but its configuration and weights: tokenizer, generation settings, licence."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    ours = {"config.json", SIDECAR, ADAPTER, TRAINING, "trainer_state.json", "results.json", "run.json"}
    return sorted(p for p in found if p.name not in ours and not p.name.endswith(".index.json"))


def place(source: Path, folder: Path) -> None:
    """Put a file into `folder`: a hard link where that is possible, a copy otherwise, never a link into the hub's cache."""
    target = folder / source.name
    if source.is_symlink() or commit_of(source.parent):
        shutil.copyfile(source.resolve(), target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with sorted keys, replacing the file in one step; never writes through a hard link."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def set_tokenizer_limit(folder: Path, window: int | None) -> None:
    """Set `model_max_length` in tokenizer_config.json and leave every other byte as it is, line ends included; None leaves it too."""
    path = folder / "tokenizer_config.json"
    if window is None or not path.exists():
        return
    text = path.read_bytes()
    text, found = re.subn(rb'("model_max_length"\s*:\s*)(?:[0-9.eE+-]+|null|Infinity)', rb"\g<1>%d" % window, text, count=1)
    if not found:
        comma = b"" if re.fullmatch(rb"\s*\{\s*\}\s*", text) else b","
        text = re.sub(rb"\{", b'{\n  "model_max_length": %d%s' % (window, comma), text, count=1)
    partial = path.with_name(path.name + ".partial")  # the file may be a hard link to the base's
    partial.write_bytes(text)
    partial.replace(path)


def check_output(out: str | Path, overwrite: bool) -> Path:
    """`out` as a path, once it is known to be free.

    Raises ValueError if it holds something and `overwrite` is off, or cannot be replaced at all.
    """
    path = Path(out).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a folder for --out")
    if Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(f"{path} is the working directory or holds it; give a folder of its own for --out")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} already holds something; choose another --out or add --overwrite")
    return path


@contextmanager
def new_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    What `out` held before survives until then (only if `overwrite` allows to replace it).
    """
    path = check_output(out, overwrite).resolve()  # a link to a folder cannot be replaced by a folder
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    aside = scratch.with_name(scratch.name + ".old")
    try:
        yield scratch
        scratch.chmod(0o755)
        if path.is_dir():
            path.rename(aside)
        scratch.rename(path)
    finally:
        if aside.is_dir() and not path.exists():
            aside.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def add_files(folder: Path, last: Sequence[str]) -> Iterator[Path]:
    """A scratch folder inside `folder` whose files move there when the block ends well, and vanish when it does not.

    Those named in `last` go at the end, in this order, and are taken away before: while they are missing, `folder` is not finished.
    """
    scratch = folder / ".unfinished"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for name in last:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(scratch.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
