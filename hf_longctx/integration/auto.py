"""Models with a bias, attention, embedding or delta method: classes of their own, so that nothing loads them as something else.

`hf_longctx_llama` is Transformers' llama and the modules that `config.longctx` names. Stock Auto classes refuse that name; with
`hf_longctx` imported, before or after transformers, they load it.
"""

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_longctx.integration import delta, rope, steps
from hf_longctx.integration.attention import LONGCTX, LONGCTX_FULL_ROWS, Rows, locate, share_table
from hf_longctx.integration.configs import DELTA_FAMILIES, FAMILIES, PREFIX, class_name, config_class, family, is_ours
from hf_longctx.integration.state import has_state
from hf_longctx.method import Method, Shape, in_slot, load_methods
from hf_longctx.modules import Formula, PerLayer

logger = logging.getLogger(__name__)
SLOTS = ("bias", "attention", "embedding", "delta")
if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class LongctxModel(_Base):
    """Mixed into a causal LM of Transformers: its methods' modules, and the hook that tells them where tokens stand."""

    _keep_in_fp32_modules_strict = {f"longctx_{slot}" for slot in SLOTS}
    _longctx_off = False
    _longctx_rows: Rows | None = None  # promised while `attn_implementation` says so
    _longctx_handles: Sequence[RemovableHandle]
    _longctx_shape: Shape

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        wanted = config._attn_implementation
        super().__init__(config, *args, **kwargs)
        # A patched checkpoint that was not trained holds no parameters of methods: `_init_weights` starts them, and nothing is amiss.
        self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), r"^longctx_"}
        install(self)
        if wanted is not None:
            self.set_attn_implementation(wanted)

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a checkpoint does not hold. Constants are never in one; parameters are not until they were trained and saved."""
        if not isinstance(module, Formula):
            return super()._init_weights(module)
        for name, value in module.start(module.initial):
            init.copy_(getattr(module, name), value)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """SDPA is ours here, since the stock function would leave bias and scaling out; there is no other yet."""
        if attn_implementation not in ("sdpa", LONGCTX, LONGCTX_FULL_ROWS):
            raise ValueError(f"a model with a {' and a '.join(_slots(self))} method has attn_implementation 'sdpa' only, got {attn_implementation!r}")
        super().set_attn_implementation(LONGCTX if attn_implementation == "sdpa" else attn_implementation, *args, **kwargs)

    def _longctx_hook(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the decoder: add position embeddings, and the keyword `longctx` for the attention function."""
        kwargs = dict(zip(inspect.signature(decoder.forward).parameters, args)) | kwargs
        embeds = kwargs.get("inputs_embeds")
        source = embeds if embeds is not None else kwargs["input_ids"]
        full = full_layers(self.config)
        rows = self._longctx_rows if self.config._attn_implementation == LONGCTX_FULL_ROWS else None
        mask, positions, past = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        tokens = locate(source.shape[1], source.device, mask, positions, past, min(full), rows)
        if self._longctx_off:
            return (), kwargs | {"longctx": tokens}
        tokens.bias, tokens.scaling, tokens.layers = getattr(self, "longctx_bias", None), getattr(self, "longctx_attention", None), full
        share_table(tokens, self._longctx_shape.heads, source.new_empty(self._longctx_shape.head_dim, dtype=self.dtype))
        embedding = getattr(self, "longctx_embedding", None)
        if embedding is not None:
            embeds = decoder.get_input_embeddings()(source) if embeds is None else embeds  # type: ignore[operator]
            kwargs |= {"input_ids": None, "inputs_embeds": embedding.of(0)(embeds, tokens.q_pos.expand(source.shape[:2]))}
        return (), kwargs | {"longctx": tokens}


class LongctxStateModel(LongctxModel):
    """Mixed into a state-space model of Transformers: the modules of its delta method, and the hooks that hand them to the scans."""

    longctx_delta: PerLayer
    _longctx_places: Mapping[int, int]  # `delta.places`
    _longctx_seen: steps.Seen | None = None

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        super(LongctxModel, self).set_attn_implementation(attn_implementation, *args, **kwargs)

    def _longctx_enter(self, mixer: Any, args: tuple[Any, ...]) -> None:
        steps.enter(mixer, None if self._longctx_off else self.longctx_delta.of(self._longctx_places[mixer.layer_idx]), self._longctx_seen)

    def _longctx_leave(self, mixer: Any, args: tuple[Any, ...], output: Any) -> None:
        steps.leave()


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its bias, scaling, position embedding and changed step sizes."""
    if not isinstance(model, LongctxModel):
        yield
        return
    model._longctx_off = True
    try:
        yield
    finally:
        model._longctx_off = False


def _slots(model: Any) -> list[str]:
    return [slot for slot in SLOTS if hasattr(model, f"longctx_{slot}")]


def full_layers(config: PretrainedConfig) -> frozenset[int]:
    """Layers without a sliding window: those that carry the context."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return frozenset(i for i, kind in enumerate(types[: config.num_hidden_layers]) if kind == "full_attention")


def needs_class(methods: Sequence[Method]) -> bool:
    """Whether any of the methods is more than a change of configuration."""
    return any(set(item.slots) & set(SLOTS) for item in methods)


def install(model: PreTrainedModel) -> None:
    """Give a model of ours the modules of its `config.longctx`, in place of those it has."""
    uninstall(model)
    config = model.config
    methods = load_methods(config.longctx["methods"])
    if isinstance(model, LongctxStateModel):
        model._longctx_places = delta.places(config)  # type: ignore[assignment]
        model.longctx_delta = PerLayer([_step_size(config, place) for place in model._longctx_places.values()]).to(model.device)
        model._longctx_handles = delta.hook(model, model._longctx_enter, model._longctx_leave)
        return
    shape = rope.read_shape(config)
    model._longctx_shape = shape  # type: ignore[assignment]
    for slot in SLOTS:
        item = in_slot(methods, slot)
        if item is not None:
            count = config.num_hidden_layers if slot == "attention" or getattr(item, "per_layer", False) else 1
            setattr(model, f"longctx_{slot}", PerLayer([getattr(item, slot)(shape) for _ in range(count)]).to(model.device))
    decoder: Any = model.get_decoder()
    # A bound method, which copy.deepcopy binds to the copy.
    model._longctx_handles = [decoder.register_forward_pre_hook(model._longctx_hook, with_kwargs=True)]  # type: ignore[assignment]
    model.set_attn_implementation("sdpa")


def uninstall(model: Any) -> None:
    """Remove what `install` put there."""
    for slot in _slots(model):
        delattr(model, f"longctx_{slot}")
    for handle in vars(model).pop("_longctx_handles", ()):
        handle.remove()


def _step_size(config: PretrainedConfig, place: int) -> Formula:
    """A new module of the delta method of a configuration, for the state-space layer at `place` among these."""
    item = in_slot(load_methods(config.longctx["methods"]), "delta")
    assert item is not None
    return item.delta(delta.read_shape(config), place)  # type: ignore[return-value]


def check_family(config: PretrainedConfig, methods: Sequence[Method]) -> None:
    """Raise ValueError if a method needs a class of ours and there is none for the family."""
    for item in methods:
        for slot in set(item.slots) & set(SLOTS):
            families = DELTA_FAMILIES if slot == "delta" else FAMILIES
            if family(config) not in families:
                raise ValueError(f"{item.name} works on {', '.join(families)} so far, not on {family(config)}")
            if slot == "delta" and not has_state(config):
                raise ValueError(f"no layer of this {family(config)} is a state-space layer, so {item.name} finds no step size to change")


def claim(config: PretrainedConfig, methods: Sequence[Method]) -> None:
    """Give a configuration the class that its methods need, ours or the stock one."""
    if needs_class(methods):
        _become(config, config_class(family(config)), class_name(stock_class(config)))
    elif is_ours(config):
        _become(config, CONFIG_MAPPING[family(config)], stock_class(config).__name__)


def _become(config: PretrainedConfig, kind: Any, architecture: str) -> None:
    config.__class__ = kind
    config.architectures = [architecture]
    vars(config).pop("model_type", None)  # one that was read from a file hides that of the class
    if is_ours(config):
        model_class(family(config))  # AutoModelForCausalLM must know it before it is asked


def stock_class(config: PretrainedConfig) -> Any:
    """The causal LM of Transformers for a configuration, of ours or not."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family(config)]]


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError unless `convert` can give the model a class of ours."""
    if not isinstance(model, stock_class(model.config)):
        raise ValueError(f"bias, attention, embedding and delta methods work on {stock_class(model.config).__name__}, not on {type(model).__name__}")


def check_nothing_learned(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's methods hold values that training changed: modules made anew would forget them."""
    for path, module in model.named_modules():
        if isinstance(module, Formula):
            for name, value in module.start(module.learned):
                if not torch.equal(getattr(module, name).detach().cpu(), value):
                    raise ValueError(f"{path}.{name} was trained, and another patch would start it anew; patch the model that it was made from")


def convert(model: PreTrainedModel) -> None:
    """Make a live model what its (claimed) configuration says. Weights, submodules and hooks of others stay."""
    if is_ours(model.config):
        model.__class__ = model_class(family(model.config))
        install(model)
    elif isinstance(model, LongctxModel):
        uninstall(model)
        attention = model.config._attn_implementation if isinstance(model, LongctxStateModel) else "sdpa"
        model.__class__ = stock_class(model.config)
        model.set_attn_implementation(attention)


def warn_if_divergent(methods: Sequence[Method], config: PretrainedConfig) -> None:
    """Warn of a bias under which far tokens together outweigh near ones in the end."""
    item = in_slot(methods, "bias")
    if item is not None and not item.converges(rope.read_shape(config)):
        _warn_of_divergence(item.name)


@cache
def _warn_of_divergence(name: str) -> None:
    """Once: a run patches a configuration to plan with, and the model."""
    logger.warning(
        "the sum of exp(bias) over all distances does not converge for %s as it is set: far tokens, each of little weight, outweigh near ones "
        "in the end, so expect it to extrapolate less than alibi or mkl_alibi", name,
    )  # fmt: skip


def prove(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless every layer with full attention asks for its bias and scaling, and constants are as computed.

    On the meta device the first half is proved, without weights or memory.
    """
    if isinstance(model, LongctxStateModel):
        _prove_steps(model)
        return
    seen: list[int] = []

    def look(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["longctx"].seen = seen

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)  # type: ignore[operator, union-attr]
    try:
        ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=model.device).tril()  # one that nothing needs to read, which meta cannot
        with torch.no_grad():
            model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
    finally:
        handle.remove()
    missing = sorted(full_layers(model.config) - set(seen))
    if missing:
        raise RuntimeError(f"the patch did not take effect: attention of layers {missing} never asked for its bias and scaling")
    for name, module in model.named_modules():
        if isinstance(module, Formula) and model.device.type != "meta":
            for constant, value in module.start(module.fixed):
                if not torch.equal(getattr(module, constant).float().cpu(), value):
                    raise RuntimeError(f"the patch did not take effect: {name}.{constant} is not what its method computes")


def _prove_steps(model: LongctxStateModel) -> None:
    item = in_slot(load_methods(model.config.longctx["methods"]), "delta")
    assert item is not None
    modules: Any = model.longctx_delta.layers

    def make(place: int) -> Formula:
        made = _step_size(model.config, place)
        made.load_state_dict(modules[place].state_dict())
        return made

    missing = [name for module in modules for name in module.measured if getattr(module, name).isnan().any()]
    if missing and model.device.type != "meta":
        raise ValueError(f"{item.name} has not been calibrated: give data to `longctx patch` (--data FILE), and load what it writes")
    delta.prove(model, make)


def set_measured(model: Any, tensors: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Give the modules of the delta slot, by state-space layer, what their calibration found."""
    for module, found in zip(model.longctx_delta.layers, tensors, strict=True):
        for name, value in found.items():
            getattr(module, name).copy_(value)


def prove_class(config: PretrainedConfig) -> None:
    """Raise RuntimeError unless a patched configuration is of the class, and has the name, that its methods need."""
    needed = needs_class(load_methods(config.longctx["methods"]))
    if (is_ours(config), config.model_type.startswith(PREFIX)) != (needed, needed):
        raise RuntimeError(f"the patch did not take effect: its methods need {'a model_type of ours' if needed else 'a stock model'}, but it is {config.model_type}")


def prove_config(config: PretrainedConfig) -> None:
    """`prove` on a model without weights. Its RoPE is proved elsewhere, and some types read positions, which meta has not."""
    small = copy.deepcopy(config)
    if rope.rotates(config):
        small.rope_parameters = _unscaled(config.rope_parameters)
    if getattr(small, "num_local_experts", 0):
        small.num_local_experts = 0  # tokens are sent to experts by values, and no method looks there
    with torch.device("meta"):
        prove(AutoModelForCausalLM.from_config(small))


def _unscaled(parameters: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_type" not in parameters:  # a dictionary a layer type
        return {key: _unscaled(value) if isinstance(value, Mapping) else value for key, value in parameters.items()}
    return {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters} | {"rope_type": "default"}


@cache
def model_class(name: str) -> Any:
    """The causal LM of a family with modules of ours, known to AutoModelForCausalLM from then on."""
    config = config_class(name)
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    kept = set(getattr(stock, "_keep_in_fp32_modules_strict", None) or ()) | LongctxModel._keep_in_fp32_modules_strict
    mixed_in = LongctxStateModel if name in DELTA_FAMILIES else LongctxModel
    made = type(class_name(stock), (mixed_in, stock), {"config_class": config, "_keep_in_fp32_modules_strict": kept, "__module__": __name__})
    globals()[made.__name__] = made
    AutoModelForCausalLM.register(config, made)
    for old, new in ((stock.__name__, made.__name__), (name, config.model_type)):  # gpt_neox's files call lm_head embed_out
        renamings = get_checkpoint_conversion_mapping(old)
        if renamings is not None:
            register_checkpoint_conversion_mapping(new, renamings, overwrite=True)
    return made
