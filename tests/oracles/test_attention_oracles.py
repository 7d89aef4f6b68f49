"""Every attention method against float64 NumPy: logits by the paper's rule, key by key, then causal softmax.

An oracle takes the keys that a query sees and returns its logits. The library rescales queries and keys and leaves the rest to
the model's attention, so the tests finish it: scores over sqrt(head_dim), mask, softmax. None shares a line with the library.
"""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch

from hf_longctx.method import Frequencies, Shape, load_method, method, method_names
from tests.conftest import refused_in_a_line

HEADS, KV_HEADS, DIM, WINDOW, TOKENS = 4, 2, 16, 16, 41
ORACLES = {}


def oracle(function):
    ORACLES[function.__name__] = function
    return function


def plain(query, keys):
    """Vaswani et al. 2017, equation 1."""
    return keys @ query / math.sqrt(len(query))


@oracle
def log_n(query, keys, head, *, form="qwen", reference=WINDOW):
    """Chiang and Cholak 2022, section 5: logits times log n. Su's post on entropy invariance: log n over log 512, 512 the length
    trained on. Qwen-1's `logn_list`: log n to the base of the trained length where n is above it, else 1."""
    n = len(keys)
    if form == "chiang":
        return plain(query, keys) * math.log(n)
    base = math.log(n, reference)
    return plain(query, keys) * (base if form == "su" or n > reference else 1)


@oracle
def ssmax(query, keys, head, *, init=None, offset=False, s=None, b=None):
    """Nakanishi 2025, equation 2: weights n^(s z_i) / sum_j n^(s z_j), and its variant exp((s log n + b) z_i)."""
    scale = (init or 1 / math.log(WINDOW)) if s is None else s[head]
    shift = 0 if b is None else b[head]
    z = plain(query, keys)
    return np.log(np.power(float(len(keys)), scale * z)) + shift * z


@oracle
def key_norm(query, keys, head, *, by="sum", gain=1.0, learn_gain=False, gains=None):
    """Bernhard 2023: q k over the sum of the key lengths, in place of sqrt(d); here of the keys seen."""
    lengths = [math.sqrt(sum(x * x for x in key)) for key in keys.tolist()]
    total = {"sum": sum(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)}[by]
    return (gain if gains is None else gains[head]) * (keys @ query) / total


CASES = [
    ("log_n", {}),
    ("log_n", {"form": "qwen", "reference": 5}),
    ("log_n", {"form": "su"}),
    ("log_n", {"form": "su", "reference": 512}),
    ("log_n", {"form": "chiang"}),
    ("ssmax", {}),
    ("ssmax", {"init": 0.43}),
    ("ssmax", {"offset": True}),
    ("key_norm", {}),
    ("key_norm", {"by": "mean"}),
    ("key_norm", {"by": "max", "gain": 0.7}),
    ("key_norm", {"by": "mean", "gain": 3.5, "learn_gain": True}),
]
ids = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
each_case = pytest.mark.parametrize(("name", "fields"), CASES, ids=ids)


def shape_of(window=WINDOW):
    return Shape(
        family="llama", hidden=HEADS * DIM, layers=2, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, rotary_dim=DIM, theta=1e4,
        trained=Frequencies((1.0,)), rope_type="default", window=window,
    )  # fmt: skip


def module_of(name, fields, window=WINDOW):
    return method(name, **fields).attention(shape_of(window))


def random_heads(seed=0, tokens=TOKENS):
    """Queries [heads, tokens, dim] and keys, exact in float32; keys unlike in length, so that taking the wrong ones shows."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(0.5 * rng.normal(size=(KV_HEADS, tokens, 1)))
    q, k = rng.normal(size=(HEADS, tokens, DIM)), lengths * rng.normal(size=(KV_HEADS, tokens, DIM))
    return q.astype(np.float32).astype(float), k.astype(np.float32).astype(float)


def weights_by_oracle(name, fields, q, k):
    """[heads, queries, keys] of one sequence without padding."""
    wanted = np.zeros((HEADS, q.shape[1], k.shape[1]))
    for head in range(HEADS):
        for i in range(q.shape[1]):
            logits = ORACLES[name](q[head, i], k[head * KV_HEADS // HEADS, : i + 1], head, **fields)
            wanted[head, i, : i + 1] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return wanted


def weights_by_module(module, q, k, sees, dtype=torch.float32):
    """[batch, heads, queries, keys]. `sees` [batch, queries, keys] is True where a query sees a key; all else follows from it, and the
    softmax is in float64, so that what differs is the method. Keys that the last query does not see are padding or a cache's
    unfilled end; with none, `k_valid` is None."""
    sees = torch.as_tensor(sees)
    q_index = sees.sum(-1)
    k_valid = sees[:, -1]
    q, k = (torch.as_tensor(x).to(dtype) for x in (q, k))
    new_q, new_k = module(q, k, q_index - 1, q_index, None if k_valid.all() else k_valid)
    assert (new_q.dtype, new_k.dtype, new_q.shape, new_k.shape) == (q.dtype, k.dtype, q.shape, k.shape)
    assert new_q.isfinite().all()  # rows of padding too
    scores = new_q.double() @ new_k.double().repeat_interleave(HEADS // KV_HEADS, 1).mT / math.sqrt(DIM)
    weights = scores.masked_fill(~sees[:, None], -math.inf).softmax(-1)
    return weights.nan_to_num(0)  # padding queries see nothing


def causal(tokens=TOKENS, padding=0, unfilled=0):
    """`sees` of one sequence of `tokens`, after left padding, in a cache with unfilled places after it."""
    sees = np.zeros((padding + tokens, padding + tokens + unfilled), bool)
    sees[padding:, padding : padding + tokens] = np.tri(tokens, dtype=bool)
    return sees


def surround(x, padding=0, unfilled=0, junk=50.0):
    """The tokens of [heads, tokens, dim] between padding and unfilled places, both full of values that nothing may read."""
    return np.pad(x, ((0, 0), (padding, unfilled), (0, 0)), constant_values=junk)


def assert_weights(found, wanted, atol=1e-6):
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=0, atol=atol)


def test_every_attention_method_has_an_oracle():
    assert set(ORACLES) == set(method_names("attention")) == {name for name, _ in CASES}


@each_case
@pytest.mark.parametrize("tokens", [1, 2, WINDOW, WINDOW + 1, TOKENS])
def test_weights_equal_the_oracle(name, fields, tokens):
    q, k = random_heads(tokens, tokens)
    assert_weights(weights_by_module(module_of(name, fields), q[None], k[None], causal(tokens)[None])[0], weights_by_oracle(name, fields, q, k))


@each_case
def test_a_padded_row_equals_the_row_alone(name, fields):
    """Left padding of 9 beside a full row; then right padding."""
    (long_q, long_k), (q, k) = random_heads(1), random_heads(2, TOKENS - 9)
    module = module_of(name, fields)
    alone = weights_by_oracle(name, fields, q, k)
    batch_q, batch_k = (np.stack([full, surround(short, padding=9)]) for full, short in ((long_q, q), (long_k, k)))
    found = weights_by_module(module, batch_q, batch_k, np.stack([causal(), causal(TOKENS - 9, padding=9)]))
    assert_weights(found[0], weights_by_oracle(name, fields, long_q, long_k))
    assert_weights(found[1, :, 9:, 9:], alone)

    index = torch.arange(1, TOKENS + 1).clamp(max=TOKENS - 9)[None]
    right_q, right_k = (torch.as_tensor(surround(x, unfilled=9), dtype=torch.float32)[None] for x in (q, k))
    new_q, _ = module(right_q, right_k, index - 1, index, torch.arange(TOKENS)[None] < TOKENS - 9)
    alone_q, _ = module(right_q[:, :, :-9], right_k[:, :, :-9], index[:, :-9] - 1, index[:, :-9], None)
    torch.testing.assert_close(new_q[:, :, :-9], alone_q, rtol=1e-6, atol=0)


@each_case
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("unfilled", [0, 11])
def test_chunks_over_a_cache_equal_the_whole(name, fields, padding, unfilled):
    """Chunks of any size against a dynamic cache (keys so far) and a static one (more places than are filled), padded or not."""
    q, k = random_heads(3)
    wanted = weights_by_oracle(name, fields, q, k)
    module = module_of(name, fields)
    padded_q, padded_k = surround(q, padding), surround(k, padding)
    for start, stop in ((0, 20), (20, 40), (40, 41), (34, 41)):
        start, stop = start + padding, stop + padding
        keys = surround(padded_k[:, :stop], unfilled=unfilled)
        sees = causal(stop - padding, padding, unfilled)[start:stop]
        found = weights_by_module(module, padded_q[None, :, start:stop], keys[None], sees[None])[0]
        assert_weights(found[:, :, padding:stop], wanted[:, start - padding : stop - padding, : stop - padding])


@each_case
def test_a_static_cache_without_a_mask(name, fields):
    """No padding, so k_valid may be None although the keys go on past the last one seen."""
    q, k = random_heads(4)
    index = torch.arange(1, TOKENS + 1)[None]
    q, k, longer = (torch.as_tensor(x, dtype=torch.float32)[None] for x in (q, k, surround(k, unfilled=7)))
    module = module_of(name, fields)
    torch.testing.assert_close(module(q, longer, index - 1, index, None)[0], module(q, k, index - 1, index, None)[0], rtol=1e-6, atol=0)


def test_what_a_static_cache_has_not_filled_may_be_nan():
    q, k = random_heads(5)
    sees = causal(unfilled=3)[None]
    for by in ("sum", "mean", "max"):
        keys = torch.as_tensor(surround(k, unfilled=3, junk=np.nan))[None]
        index = torch.as_tensor(sees).sum(-1)
        new_q, _ = module_of("key_norm", {"by": by})(torch.as_tensor(q)[None], keys, index - 1, index, torch.as_tensor(sees[:, -1]))
        assert new_q.isfinite().all()


def test_keys_of_length_zero_give_finite_queries_and_gradients():
    q, k = torch.randn(1, HEADS, 3, DIM), torch.zeros(1, KV_HEADS, 3, DIM, requires_grad=True)
    index = torch.arange(1, 4)[None]
    new_q, new_k = module_of("key_norm", {})(q, k, index - 1, index, None)
    (new_q.sum() + new_k.sum()).backward()
    assert new_q.isfinite().all()
    assert k.grad.isfinite().all()


LEARNED = [
    ("ssmax", {}, {"s": "s"}),
    ("ssmax", {"offset": True}, {"s": "s", "b": "b"}),
    *(("key_norm", {"by": by, "learn_gain": True}, {"gain": "gains"}) for by in ("sum", "mean", "max")),
]


@pytest.mark.parametrize(("name", "fields", "parameters"), LEARNED)
def test_each_head_has_its_own_parameters(name, fields, parameters):
    """Values and gradients, the latter against central differences of the oracle."""
    rng = np.random.default_rng(6)
    module = module_of(name, fields).double()
    values = {key: rng.uniform(0.3, 1.5, HEADS) for key in parameters}
    for key, parameter in module.named_parameters():
        parameter.data.copy_(torch.as_tensor(values[key]))
    assert {key: tuple(p.shape) for key, p in module.named_parameters()} == {key: (HEADS,) for key in parameters}
    q, k = random_heads(7, 12)
    cost = rng.normal(size=(HEADS, 12, 12))

    def loss(values):
        named = {parameters[key]: value for key, value in values.items()}
        return (weights_by_oracle(name, fields | named, q, k) * cost).sum()

    weights = weights_by_module(module, q[None], k[None], causal(12)[None], torch.float64)[0]
    assert_weights(weights, weights_by_oracle(name, fields | {parameters[key]: value for key, value in values.items()}, q, k))
    (weights * torch.as_tensor(cost)).sum().backward()
    for key, parameter in module.named_parameters():
        for head in range(HEADS):
            step = np.zeros(HEADS)
            step[head] = 1e-5
            slope = (loss(values | {key: values[key] + step}) - loss(values | {key: values[key] - step})) / 2e-5
            assert parameter.grad[head].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("by", ["sum", "mean", "max"])
def test_gradients_reach_queries_and_keys(by):
    """Also through the lengths, in float64 by `gradcheck`."""
    q, k = (torch.as_tensor(x)[None].requires_grad_() for x in random_heads(8, 4))
    index = torch.tensor([[1, 1, 2, 3]])
    k_valid = torch.tensor([[False, True, True, True]])
    module = module_of("key_norm", {"by": by})
    assert torch.autograd.gradcheck(lambda q, k: module(q, k, index - 1, index, k_valid), (q, k))


@each_case
def test_bfloat16_is_close_and_finite(name, fields):
    q, k = (torch.as_tensor(x).bfloat16().double().numpy() for x in random_heads(9))
    found = weights_by_module(module_of(name, fields), q[None], k[None], causal()[None], torch.bfloat16)[0]
    assert_weights(found, weights_by_oracle(name, fields, q, k), atol=0.03)


def rescaled(name, fields, seen, window=4096):
    q, k = (torch.as_tensor(x, dtype=torch.float32)[None] for x in random_heads(10, 3))
    index = torch.tensor([seen])
    new_q, new_k = module_of(name, fields, window)(q, k, index - 1, index, None)
    assert torch.equal(new_k, k)
    return q, new_q


@pytest.mark.parametrize("window", [2, 1000, 2048, 4096, 32768, 131072])
def test_log_n_of_qwen_leaves_the_trained_window_bit_for_bit(window):
    q, new_q = rescaled("log_n", {}, [1, window // 2, window], window)
    assert torch.equal(q, new_q)
    q, new_q = rescaled("log_n", {}, [window + 1, 2 * window, window**2], window)
    assert (new_q.abs() > q.abs()).all()
    torch.testing.assert_close(new_q[:, :, 2], 2 * q[:, :, 2], rtol=1e-6, atol=0)


def test_ssmax_is_unchanged_where_the_trained_window_is_seen():
    q, new_q = rescaled("ssmax", {"offset": True}, [64, 4096, 4096**2])
    torch.testing.assert_close(new_q, q * torch.tensor([0.5, 1, 2])[:, None], rtol=1e-6, atol=0)


def test_the_sum_flattens_and_the_mean_does_not():
    """Notes of the method: on standard normal vectors the paper's rule is uniform attention, its mean the usual one."""
    rng = np.random.default_rng(11)
    q, k = rng.normal(size=(HEADS, 512, DIM)), rng.normal(size=(KV_HEADS, 512, DIM))
    usual = np.exp(np.array([k[h // 2] @ q[h, -1] / math.sqrt(DIM) for h in range(HEADS)]))
    usual /= usual.sum(-1, keepdims=True)
    last = {by: weights_by_module(module_of("key_norm", {"by": by}), q[None], k[None], causal(512)[None])[0, :, -1].numpy() for by in ("sum", "mean")}
    np.testing.assert_allclose(last["sum"], 1 / 512, rtol=0.02)
    np.testing.assert_allclose(last["mean"], usual, rtol=0.1)


class CountsPositions(torch.nn.Module):
    """Wrong: n is taken from the place in the padded row, as patches without a padding mask do."""

    def __init__(self, right):
        super().__init__()
        self.right = right

    def forward(self, q, k, q_pos, q_index, k_valid):
        place = torch.arange(1, q.shape[2] + 1).expand_as(q_index)
        return self.right(q, k, q_pos, place, None)


@each_case
def test_counting_padding_is_caught(name, fields):
    q, k = random_heads(12, 30)
    padded = [surround(x, padding=9)[None] for x in (q, k)]
    wrong = CountsPositions(module_of(name, fields))
    found = weights_by_module(wrong, *padded, causal(30, padding=9)[None])[0, :, 9:, 9:]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_weights(found, weights_by_oracle(name, fields, q, k))


@each_case
def test_round_trips(name, fields):
    item = method(name, **fields)
    assert item.slots == ("attention",)
    assert load_method(json.loads(json.dumps(item.to_dict()))) == item
    module = item.attention(shape_of())
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        q, k = random_heads(13)
        assert torch.equal(*(weights_by_module(each, q[None], k[None], causal()[None]) for each in (module, other)))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("log_n", {"form": "chiang", "reference": 512}, "log_n: reference is not used by form chiang, got 512; leave it out"),
        ("log_n", {"reference": 1}, "log_n: reference must be at least 2 tokens, got 1: its logarithm divides"),
        ("log_n", {"reference": "2q"}, "log_n: reference: expected a number of tokens such as 2048, 2k or 128k, got '2q'"),
        ("log_n", {"form": "qwem"}, "log_n: form: input should be 'su', 'chiang' or 'qwen', got 'qwem'"),
        ("ssmax", {"init": 0}, "ssmax: init must be a positive number, got 0"),
        ("ssmax", {"init": math.inf}, "ssmax: init must be a positive number, got inf"),
        ("ssmax", {"bias": True}, "ssmax: unknown key 'bias'"),
        ("key_norm", {"gain": -1}, "key_norm: gain must be a positive number, got -1"),
        ("key_norm", {"by": "median"}, "key_norm: by: input should be 'sum', 'mean' or 'max', got 'median'"),
    ],
)
def test_what_is_refused(name, fields, message):
    refused_in_a_line(lambda: method(name, **fields), message)
