"""patch a configuration or a live model: which slot goes where, and the proof that it is there."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_longctx import __version__
from hf_longctx.integration import auto, delta, rope
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

    Returns the change of frequencies, for the proof (None without methods, and for a model without positions), and every other key
    that was changed with it. With a bias, attention, embedding or delta method the configuration becomes one of ours
    (`integration.auto`).

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
    auto.check_family(config, methods)
    steps = in_slot(methods, "delta")
    if steps is not None and steps.calibration is None:
        steps.delta(delta.read_shape(config), 0)  # values that do not fit are refused before anything is changed
    if all(item.slots == ("delta",) for item in methods) and not rope.rotates(config):
        auto.claim(config, methods)
        config.longctx = _memory(config, methods, rope.trained_window(config))
        return None, {}
    shape = rope.read_shape(config)
    changer = in_slot(methods, "rope")
    change = changer.rope(shape) if changer else rope.unchanged(config, shape)
    auto.claim(config, methods)
    memory = _memory(config, methods, change.window)
    # A bias reaches past the window that it was trained on.
    others = rope.unslide(config, math.inf if is_ours(config) else change.window)
    config.longctx = memory
    for key, value in others.items():
        setattr(config, key, value)
    rope.apply(config, change)
    return change, others


def _memory(config: PretrainedConfig, methods: Sequence[Method], window: int | None) -> dict[str, Any]:
    """What `config.longctx` holds."""
    trained = copy.deepcopy(dict(rope.trained_rope(config))) if rope.rotates(config) else None
    return {
        "version": __version__,
        "trained": {"rope_parameters": trained, "window": rope.trained_window(config)},
        "methods": [item.to_dict() for item in methods],
        "window": window,
    }


def prove_config(config: PretrainedConfig, change: RopeChange | None) -> None:
    """Prove `change`, and the modules of other slots, without weights. Raises RuntimeError if something did not take effect."""
    if change is not None:
        rope.prove(rope.rotary_module(config), change, rope.layer_type(config))
    auto.prove_class(config)
    if is_ours(config):
        auto.prove_config(config)


def prove_model(model: PreTrainedModel, change: RopeChange | None) -> None:
    """The same on a model with weights. Raises ValueError if a method was never calibrated."""
    if change is not None:
        rope.prove(rope.rotary_of(model), change, rope.layer_type(model.config))
    auto.prove_class(model.config)
    if is_ours(model.config):
        auto.prove(model)


def patch_model(model: PreTrainedModel, methods: Sequence[Method], tensors: Sequence[Mapping[str, torch.Tensor]] = ()) -> PreTrainedModel:
    """Patch a live model in place and return it; the same as loading it patched. `tensors`: what calibration found, by layer.

    Raises:
        ValueError: as `patch_config`; also where every layer slides, which only a freshly built model can change, and where methods of
            an earlier patch were trained.
        RuntimeError: the proof failed.
    """
    config = model.config
    trial = copy.deepcopy(config)
    change, others = _patch(trial, methods)
    if "layer_types" in others:
        raise ValueError(f"every layer of this {config.model_type} slides over {config.sliding_window} tokens: patch the checkpoint, then load it")
    if not methods:
        return model
    auto.check_nothing_learned(model)
    if is_ours(trial):
        auto.check_model(model)
    patch_config(config, methods)
    rope.rebuild(model, config)
    auto.convert(model)
    if tensors:
        auto.set_measured(model, tensors)
    prove_model(model, change)
    return model


def window_of(config: PretrainedConfig) -> int | None:
    """The window of a (patched) model: what its method aims at, or what it was trained for; None for a model without positions."""
    memory = getattr(config, "longctx", None)
    return memory["window"] if memory else rope.trained_window(config)
