"""Configurations of models with modules of ours: `hf_longctx_<family>`, known to AutoConfig.

Imported as soon as Transformers' AutoConfig is (see `hf_longctx.on_import`), so it must not import models itself.
"""

from functools import cache
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

PREFIX = "hf_longctx_"
# Families whose layers hand positions and unknown keywords on to the attention function; each is under the laws.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "gpt_neox")
DELTA_FAMILIES = ("mamba", "falcon_mamba", "mamba2", "bamba", "granitemoehybrid")  # of the delta slot


class LongctxConfig:
    """Mixed into a configuration of Transformers."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        from hf_longctx.integration.auto import model_class

        model_class(family(self))  # from now on AutoModelForCausalLM knows it


def is_ours(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model with modules of ours."""
    return isinstance(config, LongctxConfig)


def family(config: Any) -> str:
    """The `model_type` of Transformers, also of a model with modules of ours."""
    return config.model_type.removeprefix(PREFIX)


def class_name(stock: type) -> str:
    return f"Longctx{stock.__name__}"


@cache
def config_class(name: str) -> Any:
    """The configuration class `hf_longctx_<family>`."""
    stock = CONFIG_MAPPING[name]
    made = type(class_name(stock), (LongctxConfig, stock), {"model_type": PREFIX + name, "__module__": __name__})
    globals()[made.__name__] = made  # where pickle looks for it
    return made


for _name in (*FAMILIES, *DELTA_FAMILIES):
    AutoConfig.register(PREFIX + _name, config_class(_name), exist_ok=True)
