"""The delta slot: which models it is for, its modules in a live model, and the proof that every scan gets what they compute.

A hybrid's attention layers have no step sizes, so methods, modules and calibration count the state-space layers alone, in order.
What looks into a running model (`steps`, the proof's errors) names layers as the model does; `places` translates.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PretrainedConfig

from hf_longctx.integration import state, steps
from hf_longctx.integration.configs import family
from hf_longctx.integration.state import CACHE_ARGUMENT
from hf_longctx.integration.steps import Seen
from hf_longctx.method import StateShape


def read_shape(config: PretrainedConfig) -> StateShape:
    """The StateShape of a configuration of `configs.DELTA_FAMILIES`."""
    name = family(config)
    channels = {"mamba": "intermediate_size", "falcon_mamba": "intermediate_size", "mamba2": "num_heads"}.get(name, "mamba_n_heads")
    return StateShape(name, len(places(config)), getattr(config, channels))


def places(config: PretrainedConfig) -> dict[int, int]:
    """The place of each state-space layer among the state-space layers, by its `layer_idx`."""
    kinds = config.layer_types[: config.num_hidden_layers]
    return {layer: place for place, layer in enumerate(i for i, kind in enumerate(kinds) if kind == "linear_attention")}


def hook(model: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> list[RemovableHandle]:
    """Call `enter` and `leave` around every mixer, and let its scan ask which module is to change its step sizes."""
    state.prepare(model)
    handles = []
    for mixer, _ in state.mixers(model):
        steps.wrap(sys.modules[state.stock_class(mixer).__module__])
        handles.append(mixer.register_forward_pre_hook(enter))
        handles.append(mixer.register_forward_hook(leave, always_call=True))
    return handles


@contextmanager
def using(model: nn.Module, modules: Callable[[int], nn.Module], seen: Seen | None = None) -> Iterator[None]:
    """The model with `modules(place)` in the place of its own, and what passes them in `seen`."""
    place = places(model.config)  # type: ignore[arg-type]
    handles = hook(model, lambda mixer, args: steps.enter(mixer, modules(place[mixer.layer_idx]), seen), lambda *_: steps.leave())
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prove(model: Any, make: Callable[[int], nn.Module]) -> None:
    """Raise RuntimeError unless the scan of every layer, of a text and of one token more, gets Delta as `make(place)` computes it.

    On the meta device it is proved that the modules are asked, without weights or memory.

    Raises:
        ValueError: a module was never calibrated.
    """
    seen: Seen = []
    argument, place = CACHE_ARGUMENT[family(model.config)], places(model.config)
    model._longctx_seen = seen
    try:
        with torch.no_grad():
            ids = torch.arange(5, device=model.device)[None] % model.config.vocab_size
            cache = DynamicCache(config=model.config)
            for part in (ids[:, :4], ids[:, 4:]):
                model.get_decoder()(input_ids=part, use_cache=True, **{argument: cache})
    finally:
        model._longctx_seen = None
    asked = {(layer, function) for layer, function, *_ in seen}
    missing = sorted({(mixer.layer_idx, function) for mixer, _ in state.mixers(model) for function in ("scan", "update")} - asked)
    if missing:
        raise RuntimeError(
            f"the patch did not take effect: the step sizes of {', '.join(f'layer {i} ({function})' for i, function in missing)} never met their method"
        )
    if model.device.type == "meta":
        return
    for layer, function, before, after in seen:
        wanted = make(place[layer]).to(before.device)(before)
        if not torch.allclose(after, wanted, rtol=1e-5, atol=0):
            raise RuntimeError(f"the patch did not take effect: the step sizes of layer {layer} ({function}) are not what their method computes")
