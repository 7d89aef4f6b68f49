"""Next-token cross entropy without the tokens x vocabulary logits.

`summed_loss` scores hidden states block by block; `BlockLoss` puts it into Trainer through `compute_loss_func`: a
forward hook taps the decoder's last hidden state while the model itself computes the logits of one token only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
_BLOCK_ELEMENTS = 2**26  # of one block of logits: 256 MiB in float32
_CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")  # keys of configurations
_REMEDY = "set loss: model in the recipe"


def _block(vocabulary: int) -> int:
    return max(16, _BLOCK_ELEMENTS // vocabulary)


class _SummedLoss(torch.autograd.Function):
    """Sum of cross entropies; gradients are formed block by block in the forward pass, so no logits outlive their block."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[1] else None
        size = _block(weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, d_logits = _block_loss(hidden[part], weight, labels[part])
            total += loss
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[part]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        scaled = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        return scaled, None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype), None


def _block_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of one block and its gradient with respect to the logits, in the dtype of `hidden`."""
    logits = (hidden @ weight.T).float()
    log_p = logits.log_softmax(-1)
    keep = labels != IGNORE
    index = labels.clamp(min=0)[:, None]
    loss = -(log_p.gather(1, index)[:, 0] * keep).sum()
    d_logits = log_p.exp_()  # in place: a block of logits is the largest thing alive
    d_logits.scatter_add_(1, index, torch.full_like(index, -1, dtype=d_logits.dtype))
    return loss, d_logits.mul_(keep[:, None]).to(hidden.dtype)


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of -log p(label), with gradients to `hidden` and, if it is trained, to `weight`.

    Args:
        hidden: [tokens, width], the states that predict `labels`.
        weight: [vocabulary, width], the output embedding.
        labels: [tokens]; -100 is left out.

    On CUDA with liger-kernel installed its fused kernel computes this; elsewhere blocks of torch operations do.
    """
    fused = _liger() if hidden.is_cuda else None
    if fused is not None:
        return fused.apply(hidden, weight, labels, None, None, IGNORE, 0.0, 0.0, "sum")[0]
    return _SummedLoss.apply(hidden, weight, labels)


def _liger() -> Any:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyFunction


class BlockLoss:
    """`compute_loss_func` for Trainer. The batch must carry `logits_to_keep: 1`.

    Args:
        model: the causal language model, wrapped by PEFT or not.
    """

    def __init__(self, model: nn.Module):
        base: Any = model
        if hasattr(model, "get_base_model"):  # PEFT
            base = base.get_base_model()
        self.model = base
        self.hidden: Tensor | None = None
        _plain_head(base)
        self._hook = base.get_decoder().register_forward_hook(self._keep)

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        hidden, self.hidden = self.hidden, None
        assert hidden is not None, "the decoder did not run"
        weight = _plain_head(self.model).weight
        if weight.dtype != hidden.dtype:
            lower = min(weight.dtype, hidden.dtype, key=lambda kind: kind.itemsize)
            weight, hidden = weight.to(lower), hidden.to(lower)
        total = summed_loss(hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten())
        items = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != IGNORE).sum()
        return total / torch.as_tensor(items, device=total.device).clamp(min=1)  # all labels left out: 0, not NaN


def _plain_head(model: Any) -> nn.Linear:
    """The output embedding, or PEFT's trained copy of it. Raises ValueError if it is more than a matrix."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies:
        head = next(iter(copies.values()))
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"the block-wise loss needs an output embedding that is a plain matrix, got {type(head).__name__}: {_REMEDY}")
    return head


def check_block_loss(model: nn.Module, length: int = 64) -> None:
    """Compare the block loss with the model's own on a short row.

    Raises:
        ValueError: they differ, because the family scales or caps its logits; the message names the remedy.
    """
    loss = BlockLoss(model)
    base = loss.model
    # A cap bends small logits less than bfloat16 rounds, so the configuration is asked too.
    declared = [key for key in _CHANGES_LOGITS if getattr(base.config, key, None) not in (None, 1)]
    if declared:
        loss.close()
        raise ValueError(f"the block-wise loss does not know the {declared[0]} of {base.config.model_type}: {_REMEDY}")
    parameter = next(base.parameters())
    ids = torch.arange(3, 3 + length, device=parameter.device)[None] % base.config.vocab_size
    try:
        with torch.no_grad(), _evaluating(model):
            wanted = float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss)
            got = float(loss(None, ids))
    finally:
        loss.close()  # a hook left behind would keep the last hidden states of every forward pass
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 2e-2
    if not abs(got - wanted) <= tolerance * abs(wanted):
        raise ValueError(f"the block-wise loss gives {got:.5f} where {base.config.model_type} itself gives {wanted:.5f}: {_REMEDY}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
