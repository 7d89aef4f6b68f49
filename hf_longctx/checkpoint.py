"""Checkpoints in and out: patch a folder, load, save, inspect, merge.

A RoPE-only result is a stock checkpoint: the base's own files and a rewritten config.json. An adapter folder is a PEFT
adapter with `longctx.json` (methods, base, revision, fingerprint of the base) and the patched config.json beside it.
"""

import copy
import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available

from hf_longctx import __version__, files
from hf_longctx.calibration import calibrate, check_data
from hf_longctx.integration import auto, rope
from hf_longctx.integration.configs import family, is_ours
from hf_longctx.integration.state import has_state
from hf_longctx.method import Method, load_methods, method_names
from hf_longctx.patching import patch_config, patch_model, prove_config, prove_model, window_of
from hf_longctx.recipe import DataSource

logger = logging.getLogger(__name__)
Specs = Sequence[Method | str | Mapping[str, Any]] | Method | str | Mapping[str, Any]


class Loaded(NamedTuple):
    """A model ready for evaluation or training, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def patch(
    model: PreTrainedModel | str | Path, methods: Specs, out: str | Path | None = None, *,
    revision: str | None = None, overwrite: bool = False, data: DataSource | str | Path | None = None, tokenizer: Any = None,
) -> PreTrainedModel | Path:  # fmt: skip
    """Give a model another position handling, or other step sizes, and prove that it took effect.

    Args:
        model: a live model, patched in place; or a hub id, a folder or a .gguf file, whose patched copy goes to `out`.
        methods: what to apply: `"nope"`, `{"name": "yarn", "factor": 4}`, `method("yarn", factor=4)`, or several.
        out: the folder to write; for a hub id or a folder. Weights are linked or copied byte for byte, and loaded only to calibrate.
        revision: branch, tag or commit on the hub.
        overwrite: replace `out` if it holds something.
        data: for methods that have to be calibrated: training text or token ids, as a recipe's `data.path`.
        tokenizer: for a live model and `data` that is text.

    Returns:
        The model, or the folder.

    Raises:
        ValueError: unknown or colliding methods, an unsupported family, an `out` in use; `data` missing, too short or of no use.
        RuntimeError: what was installed does not compute what the method does.
    """
    chosen = load_methods(methods)
    if not chosen:
        raise ValueError(f"no method given; there is: {', '.join(method_names('rope'))}")
    check_data(chosen, data)
    if isinstance(model, PreTrainedModel):
        return patch_model(model, *calibrate(model, tokenizer, chosen, data))
    if isinstance(model, torch.nn.Module):
        raise ValueError(f"{type(model).__name__} is not a Transformers model; patch the base model before PEFT or torch.compile wraps it")
    if out is None:
        raise ValueError("patching a checkpoint needs out, the folder to write")
    files.check_output(out, overwrite)
    if is_gguf(model):
        loaded = load(model, dtype="auto", device="cpu")
        return _patch_loaded(loaded, *calibrate(*loaded, chosen, data), out, overwrite)
    source = files.local_folder(model, revision)
    if (source / files.ADAPTER).exists():
        raise ValueError(f"{model} is an adapter; merge it first (`longctx merge`), then patch the result")
    config = AutoConfig.from_pretrained(source)
    learned = method_tensors(source) if is_ours(config) else []
    if learned:
        raise ValueError(f"{model} holds what its methods learned ({learned[0]}, ...), which another patch would mix up; patch the model that it was made from")
    if data is not None:
        patch_config(copy.deepcopy(config), chosen)  # what does not fit is refused before anything is loaded
        chosen, tensors = calibrate(*load(source), chosen, data)
        if tensors:  # they go into the checkpoint, beside the weights
            return _patch_loaded(load(source, dtype="auto", device="cpu"), chosen, tensors, out, overwrite)
    change, others = patch_config(config, chosen)
    with files.new_folder(out, overwrite) as folder:
        for path in [*files.companions(source), *weight_files(source)]:
            files.place(path, folder)
        finish_folder(folder, config, others, files.read_json(source / "config.json"))
        prove_config(AutoConfig.from_pretrained(folder), change)
    return Path(out)


def _patch_loaded(loaded: Loaded, methods: Sequence[Method], tensors: Sequence[Mapping[str, torch.Tensor]], out: str | Path, overwrite: bool) -> Path:
    patch_model(loaded.model, methods, tensors)
    with files.new_folder(out, overwrite) as folder:
        save(loaded.model, loaded.tokenizer, folder)
    return Path(out)


def finish_folder(folder: Path, config: PretrainedConfig, others: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Write config.json and the tokenizer's limit: `raw` with what a patch changed, RoPE in the v5 and the v4 spelling."""
    keys = {**raw, **others, "model_type": config.model_type, "architectures": config.architectures}
    if getattr(config, "longctx", None):
        keys["longctx"] = config.longctx
    if rope.rotates(config):
        for stale in ("rope_scaling", "original_max_position_embeddings"):
            keys.pop(stale, None)
        keys |= {"rope_parameters": config.rope_parameters, "max_position_embeddings": config.max_position_embeddings}
        keys |= {key: value for key, value in rope.legacy_keys(config).items() if key != "rope_scaling" or value is not None}
    files.write_json(folder / "config.json", keys)
    files.set_tokenizer_limit(folder, window_of(config))


def method_tensors(folder: Path) -> list[str]:
    """Names of the tensors in a checkpoint that belong to methods."""
    names: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            names += [name for name in opened.keys() if name.startswith("longctx_")]  # noqa: SIM118
    return sorted(names)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files and their index."""
    return sorted(path for pattern in files.WEIGHTS for path in folder.glob(pattern))


def is_gguf(model: object) -> bool:
    """True for a path that ends in .gguf."""
    return isinstance(model, str | Path) and str(model).endswith(".gguf")


def load(
    model: str | Path, *, methods: Specs = (), revision: str | None = None, base: str | None = None,
    dtype: str | torch.dtype | None = None, device: str | None = None, attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> Loaded:  # fmt: skip
    """Load a model and its tokenizer, patched as they were saved, or with `methods`.

    Args:
        model: a hub id, a folder, an adapter folder (its base is loaded, patched and checked) or a .gguf file.
        methods: applied before the model is built; given, they replace what the checkpoint was patched with.
        revision: branch, tag or commit on the hub; for an adapter, it is what the adapter remembers.
        base: for an adapter, another place to find its base model.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", ...; by default "auto", and float32 on the CPU.
        device: by default the accelerator if there is one.
        attn_implementation: passed to Transformers.
        quantization_config: pack the weights while they are loaded; not for .gguf files. `bitsandbytes_config` makes one.

    Raises:
        ValueError: no such model; an adapter on the wrong base; weights in pickle; a method that does not fit.
    """
    if is_gguf(model):
        if quantization_config is not None:
            raise ValueError(f"{model} cannot be quantised while it is loaded: a .gguf file is read dequantised; give the safetensors checkpoint")
        return _load_gguf(Path(model), methods, dtype, device, attn_implementation)
    folder = files.local_folder(model, revision)
    if (folder / files.ADAPTER).exists():
        if load_methods(methods):
            raise ValueError(f"{model} is an adapter, trained with methods of its own; merge it first, then load the result with other methods")
        return _load_adapter(folder, base, dtype, device, attn_implementation, quantization_config)
    config = AutoConfig.from_pretrained(folder)
    chosen = load_methods(methods)
    change, _ = patch_config(config, chosen)
    files.check_whole(folder)
    target = chosen_device(device)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=_dtype(dtype, target), attn_implementation=attn_implementation, use_safetensors=True,
        quantization_config=quantization_config, device_map=None if quantization_config is None or device is None else {"": target},
    )  # fmt: skip
    if quantization_config is None:  # quantised weights are made where they stay
        loaded = loaded.to(target)  # type: ignore[arg-type]
    if chosen:
        prove_model(loaded, change)
    elif is_ours(config):
        auto.prove(loaded)
    return Loaded(loaded.eval(), load_tokenizer(folder, window_of(config)))


def load_tokenizer(folder: Path, window: int | None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; it remembers the folder as `name_or_path`, where its files are copied from."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if window is not None:
        tokenizer.model_max_length = window
    return tokenizer


def _check_gguf(path: Path) -> None:
    """Raises ValueError for a file that is not there, or empty."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


def _load_gguf(path: Path, methods: Specs, dtype: Any, device: str | None, attn_implementation: str | None) -> Loaded:
    _check_gguf(path)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("reading .gguf files needs the package gguf: pip install 'hf-longctx[gguf]'") from None
    target = chosen_device(device)
    # Left out, the quantiser stays attached: such a model can be neither saved nor trained.
    quantization = GgufConfig(dequantize=True)
    kind = _dtype(dtype, target)
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=quantization, dtype=torch.float32 if kind == "auto" else kind,
        attn_implementation=attn_implementation,
    )  # fmt: skip
    loaded.config._name_or_path = str(path)
    chosen = load_methods(methods)
    if chosen:
        patch_model(loaded, chosen)
    tokenizer = load_tokenizer(path.parent, window_of(loaded.config), gguf_file=path.name)
    return Loaded(loaded.to(target).eval(), tokenizer)  # type: ignore[arg-type]


def bitsandbytes_config(keys: Mapping[str, Any]) -> BitsAndBytesConfig:
    """A BitsAndBytesConfig. Raises ValueError if bitsandbytes is not installed, or a value is refused."""
    if not is_bitsandbytes_available():
        raise ValueError("quantization needs the package bitsandbytes, which is not here: pip install 'hf-longctx[qlora]'")
    try:
        return BitsAndBytesConfig(**keys)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"quantization: {error}") from None


def _load_adapter(
    folder: Path, base: str | None, dtype: Any, device: str | None, attn_implementation: str | None, quantization_config: BitsAndBytesConfig | None = None
) -> Loaded:
    from peft import PeftModel

    note = read_sidecar(folder)
    files.check_whole(folder)
    name = base or note["base"]
    revision = None if base else note["revision"]
    loaded = load(
        name, methods=note["methods"], revision=revision, dtype=dtype, device=device, attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )  # fmt: skip
    found = fingerprint(loaded.model) if quantization_config is None else fingerprint_of(name, revision)
    if found != note["fingerprint"]:
        raise ValueError(
            f"{folder} was trained on {note['base']} (fingerprint {note['fingerprint'][:12]}), but {name} is another model ({found[:12]}); give the right one as base"
        )
    model = PeftModel.from_pretrained(loaded.model, str(folder))
    return Loaded(model.eval(), loaded.tokenizer)  # type: ignore[arg-type]


def read_sidecar(folder: Path) -> dict[str, Any]:
    """`longctx.json` of an adapter folder. Raises ValueError if there is none."""
    path = folder / files.SIDECAR
    if not path.exists():
        raise ValueError(f"{folder} is a PEFT adapter without {files.SIDECAR}, so its position handling is unknown; it was not made by longctx")
    return files.read_json(path)


def write_sidecar(folder: Path, base: str, revision: str | None, methods: Sequence[Method], mark: str, window: int | None) -> None:
    """Write `longctx.json`: what an adapter needs besides its weights."""
    value = {
        "version": __version__, "base": base, "revision": revision, "fingerprint": mark,
        "methods": [item.to_dict() for item in methods], "window": window,
    }  # fmt: skip
    files.write_json(folder / files.SIDECAR, value)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over sixteen values of every parameter, rounded to bfloat16: the same for any file layout, device and dtype of
    at least that precision; different for another checkpoint of the same shape."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith("longctx_"):  # a method's own; the base has none
            continue
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, min(16, flat.numel()), dtype=torch.float64).round().long()
        values = flat[index.to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(model: str | Path, revision: str | None = None) -> str:
    """The fingerprint of a checkpoint as it is stored, for one that is used quantised; of its files only few pages are read."""
    return fingerprint(load(model, revision=revision, dtype="auto", device="cpu").model)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> Path:
    """Save a whole model as a stock checkpoint: safetensors, the base's tokenizer files, a config that v5 and v4 read alike."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    source = Path(str(tokenizer.name_or_path))
    if source.is_dir() and (source / "config.json").exists() and (source / "tokenizer_config.json").exists():
        for path in files.companions(source):
            if not (folder / path.name).exists():
                files.place(path, folder)
    else:
        tokenizer.save_pretrained(folder)
    raw = files.read_json(folder / "config.json")
    raw["use_cache"] = True  # Trainer switches it off in the configuration, for good
    finish_folder(folder, model.config, {}, raw)
    return folder


def merge(adapter: str | Path, out: str | Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Fold an adapter into its base and save a stock checkpoint with the scaled configuration. The vocabulary stays as it is.

    The recipe of the run, and what became of it, come along for the model card.

    Raises:
        ValueError: `adapter` is not an adapter of ours; the base is missing or another model; `out` is in use.
    """
    files.check_output(out, overwrite)
    folder = Path(adapter)
    if not (folder / files.ADAPTER).exists():
        raise ValueError(f"{adapter} is not an adapter folder: there is no {files.ADAPTER} in it")
    loaded = _load_adapter(folder, base, "auto", "cpu", None)
    merged = loaded.model.merge_and_unload()  # type: ignore[operator]
    with files.new_folder(out, overwrite) as scratch:
        save(merged, loaded.tokenizer, scratch)
        for name in (files.RECIPE, files.TRAINING):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, scratch / name)
    return Path(out)


def inspect_model(model: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """What a checkpoint is, without loading its weights: family, trained and present window, RoPE, methods, who can load it.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if is_gguf(model):
        path = Path(model)
        _check_gguf(path)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return _describe(config, "GGUF") | {"loads_with": ["llama.cpp", "transformers>=5 (dequantised)"]}
    folder = files.local_folder(model, revision, weights=False) if not Path(model).exists() else Path(model)
    if (folder / files.ADAPTER).exists():
        note = read_sidecar(folder)
        facts = _describe(AutoConfig.from_pretrained(folder), "adapter")
        return facts | {"base": note["base"], "loads_with": ["hf_longctx"]}
    if not (folder / "config.json").exists():
        raise ValueError(f"{model} holds no model: there is no config.json in it")
    config = AutoConfig.from_pretrained(folder)
    return _describe(config, "model") | {"loads_with": _readers(config)}


def _describe(config: PretrainedConfig, kind: str) -> dict[str, Any]:
    memory = getattr(config, "longctx", None) or {}
    facts: dict[str, Any] = {
        "kind": kind, "family": family(config), "needs_plugin": is_ours(config), "methods": memory.get("methods", []), "state": has_state(config),
    }  # fmt: skip
    try:
        shape = rope.read_shape(config)
    except ValueError as error:
        facts["window"] = window_of(config)
        return facts | ({"layers": config.num_hidden_layers, "supported": True} if facts["state"] else {"supported": str(error)})
    return facts | {
        "trained_window": shape.window, "window": window_of(config), "rope": config.rope_parameters, "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "layers": shape.layers, "supported": True,
    }  # fmt: skip


def _readers(config: PretrainedConfig) -> list[str]:
    """Runtimes that read the same frequencies from this configuration; rules and sources: see the README."""
    if is_ours(config):
        return ["transformers>=5 with hf_longctx imported"]
    readers = ["transformers>=5"]
    if has_state(config):  # by vLLM's list of models; what other runtimes make of a hybrid's RoPE was not compared
        return readers if rope.rotates(config) else [*readers, "vLLM"]
    parameters = getattr(config, "rope_parameters", None) or {}
    flat = parameters.get("full_attention", parameters)
    kind = flat.get("rope_type", "default")
    if not parameters or rope.read_by_v4(config):
        readers.append("transformers>=4.43")
    if kind in ("default", "yarn", "llama3") or (kind == "longrope" and flat["original_max_position_embeddings"] == config.max_position_embeddings):
        readers.append("vLLM")
    elif kind == "longrope":
        readers.append("vLLM (give --max-model-len: it takes the trained window otherwise)")
    if kind == "linear" or kind == "dynamic":
        readers.append("vLLM (give --max-model-len: it multiplies the window by the factor once more)")
    if kind in ("default", "yarn", "linear", "llama3"):
        readers.append("llama.cpp (convert_hf_to_gguf.py)")
    return readers


def chosen_device(device: str | None = None) -> torch.device:
    """The one that is named, or this process's accelerator, or the CPU."""
    try:
        return torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cuda, cpu, mps, ...") from None


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return "auto" if device.type != "cpu" else torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; use float32, bfloat16, float16 or auto")
    return found

