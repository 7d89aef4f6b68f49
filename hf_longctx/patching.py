"""patch a configuration or a live model: which slot goes where, and the proof that it is there."""

import copy
import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from hf_longctx import __version__
from hf_longctx.integration import auto, rope
from hf_longctx.integration.configs import is_ours
from hf_longctx.method import Method, RopeChange, in_slot

MODEL_SLOTS = ("rope", *auto.SLOTS)


def model_methods(methods: Sequence[Method]) -> tuple[Method, ...]:
    """`methods`, once it is known that each changes a model. Raises ValueError naming one that only affects training."""
    for item in methods:
        if not set(item.slots) & set(MODEL_SLOTS):
            raise ValueError(f"{item.name} fills the {item.slots[0]} slot, which belongs to training, not to a model")
    return tuple(methods)


def patch_config(config: PretrainedConfig, methods: Sequence[Method]) -> tuple[RopeChange | None, dict[str, Any]]:
    """Apply `methods` to a configuration, starting from what the model was *trained* with, not from an earlier patch.

    Returns the change of frequencies, for the proof (None without methods), and every other key that was changed with it. With a
    bias, attention or embedding method the configuration becomes one of ours (`integration.auto`).

    Raises:
        ValueError: the family is not supported, or a method does not fit it.
    """
    change, others = _patch(config, methods)
    auto.warn_if_divergent(methods, config)
    return change, others


def _patch(config: PretrainedConfig, methods: Sequence[Method]) -> tuple[RopeChange | None, dict[str, Any]]:
    methods = model_methods(methods)
    if not methods:
        return None, {}
    shape = rope.read_shape(config)
    changer = in_slot(methods, "rope")
    change = changer.rope(shape) if changer else rope.unchanged(config, shape)
    auto.claim(config, methods)
    memory = {
        "version": __version__,
        "trained": {"rope_parameters": copy.deepcopy(dict(rope.trained_rope(config))), "window": shape.window},
        "methods": [item.to_dict() for item in methods],
        "window": change.window,
    }
    # A bias reaches past the window that it was trained on.
    others = rope.unslide(config, math.inf if is_ours(config) else change.window)
    config.longctx = memory
    for key, value in others.items():
        setattr(config, key, value)
    rope.apply(config, change)
    return change, others


def prove_config(config: PretrainedConfig, change: RopeChange) -> None:
    """Prove `change`, and the modules of other slots, without weights. Raises RuntimeError if something did not take effect."""
    rope.prove(rope.rotary_module(config), change, rope.layer_type(config))
    auto.prove_class(config)
    if is_ours(config):
        auto.prove_config(config)


def prove_model(model: PreTrainedModel, change: RopeChange) -> None:
    """The same on a model with weights."""
    rope.prove(rope.rotary_of(model), change, rope.layer_type(model.config))
    auto.prove_class(model.config)
    if is_ours(model.config):
        auto.prove(model)


def patch_model(model: PreTrainedModel, methods: Sequence[Method]) -> PreTrainedModel:
    """Patch a live model in place and return it; the same as loading it patched.

    Raises:
        ValueError: as `patch_config`; also where every layer slides, which only a freshly built model can change.
        RuntimeError: the proof failed.
    """
    config = model.config
    trial = copy.deepcopy(config)
    change, others = _patch(trial, methods)
    if "layer_types" in others:
        raise ValueError(f"every layer of this {config.model_type} slides over {config.sliding_window} tokens: patch the checkpoint, then load it")
    if change is None:
        return model
    if is_ours(trial):
        auto.check_model(model)
    patch_config(config, methods)
    rope.rebuild(model, config)
    auto.convert(model)
    prove_model(model, change)
    return model


def window_of(config: PretrainedConfig) -> int:
    """The window of a (patched) model: what its method aims at, or what it was trained for."""
    memory = getattr(config, "longctx", None)
    if not memory:
        return rope.trained_window(config) if getattr(config, "rope_parameters", None) else int(config.max_position_embeddings)
    return int(memory["window"])
