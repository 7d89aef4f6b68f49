"""Which passes of a model the Triton kernel computes, and that they give what the blocks of SDPA give.

Where Triton does not run, dense attention from the same arguments takes its place, so that all but the kernel itself is tested.
"""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_longctx import method
from hf_longctx.integration import attention
from hf_longctx.kernels import biased_attention as kernel
from hf_longctx.kernels.biased_attention import Table, biased_attention
from tests.conftest import TINY
from tests.test_biased_kernel import DEVICE, needs_kernel, oracle, positions_of
from tests.test_slot_laws import patched

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
LENGTH = 40
LEARNED = ("mkl_learned",)
BIASES = [("alibi",), ("mkl_learned",), ("kerple_power", "log_n"), ("t5", "nope")]


def dense(q, k, v, table, scale=None, *, k_start=None, chunks=None):
    assert isinstance(table, Table)
    positions = None if chunks is None else positions_of(chunks, q.shape[2])
    assert positions is None or positions[:, -1].sub(positions[:, 0]).max() < chunks.reach == table.values.shape[1]
    return oracle(q.double(), k.double(), v.double(), table.values.double(), q.shape[3] ** -0.5 if scale is None else scale, k_start, positions).to(q.dtype)


@pytest.fixture(params=["dense", pytest.param("triton", marks=needs_kernel)])
def calls(request, monkeypatch):
    """Passes go to the kernel; the arguments of its calls."""
    made = []
    inner = dense if request.param == "dense" else biased_attention

    def counted(*args, **kwargs):
        made.append((*args, kwargs["chunks"]))
        return inner(*args, **kwargs)

    monkeypatch.setattr(attention.kernel, "serves", lambda x: True)
    monkeypatch.setattr(attention.kernel, "biased_attention", counted)
    return made


def tokens(rows=2, length=LENGTH):
    return torch.randint(3, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)


def blocks(monkeypatch, call):
    """What `call` gives without the kernel."""
    with monkeypatch.context() as other:
        other.setattr(attention.kernel, "serves", lambda x: False)
        return call()


def same(calls, monkeypatch, call, served):
    """`call` gives the same with the kernel and without, and the kernel was called `served` times."""
    with torch.no_grad():
        got, want = call(), blocks(monkeypatch, call)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert len(calls) == served


@pytest.mark.parametrize("names", BIASES, ids="+".join)
def test_a_whole_text(names, calls, monkeypatch):
    model = patched("llama", names).to(DEVICE)
    ids = tokens()
    same(calls, monkeypatch, lambda: model(ids, attention_mask=torch.ones_like(ids)).logits, 2)


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("names", BIASES, ids="+".join)
def test_every_gradient(names, checkpointing, calls, monkeypatch):
    model = patched("llama", names).to(DEVICE).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    got, want = gradients(), blocks(monkeypatch, gradients)
    assert len(calls) == (4 if checkpointing else 2)
    for name in want:
        assert want[name].any(), name
        assert (got[name] - want[name]).abs().max() <= 2e-4 * want[name].abs().max(), name


@needs_kernel
@pytest.mark.parametrize("names", BIASES, ids="+".join)
def test_a_compiled_model_is_one_graph_with_the_kernel_in_it(names, monkeypatch):
    model, ids = patched("llama", names).to(DEVICE).eval(), tokens()
    launched, run = [], kernel._run_forward
    monkeypatch.setattr(kernel, "_run_forward", lambda *args: (launched.append(1), run(*args))[1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="inductor" if DEVICE == "cuda" else "eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=ids, use_cache=False).logits
        assert len(launched) == 2
        want = blocks(monkeypatch, lambda: model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@needs_kernel
def test_a_compiled_model_has_the_gradients_of_the_kernel(monkeypatch):
    model, ids = patched("llama", LEARNED).to(DEVICE).eval(), tokens()
    launched, run = [], kernel._run_dtable
    monkeypatch.setattr(kernel, "_run_dtable", lambda *args: (launched.append(1), run(*args))[1])
    torch._dynamo.reset()
    learned = [p for p in model.parameters() if p.requires_grad]
    want, got = (torch.autograd.grad(call(input_ids=ids, use_cache=False).logits.square().sum(), learned) for call in (model, torch.compile(model, backend="eager")))
    assert len(launched) == 4
    for a, b in zip(got, want):
        assert b.any()
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize(("names", "served"), [(("alibi",), 2), (LEARNED, 0)])
def test_where_sums_must_have_an_order_the_kernel_learns_nothing(names, served, calls):
    """It adds the gradient of a table as its programs end; `train: {full_determinism: true}` is heeded."""
    model = patched("llama", names).to(DEVICE).train()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        assert len(calls) == served
        with torch.no_grad():
            model(tokens(), use_cache=False)
        assert len(calls) == served + 2
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_reaches_the_kernel(calls, monkeypatch):
    """With float32 weights RoPE leaves queries and keys in float32; values are in half precision."""
    model, ids = patched("llama", ("alibi", "yarn")).to(DEVICE), tokens()
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        got = model(ids).logits.float()
        want = blocks(monkeypatch, lambda: model(ids).logits.float())
    assert [t.dtype for t in calls[0][:3]] == 3 * [torch.float16]
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_left_padding(calls, monkeypatch):
    model, ids = patched("llama", LEARNED).to(DEVICE), tokens()
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    same(calls, monkeypatch, lambda: model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()], 2)


def test_a_prompt_in_two_pieces_then_a_token(calls, monkeypatch):
    model, ids = patched("llama", LEARNED).to(DEVICE), tokens()

    def pieces():
        cache = DynamicCache(config=model.config)
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([17, 22, 1], 1)], 1)

    same(calls, monkeypatch, pieces, 4)  # one token has nothing to gain from it


def pose(rows, chunks=2, seed=0):
    """Positions of PoSE, [rows + 1, LENGTH]: each row with cuts and skips of its own, the last without."""
    drawn, made = np.random.default_rng(seed), method("pose", chunks=chunks, target=300)
    skips = [made.positions(LENGTH, 10**6, drawn)[1] for _ in range(rows)]
    return torch.from_numpy(np.stack([*skips, np.arange(LENGTH)])).to(DEVICE)


@pytest.mark.parametrize("names", BIASES, ids="+".join)
def test_every_gradient_at_positions_that_skip(names, calls, monkeypatch):
    model, ids = patched("llama", names).to(DEVICE).train(), tokens(3)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": pose(2)}

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False, **given).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    got, want = gradients(), blocks(monkeypatch, gradients)
    assert len(calls) == 2
    assert all(torch.equal(positions_of(call[-1], LENGTH), given["position_ids"].cpu()) for call in calls)
    for name in want:
        assert want[name].any(), name
        assert (got[name] - want[name]).abs().max() <= 2e-4 * want[name].abs().max(), name
    given["position_ids"] = torch.arange(LENGTH, device=DEVICE)[None]
    assert (gradients()["loss"] - want["loss"]).abs() > 1e-3  # that skips matter here


@pytest.mark.parametrize("skips", [False, True])
def test_rows_that_were_promised(skips, calls):
    """The kernel is told what was promised, and gradients are those of rows that were looked at."""
    model, ids = patched("llama", LEARNED).to(DEVICE).train(), tokens(3)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": pose(2) if skips else torch.arange(LENGTH, device=DEVICE).expand(3, -1)}

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, **given).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want = gradients()
    assert attention.expect_full_rows(model, attention.Rows(2 if skips else 1, 300))
    got = gradients()
    looked_at, promised = calls[0][-1], calls[-1][-1]
    assert (promised.reach, promised.cuts.equal(looked_at.cuts)) == (300, True) if skips else promised is looked_at is None
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-5 * want[name].abs().max(), name


@pytest.mark.parametrize("chunks", [4, attention.CHUNKS])
def test_more_chunks_and_left_padding(chunks, calls, monkeypatch):
    model, ids = patched("llama", LEARNED).to(DEVICE), tokens(3)
    mask, positions = torch.ones_like(ids), pose(2, 3)
    positions[0] = torch.arange(LENGTH, device=DEVICE) + 9 * (torch.arange(LENGTH, device=DEVICE) // (LENGTH // chunks))
    mask[1, :13] = 0
    positions[1] = torch.where(mask[1].bool(), positions[1], 1)
    same(calls, monkeypatch, lambda: model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()], 2)
    assert calls[0][-1].skips.shape[1] == chunks


def test_one_row_of_positions_for_all(calls, monkeypatch):
    """And of the mask."""
    model, ids = patched("llama", LEARNED).to(DEVICE), tokens(2)
    same(calls, monkeypatch, lambda: model(ids, attention_mask=torch.ones_like(ids[:1]), position_ids=pose(1)[:1]).logits, 2)


def test_layers_share_one_table_at_positions_that_skip(calls):
    model, evaluated = patched("llama", ("kerple",)).to(DEVICE).train(), []
    model.longctx_bias.of(0).register_forward_pre_hook(lambda *_: evaluated.append(1))
    model(tokens(2), labels=tokens(2), attention_mask=torch.ones_like(tokens(2)), position_ids=pose(1), use_cache=False).loss.backward()
    assert len(evaluated) == 2  # the backward pass makes it again
    assert len({id(call[3]) for call in calls}) == 1


def skips_without_a_mask(ids):
    """Transformers takes them for packed documents."""
    return {"attention_mask": None, "position_ids": pose(1), "use_cache": False}


def positions_that_begin_again(ids):
    return {"position_ids": (torch.arange(LENGTH, device=DEVICE) % 25)[None]}


def a_position_twice(ids):
    return {"position_ids": (torch.arange(LENGTH, device=DEVICE) - (torch.arange(LENGTH, device=DEVICE) > 20).long())[None]}


def skips_at_every_token(ids):
    return {"position_ids": 2 * torch.arange(LENGTH, device=DEVICE)[None]}


def one_chunk_too_many(ids):
    index = torch.arange(LENGTH, device=DEVICE)
    return {"position_ids": (index + (index // 3).clamp(max=attention.CHUNKS))[None]}


def skips_too_far(ids):
    return {"position_ids": torch.arange(LENGTH, device=DEVICE)[None] + attention.REACH * (torch.arange(LENGTH, device=DEVICE) >= 20)[None]}


def holes(ids):
    mask = torch.ones_like(ids)
    mask[0, 5:9] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def padded_on_the_right(ids):
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    return {"attention_mask": mask}


def packed(ids):
    segment = torch.arange(LENGTH, device=DEVICE) >= 15
    return {"attention_mask": ((segment[:, None] == segment) & torch.ones(LENGTH, LENGTH, device=DEVICE).tril().bool())[None, None].expand(2, 1, -1, -1)}


OTHERWISE = [
    holes, padded_on_the_right, packed, skips_without_a_mask, positions_that_begin_again, a_position_twice, skips_at_every_token, one_chunk_too_many, skips_too_far,
]  # fmt: skip


@pytest.mark.parametrize("rest", OTHERWISE)
def test_what_is_not_plainly_causal_is_left_to_the_blocks(rest, calls, monkeypatch):
    model, ids = patched("llama", LEARNED).to(DEVICE), tokens()
    given = {"attention_mask": torch.ones_like(ids)} | rest(ids)
    mask = given["attention_mask"]
    seen = mask.bool() if mask is not None and mask.dim() == 2 else torch.ones_like(ids).bool()
    same(calls, monkeypatch, lambda: model(ids, **given).logits[seen], 0)


def test_skips_behind_a_cache_are_left_to_the_blocks(calls, monkeypatch):
    """A cache does not remember positions."""
    model, ids = patched("llama", LEARNED).to(DEVICE), tokens()
    positions = torch.arange(LENGTH, device=DEVICE)[None]
    positions = positions + 50 * (positions > 30)

    def pieces():
        cache = DynamicCache(config=model.config)
        given = [(part, where, torch.ones_like(ids[:, :end])) for part, where, end in zip(ids.split([17, 23], 1), positions.split([17, 23], 1), (17, LENGTH))]
        return torch.cat([model(part, attention_mask=mask, position_ids=where, past_key_values=cache, use_cache=True).logits for part, where, mask in given], 1)

    same(calls, monkeypatch, pieces, 2)  # of the first piece


def test_a_static_cache_is_left_to_the_blocks(calls, monkeypatch):
    model, ids = patched("llama", LEARNED).to(DEVICE), tokens()
    same(calls, monkeypatch, lambda: model(ids, past_key_values=StaticCache(model.config, max_cache_len=64), use_cache=True).logits, 0)


def test_a_bias_of_more_than_the_distance_and_dropout_are_left_to_the_blocks(calls, monkeypatch):
    model, ids = patched("llama", ("fire",)).to(DEVICE), tokens()
    same(calls, monkeypatch, lambda: model(ids).logits, 0)
    model = patched("llama", LEARNED, attention_dropout=0.5).to(DEVICE).train()
    model(ids)
    assert not calls


def test_only_layers_that_see_everything(calls, monkeypatch):
    model, ids = patched("gemma3_text", LEARNED).to(DEVICE), tokens()
    full = sum(kind == "full_attention" for kind in model.config.layer_types)
    assert 0 < full < model.config.num_hidden_layers
    same(calls, monkeypatch, lambda: model(ids).logits, full)


@pytest.mark.parametrize(("name", "checkpointing", "times", "tables"), [("kerple", False, 2, 1), ("kerple", True, 2, 1), ("mkl_learned", False, 4, 2), ("mkl_learned", True, 6, 4)])
def test_layers_share_one_table(name, checkpointing, times, tables, calls):
    """A bias that both layers share is evaluated once a pass, and once more in backward; one a layer is not shared, and recomputed with its layer."""
    model, evaluated = patched("llama", (name,)).to(DEVICE).train(), []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for bias in model.longctx_bias.layers:
        bias.register_forward_pre_hook(lambda *_: evaluated.append(1))
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert len(evaluated) == times
    assert len({id(call[3]) for call in calls}) == tables


def test_no_step_to_the_table_is_kept_for_backward():
    """The table of a learned bias is computed again in backward: between the passes one table a layer is there, and no part of it."""
    kept = []
    bias = patched("llama", LEARNED).longctx_bias.of(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attention._table(bias, 4, 500, torch.device("cpu")).values.sum()
    assert all(size <= 500 for size in kept)
