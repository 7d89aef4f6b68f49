"""Attention through Transformers' AttentionInterface and AttentionMaskInterface."""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FULL_ROWS = "sdpa_full_rows"


def mask_of_full_rows(*, q_length: int, kv_length: int, local_size: int | None = None, allow_is_causal_skip: bool = True, **rest: Any) -> Tensor | None:
    """The mask of SDPA, for rows known to hold no padding: none at all where causality says everything.

    Stock SDPA finds that out by reading the mask back, which makes the CPU wait for the GPU in every step and is not allowed
    while a CUDA graph is recorded: there it builds the whole mask and loses the flash kernel.
    """
    if allow_is_causal_skip and q_length == kv_length and (local_size is None or kv_length <= local_size):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **rest)


AttentionInterface.register(FULL_ROWS, sdpa_attention_forward)
AttentionMaskInterface.register(FULL_ROWS, mask_of_full_rows)


def expect_full_rows(model: PreTrainedModel) -> bool:
    """Promise that every 2-D attention mask is all ones; 4-D ones are read as they are. True if the model uses SDPA and took it."""
    if model.config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation(FULL_ROWS)
    return True
