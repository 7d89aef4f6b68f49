"""Next-token cross entropy without the tokens x vocabulary logits.

`summed_loss` scores hidden states block by block; `BlockLoss` puts it into Trainer through `compute_loss_func`: a
forward hook taps the decoder's last hidden state while the model itself computes the logits of one token only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_longctx.lora import base_model

IGNORE = -100
_BLOCK_ELEMENTS = 2**26  # of one block of logits: 256 MiB in float32
_CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")  # keys of configurations
_REMEDY = "set loss: model in the recipe"


class TeacherStates(NamedTuple):
    """What another model says of the same tokens, and how much that counts."""

    hidden: Tensor  # [tokens, width]
    weight: Tensor  # [vocabulary, width], its output embedding
    share: float  # between 0 and 1


def _block(vocabulary: int) -> int:
    return max(16, _BLOCK_ELEMENTS // vocabulary)


class _SummedLoss(torch.autograd.Function):
    """Sum of cross entropies; gradients are formed block by block in the forward pass, so no logits outlive their block."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, compiled: bool, teacher: "TeacherStates | None") -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[1] else None
        block_loss = _compiled_block_loss() if compiled else _block_loss
        for start, end in pairwise(_bounds(len(hidden), _block(weight.shape[0]))):
            part = slice(start, end)
            soft = teacher and teacher._replace(hidden=teacher.hidden[part])
            loss, d_logits = block_loss(hidden[part], weight, labels[part], soft)
            total += loss
            keep = (labels[part] != IGNORE)[:, None]  # here, where it is tokens x width: a pass over the logits costs more
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ weight) * keep
            if d_weight is not None:
                d_weight += d_logits.T @ (hidden[part] * keep)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        scaled = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        return scaled, None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype), None, None, None


def _bounds(tokens: int, most: int) -> list[int]:
    """Where blocks of at most `most` tokens begin and end. Their sizes differ by at most one, so few sizes are compiled."""
    blocks = max(1, -(-tokens // most))
    return [tokens * i // blocks for i in range(blocks + 1)]


def _block_loss(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: "TeacherStates | None") -> tuple[Tensor, Tensor]:
    """Summed loss of one block, and the gradient with respect to the logits as if every label counted, in the dtype of `hidden`."""
    log_p = _log_softmax(hidden, weight)
    keep = labels != IGNORE
    index = labels.clamp(min=0)[:, None]
    loss = -log_p.gather(1, index)[:, 0]
    hard = 1.0
    if teacher is not None:
        log_q = _log_softmax(teacher.hidden, teacher.weight)
        q = log_q.exp()
        hard = 1 - teacher.share
        loss = hard * loss + teacher.share * (q * log_q.sub_(log_p)).sum(-1)
    d_logits = log_p.exp_()  # in place: a block of logits is the largest thing alive
    if teacher is not None:
        d_logits.sub_(q, alpha=teacher.share)
    d_logits.scatter_add_(1, index, torch.full_like(index, -hard, dtype=d_logits.dtype))
    return (loss * keep).sum(), d_logits.to(hidden.dtype)


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1, dtype=torch.float32)


@cache
def _compiled_block_loss() -> Any:
    return torch.compile(_block_loss, dynamic=False)


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor, compiled: bool = False, teacher: TeacherStates | None = None) -> Tensor:
    """Sum over tokens of -log p(label), or with a teacher q of (1 - share) (-log p(label)) + share KL(q || p), with gradients to `hidden` and, if it is trained, to `weight`.

    Args:
        hidden: [tokens, width], the states that predict `labels`.
        weight: [vocabulary, width], the output embedding.
        labels: [tokens]; -100 is left out.
        compiled: compile the blocks, which read nothing back to the CPU (liger-kernel does) and so fit into a CUDA graph.
        teacher: its states that predict `labels`.

    Otherwise, on CUDA with liger-kernel installed, its fused kernel computes this; elsewhere blocks of torch operations do, and where
    `weight` is trained: that kernel adds up its gradient in the dtype of `weight`, in vocabulary / width steps.
    """
    fused = _liger() if hidden.is_cuda and not (compiled or teacher or weight.requires_grad) else None
    if fused is not None:
        return fused.apply(hidden, weight, labels, None, None, IGNORE, 0.0, 0.0, "sum")[0]
    return _SummedLoss.apply(hidden, weight, labels, compiled, teacher)


def _liger() -> Any:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyFunction


class BlockLoss:
    """`compute_loss_func` for Trainer. The batch must carry `logits_to_keep: 1`.

    Labels are [batch, tokens], or [batch, tokens + 1] where the token after the row's last is known.

    Args:
        model: the causal language model, wrapped by PEFT or not.
        compiled: as in `summed_loss`.
        teacher: called with the token ids and the mask of a batch, gives the last hidden states of the model to learn from.
        share: how much the teacher counts, between 0 and 1.
    """

    def __init__(self, model: nn.Module, compiled: bool = False, teacher: Callable[[Tensor, Tensor], Tensor] | None = None, share: float = 0.0):
        self.compiled, self.teacher, self.share = compiled, teacher, share
        self.model = base = base_model(model)
        self.hidden: Tensor | None = None
        self.batch: tuple[Tensor, Tensor] | None = None
        _plain_head(base)
        self._hook = base.get_decoder().register_forward_hook(self._keep, with_kwargs=True)

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() and kwargs.get("attention_mask") is None:
            return  # an evaluation in the midst of training: its long rows are not to be kept
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        # As the head would do with its input: Trainer calls the loss where autocast is over, and float32 multiplies ten times slower.
        # Not float16, where gradients that are not scaled yet would be flushed to zero.
        device = hidden.device.type
        lower = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        self.hidden = hidden.bfloat16() if lower else hidden
        self.batch = (kwargs["input_ids"], kwargs["attention_mask"]) if self.teacher else None

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        hidden, self.hidden = self.hidden, None
        assert hidden is not None, "the decoder did not run"
        weight = _plain_head(self.model).weight
        if weight.dtype != hidden.dtype:
            lower = min(weight.dtype, hidden.dtype, key=lambda kind: kind.itemsize)
            weight, hidden = weight.to(lower), hidden.to(lower)
        predicting = hidden[:, : labels.shape[1] - 1]  # every token, where there is one label more than tokens
        total = summed_loss(predicting.flatten(0, 1), weight, labels[:, 1:].flatten(), self.compiled, self._taught())
        items = num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != IGNORE).sum()
        return total / torch.as_tensor(items, device=total.device).clamp(min=1)  # all labels left out: 0, not NaN

    def _taught(self) -> TeacherStates | None:
        if self.teacher is None:
            return None
        assert self.batch is not None
        hidden = self.teacher(*self.batch)
        self.hidden = self.batch = None  # the teacher went through the same decoder
        weight = _plain_head(self.model, trained=False).weight
        return TeacherStates(hidden[:, :-1].flatten(0, 1).to(weight.dtype), weight, self.share)


def _plain_head(model: Any, trained: bool = True) -> nn.Linear:
    """The output embedding, or PEFT's trained copy of it. Raises ValueError if it is more than a matrix."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies:
        head = next(iter(copies.values())) if trained else head.original_module
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
        with torch.no_grad(), evaluating(model):
            wanted = float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss)
            got = float(loss(None, ids))
    finally:
        loss.close()  # a hook left behind would keep the last hidden states of every forward pass
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 2e-2
    if not abs(got - wanted) <= tolerance * abs(wanted):
        raise ValueError(f"the block-wise loss gives {got:.5f} where {base.config.model_type} itself gives {wanted:.5f}: {_REMEDY}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
