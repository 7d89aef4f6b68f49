"""PEFT around a model."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_longctx.recipe import Recipe


def add_lora(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """The model with the adapter that a recipe asks for; what methods learn is trained and saved with it.

    Raises:
        ValueError: what PEFT refuses.
    """
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    if is_quantised(model):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer sees to that, as `train` says
        layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
        for layer in layers:  # on such CPUs bitsandbytes repacks a layer in its first evaluation, and no gradient passes it then
            layer.support_avx512bf16_for_cpu = False
    keys = dict(recipe.lora or {})
    keys.setdefault("task_type", TaskType.CAUSAL_LM)
    also = list(keys.pop("modules_to_save", None) or [])
    if "norms" in recipe.also_train:
        also += sorted({name.rpartition(".")[2] for name, module in model.named_modules() if "Norm" in type(module).__name__})
    if "embeddings" in recipe.also_train:
        also += [name.rpartition(".")[2] for name, module in model.named_modules() if module is model.get_input_embeddings()]
        keys.setdefault("ensure_weight_tying", bool(model.config.tie_word_embeddings))
    also += [name for name, module in model.named_children() if name.startswith("longctx_") and list(module.parameters())]
    try:
        return get_peft_model(model, LoraConfig(**keys, modules_to_save=also or None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from None


def is_quantised(model: nn.Module) -> bool:
    """Whether bitsandbytes packed its weights."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def base_model(model: Any) -> Any:
    """The model itself, also when PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
