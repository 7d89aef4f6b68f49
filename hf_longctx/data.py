"""Documents to training windows, deterministic and resumable.

Example i of a run is a function of (recipe, seed, i): which window of which document, where its chunks lie, which positions
they get. Neither the number of workers and processes nor a restart changes it.
"""

import bisect
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from hf_longctx.chat import encode_chat
from hf_longctx.integration import rope
from hf_longctx.method import Method, load_methods
from hf_longctx.patching import window_of
from hf_longctx.recipe import DataSource

logger = logging.getLogger(__name__)
IGNORE = -100
_BLOCK = 1024  # draws of a mixture that are made together
_DRAWS = 500  # of a window from a conversation, until there is something to predict in it
_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Documents:
    """Token ids of many documents in one array: document i is `ids[starts[i]:starts[i+1]]`.

    `trained`, as long as `ids`, tells which tokens of conversations are to be predicted; text has none, and all of it is.
    """

    ids: np.ndarray
    starts: np.ndarray
    trained: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.starts)

    @property
    def last_labels(self) -> np.ndarray:
        """Where in each document the last token to be predicted is; 0, which nothing predicts, if there is none."""
        if self.trained is None:
            return self.lengths - 1
        marked = np.append(-1, np.flatnonzero(self.trained))
        return (marked[np.searchsorted(marked, self.starts[1:]) - 1] - self.starts[:-1]).clip(min=0)

    @classmethod
    def join(cls, documents: Sequence[np.ndarray]) -> "Documents":
        """Documents one after another: token ids [tokens], or of conversations [tokens, 2], which tokens are predicted beside them."""
        starts = np.cumsum([0, *map(len, documents)])
        joined = np.concatenate(documents) if documents else np.zeros(0, np.uint32)
        return cls(joined, starts) if joined.ndim == 1 else cls(joined[:, 0], starts, joined[:, 1].astype(bool))


def load_documents(source: DataSource, tokenizer: Any) -> Documents:
    """Read and tokenise a source once; later calls with the same source and tokenizer read the cache.

    A text ends with the tokenizer's end-of-sequence token, if it has one; a conversation as the chat template ends it. The cache
    lies in `$HF_LONGCTX_CACHE`, by default `~/.cache/hf_longctx`.

    Raises:
        ValueError: nothing there, an unknown format, text that is not UTF-8, no such column, no document at all; conversations
            without a chat template, or without an answer where these are what is trained.
    """
    check_source(source)
    if source.path.endswith(".npz"):
        return _read_npz(source)
    key = _cache_key(source, tokenizer)
    folder = Path(os.environ.get("HF_LONGCTX_CACHE", "~/.cache/hf_longctx")).expanduser() / "tokens" / key
    if not folder.is_dir():
        documents = Documents.join(_tokenize(source, tokenizer))
        if not len(documents):
            raise ValueError(f"{source.path} holds no text")
        if not documents.last_labels.any() and documents.trained is not None:
            raise ValueError(f"{source.path} holds no answer: no message of role assistant follows another; set loss_on: all to train every token")
        _write_cache(folder, documents)
    marks = folder / "trained.npy"
    return Documents(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "starts.npy"), np.load(marks, mmap_mode="r") if marks.exists() else None)


def check_source(source: DataSource) -> None:
    """Raise ValueError for what can be told without reading: a file that is not there, or of a kind that is not read."""
    path = Path(source.path).expanduser()
    if path.exists() and path.suffix != ".npz":
        _local_files(path)
    elif not path.exists() and path.suffix in (*_FORMATS, ".npz"):
        raise ValueError(f"{source.path} does not exist")


def read_texts(source: DataSource) -> Iterator[str | list[dict[str, Any]]]:
    """The documents of a source, streamed: text, or conversations as lists of messages. Raises ValueError as `load_documents`."""
    for row in _rows(source):
        if source.column not in row:
            raise ValueError(f"{source.path} has no column {source.column!r}; it has: {', '.join(row)}")
        text = row[source.column]
        if text is not None and not isinstance(text, str) and not _is_chat(text):
            raise ValueError(f"{source.path}: column {source.column!r} holds {type(text).__name__}, not text or lists of messages with role and content")
        if text:
            yield text


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)


def _rows(source: DataSource) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    path = Path(source.path).expanduser()
    kind, names = _local_files(path) if path.exists() else ("", [])
    try:
        if names:
            extra = {"sample_by": "document"} if kind == "text" else {}
            yield from load_dataset(kind, data_files=names, split="train", streaming=True, **extra)
        else:
            yield from load_dataset(source.path, source.name, split=source.split, revision=source.revision, streaming=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.path} is not UTF-8 text: {error}") from None
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{source.path!r} is neither a file here nor a dataset on the hub: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # pyarrow's complaints about a file, those of datasets about a split or a configuration
        raise ValueError(f"{source.path} cannot be read: {str(error).splitlines()[0]}") from None


def _local_files(path: Path) -> tuple[str, list[str]]:
    found = sorted(p for p in path.rglob("*") if p.suffix in _FORMATS) if path.is_dir() else [path]
    kinds = {_FORMATS.get(p.suffix) for p in found}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"{path}: expected .txt, .jsonl, .parquet (one kind in a folder) or .npz files")
    names = [str(p) for p in found if p.stat().st_size]
    if not names:
        raise ValueError(f"{path} holds no text: every file in it is empty" if path.is_dir() else f"{path} is empty")
    return str(kinds.pop()), names


def _read_npz(source: DataSource) -> Documents:
    path = Path(source.path).expanduser()
    if not path.is_file():
        raise ValueError(f"{source.path} does not exist")
    if source.loss_on == "answers":
        raise ValueError(f"{source.path}: loss_on: answers needs conversations, and token ids do not tell who speaks; leave it out")
    wrong = f"{source.path} must hold 1-D integer arrays of token ids, one a document"
    try:
        with np.load(path) as arrays:
            documents = [arrays[name] for name in arrays.files]
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile):  # not an .npz at all, an empty file, or pickled objects
        raise ValueError(wrong) from None
    if not documents or any(d.ndim != 1 or not np.issubdtype(d.dtype, np.integer) for d in documents):
        raise ValueError(wrong)
    joined = Documents.join([d.astype(np.int64) for d in _until(iter(documents), source.tokens)])
    if len(joined.ids) == 0 or joined.ids.min() < 0:
        raise ValueError(f"{source.path} holds {'no tokens' if len(joined.ids) == 0 else 'negative token ids'}")
    return Documents(joined.ids.astype(np.uint32), joined.starts)


def _tokenize(source: DataSource, tokenizer: Any) -> list[np.ndarray]:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = read_texts(source)

    def encode() -> Iterator[np.ndarray]:
        while batch := list(islice(documents, 16)):
            if not isinstance(batch[0], str):
                yield from (np.array(_chat(source, tokenizer, messages), dtype=dtype).T for messages in batch)
                continue
            if source.loss_on == "answers":
                raise ValueError(f"{source.path}: loss_on: answers needs conversations, but column {source.column!r} holds text; give their column, or leave it out")
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                yield np.array([*ids, *end], dtype=dtype)

    return _until(encode(), source.tokens)


def _chat(source: DataSource, tokenizer: Any, messages: Any) -> tuple[list[int], list[bool]]:
    try:
        return encode_chat(tokenizer, messages, answers=source.loss_on != "all")
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None


def _until(documents: Iterable[np.ndarray], budget: int | None) -> list[np.ndarray]:
    """Documents up to `budget` tokens; the last one is cut there."""
    taken: list[np.ndarray] = []
    left = budget
    for document in documents:
        taken.append(document if left is None else document[:left])
        if left is not None:
            left -= len(taken[-1])
            if left <= 0:
                break
    return [document for document in taken if len(document)]


def _cache_key(source: DataSource, tokenizer: Any) -> str:
    what = {k: v for k, v in asdict(source).items() if k not in ("weight", "short")}
    path = Path(source.path).expanduser()
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        what["files"] = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    what |= {"tokenizer": _rules(tokenizer), "end": tokenizer.eos_token_id, "class": type(tokenizer).__name__}
    what |= {"template": tokenizer.chat_template, "special": tokenizer.special_tokens_map}
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _rules(tokenizer: Any) -> str:
    """A digest of all that decides how text is split: the vocabulary alone does not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    kept = {key: value for key, value in rules.items() if backend is None or key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _write_cache(folder: Path, documents: Documents) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        np.save(scratch / "ids.npy", documents.ids)
        np.save(scratch / "starts.npy", documents.starts)
        if documents.trained is not None:
            np.save(scratch / "trained.npy", documents.trained)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first; its content is the same
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The training examples of one source, `window` tokens each.

    A document of at least `window` tokens gives one example per full window; the sampler may also take tokens from the rest
    of the document behind the window's start. Shorter documents are packed, several to a row, or dropped. Examples are
    visited in random order, each once before any comes again.

    Of a conversation, there are windows up to the last answer, the last one within it; the sampler draws again while it meets no answer.
    """

    def __init__(
        self, documents: Documents, window: int, sampler: Method, seed: Sequence[int], short: str = "pack",
        first_token: int | None = None, mask_seams: bool = False,
    ):  # fmt: skip
        self.documents, self.window, self.sampler, self.seed = documents, window, sampler, list(seed)
        self.first_token, self.mask_seams = first_token, mask_seams
        lengths, last = documents.lengths, documents.last_labels
        self.long = np.flatnonzero((lengths >= window) & (last > 0))
        self.ends = np.cumsum(self._count(lengths, last)[self.long])  # window number j belongs to the first long document whose end is above j
        self.full = int(self.ends[-1]) if len(self.ends) else 0
        brief = np.flatnonzero((lengths < window) & (last > 0))
        self.packs = _pack(brief, lengths, window) if short == "pack" else []
        self.dropped = len(brief) if short == "drop" else 0
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return self.full + len(self.packs)

    def _count(self, lengths: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Windows of documents of these lengths, whose last labels are there."""
        return lengths // self.window if self.documents.trained is None else -(-last // self.window)

    def _item(self, epoch: int, rank: int) -> int:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([*self.seed, epoch]).permutation(len(self)))
        return int(self._order[1][rank])

    def _start(self, item: int) -> tuple[int, int]:
        """Of a full window, the document and where in it the window starts."""
        at = int(np.searchsorted(self.ends, item, side="right"))
        before = int(self.ends[at - 1]) if at else 0
        document = int(self.long[at])
        return document, min((item - before) * self.window, int(self.documents.lengths[document]) - self.window)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Example i, i counting on past the first epoch: `input_ids`, `position_ids`, `labels`, `segments`, each [window].

        `segments` numbers the packed documents from 0; -1 marks padding.
        """
        item = self._item(*divmod(i, len(self)))
        rng = np.random.default_rng([*self.seed, 1, i])
        if item < self.full:
            return self._finish([self._piece(*self._start(item), self.window, rng)])
        rows = self.packs[item - self.full]
        return self._finish([self._piece(d, 0, len(self.documents[d]), rng) for d in rows])

    def _piece(self, document: int, start: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        text = self.documents[document][start:]
        trained = self.documents.trained
        if trained is None:
            tokens, positions = self.sampler.positions(size, len(text), rng)
        else:
            trained = trained[self.documents.starts[document] + start :][: len(text)]
            tokens, positions = self._meet_labels(trained, size, rng)
        ids = text[tokens].astype(np.int64)
        if self.first_token is not None and (trained is None or start):  # a conversation begins as its template begins it
            ids[0] = self.first_token
        labels = ids.copy() if trained is None else np.where(trained[tokens], ids, IGNORE)
        return ids, positions, drop_labels(labels, positions, self.mask_seams)

    def _meet_labels(self, trained: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What the sampler draws, drawn again while none of it is to be predicted: answers are few in long conversations."""
        for _ in range(_DRAWS):
            tokens, positions = self.sampler.positions(size, len(trained), rng)
            if trained[tokens[1:]].any():
                break
        return tokens, positions

    def _finish(self, pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        ids, positions, labels = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        segments = np.repeat(np.arange(len(pieces)), [len(p[0]) for p in pieces])
        pad = self.window - len(ids)
        return {
            "input_ids": np.pad(ids, (0, pad)), "position_ids": np.pad(positions, (0, pad)),
            "labels": np.pad(labels, (0, pad), constant_values=IGNORE), "segments": np.pad(segments, (0, pad), constant_values=-1),
        }  # fmt: skip


def drop_labels(labels: np.ndarray, positions: np.ndarray, mask_seams: bool) -> np.ndarray:
    """`labels` of one text, in place, without the first one and, with `mask_seams`, those just after a skip."""
    labels[0] = IGNORE  # nothing before it predicts it
    if mask_seams:
        labels[1:][np.diff(positions) != 1] = IGNORE
    return labels


def fit_sampler(sampler: Method, window: int, config: PretrainedConfig) -> Method:
    """`sampler` with the window of a patched configuration as its target.

    Raises:
        ValueError: a model without positions, frequencies that depend on the length seen, another target, or one below `window`.
    """
    if not hasattr(sampler, "target"):
        return sampler
    for item in load_methods((getattr(config, "longctx", None) or {}).get("methods", ())):
        if not item.static:
            raise ValueError(f"{sampler.name} skips positions, but the frequencies of {item.name} depend on the length seen; use a static method such as yarn")
    target = window_of(config)
    if target is None:
        raise ValueError(f"{sampler.name} chooses positions, which {config.model_type} does not have; leave it out")
    wanted = sampler.target or target
    if wanted != target:
        raise ValueError(
            f"{sampler.name}: target {wanted} is not the patched model's window {target} (trained window {rope.trained_window(config)} x factor); "
            "set the factor, or leave target out"
        )
    if wanted < window:
        raise ValueError(f"{sampler.name}: target {wanted} is below the training window {window}")
    return replace(sampler, target=wanted)  # type: ignore[call-arg]


def _pack(documents: np.ndarray, lengths: np.ndarray, window: int) -> list[list[int]]:
    """Fill rows of `window` tokens with whole documents, longest first, each into the fullest row that still takes it."""
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    rows: list[list[int]] = []
    for document in sorted(documents.tolist(), key=lambda d: (-lengths[d], d)):
        size = int(lengths[document])
        at = bisect.bisect_left(rooms, (size, -1))
        if at == len(rooms):
            rows.append([])
            free, row = window, len(rows) - 1
        else:
            free, row = rooms.pop(at)
        rows[row].append(document)
        bisect.insort(rooms, (free - size, row))
    return rows


class Mixture(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """`total` examples drawn from several sources by weight; example i is the same whatever `total` is."""

    def __init__(self, sources: Sequence[Windows], weights: Sequence[float], total: int, seed: int):
        self.sources, self.total, self.seed = list(sources), total, seed
        self.share = np.cumsum(weights) / np.sum(weights)
        # How many examples each source gave before each block: draws are made again when needed, so long runs cost no memory.
        blocks = -(-total // _BLOCK) if len(self.sources) > 1 else 0
        given = [np.bincount(self._draw(block), minlength=len(self.sources)) for block in range(blocks)]
        self.before = np.cumsum([np.zeros(len(self.sources), np.int64), *given], axis=0)

    def __len__(self) -> int:
        return self.total

    def _draw(self, block: int) -> np.ndarray:
        """Which source each example of a block comes from."""
        draws = np.random.default_rng([self.seed, block, 0, 0, 1]).random(_BLOCK)
        return np.searchsorted(self.share, draws, side="right").clip(max=len(self.sources) - 1)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < self.total:
            raise IndexError(i)
        if len(self.sources) == 1:
            return self.sources[0][i]
        block, place = divmod(i, _BLOCK)
        drawn = self._draw(block)
        source = int(drawn[place])
        return self.sources[source][int(self.before[block][source] + (drawn[:place] == source).sum())]


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack examples into tensors [batch, window].

    The attention mask is always there: without one, and without a cache, Transformers takes every jump in `position_ids`
    for a new packed document and cuts the very attention that skipping positions train. Rows that hold one document get
    ones; if any row holds several, the mask is [batch, 1, window, window], causal within each document.
    """
    batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in ("input_ids", "position_ids", "labels")}
    segments = torch.from_numpy(np.stack([row["segments"] for row in rows]))
    if bool((segments == 0).all()):
        return batch | {"attention_mask": torch.ones_like(segments)}
    same = segments[:, :, None] == segments[:, None, :]
    return batch | {"attention_mask": (same & torch.ones_like(same[0]).tril())[:, None]}


def coverage(sampler: Method, window: int, target: int, draws: int = 400, seed: int = 0) -> dict[str, Any]:
    """How well a sampler covers relative distances.

    Args:
        sampler: fills the `positions` slot.
        window, target: tokens of an example; positions it may reach.
        draws: how many examples to draw.

    Returns:
        `probability[target]`: the share of examples in which some pair of tokens is d apart, for d = 0 ... target-1;
        `bins`: its mean over 16 equal bins; `last_window`: its mean over the last `window / 2` distances; `never`: the share
        of distances that no draw covers; `far_pairs`: the share of attention pairs at least `window` apart.
    """
    size = 2 * target
    seen, far, pairs = np.zeros(target), 0.0, 0.0
    for i in range(draws):
        _, positions = sampler.positions(window, max(target, window), np.random.default_rng([seed, i]))
        present = np.zeros(size)
        present[positions] = 1
        spectrum = np.fft.rfft(present)
        counts = np.rint(np.fft.irfft(spectrum * spectrum.conj(), size)[:target])
        seen += counts > 0
        far += counts[window:].sum()
        pairs += counts.sum()
    probability = seen / draws
    bins = [float(part.mean()) for part in np.array_split(probability, 16)]
    last = max(1, window // 2)
    return {
        "probability": probability, "bins": bins, "last_window": float(probability[-last:].mean()),
        "never": float((seen == 0).mean()), "far_pairs": float(far / pairs), "draws": draws,
    }  # fmt: skip
