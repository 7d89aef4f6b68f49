"""Short-to-long distillation: skip-wise positions learn from the base model at the plain ones it was trained with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_longctx.integration import auto, rope


class Teacher:
    """The base model of an adapter, inside the model that is trained: adapter and methods off, trained RoPE, positions 0, 1, 2, ...

    No second copy of the weights is held. Source: LongReD (Dong et al. 2025, arXiv 2502.07365), section 3.3.

    Args:
        model: a PEFT model whose base was patched by methods other than embeddings.
    """

    def __init__(self, model: Any):
        self.model = model
        self.base = model.get_base_model()
        self.rotary = rope.trained_modules(self.base)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states [batch, window, width], without gradients."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        with torch.no_grad(), self.model.disable_adapter(), auto.switched_off(self.base), self._trained_rope():
            return self.base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)[0]

    @contextmanager
    def _trained_rope(self) -> Iterator[None]:
        patched = [getattr(parent, name) for parent, name, _ in self.rotary]
        for parent, name, module in self.rotary:
            setattr(parent, name, module)
        try:
            yield
        finally:
            for (parent, name, _), module in zip(self.rotary, patched, strict=True):
                setattr(parent, name, module)
