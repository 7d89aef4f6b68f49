"""The rope slot: read a configuration's rotary embedding, change it, and prove on Transformers' own module that it changed.

Everything goes through `config.rope_parameters`; no model code is replaced, so the result loads in plain Transformers.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from hf_longctx.integration.configs import family, is_ours
from hf_longctx.method import Frequencies, RopeChange, Shape

_SCALED_STATIC = {"linear", "llama3", "yarn"}  # trained types whose frequencies can be read once and scaled further
_KEPT = ("rope_theta", "partial_rotary_factor")  # what survives of the trained parameters when the type changes
_ONLY_LONGROPE = {"phi3"}  # these configurations accept no other scaled type


def check_supported(config: PretrainedConfig) -> None:
    """Raise ValueError, naming the reason, unless the model rotates queries and keys by one position per token."""
    name = family(config)
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise ValueError(f"{name} is a multimodal model; give the checkpoint of its text model")
    if not rotates(config):
        raise ValueError(f"{name} has no rotary position embedding, so there is no rope to change")
    if name == "phimoe":
        raise ValueError("phimoe multiplies cos and sin by a long_mscale and a short_mscale of its own, which is not supported")
    if getattr(config, "kv_lora_rank", None) or getattr(config, "qk_rope_head_dim", None):
        raise ValueError(f"{name} uses multi-head latent attention (MLA), whose decoupled RoPE is not supported")
    extended = _entry(config.rope_parameters, config)
    if "mrope_section" in extended or extended["rope_type"] == "axial":
        raise ValueError(f"{name} uses a multi-axis RoPE ({'mrope_section' if 'mrope_section' in extended else 'axial'}), which is not supported")
    if trained_parameters(config).get("rope_type") not in {"default", *_SCALED_STATIC} and not _one_list(_entry(trained_rope(config), config)):
        kind = _entry(trained_rope(config), config)["rope_type"]
        why = "whose frequencies depend on the length" if kind in ("dynamic", "longrope") else "which we cannot read"
        raise ValueError(f"{name} was trained with rope_type {kind!r}, {why}; it cannot be scaled further")


def rotates(config: PretrainedConfig) -> bool:
    """Whether the model has RoPE. State-space models have no positions at all; some families choose by a key, RoPE's stay there."""
    chosen = getattr(config, "position_embedding_type", "rope") == "rope" and not getattr(config, "alibi", False)
    return chosen and bool(getattr(config, "rope_parameters", None))


def trained_rope(config: PretrainedConfig) -> dict[str, Any]:
    """`rope_parameters` as the model was trained, before any patch of ours."""
    memory = getattr(config, "longctx", None)
    return memory["trained"]["rope_parameters"] if memory else config.rope_parameters


def trained_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The flat dictionary of the layers that are extended: all of them, or the full-attention ones."""
    return _entry(trained_rope(config), config)


def trained_window(config: PretrainedConfig) -> int | None:
    """How many positions the model was trained on; None for a model without positions, whose configuration does not tell."""
    memory = getattr(config, "longctx", None)
    if memory:
        return memory["trained"]["window"]
    window = getattr(config, "max_position_embeddings", None)
    parameters = _entry(getattr(config, "rope_parameters", None) or {}, config)
    if parameters.get("rope_type") == "yarn":  # Qwen states YaRN beside the unscaled limit
        window = max(window, round(parameters["original_max_position_embeddings"] * parameters["factor"]))
    return None if window is None else int(window)


def read_shape(config: PretrainedConfig) -> Shape:
    """The Shape of a supported configuration. Raises ValueError as `check_supported` does."""
    check_supported(config)
    parameters = trained_parameters(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    theta = float(parameters["rope_theta"])
    if parameters["rope_type"] == "default":
        trained = Frequencies(tuple(theta ** (-2 * j / rotary_dim) for j in range(rotary_dim // 2)))
    else:
        trained = frequencies(rotary_module(_as_trained(config)), layer_type(config))
    return Shape(
        family=family(config), hidden=config.hidden_size, layers=config.num_hidden_layers, heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads, head_dim=head_dim, rotary_dim=rotary_dim,
        theta=theta, trained=trained, rope_type=parameters["rope_type"], window=_limit(config),
    )  # fmt: skip


def unchanged(config: PretrainedConfig, shape: Shape) -> RopeChange:
    """The frequencies and the window that the model was trained with, for a patch without a rope method."""
    native = {key: value for key, value in trained_parameters(config).items() if key not in _KEPT}
    return RopeChange.static(shape.trained.inv_freq, shape.window, native, shape.trained.attention_factor)


def rope_parameters(config: PretrainedConfig, change: RopeChange) -> dict[str, Any]:
    """The `rope_parameters` that make Transformers compute `change`, starting from the trained ones.

    Where Transformers has no type for it, or the family accepts few types, the same frequencies are written as `longrope`
    with two equal lists of factors. Raises ValueError where that form cannot hold them: they depend on the length.
    """
    trained = trained_rope(config)
    flat = _entry(trained, config)
    key = layer_type(config)
    kept = {name: flat[name] for name in _KEPT if flat.get(name) is not None}
    native = dict(change.native or {})
    narrow = family(config) in _ONLY_LONGROPE and native.get("rope_type") not in ("default", "longrope")
    # With a dictionary a layer type, Transformers looks for `truncate` beside these, and 5.17 fails at longrope's second long row.
    unread = key is not None and ("truncate" in native or _one_list(native))
    if not native or narrow or unread:
        if len(change.at) > 1:
            raise ValueError(f"{family(config)} accepts no rope_type but longrope, which cannot express frequencies that depend on the length")
        native = _as_longrope(change, kept["rope_theta"])
        if is_ours(config) and family(config) not in _ONLY_LONGROPE:  # no other runtime reads it
            native = _as_linear(native) or native
    if native["rope_type"] == "longrope":
        native |= _mscales(native, change.window)
    new = kept | native
    return new if key is None else {**copy.deepcopy(dict(trained)), key: new}


def _mscales(native: Mapping[str, Any], window: int) -> dict[str, float]:
    """vLLM does not read longrope's `attention_factor`: it derives one from the windows, unless these keys of Phi-3-small are
    there. Transformers names them as unknown when it loads, so they are written only where needed."""
    original, meant = native["original_max_position_embeddings"], native["attention_factor"]
    derived = math.sqrt(1 + math.log(max(1.0, window / original)) / math.log(original))
    return {} if abs(derived / meant - 1) < 1e-6 else {"short_mscale": meant, "long_mscale": meant}


def apply(config: PretrainedConfig, change: RopeChange) -> None:
    """Write `change` into a configuration object; modules built from it afterwards follow it."""
    parameters = rope_parameters(config, change)
    window = change.window if change.raise_limit else _limit(config)
    _set_original(config, _entry(parameters, config).get("original_max_position_embeddings", window))
    config.rope_parameters = parameters
    config.max_position_embeddings = window
    config.validate_rope()


def rebuild(model: nn.Module, config: PretrainedConfig) -> None:
    """Give every rotary module of a live model the frequencies of its (changed) configuration, in place.

    The configuration alone changes nothing: frequencies were computed when the module was built.
    """
    for parent, name, module in list(_rotary_children(model)):
        fresh = type(module)(config=config).to(next(module.buffers()).device)
        setattr(parent, name, fresh)


def trained_modules(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """What `rebuild` replaced: for each rotary module its parent, its name there, and one with the trained frequencies."""
    config = _as_trained(model.config)  # type: ignore[arg-type]
    return [(parent, name, type(module)(config=config).to(next(module.buffers()).device)) for parent, name, module in _rotary_children(model)]


def rotary_module(config: PretrainedConfig) -> nn.Module:
    """Transformers' rotary module for a configuration, on the CPU, without building the model.

    The class is looked up in a one-layer model on the meta device, which costs milliseconds whatever the model's size.
    """
    small = copy.deepcopy(config)
    types = getattr(small, "layer_types", None)
    with torch.device("meta"):
        try:
            if types:
                small.layer_types = list(types)[:1]
            small.num_hidden_layers = 1
            skeleton = AutoModelForCausalLM.from_config(small)
        except Exception:  # a family whose layers cannot be cut to one
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return type(rotary_of(skeleton))(config=config)


def frequencies(module: nn.Module, key: str | None) -> Frequencies:
    """What a rotary module holds now; `key` picks the layer type where it holds several."""
    prefix = f"{key}_" if key and hasattr(module, f"{key}_inv_freq") else ""
    inv_freq = getattr(module, f"{prefix}inv_freq").double().tolist()
    return Frequencies(tuple(inv_freq), float(getattr(module, f"{prefix}attention_scaling")))


def prove(module: nn.Module, change: RopeChange, key: str | None) -> None:
    """Raise RuntimeError unless the module turns as `change` says at every length that `change` names.

    Lengths are visited in ascending order, through the module's own forward, so that length-dependent types are seen too.
    """
    module = copy.deepcopy(module)  # a forward pass moves the frequencies of length-dependent types
    for length in sorted(change.at):
        device = next(module.buffers()).device
        position_ids = torch.tensor([[0, length - 1]], device=device)
        arguments = {"layer_type": key} if key and hasattr(module, f"{key}_inv_freq") else {}
        module(torch.zeros(1, device=device), position_ids, **arguments)
        got, want = frequencies(module, key), change.at[length]
        worst = _largest_error(got.inv_freq, want.inv_freq)
        temperature = abs(got.attention_factor / want.attention_factor - 1)
        if not (worst < 1e-5 and temperature < 1e-5):  # float32 powers err by some 1e-6; NaN must fail
            raise RuntimeError(
                f"the patch did not take effect: at length {length} the model's frequencies differ from the method's by a factor of "
                f"{1 + worst:.6g}, its attention factor is {got.attention_factor:.6g} where {want.attention_factor:.6g} is meant"
            )


def reads_lengths(config: PretrainedConfig) -> bool:
    """Whether Transformers' rotary module looks at the positions of every forward pass to choose its frequencies."""
    parameters: Any = config.rope_parameters
    entries = [parameters, *(v for v in parameters.values() if isinstance(v, Mapping))]
    return any("dynamic" in entry.get("rope_type", "") or entry.get("rope_type") == "longrope" for entry in entries)


def layer_type(config: PretrainedConfig) -> str | None:
    """The key under which nested `rope_parameters` hold the extended layers, None where they are flat."""
    return "full_attention" if _nested(config.rope_parameters) else None


def rotary_of(model: nn.Module) -> nn.Module:
    """The rotary module of a live model. Raises ValueError if it has none that is built from the configuration."""
    found = next(_rotary_children(model), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no rotary module that Transformers builds from the configuration")
    return found[2]


def unslide(config: PretrainedConfig, window: float) -> dict[str, Any]:
    """Configuration changes that turn sliding windows into full attention, where *every* layer slides below `window`.

    Sliding windows count tokens, not positions: nothing beyond them is ever attended, whatever the RoPE. Where full and
    sliding layers alternate, the full ones carry the context and nothing changes (an empty dictionary).
    """
    size = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    slides = size is not None and size < window and (not types or set(types) == {"sliding_attention"})
    if not slides:
        return {}
    changes: dict[str, Any] = {"sliding_window": None}
    if hasattr(config, "use_sliding_window"):
        changes["use_sliding_window"] = False
    if types:
        changes["layer_types"] = ["full_attention"] * len(types)
    return changes


def legacy_keys(config: PretrainedConfig) -> dict[str, Any]:
    """The keys that Transformers 4, TGI and older vLLM read in place of `rope_parameters`; Transformers 5 accepts both."""
    key = layer_type(config)
    flat = _entry(config.rope_parameters, config)
    scaling = {k: v for k, v in flat.items() if k not in _KEPT}
    scaled = scaling.get("rope_type", "default") != "default"
    keys: dict[str, Any] = {"rope_theta": flat["rope_theta"], "rope_scaling": scaling if scaled else None}
    if _declares_original(config):
        keys["original_max_position_embeddings"] = config.original_max_position_embeddings
    if "partial_rotary_factor" in flat:
        name = "rotary_pct" if family(config) == "gpt_neox" else "partial_rotary_factor"
        keys[name] = flat["partial_rotary_factor"]
    if family(config) == "gpt_neox":
        keys["rotary_emb_base"] = flat["rope_theta"]
    if key is not None and isinstance(config.rope_parameters.get("sliding_attention"), Mapping):
        keys["rope_local_base_freq"] = config.rope_parameters["sliding_attention"]["rope_theta"]
    if scaled and scaling["rope_type"] == "longrope":
        keys |= _legacy_longrope(config, scaling)
    return keys


def _legacy_longrope(config: PretrainedConfig, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers 4 takes the trained window of longrope from the top level; its phi3 accepts no attention factor at all
    and derives one as sqrt(1 + ln(window / original) / ln(original)), so `original` is chosen to give the one we mean.
    With two equal lists it decides nothing else. `original` is a whole number: where none comes close enough, all keys are
    written, and phi3 of Transformers 4 refuses them instead of computing something else."""
    original = scaling["original_max_position_embeddings"]
    meant = scaling.get("attention_factor")
    if family(config) not in _ONLY_LONGROPE:
        return {"original_max_position_embeddings": original}
    lists = {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
    if meant is None:  # read from a file of ours, or from a vendor's: it is derived from `original` already
        return {"original_max_position_embeddings": original, "rope_scaling": lists}
    window = config.max_position_embeddings
    derived = original
    if scaling["short_factor"] == scaling["long_factor"] and meant >= 1:
        derived = max(2, round(window ** (1 / meant**2)))
    if abs(math.sqrt(max(1.0, math.log(window) / math.log(derived))) / meant - 1) > 5e-6:
        return {"original_max_position_embeddings": original, "rope_scaling": dict(scaling)}
    return {"original_max_position_embeddings": derived, "rope_scaling": lists}


def read_by_v4(config: PretrainedConfig) -> bool:
    """False where Transformers 4 refuses the configuration that `legacy_keys` writes."""
    scaling = legacy_keys(config)["rope_scaling"]
    return family(config) not in _ONLY_LONGROPE or not scaling or len(scaling) == 3


def _declares_original(config: PretrainedConfig) -> bool:
    """phi3: Transformers prefers its top-level `original_max_position_embeddings` to the key in `rope_parameters`."""
    return hasattr(type(config), "original_max_position_embeddings")


def _set_original(config: PretrainedConfig, value: int) -> None:
    """Set the top-level key where the family has one; elsewhere remove one that a file brought, since it would win as well."""
    if _declares_original(config):
        config.original_max_position_embeddings = value
    elif hasattr(config, "original_max_position_embeddings"):
        del config.original_max_position_embeddings


def _as_longrope(change: RopeChange, theta: float) -> dict[str, Any]:
    """One set of frequencies as `longrope` keys: factor_j = plain_j / wanted_j in both lists."""
    assert len(change.at) == 1, "only static frequencies have a list form"
    (wanted,) = change.at.values()
    pairs = len(wanted.inv_freq)
    factors = [theta ** (-j / pairs) / f for j, f in enumerate(wanted.inv_freq)]
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
        "attention_factor": wanted.attention_factor, "original_max_position_embeddings": change.window,
    }  # fmt: skip


def _as_linear(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """`_as_longrope` where one factor is enough: for longrope Transformers looks at the positions of every forward pass, and waits for the device."""
    factor = min(parameters["short_factor"])
    alike = max(parameters["short_factor"]) <= factor * (1 + 1e-9)
    return {"rope_type": "linear", "factor": factor} if alike and parameters["attention_factor"] == 1 else None


def _as_trained(config: PretrainedConfig) -> PretrainedConfig:
    before = copy.deepcopy(config)
    before.rope_parameters = copy.deepcopy(dict(trained_rope(config)))
    before.max_position_embeddings = _limit(config)
    _set_original(before, trained_parameters(config).get("original_max_position_embeddings", before.max_position_embeddings))
    return before


def _limit(config: PretrainedConfig) -> int:
    window = trained_window(config)
    assert window is not None, "a model with RoPE has a window"
    return window


def _rotary_children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if "RotaryEmbedding" in type(child).__name__ and any(b.endswith("inv_freq") for b, _ in child.named_buffers(recurse=False)):
                yield parent, name, child


def _nested(parameters: Mapping[str, Any]) -> bool:
    return isinstance(parameters.get("full_attention"), Mapping)


def _entry(parameters: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    return dict(parameters["full_attention"] if _nested(parameters) else parameters)


def _one_list(parameters: Mapping[str, Any]) -> bool:
    return parameters.get("rope_type") == "longrope" and parameters.get("short_factor") == parameters.get("long_factor")


def _largest_error(got: tuple[float, ...], want: tuple[float, ...]) -> float:
    """Largest relative difference; infinite if the lengths differ or a number is not finite."""
    if len(got) != len(want) or not all(map(math.isfinite, got)):
        return math.inf
    return max(abs(g / w - 1) for g, w in zip(got, want, strict=True))
