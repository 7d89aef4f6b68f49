"""PEFT around a model."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_longctx.integration.configs import family, is_ours
from hf_longctx.integration.state import has_state
from hf_longctx.recipe import Recipe

_READ_PAST = {"dt_proj", "conv1d"}  # of a state-space mixer: it reads their weights without calling them
_FUSED = {"out_proj"}  # so do the kernels that compute a mixer in one, here never used; PEFT refuses it for most families


def add_lora(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """The model with the adapter that a recipe asks for; what methods learn is trained and saved with it.

    Raises:
        ValueError: what PEFT refuses.
    """
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if is_quantised(model):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer sees to that, as `train` says
        layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
        for layer in layers:  # on such CPUs bitsandbytes repacks a layer in its first evaluation, and no gradient passes it then
            layer.support_avx512bf16_for_cpu = False
    keys = dict(recipe.lora or {})
    keys.setdefault("task_type", TaskType.CAUSAL_LM)
    if has_state(model.config) and keys.get("target_modules", "all-linear") == "all-linear":
        keys["target_modules"] = state_targets(model)
    if keys.get("target_modules") is None and is_ours(model.config):  # PEFT's defaults go by the model_type of the stock model
        keys["target_modules"] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family(model.config))
    also = list(keys.pop("modules_to_save", None) or [])
    if "norms" in recipe.also_train:
        also += sorted({name.rpartition(".")[2] for name, module in model.named_modules() if "Norm" in type(module).__name__})
    if "embeddings" in recipe.also_train:
        tied = bool(model.config.tie_word_embeddings)  # PEFT knows tied embeddings by the name of the output's, and trains the input's
        wanted = model.get_output_embeddings() if tied else model.get_input_embeddings()
        also += [name.rpartition(".")[2] for name, module in model.named_modules() if module is wanted]
        keys.setdefault("ensure_weight_tying", tied)
    also += [name for name, module in model.named_children() if name.startswith("longctx_") and list(module.parameters())]
    try:
        adapted: Any = get_peft_model(model, LoraConfig(**keys, modules_to_save=list(also) or None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from None
    if has_state(model.config):
        _check_reached(adapted, family(model.config))
    if also:  # as asked: PEFT puts the input's embeddings in the place of tied output's, and would not know them when it loads the adapter
        adapted.peft_config["default"].modules_to_save = also
    return adapted


def state_targets(model: PreTrainedModel) -> list[str]:
    """Every linear layer of a model with a state that an adapter can be trained on; of the mixers, in_proj and x_proj."""
    head = model.get_output_embeddings()
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    return sorted(names - _READ_PAST - _FUSED)


def _check_reached(model: nn.Module, name: str) -> None:
    """Raise ValueError if a layer has an adapter that the model reads past."""
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        layer = path.rpartition(".")[2]
        if isinstance(module, LoraLayer) and layer in _READ_PAST:
            raise ValueError(f"lora: {name} reads the weights of {layer} past its adapter, which would never be trained; leave {layer} out of target_modules")


def is_quantised(model: nn.Module) -> bool:
    """Whether bitsandbytes packed its weights."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def base_model(model: Any) -> Any:
    """The model itself, also when PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
