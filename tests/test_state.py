"""State passing on state-space models: a sequence cut anywhere equals the sequence in one, values and gradients.

The laws are functions of a model and a cache class, so that the stock ones can be handed to them and be caught.
"""

import copy
import functools
import inspect

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.mamba import modeling_mamba

from hf_longctx.integration import state
from hf_longctx.integration.state import CACHE_ARGUMENT, StatePassingCache, prepare
from hf_longctx.method import method, method_names
from tests.conftest import largest_tensor, tiny_config

TOKENS, ROWS, VOCABULARY = 33, 2, 50
MAMBA_1 = ("mamba", "falcon_mamba")
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 4, "mamba_chunk_size": 8}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0}
HYBRID = MAMBA_2 | ATTENTION | {"num_hidden_layers": 3}
FAMILIES = {
    "mamba": {"state_size": 4, "time_step_rank": 3},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 3},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "granitemoehybrid": HYBRID | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "position_embedding_type": "rope",
        "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 24,
    },
    "bamba": HYBRID | {"attn_layer_indices": [1]},
}  # fmt: skip
EVERY = pytest.mark.parametrize("family", FAMILIES)
SSM_ONLY = pytest.mark.parametrize("family", [name for name in FAMILIES if CACHE_ARGUMENT[name] == "cache_params"])


@functools.cache
def _stock(family, dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | FAMILIES[family])), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:  # stock initialisation is so small that the state hardly matters
            parameter.data.mul_(3.0)
        if name.endswith(("dt_proj.bias", "dt_bias")):  # and forgets within a few tokens or never moves
            torch.nn.init.uniform_(parameter, -3.0, 0.0)
    return model.to(dtype).eval()


def stock(family, dtype=torch.float32):
    """A tiny model as Transformers makes it; change it freely."""
    return copy.deepcopy(_stock(family, dtype))


def prepared(family, dtype=torch.float32):
    model = stock(family, dtype)
    prepare(model)
    return model


def ids(seed=0, rows=ROWS, tokens=TOKENS):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def forward(model, tokens, cache=None, **arguments):
    if isinstance(cache, StatePassingCache) and "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = cache.positions(tokens)
    return model(tokens, **{CACHE_ARGUMENT[model.config.model_type]: cache}, **arguments)


def random_states(model, rows=ROWS, seed=1):
    """States of the size that text leaves, from other text."""
    cache = StatePassingCache(model.config)
    with torch.no_grad():
        forward(model, ids(seed + 100, rows), cache)
    return cache.states()


def leaves(states):
    return [tensor for pair in states for tensor in pair]


def assert_same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert torch.equal(x, y)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want, tolerance=1e-5):
    """Tensors by name, each within `tolerance` of its own largest number."""
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).abs().max() <= tolerance * want[name].abs().max().clamp(min=1e-3), name


# --- Laws --------------------------------------------------------------------------------------------------------------


def law_cut_anywhere(model, size, cache):
    """Logits of a text in pieces of `size` are those of the text in one call."""
    tokens = ids()
    with torch.no_grad():
        whole = forward(model, tokens).logits
        pieces = []
        for first in range(0, TOKENS, size):
            pieces.append(forward(model, tokens[:, first : first + size], cache, use_cache=True).logits)
            cache = cache.next() if isinstance(cache, StatePassingCache) else cache
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


def law_checkpointing_changes_no_gradient(model, make_cache):
    """The loss of a window that starts from a state, with and without gradient checkpointing; layers run twice with it."""
    model.train()
    found, runs, start = {}, {}, random_states(model)
    mixer = next(m for m in model.modules() if hasattr(m, "A_log"))
    for checkpointing in (False, True):
        calls = []
        hook = mixer.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        model.gradient_checkpointing_enable({"use_reentrant": False}) if checkpointing else model.gradient_checkpointing_disable()
        model.zero_grad()
        cache = make_cache(model, start)
        forward(model, ids(), cache, labels=ids()).loss.backward()
        hook.remove()
        found[checkpointing], runs[checkpointing] = gradients(model), len(calls)
        if isinstance(cache, StatePassingCache):
            found[checkpointing] |= {f"state {i}": tensor for i, tensor in enumerate(leaves(cache.states()))}
    assert (runs[False], runs[True]) == (1, 2), "checkpointing was not on"
    assert_close(found[True], found[False])


def law_two_halves_have_the_gradient_of_one_whole(model, cut=16):
    """Gradients reach the first half through the states, when they are let through."""
    tokens, model = ids(), model.train()
    weights = torch.randn(ROWS, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (forward(model, tokens).logits * weights).sum().backward()
    want = gradients(model)
    model.zero_grad()
    cache = StatePassingCache(model.config, keys="carry", detach=False)
    first = forward(model, tokens[:, :cut], cache).logits
    second = forward(model, tokens[:, cut:], cache.next()).logits
    (torch.cat([first, second], 1) * weights).sum().backward()
    assert_close(gradients(model), want, 2e-5)


def from_states(model, start):
    return StatePassingCache(model.config, start)


def stock_cache(model, start):
    """What a script would do: put the states into a DynamicCache."""
    cache = DynamicCache(config=model.config)
    for layer, (conv, ssm) in zip(cache.layers, start, strict=True):
        layer.update_conv_state(conv, conv_kernel_size=conv.shape[-1])
        layer.update_recurrent_state(ssm)
    return cache


@pytest.mark.floor
@EVERY
@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_cut_anywhere(family, size):
    model = prepared(family)
    law_cut_anywhere(model, size, StatePassingCache(model.config, keys="carry"))


@EVERY
def test_two_halves_have_the_gradient_of_one_whole(family):
    law_two_halves_have_the_gradient_of_one_whole(prepared(family))


@pytest.mark.floor
@EVERY
def test_checkpointing_changes_no_gradient(family):
    law_checkpointing_changes_no_gradient(prepared(family), from_states)


@pytest.mark.parametrize("family", MAMBA_1)
def test_with_a_kernel_the_correction_does_the_same(family, monkeypatch):
    """Transformers' loop takes the kernel's part, which starts from zero as the kernel does."""
    monkeypatch.setattr(state, "has_kernel", lambda tensor: True)
    monkeypatch.setattr(state, "_BLOCK", 1)  # blocks of 16 tokens
    for size in (7, 16):
        model = prepared(family)
        law_cut_anywhere(model, size, StatePassingCache(model.config))
    law_two_halves_have_the_gradient_of_one_whole(prepared(family), 5)
    law_checkpointing_changes_no_gradient(prepared(family), from_states)


def test_a_kernel_gets_rows_that_begin_where_it_can_read(monkeypatch):
    """Beside a cache, inputs are the last tokens of rows that also hold the convolution's: mamba-ssm's kernel fails with "misaligned address"."""
    contiguous = []

    def kernel(u, *args, **kwargs):
        contiguous.append(u.is_contiguous())
        return stock_scan(u, *args, **kwargs)

    model = prepared("mamba")
    scan = modeling_mamba.mamba_selective_scan
    stock_scan = scan.stock
    monkeypatch.setattr(state, "has_kernel", lambda tensor: True)
    monkeypatch.setattr(scan, "stock", kernel)
    forward(model, ids(), StatePassingCache(model.config, random_states(model)))
    assert contiguous
    assert all(contiguous)


@pytest.mark.parametrize("family", MAMBA_1)
def test_stock_transformers_drops_the_state_of_mamba_1(family):
    """The trap that this is for. When this test fails, Transformers has been corrected, and `prepare` can go."""
    model = stock(family)
    law_cut_anywhere(model, 1, DynamicCache(config=model.config))
    with pytest.raises(AssertionError):
        law_cut_anywhere(model, 16, DynamicCache(config=model.config))
    with pytest.raises(AssertionError):
        law_cut_anywhere(model, 16, StatePassingCache(model.config))  # the cache alone does not do it


def test_stock_cache_gives_wrong_gradients_under_checkpointing():
    with pytest.raises(AssertionError, match=r"A_log|dt_bias|weight|bias"):
        law_checkpointing_changes_no_gradient(stock("mamba2"), stock_cache)


@pytest.mark.parametrize("family", ["granitemoehybrid", "bamba"])
def test_an_unprepared_hybrid_drops_the_cache_under_checkpointing(family):
    with pytest.raises((AssertionError, RuntimeError)):
        law_checkpointing_changes_no_gradient(stock(family), from_states)


def test_detached_states_have_no_gradient_of_the_other_half():
    """The law of gradients sees a first half that was cut off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatePassingCache, "next", lambda cache: StatePassingCache(cache._config, state.detach(cache.states())))
        with pytest.raises(AssertionError):
            law_two_halves_have_the_gradient_of_one_whole(prepared("mamba"))


@pytest.mark.parametrize("family", MAMBA_1)
def test_ordinary_caches_are_corrected_too(family):
    model = prepared(family)
    for size in (1, 7, 16):
        law_cut_anywhere(model, size, DynamicCache(config=model.config))


# --- The scan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAMBA_1)
def test_the_scan_is_stocks_loop(family):
    """Without a cache, in training, on a left-padded batch: logits and gradients of a prepared model are the stock model's."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, :9] = 0
    found = []
    for model in (stock(family), prepared(family)):
        output = model.train()(ids(), labels=ids(), attention_mask=mask)
        output.loss.backward()
        found.append({"logits": output.logits.detach()} | gradients(model))
    assert_close(found[1], found[0])


def _random_scan(tokens=11, dtype=torch.float64, channels=3, size=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    delta = torch.rand(ROWS, channels, tokens, generator=generator, dtype=dtype).requires_grad_()
    a = (-torch.rand(channels, size, generator=generator, dtype=dtype) * 3).requires_grad_()
    return normal(ROWS, channels, tokens), delta, a, normal(ROWS, size, tokens), normal(ROWS, size, tokens), normal(ROWS, channels, size)


@pytest.mark.parametrize("block", [1, 3, 4, 64])
def test_derivatives_of_the_scan(block, monkeypatch):
    monkeypatch.setattr(state, "_BLOCK", 1)
    monkeypatch.setattr(state, "_FEWEST", block)
    u, delta, a, b, c, start = _random_scan()
    assert torch.autograd.gradcheck(state.scan, (u, delta, a, b, c, start), fast_mode=True)
    assert torch.autograd.gradcheck(state.carried, (delta, a, c, start), fast_mode=True)


def test_a_scan_of_long_strong_decays_stays_exact():
    """Decays that underflow together: 4,096 steps of e^-30 and of e^-1e-6 beside each other."""
    u, delta, _, b, c, start = (t.detach() for t in _random_scan(4096, torch.float32))
    a = torch.tensor([[-30.0, -1e-6], [-1.0, -0.001], [-100.0, -1.0]])
    y, last = state.scan(u, delta, a, b, c, start)
    want, want_last = state.scan(*(t.double() for t in (u, delta, a, b, c, start)))
    assert (y - want).abs().max() < 1e-5 * want.abs().max()
    assert (last - want_last).abs().max() < 1e-5 * want_last.abs().max()


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def _operations(function):
    with _Operations() as mode:
        function()
    return mode.count


def _train(model, tokens, start):
    cache = StatePassingCache(model.config, start)
    forward(model.train(), tokens, cache, labels=tokens).loss.backward()
    return cache


@pytest.mark.parametrize("family", [*MAMBA_1, "mamba2"])
def test_no_loop_over_time(family):
    """Sixteen times the tokens, hardly more operations; the stock loop has sixteen times as many."""
    short, long = ids(tokens=64), ids(tokens=1024)
    model = prepared(family)
    start = random_states(model)
    assert _operations(lambda: _train(model, long, start)) < 1.6 * _operations(lambda: _train(model, short, start))
    if family == "mamba":
        model = stock(family)
        assert _operations(lambda: model(long[:, :256])) > 3 * _operations(lambda: model(short))


def test_no_tensor_has_a_state_for_every_token(monkeypatch):
    """What the scan and the correction hold is bounded by their inputs and a block, forward and backward."""
    monkeypatch.setattr(state, "_BLOCK", 4096)
    u, delta, a, b, c, start = (t.detach().requires_grad_() for t in _random_scan(2048, torch.float32, channels=4, size=16))
    inputs = max(t.numel() for t in (u, delta, b, c))
    full = u.numel() * 16

    def both():
        y, last = state.scan(u, delta, a, b, c, start)
        more, decayed = state.carried(delta, a, c, start)
        (y.sum() + last.sum() + more.sum() + decayed.sum()).backward()

    assert largest_tensor(both) <= max(inputs, 4096) < full / 3
    monkeypatch.setattr(state, "_BLOCK", 1 << 30)
    assert largest_tensor(both) >= full  # the bound is the blocks' doing


# --- Gradients with respect to the states --------------------------------------------------------------------------------


@pytest.fixture
def float64_throughout(monkeypatch):
    """Transformers' norms and Mamba-2's scan go through float32 whatever the model's dtype; here, what they take for it is float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)


@EVERY
def test_gradient_of_the_initial_state_is_the_finite_difference(family, float64_throughout):
    model = prepared(family, torch.float64)
    start = [(conv.double(), ssm.double()) for conv, ssm in random_states(model)]
    generator = torch.Generator().manual_seed(3)
    direction = state.map_states(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype) * t.abs().mean(), start)
    weights = torch.randn(ROWS, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)

    def value(at):
        return (forward(model, ids(), StatePassingCache(model.config, at)).logits * weights).sum()

    for part in (0, 1):  # convolution, SSM

        def moved(by, part=part):
            return [tuple(t + by * d * (i == part) for i, (t, d) in enumerate(zip(s, ds))) for s, ds in zip(start, direction, strict=True)]

        required = state.map_states(lambda t: t.clone().requires_grad_(), start)
        value(required).backward()
        slope = sum((pair[part].grad * d[part]).sum() for pair, d in zip(required, direction, strict=True)).item()
        with torch.no_grad():
            difference = (value(moved(1e-4)) - value(moved(-1e-4))).item() / 2e-4
        assert abs(slope) > 1e-4
        assert slope == pytest.approx(difference, rel=1e-5)


@EVERY
def test_gradients_do_not_cross_windows(family):
    model = prepared(family).train()
    start = state.map_states(lambda t: t.requires_grad_(), random_states(model))
    cache = _train(model, ids(), start)
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in leaves(start))  # the given states are reached
    assert not any(t.requires_grad for t in leaves(cache.states()))
    assert not any(t.requires_grad for pair in cache.next().layers for t in leaves([getattr(pair, "initial", None) or ()]))


# --- The states ----------------------------------------------------------------------------------------------------------


@EVERY
def test_given_states_are_never_written_to(family):
    model = prepared(family)
    start = random_states(model)
    before = state.map_states(torch.clone, start)
    cache = _train(model, ids(), start)
    assert_same(start, before)
    first = state.map_states(torch.clone, cache.states())
    forward(model, ids(), cache, labels=ids())  # a second pass starts where the first did
    for x, y in zip(leaves(cache.states()), leaves(first), strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        forward(model.eval(), ids(tokens=1), cache)  # the one-token path writes in place
    assert_same(start, before)
    assert not any(torch.equal(x, y) for x, y in zip(leaves(cache.states()), leaves(start), strict=True))


@EVERY
def test_zeros_are_no_states(family):
    model = prepared(family)
    with torch.no_grad():
        fresh, zeros = StatePassingCache(model.config), StatePassingCache(model.config, state.zeros(model, ROWS))
        torch.testing.assert_close(forward(model, ids(), zeros).logits, forward(model, ids(), fresh).logits, atol=1e-6, rtol=1e-5)
    for got, want in zip(leaves(zeros.states()), leaves(state.zeros(model, ROWS)), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


@EVERY
def test_rows_do_not_see_each_other(family):
    """Another row's state and text change nothing; rows may be put in another order; an ended row starts from zeros."""
    model = prepared(family)
    start, other = random_states(model, 3), random_states(model, 3, seed=7)
    tokens = ids(rows=3)

    def run(states, text):
        cache = StatePassingCache(model.config, states)
        with torch.no_grad():
            return forward(model, text, cache).logits, cache.states()

    logits, final = run(start, tokens)
    mixed = [tuple(torch.cat([s[:1], o[1:]]) for s, o in zip(*pairs)) for pairs in zip(start, other, strict=True)]
    text = torch.cat([tokens[:1], ids(5, rows=2)])
    torch.testing.assert_close(run(mixed, text)[0][0], logits[0])
    assert (run(mixed, tokens)[0][1] - logits[1]).abs().max() > 1e-3  # while its own state matters

    order = torch.tensor([2, 0, 1])
    turned, turned_final = run(state.select_rows(start, order), tokens[order])
    torch.testing.assert_close(turned, logits[order])
    for x, y in zip(leaves(turned_final), leaves(state.select_rows(final, order)), strict=True):
        torch.testing.assert_close(x, y)

    ended = torch.tensor([False, True, False])
    start[0][1][1] = float("inf")  # even then
    cleared = state.zero_rows(start, ended)
    assert all((t[1] == 0).all() for t in leaves(cleared))
    after, _ = run(cleared, tokens)
    torch.testing.assert_close(after[1], run(None, tokens)[0][1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[0], logits[0])


@EVERY
def test_saved_states_go_on_bit_for_bit(family, tmp_path):
    model = prepared(family)
    start = random_states(model)
    safetensors.torch.save_file(state.to_tensors(start), tmp_path / "states.safetensors")
    read = state.from_tensors(safetensors.torch.load_file(tmp_path / "states.safetensors"))
    assert_same(read, start)
    with torch.no_grad():
        found = [forward(model, ids(), StatePassingCache(model.config, each)).logits for each in (start, read)]
    assert torch.equal(*found)
    assert_same(state.move(state.map_states(torch.Tensor.double, start), start), start)


@EVERY
def test_bfloat16_stays_finite_and_close(family):
    model, wide = prepared(family, torch.bfloat16).train(), prepared(family)
    cache, exact = StatePassingCache(model.config), StatePassingCache(wide.config)
    for seed in range(4):
        loss = forward(model, ids(seed), cache, labels=ids(seed)).loss
        loss.backward()
        with torch.no_grad():
            want = forward(wide, ids(seed), exact, labels=ids(seed)).loss
        assert loss.item() == pytest.approx(want.item(), rel=0.05)
        cache, exact = cache.next(), exact.next()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(layer.initial[1].dtype == torch.float32 for layer in cache.layers if hasattr(layer, "initial"))


def test_autocast_keeps_the_state_in_float32():
    model = prepared("mamba").train()
    start = random_states(model)
    with torch.autocast("cpu", torch.bfloat16):
        cache = _train(model, ids(), start)
    assert all(ssm.dtype == torch.float32 for _, ssm in cache.states())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kernel", [False, True])
def test_autocast_does_not_reach_the_scan(kernel):
    """Forward and backward, its products stay in float32; the kernel's part is played by the scan from zero."""
    found = []
    for enabled in (False, True):
        u, delta, a, b, c, start = (t.detach().requires_grad_() for t in _random_scan(dtype=torch.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, last = state.scan_from(start, functools.partial(state.scan_from, None, None) if kernel else None, u, delta, a, b, c, return_last_state=True)
            (y.sum() + last.sum()).backward()
        found.append([y, last, *(t.grad for t in (u, delta, a, b, c, start))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("family", MAMBA_1)
def test_ordinary_caches_may_be_trained_with(family):
    """Their tensors are written in place; the state that the scan started from is a copy."""
    model = prepared(family).train()
    start, found = random_states(model), []
    for cache in (stock_cache(model, state.map_states(torch.clone, start)), StatePassingCache(model.config, start)):
        model.zero_grad()
        forward(model, ids(), cache, labels=ids()).loss.backward()
        found.append(gradients(model))
    assert_close(*found)


@pytest.mark.parametrize("family", ["granitemoehybrid", "bamba"])
def test_a_prepared_hybrid_still_drops_ordinary_caches_under_checkpointing(family):
    """Also after a pass with ours: a layer that writes to an ordinary cache twice has wrong gradients."""
    model = prepared(family).train()
    start, found = random_states(model), []
    for checkpointing in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": False}) if checkpointing else model.gradient_checkpointing_disable()
        _train(model, ids(), start)
        model.zero_grad()
        forward(model, ids(), DynamicCache(config=model.config), labels=ids()).loss.backward()
        found.append(gradients(model))
    assert_close(*found)


@pytest.mark.parametrize("family", ["granitemoehybrid", "bamba"])
def test_a_hybrids_keys_restart_or_go_on(family):
    model = prepared(family)
    with torch.no_grad():
        for keys, length in (("restart", 0), ("carry", 2 * TOKENS)):
            cache = StatePassingCache(model.config, keys=keys)
            for _ in range(2):
                forward(model, ids(), cache)
                cache = cache.next()
            assert int(cache.positions(ids())[0, 0]) == length
            assert sum(layer.keys.shape[2] for layer in cache.layers if getattr(layer, "keys", None) is not None) == length


# --- Models ----------------------------------------------------------------------------------------------------------------


def test_preparing_twice_is_preparing_once():
    for family in FAMILIES:
        once, twice = prepared(family), prepared(family)
        prepare(twice)
        for x, y in zip(once.modules(), twice.modules(), strict=True):
            assert len(x._forward_pre_hooks) == len(y._forward_pre_hooks) <= 1
            assert len(x._forward_hooks) == len(y._forward_hooks) <= 1


def test_a_copy_of_a_prepared_model_is_prepared():
    model = copy.deepcopy(prepared("mamba"))
    law_cut_anywhere(model, 7, StatePassingCache(model.config))


def test_a_failed_forward_pass_leaves_nothing_behind():
    """The state that a scan starts from is known while its mixer runs and no longer."""
    model = prepared("mamba")
    with pytest.raises(ValueError, match="rows"):
        forward(model, ids(rows=3), StatePassingCache(model.config, random_states(model)))
    assert state._running.starts == []
    with pytest.raises(AssertionError):  # and a model that was not prepared is still the stock one
        law_cut_anywhere(stock("mamba"), 16, StatePassingCache(model.config))


@SSM_ONLY
@pytest.mark.parametrize("early", [True, False])
def test_every_adapter_gets_a_gradient(family, early):
    """LoRA on in_proj and x_proj, before and after `prepare`; with adapters that do something, cutting is still exact."""
    model = stock(family)
    if early:
        prepare(model)
    targets = ["in_proj", "x_proj"] if family in MAMBA_1 else ["in_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    if not early:
        prepare(adapted)
    _train(adapted, ids(), random_states(adapted))
    found = {name for name, p in adapted.named_parameters() if "lora_" in name and p.grad is not None and p.grad.abs().max() > 0}
    assert found == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(found) == 2 * 2 * len(targets)
    law_cut_anywhere(adapted.eval(), 7, StatePassingCache(adapted.config))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_generation_is_unchanged(family):
    found = [model.generate(ids(), max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (stock(family), prepared(family))]
    assert torch.equal(*found)


def test_models_without_states_are_refused_in_one_line():
    for config in (tiny_config("llama"), AutoConfig.for_model("zamba2"), AutoConfig.for_model("jamba")):
        with pytest.raises(ValueError, match=f"^{config.model_type} has no state that state methods can pass on; families that have: bamba, .*mamba2$"):
            StatePassingCache(config)
    with pytest.raises(ValueError, match="llama has no state"):
        prepare(AutoModelForCausalLM.from_config(tiny_config("llama")))
    only_attention = FAMILIES["granitemoehybrid"] | {"hidden_size": 16, "layer_types": ["full_attention"] * 3}
    with pytest.raises(ValueError, match="no layer of this granitemoehybrid"):
        StatePassingCache(AutoConfig.for_model("granitemoehybrid", **only_attention))


def test_wrong_states_are_refused_in_one_line():
    model = prepared("mamba2")
    start = random_states(model)
    with pytest.raises(ValueError, match=r"^states of 1 layers for a model with 2$"):
        StatePassingCache(model.config, start[:1])
    with pytest.raises(ValueError, match=r"^states of 2 rows for a batch of 3$"):
        forward(model, ids(rows=3), StatePassingCache(model.config, start))
    with pytest.raises(ValueError, match="2 rows beside an SSM state of 1"):
        StatePassingCache(model.config, [(conv, ssm[:1]) for conv, ssm in start])
    with pytest.raises(RuntimeError, match="not been through a model"):
        StatePassingCache(model.config, start).states()
    with pytest.raises(ValueError, match="one token cannot be trained on"):
        _train(model, ids(tokens=1), start)


# --- Methods ---------------------------------------------------------------------------------------------------------------

METHODS = {"zero": {}, "carry": {}, "shuffled_carry": {}, "noise": {"sigma": 0.1}, "fitted_noise": {}}


def test_these_are_the_state_methods():
    assert set(method_names("state")) == set(METHODS)


def _training(family, name, steps, saved=None, **fields):
    """`steps` of SGD with a state method, from `saved`; returns losses and everything that a checkpoint would hold."""
    if saved is None:
        model = prepared(family).train()
        source, final, first = method(name, **fields).state(), state.zeros(model, ROWS), 0
    else:
        model, first, tensors, kept = saved
        model, source, final = copy.deepcopy(model), method(name, **fields).state(), state.from_tensors(tensors)
        source.load_state_dict(kept)
    losses = []
    for step in range(first, first + steps):
        ended = torch.tensor([step % 3 == 2, False])
        cache = StatePassingCache(model.config, source.start(final, ended, np.random.default_rng(step)))
        loss = forward(model, ids(step), cache, labels=ids(step)).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        model.zero_grad()
        final = cache.states()
        source.observe(final)
        losses.append(loss.item())
    checkpoint = safetensors.torch.load(safetensors.torch.save(state.to_tensors(final)))
    learned = source.state_dict()
    learned = safetensors.torch.load(safetensors.torch.save(learned)) if learned else learned
    return losses, (model, first + steps, checkpoint, learned)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["mamba", "granitemoehybrid"])
def test_a_resumed_training_is_the_same_training(family, name):
    fields = METHODS[name] | ({} if name == "zero" else {"probability": 0.3})
    straight, (model, *_) = _training(family, name, 6, **fields)
    first, saved = _training(family, name, 3, **fields)
    second, (resumed, *_) = _training(family, name, 3, saved, **fields)
    assert first + second == straight
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_method_that_forgets_is_caught():
    _, saved = _training("mamba", "fitted_noise", 3)
    straight, _ = _training("mamba", "fitted_noise", 6)
    second, _ = _training("mamba", "fitted_noise", 3, (*saved[:3], {}))
    assert second != straight[3:]


@pytest.mark.parametrize("name", METHODS)
def test_sources_return_detached_copies(name):
    """Gradients never cross, the final states are not written to, and a probability of one is a start from zeros."""
    model = prepared("mamba2")
    final = state.map_states(lambda t: t.requires_grad_(), random_states(model))
    before = [t.detach().clone() for t in leaves(final)]
    ended = torch.tensor([False, True])
    source = method(name, **METHODS[name]).state()
    source.observe(final)
    start = source.start(final, ended, np.random.default_rng(0))
    assert not any(t.requires_grad for t in leaves(start))
    for got, given in zip(leaves(start), leaves(final), strict=True):
        assert (got.shape, got.dtype) == (given.shape, given.dtype)
        got.fill_(7.0)
    assert all(torch.equal(t, b) for t, b in zip(leaves(final), before, strict=True))
    if name != "zero":
        always = method(name, **METHODS[name], probability=1).state()
        always.observe(final)
        assert all((t == 0).all() for t in leaves(always.start(final, ended, np.random.default_rng(0))))


def test_only_carry_needs_an_order():
    assert {name: method(name, **METHODS[name]).state().order for name in METHODS} == {name: "any" for name in METHODS} | {"carry": "stream"}


def test_method_values_are_checked():
    for name, fields, words in (
        ("carry", {"probability": 1.5}, "probability"), ("noise", {"sigma": 0}, "sigma"), ("fitted_noise", {"horizon": 0.5}, "horizon"),
        ("fitted_noise", {"horizon": -1}, "horizon"), ("noise", {"sigma": 1, "probability": -1}, "probability"), ("noise", {}, "sigma"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            method(name, **fields)
    with pytest.raises(ValueError, match="3 rows cannot continue 2"):
        method("carry").state().start(random_states(prepared("mamba")), torch.zeros(3, dtype=torch.bool), np.random.default_rng(0))
    with pytest.raises(ValueError, match="keeps nothing"):
        method("carry").state().load_state_dict({"0.ssm": torch.zeros(1)})
