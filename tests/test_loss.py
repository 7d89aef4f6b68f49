"""The block loss: equal to cross entropy on full logits, never holding them, refused where a family changes its logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hf_longctx import loss as L
from hf_longctx.loss import IGNORE, BlockLoss, check_block_loss, summed_loss
from tests.conftest import largest_tensor, tiny_model

TOKENS, WIDTH, VOCABULARY = 75, 24, 130


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """16 tokens a block (the least there is): 75 is four blocks and a rest."""
    monkeypatch.setattr(L, "_BLOCK_ELEMENTS", 1)


def case(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::7] = IGNORE
    labels[16:32] = IGNORE  # a whole block without a label
    return hidden, weight, labels


def reference(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE, reduction="sum")


def with_gradients(function, hidden, weight, labels, scale=0.37):
    hidden.grad = weight.grad = None
    value = function(hidden, weight, labels)
    (value * scale).backward()
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.floor
def test_equals_cross_entropy_on_full_logits():
    wanted, got = (with_gradients(f, *case()) for f in (reference, summed_loss))
    for name, a, b in zip(("loss", "d hidden", "d weight"), wanted, got):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name


def test_bfloat16_lies_as_near_to_the_truth_as_full_logits_do():
    truth = with_gradients(reference, *(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in case(torch.bfloat16)))
    full, blocks = (with_gradients(f, *case(torch.bfloat16)) for f in (reference, summed_loss))
    for name, t, a, b in zip(("loss", "d hidden", "d weight"), truth, full, blocks):
        error_full, error_blocks = ((x.double() - t).norm() / t.norm() for x in (a, b))
        assert error_blocks < 2 * error_full + 2**-9, name
    assert blocks[1].dtype == blocks[2].dtype == torch.bfloat16


def test_a_frozen_weight_gets_no_gradient_and_costs_none():
    hidden, weight, labels = case()
    weight.requires_grad_(False)
    summed_loss(hidden, weight, labels).backward()
    assert weight.grad is None
    assert torch.allclose(hidden.grad, with_gradients(reference, *case(), scale=1.0)[1], atol=1e-5)


@pytest.mark.floor
def test_the_logits_of_all_tokens_are_never_alive():
    allowed = max(16 * VOCABULARY, VOCABULARY * WIDTH, TOKENS * WIDTH)  # a block, the weight, the hidden states
    assert allowed < TOKENS * VOCABULARY
    assert largest_tensor(lambda: with_gradients(summed_loss, *case())) <= allowed
    assert largest_tensor(lambda: with_gradients(reference, *case())) == TOKENS * VOCABULARY  # the measure can see them


def test_memory_of_a_model_step_does_not_hold_the_logits_either():
    model = tiny_model(vocab_size=2000)
    ids = torch.randint(3, 2000, (2, 40))
    loss = BlockLoss(model)

    def step(labels=None, **kwargs):
        out = model(ids, attention_mask=torch.ones_like(ids), labels=labels, **kwargs)
        (out.loss if labels is not None else loss(out, ids)).backward()

    assert largest_tensor(lambda: step(logits_to_keep=1)) == 2000 * 64  # the embedding
    assert largest_tensor(lambda: step(labels=ids)) >= 2 * 39 * 2000


# --- inside a model


@pytest.mark.floor
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma3_text"])
def test_equals_the_models_own_loss(family):
    model = tiny_model(family)
    check_block_loss(model)
    ids = torch.randint(3, 300, (2, 20))
    labels = ids.clone()
    labels[0, :9] = IGNORE

    def gradients(value):
        model.zero_grad()
        value.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    own = model(ids, labels=labels, attention_mask=torch.ones_like(ids)).loss
    wanted = gradients(own)
    loss = BlockLoss(model)
    blocks = loss(model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1), labels)
    assert blocks.item() == pytest.approx(own.item(), rel=1e-5)
    got = gradients(blocks)
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert (wanted[name] - got[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name


@pytest.mark.parametrize(("autocast", "multiplied"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_bfloat16_autocast_multiplies_as_the_models_own_head_does(monkeypatch, autocast, multiplied):
    """A model in float32: its last norm leaves hidden states in float32, and the embedding is. Gradients of logits are too small for float16."""
    model = tiny_model()
    ids = torch.arange(5, 45)[None]
    seen, original = [], L.summed_loss
    monkeypatch.setattr(L, "summed_loss", lambda hidden, weight, *rest: seen.append((hidden.dtype, weight.dtype)) or original(hidden, weight, *rest))

    def gradient(loss):
        model.zero_grad()
        with torch.autocast("cpu", autocast):
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **({"logits_to_keep": 1} if loss else {"labels": ids}))
        (loss(out, ids) if loss else out.loss).backward()  # Trainer, too, has left autocast here
        return model.get_output_embeddings().weight.grad.clone()

    wanted, block = gradient(None), BlockLoss(model)
    got = gradient(block)
    block.close()
    assert seen == [(multiplied, multiplied)]
    assert got.dtype == torch.float32
    assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_accumulating_four_batches_equals_one():
    model = tiny_model()
    loss = BlockLoss(model)
    ids = torch.randint(3, 300, (4, 20))
    labels = ids.clone()
    for row in range(4):  # ragged: 19, 14, 9 and 4 labels
        labels[row, : 1 + 5 * row] = IGNORE
    items = (labels[:, 1:] != IGNORE).sum()

    def gradient(rows):
        model.zero_grad()
        for part in rows:
            out = model(ids[part], attention_mask=torch.ones_like(ids[part]), logits_to_keep=1)
            loss(out, labels[part], items).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    one, four = gradient([slice(0, 4)]), gradient([slice(i, i + 1) for i in range(4)])
    assert torch.allclose(one, four, rtol=1e-4, atol=1e-5 * one.abs().max())


def test_a_batch_without_labels_is_zero_and_not_nan():
    model = tiny_model()
    loss = BlockLoss(model)
    ids = torch.full((1, 8), 5)
    value = loss(model(ids, logits_to_keep=1), torch.full_like(ids, IGNORE))
    value.backward()
    assert value == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.floor
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 16}),
        ("gemma2", {"final_logit_softcapping": 1e4, "head_dim": 16}),  # too wide a cap for the loss to show it
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_families_that_change_their_logits_are_refused_with_the_remedy(family, change):
    with pytest.raises(ValueError, match="set loss: model in the recipe"):
        check_block_loss(tiny_model(family, **change))


def test_a_difference_that_no_configuration_declares_is_found():
    model = tiny_model()
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.loss = out.loss * 1.001
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match=r"the block-wise loss gives .* set loss: model"):
        check_block_loss(model)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_families_whose_switch_is_off_are_accepted(family):
    check_block_loss(tiny_model(family, **({"final_logit_softcapping": None, "head_dim": 16} if family == "gemma2" else {"logits_scaling": 1.0})))


def test_heads_that_are_more_than_a_matrix_are_refused():
    """LoRA on the head starts at zero, so comparing losses at the start would not show it."""
    with pytest.raises(ValueError, match="plain matrix"):
        BlockLoss(get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head", "q_proj"])))
    biased = tiny_model()
    biased.lm_head = torch.nn.Linear(64, 300, bias=True)
    with pytest.raises(ValueError, match="plain matrix"):
        BlockLoss(biased)


def test_the_check_leaves_no_hook_behind():
    """It would keep the last hidden states of every forward pass alive."""
    model = tiny_model()
    check_block_loss(model)
    with pytest.raises(ValueError, match="loss: model"):
        check_block_loss(tiny_model("granite", logits_scaling=8.0))
    assert not model.get_decoder()._forward_hooks
    assert not model.training


def test_a_teacher_is_mixed_in_as_the_dense_formula_says():
    torch.manual_seed(3)
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    soft = L.TeacherStates(torch.randn(30, 8), torch.randn(50, 8), 0.3)
    labels = torch.randint(0, 50, (30,))
    labels[::7] = IGNORE
    got = summed_loss(hidden, weight, labels, teacher=soft)
    got.backward()
    mine = (hidden.grad.clone(), weight.grad.clone())
    hidden.grad = weight.grad = None

    log_p, log_q = (hidden @ weight.T).log_softmax(-1), (soft.hidden @ soft.weight.T).log_softmax(-1)
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)[labels != IGNORE].sum()
    wanted = 0.7 * F.cross_entropy(log_p, labels, ignore_index=IGNORE, reduction="sum") + 0.3 * divergence
    wanted.backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(mine, (hidden.grad, weight.grad))


@pytest.mark.parametrize(("tokens", "most"), [(1, 16), (16, 16), (17, 16), (32752, 1365)])
def test_blocks_have_at_most_two_sizes(tokens, most):
    """Each size is compiled by itself."""
    bounds = L._bounds(tokens, most)
    sizes = {end - start for start, end in itertools.pairwise(bounds)}
    assert bounds[0] == 0
    assert bounds[-1] == tokens
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


def test_compiled_blocks_give_the_same(monkeypatch):
    called = []
    compiled = torch.compile(L._block_loss, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(L, "_compiled_block_loss", lambda: lambda *args: called.append(1) or compiled(*args))
    hidden, weight, labels = case()
    wanted = with_gradients(summed_loss, *case())
    got = with_gradients(lambda *args: summed_loss(*args, compiled=True), hidden, weight, labels)
    assert called
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
