"""Every bias method against float64 NumPy written from the paper's or the authors' formula.

An oracle takes the learned parameters, the number of heads, query and key positions (two vectors) and the method's fields, and
returns the bias, [heads, pairs]. None of them shares a line with the library.
"""

import copy
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

from hf_longctx.method import Frequencies, Shape, load_method, method, method_names
from hf_longctx.schema import build

ORACLES = {}
HEAD_DIM = 24


def oracle(function):
    ORACLES[function.__name__] = function
    return function


def press_slopes(heads):
    """ofirpress/attention_with_linear_biases, `get_slopes`: a geometric series that starts at its ratio; other head counts
    recurse into twice the power of two below."""
    exponent = int(np.floor(np.log2(heads)))
    if 2**exponent == heads:
        ratio = np.power(2.0, -np.power(2.0, 3 - exponent))
        return np.cumprod(np.full(heads, ratio))
    return np.concatenate([press_slopes(2**exponent), press_slopes(2 ** (exponent + 1))[0::2][: heads - 2**exponent]])


def column(values):
    return np.asarray(values, dtype=np.float64)[:, None]


@oracle
def alibi(params, heads, q, k, *, slopes=None, multiplier=1.0):
    """Press et al. 2021, section 3, with the released code's slopes."""
    return -column(press_slopes(heads) if slopes is None else slopes) * multiplier * (q - k)


@oracle
def kerple(params, heads, q, k, *, form="log", seed=0, per_layer=False):
    """chijames/KERPLE, ParallelKerpleLog and ParallelKerplePower: the stored parameters are clamped, then used."""
    a = column(np.clip(params["a"], 1e-2, None))
    if form == "log":
        return -column(np.clip(params["p"], 1e-2, None)) * np.log(1 + a * (q - k))
    return -a * np.power(np.abs(q - k).astype(np.float64), column(np.clip(params["p"], 1e-2, 2)))


@oracle
def sandwich(params, heads, q, k, *, dim=128):
    """NVIDIA NeMo, SandwichRelativePositionEmbedding: a sum of cosines, less its value at distance 0, over 8h/H."""
    frequencies = 1 / 10000 ** (2 * np.arange(1, dim // 2 + 1) / dim)
    cosines = np.cos((q - k)[:, None] * frequencies).sum(-1)
    return (cosines - dim / 2) / (8 * column(np.arange(1, heads + 1)) / heads)


@oracle
def fire(params, heads, q, k, *, threshold=512, width=32, seed=0, per_layer=False):
    """Li et al. 2023, appendix: progressive interpolation with the log transform and the learned threshold."""
    c, reach = params["c"], np.maximum(q, np.abs(params["l"] * threshold))
    x = np.log(np.abs(c * (q - k)) + 1) / (np.log(np.abs(c * reach) + 1) + 1e-6)
    hidden = np.maximum(x[:, None] * params["w1"] + params["b1"], 0)
    return (hidden @ params["w2"] + params["b2"]).T


def raffel_bucket(distance, buckets, max_distance):
    """mesh-tensorflow's `_relative_position_bucket`, causal; exact at the edges, where float32 falls to either side."""
    exact = buckets // 2
    if distance < exact:
        return distance
    place = np.log(distance / exact) / np.log(max_distance / exact) * (buckets - exact)
    return min(exact + int(np.floor(place + 1e-11)), buckets - 1)


@oracle
def t5(params, heads, q, k, *, buckets=32, max_distance=128, scale=True, init="zero", seed=0, per_layer=False):
    """GPT-NeoX, ParallelRelativePositionBias: T5's table times sqrt(head_dim)."""
    rows = [raffel_bucket(d, buckets, max_distance) for d in (q - k).tolist()]
    return params["table"][rows].T * (np.sqrt(HEAD_DIM) if scale else 1)


@oracle
def wavelet_bias(params, heads, q, k, *, wavelet="ricker", scales=16, shift=0.0, per_layer=False):
    """Ours: sum_j w_hj psi((d - c_j) / 2^j), c_j = shift 2^j."""
    total = 0
    for j in range(scales):
        u = ((q - k) - shift * 2**j) / 2**j
        if wavelet == "ricker":
            psi = np.exp(-(u**2) / 2) - u**2 * np.exp(-(u**2) / 2)
        else:
            psi = np.select([(u >= 0) & (u < 1 / 2), (u >= 1 / 2) & (u < 1)], [1.0, -1.0], 0.0)
        total = total + column(params["weight"][j]) * psi
    return total


@oracle
def mkl_alibi(params, heads, q, k, *, preset=None, kernels=(), weights=None, learn_weights=False, seed=0, per_layer=False):
    """vangogh0318/MEP, megatron/mpu/layers.py, ParallelSNOPE and ParallelSNOPEKerpleLog; logarithms of kernels, added by NumPy."""
    d, logs = (q - k).astype(np.float64), []
    if not kernels:
        kernels = ["gaussian", "exponential", "t5", "polynomial"] if preset == "mep_learned" else ["exponential", "half_exponential", "gaussian"]
    for i, kernel in enumerate(kernels):
        kernel = {"kind": kernel} if isinstance(kernel, str) else kernel
        m = column(kernel.get("slopes") or press_slopes(heads)) * kernel.get("multiplier", 1)
        if kernel["kind"] == "t5":
            rows = [raffel_bucket(int(x), 32, 128) for x in d]
            logs.append(np.sqrt(HEAD_DIM) * params[f"table{i}"][rows].T)
        elif kernel["kind"] == "polynomial":
            logs.append(np.log((1 + column(np.clip(params[f"a{i}"], 1e-2, None)) * d) ** -column(np.clip(params[f"p{i}"], 1e-2, None))))
        elif kernel["kind"] == "tanh":
            logs.append(np.log(1 + 1e-6 + np.tanh(-m * d)))
        else:
            logs.append({"exponential": -m * d, "half_exponential": -m * d / 2, "gaussian": -m * d**2}[kernel["kind"]])
    mixed = np.ones((len(logs), heads)) if weights is None else np.repeat(column(weights), heads, axis=1)
    if learn_weights:
        mixed = np.exp(params["logits"])
    mixed = mixed / mixed.sum(0)
    return np.logaddexp.reduce(np.array(logs) + np.log(mixed)[:, :, None], axis=0)


OWN = (0.7, 0.3, 0.01, 0.0)  # slopes of four heads
CASES = [
    ("alibi", 4, {}),
    ("alibi", 6, {}),
    ("alibi", 12, {"multiplier": 0.25}),
    ("alibi", 32, {}),
    ("alibi", 1, {}),
    ("alibi", 4, {"slopes": OWN, "multiplier": 2.0}),
    ("kerple", 4, {}),
    ("kerple", 12, {"seed": 3}),
    ("kerple", 6, {"form": "power"}),
    ("sandwich", 4, {}),
    ("sandwich", 12, {"dim": 64}),
    ("sandwich", 32, {"dim": 2}),
    ("fire", 4, {}),
    ("fire", 12, {"threshold": 4096, "width": 5, "seed": 1}),
    ("t5", 4, {}),
    ("t5", 6, {"buckets": 32, "max_distance": 256}),  # edges at 32, 64, 128: whole numbers
    ("t5", 12, {"buckets": 7, "max_distance": 2048, "scale": False, "init": "normal"}),
    ("wavelet_bias", 4, {}),
    ("wavelet_bias", 6, {"wavelet": "haar"}),
    ("wavelet_bias", 12, {"scales": 5, "shift": 1.25}),
    ("wavelet_bias", 4, {"wavelet": "haar", "scales": 1, "shift": -0.5}),
    ("mkl_alibi", 4, {}),
    ("mkl_alibi", 12, {"preset": "mep"}),
    ("mkl_alibi", 12, {"preset": "mep_learned", "seed": 2}),
    ("mkl_alibi", 6, {"preset": "mep_learned", "learn_weights": True}),
    ("mkl_alibi", 6, {"weights": (3.0, 1.0, 0.5)}),
    ("mkl_alibi", 6, {"kernels": ("tanh",)}),
    ("mkl_alibi", 4, {"kernels": ({"kind": "exponential", "slopes": OWN}, "gaussian", {"kind": "gaussian", "multiplier": 0.001})}),
    ("mkl_alibi", 32, {"kernels": ("tanh", "polynomial", "half_exponential"), "weights": (1.0, 2.0, 7.0), "learn_weights": True}),
    ("mkl_alibi", 4, {"kernels": ("polynomial", "polynomial", "t5"), "per_layer": True}),
]
ids = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]
over_cases = pytest.mark.parametrize(("name", "heads", "fields"), CASES, ids=ids)
DISTANCES = np.unique([*range(300), *np.geomspace(300, 10000, 200).astype(int), 512, 1024, 2048, 4096, 8192])


def shape_of(heads):
    return Shape(
        family="llama", hidden=64, layers=1, heads=heads, kv_heads=heads, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM, theta=1e4,
        trained=Frequencies((1.0,)), rope_type="default", window=512,
    )  # fmt: skip


def perturbed(name, heads, fields, scale=0.3):
    """The module with each parameter moved away from where it starts."""
    module = method(name, **fields).bias(shape_of(heads))
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return module


def numbers(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def call(module, heads, q, k):
    return module(torch.arange(heads)[:, None], torch.as_tensor(q)[None], torch.as_tensor(k)[None])


def pairs():
    """Every distance, from the first token and from the 124th."""
    k = np.repeat([0, 123], len(DISTANCES))
    return k + np.tile(DISTANCES, 2), k


def assert_same(module, name, heads, fields):
    """Within 1e-6 of the magnitude, in float32."""
    q, k = pairs()
    wanted = ORACLES[name](numbers(module), heads, q, k, **fields)
    found = call(module, heads, q, k)
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape == (heads, len(q))
    error = np.abs(found.detach().double().numpy() - wanted) / np.maximum(1, np.abs(wanted))
    assert error.max() <= 1e-6, f"off by {error.max():.2g} of the magnitude"


def test_every_bias_method_has_an_oracle():
    assert set(ORACLES) == set(method_names("bias"))
    assert {name for name, _, _ in CASES} == set(ORACLES)


@over_cases
def test_method_equals_its_oracle(name, heads, fields):
    assert_same(perturbed(name, heads, fields), name, heads, fields)


@over_cases
def test_method_equals_its_oracle_as_built(name, heads, fields):
    assert_same(perturbed(name, heads, fields, scale=0), name, heads, fields)


BREAKS = [  # what replaces the formula's result, given the true one and its arguments
    ("alibi", 6, {}, lambda true, v, head, d: true(v, (head + 1) % 6, d)),
    ("alibi", 12, {}, lambda true, v, head, d: true(v, head, d.clamp(max=9000))),
    ("kerple", 4, {}, lambda true, v, head, d: true({**v, "p": v["p"].clamp(min=0.05, max=1.5)}, head, d)),
    ("kerple", 4, {"form": "power"}, lambda true, v, head, d: true(v, head, d) - 1e-4 * (d == 0)),
    ("sandwich", 4, {}, lambda true, v, head, d: true(v, head, d) * (1 + 3e-6)),
    ("fire", 4, {}, lambda true, v, head, q, k: true(v, head, q - k, 0 * k)),
    ("t5", 4, {}, lambda true, v, head, d: true(v, head, d + (d == 15))),
    ("t5", 6, {"buckets": 32, "max_distance": 256}, lambda true, v, head, d: true(v, head, d - (d == 64) * 1)),
    ("wavelet_bias", 4, {}, lambda true, v, head, d: true(v, head, d + 1)),
    ("mkl_alibi", 4, {}, lambda true, v, head, d: true(v, head, d) + (true(v, head, d) + math.log(3)) * (d > 5000) * 2e-6),
    ("mkl_alibi", 6, {"kernels": ("tanh",)}, lambda true, v, head, d: true(v, head, d).clamp(min=-13.8)),
]


@pytest.mark.parametrize(("name", "heads", "fields", "wrong"), BREAKS, ids=[f"{b[0]}-{i}" for i, b in enumerate(BREAKS)])
def test_a_wrong_formula_is_caught(name, heads, fields, wrong):
    module = perturbed(name, heads, fields)
    true = module.formula
    module.formula = lambda *arguments: wrong(true, *arguments)
    with pytest.raises(AssertionError, match="of the magnitude"):
        assert_same(module, name, heads, fields)


@pytest.mark.parametrize("heads", [4, 12])
def test_mep_is_the_logarithm_of_the_mean_kernel(heads):
    """As the paper has it, where float64 does not underflow; in float32 the paper's form is -inf within these distances."""
    d, m = np.arange(1500.0), column(press_slopes(heads))
    mean = (np.exp(-m * d) + np.exp(-m * d / 2) + np.exp(-m * d**2)) / 3
    found = call(perturbed("mkl_alibi", heads, {}), heads, d.astype(int), 0 * d.astype(int)).numpy()
    np.testing.assert_allclose(found, np.log(mean), rtol=1e-6, atol=1e-6)
    if heads == 12:
        assert (mean.astype(np.float32) == 0).any()


LEARNED = [case for case in CASES if case[0] not in ("alibi", "sandwich") and list(method(case[0], **case[2]).bias(shape_of(case[1])).parameters())]


@pytest.mark.parametrize(("name", "heads", "fields"), LEARNED, ids=[f"{c[0]}-{i}" for i, c in enumerate(LEARNED)])
def test_gradients_equal_finite_differences(name, heads, fields):
    """In float64, of a random weighting of all biases, with respect to every number that is learned."""
    module = perturbed(name, heads, fields).double()
    for parameter in module.parameters():  # away from KERPLE's clamps, where the gradient is meant to differ
        parameter.data = parameter.data.abs() + 0.05 if name == "kerple" else parameter.data
    for parameter_name, parameter in module.named_parameters():
        if name == "mkl_alibi" and parameter_name[0] in "ap":
            parameter.data = parameter.data.abs() + 0.05
    if name == "kerple":
        module.p.data.clamp_(max=1.9)
    q = np.concatenate([np.arange(160), np.arange(160, 3000, 97)])
    k = np.where(np.arange(len(q)) % 3 == 0, 0, q // 5)
    weight = torch.randn(heads, len(q), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss():
        return (weight * call(module, heads, q, k)).sum()

    loss().backward()
    for parameter_name, parameter in module.named_parameters():
        flat, grad, wanted = parameter.data.view(-1), parameter.grad.view(-1), torch.zeros(parameter.numel(), dtype=torch.float64)
        for i in range(parameter.numel()):
            middle, values = flat[i].item(), []
            for sign in (1, -1):
                flat[i] = middle + sign * 1e-5
                values.append(loss().item())
            flat[i] = middle
            wanted[i] = (values[0] - values[1]) / 2e-5
        assert wanted.abs().max() > 1e-3, f"{parameter_name} does nothing here"
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item(), msg=lambda m, n=parameter_name: f"{n}: {m}")


@over_cases
def test_values_and_gradients_are_finite_everywhere(name, heads, fields):
    """At distance 0, at keys after the query (masked, yet computed), and a million tokens away."""
    module = perturbed(name, heads, fields)
    q, k = np.array([0, 7, 0, 5, 3, 10**6, 10**6, 10**6]), np.array([0, 7, 1, 10**6, 4, 0, 10, 10**6])
    found = call(module, heads, q, k)
    assert found.isfinite().all()
    if found.requires_grad:
        for pair in range(len(q)):
            grads = torch.autograd.grad(found[:, pair].sum(), list(module.parameters()), retain_graph=True, allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in grads)
    zero_distance = call(module, heads, k, k)
    assert torch.equal(call(module, heads, k - 1, k)[:, 1:-1], zero_distance[:, 1:-1]) or name == "fire"  # masked pairs count as distance 0


@pytest.mark.parametrize("fields", [{}, {"preset": "mep_learned"}, {"kernels": ("tanh",)}, {"kernels": ("gaussian",)}, {"learn_weights": True}])
def test_a_million_tokens_away_mkl_alibi_is_finite(fields):
    """With the steepest of ALiBi's slopes, 0.707; the parameter-free form tends to ALiBi with half the slope, less log 3."""
    module = perturbed("mkl_alibi", 12, fields)
    found = call(module, 12, np.array([10**6]), np.array([0]))[:, 0]
    assert press_slopes(12)[8] == pytest.approx(0.7071, abs=1e-4)
    assert found.isfinite().all()
    if not fields:
        np.testing.assert_allclose(found.numpy(), -press_slopes(12) / 2 * 1e6 - np.log(3), rtol=1e-6)
    found.sum().backward() if found.requires_grad else None
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_sandwich_keeps_its_phase_a_million_tokens_away():
    q = np.array([999_983, 10**6, 2**20 + 1])
    found = call(perturbed("sandwich", 4, {}), 4, q, 0 * q).numpy()
    np.testing.assert_allclose(found, sandwich({}, 4, q, 0 * q), rtol=3e-5)


@pytest.mark.parametrize(("name", "fields", "parameters"), [("kerple", {}, "ap"), ("kerple", {"form": "power"}, "ap"), ("mkl_alibi", {"kernels": ("polynomial",)}, ("a0", "p0"))])
def test_a_parameter_below_the_clamp_can_return(name, fields, parameters):
    """The authors clamp what is stored, so a parameter at 0.01 still has its gradient."""
    module = perturbed(name, 4, fields)
    for parameter in parameters:
        getattr(module, parameter).data.fill_(-0.2)
    call(module, 4, np.array([5, 50]), np.array([0, 0])).sum().backward()
    assert all((getattr(module, parameter).grad < 0).all() for parameter in parameters)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 256), (2, 3), (3, 50), (7, 2048), (64, 4096), (320, 800)])
def test_buckets_equal_raffels(buckets, max_distance):
    table = perturbed("t5", 1, {"buckets": buckets, "max_distance": max_distance}).bucket
    assert table.tolist() == [raffel_bucket(d, buckets, max_distance) for d in range(max_distance + 1)]


@pytest.mark.parametrize("name", ["t5", "wavelet_bias"])
def test_a_pretrained_model_is_left_as_it_is_at_first(name):
    assert (call(method(name).bias(shape_of(4)), 4, np.arange(300), np.zeros(300, int)) == 0).all()


@pytest.mark.parametrize("fields", [{"name": "kerple"}, {"name": "fire"}, {"name": "t5", "init": "normal"}, {"name": "mkl_alibi", "preset": "mep_learned"}])
def test_the_seed_alone_decides_the_start(fields):
    first, second, other = (dict(load_method(fields | {"seed": seed}).bias(shape_of(6)).named_parameters()) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_starts_are_drawn_as_in_the_authors_code():
    """Ranges and spread, of 4000 heads."""
    start = method("kerple").bias(shape_of(4000)).requires_grad_(False)
    for values, top in ((start.a, 1), (start.p, 2)):
        assert values.min() == pytest.approx(0.01)
        assert values.max() < top
        assert values.mean() == pytest.approx(top / 2, rel=0.03)
    table = method("t5", init="normal").bias(shape_of(4000)).table.detach()
    assert table.shape == (32, 4000)
    assert table.std() == pytest.approx(math.sqrt(2 / 4032), rel=0.02)
    start = method("fire", width=100).bias(shape_of(400)).requires_grad_(False)
    for values, bound in ((start.w1, 1), (start.b1, 1), (start.w2, 0.1), (start.b2, 0.1)):
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert 0.9 * bound < values.abs().max() <= bound


CONVERGES = [
    ("alibi", {}, True),
    ("alibi", {"slopes": OWN}, False),
    ("kerple", {"form": "power"}, True),
    ("kerple", {}, False),
    ("sandwich", {}, False),
    ("fire", {}, False),
    ("t5", {}, False),
    ("wavelet_bias", {}, False),
    ("mkl_alibi", {}, True),
    ("mkl_alibi", {"preset": "mep_learned"}, False),
    ("mkl_alibi", {"kernels": ("exponential", "tanh")}, False),
    ("mkl_alibi", {"kernels": ("exponential", {"kind": "gaussian", "slopes": OWN})}, False),
]


@pytest.mark.parametrize(("name", "fields", "converges"), CONVERGES)
def test_converges(name, fields, converges):
    """Against the sum of exp(b) itself: does the octave up to 2^25 tokens add less than the one up to 2^21, in every head?"""
    assert method(name, **fields).converges(shape_of(4)) is converges
    if name in ("kerple", "fire"):  # kerple power with p near 0 converges long after; fire's b depends on the query's position
        return
    module = method(name, **fields).bias(shape_of(4))
    octaves = [call(module, 4, np.geomspace(2**e, 2 ** (e + 1), 500).astype(int), np.zeros(500, int)).double().exp().mean(1) * 2**e for e in (20, 24)]
    assert bool((octaves[1] <= 0.5 * octaves[0]).all()) is converges


def test_kerple_log_converges_if_every_p_is_above_one():
    found = {seed: method("kerple", seed=seed) for seed in range(200)}
    verdicts = [m.converges(shape_of(2)) for m in found.values()]
    assert verdicts == [bool((m.bias(shape_of(2)).p > 1).all()) for m in found.values()]
    assert 20 < sum(verdicts) < 80


@over_cases
def test_round_trip_through_json(name, heads, fields):
    found = method(name, **fields)
    assert load_method(json.loads(json.dumps(found.to_dict()))) == found


@over_cases
def test_module_can_be_pickled_and_copied(name, heads, fields):
    module = perturbed(name, heads, fields)
    q, k = pairs()
    wanted = call(module, heads, q, k)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(call(other, heads, q, k), wanted)


class _IndexedByTensors(TorchFunctionMode):
    """Fails where a parameter is indexed by a plain number or a slice: FlexAttention has no gradient for that (torch 2.11)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[0], torch.nn.Parameter):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert all(isinstance(index, torch.Tensor) for index in indices), indices
            self.seen = True
        return function(*args, **(kwargs or {}))


# One case a formula: other sizes and seeds trace alike, and tracing takes seconds.
FORMULAS = {
    (name, *(str(fields.get(key)) for key in ("form", "preset", "kernels", "learn_weights", "wavelet"))): (name, heads, fields)
    for name, heads, fields in CASES
}.values()  # fmt: skip


@pytest.mark.parametrize(("name", "heads", "fields"), FORMULAS)
def test_formula_is_pointwise(name, heads, fields):
    """As a score_mod, called with one head and one pair at a time, it gives what the table gives."""
    module = perturbed(name, heads, fields)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, 40, 16, generator=generator) for _ in range(3))
    index = torch.arange(40)
    with torch.no_grad():
        with _IndexedByTensors() as mode:
            table = module(torch.arange(heads)[:, None, None], index[None, :, None], index[None, None])
        assert hasattr(mode, "seen") == bool(numbers(module))
        wanted = ((q @ k.transpose(-1, -2)) / 4 + table).softmax(-1) @ v
        found = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + module(h, i, j))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "heads", "fields"), FORMULAS)
def test_keys_lie_last_in_memory(name, heads, fields):
    """Otherwise SDPA has no fast kernel for the mask that it becomes."""
    at = torch.arange(20).expand(3, 20)
    found = perturbed(name, heads, fields)(torch.arange(heads)[:, None, None], at[:, None, :, None], at[:, None, None])
    assert found.stride(-1) == 1


@pytest.mark.parametrize(("name", "heads", "fields"), FORMULAS)
def test_autocast_does_not_round_it(name, heads, fields):
    module, (q, k) = perturbed(name, heads, fields), pairs()
    with torch.no_grad():
        wanted = call(module, heads, q, k)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(module, heads, q, k), wanted)


def test_int32_positions_do_not_overflow():
    """Kernels pass positions of 32 bits; the Gaussian squares them, sandwich multiplies them."""
    for name in ("mkl_alibi", "sandwich", "kerple"):
        module = perturbed(name, 4, {})
        q = torch.tensor([[100_000]])
        wide, narrow = (module(torch.arange(4)[:, None], q.to(dtype), 0 * q.to(dtype)) for dtype in (torch.int64, torch.int32))
        assert torch.equal(wide, narrow)


KINDS = "exponential, gaussian, half_exponential, polynomial, t5, tanh"
ERRORS = [
    ("alibi", {"slopes": [0.5, -0.25]}, "alibi: slopes must be finite and not negative, got -0.25"),
    ("alibi", {"slopes": [float("nan")]}, "alibi: slopes must be finite and not negative, got nan"),
    ("alibi", {"slopes": "steep"}, "alibi: slopes takes a list, got 'steep'"),
    ("alibi", {"multiplier": 0}, "alibi: multiplier must be a positive number, got 0.0"),
    ("alibi", {"slope": [1.0]}, "alibi: unknown key 'slope'; did you mean 'slopes'?"),
    ("kerple", {"form": "square"}, "kerple: form: input should be 'log' or 'power', got 'square'"),
    ("sandwich", {"dim": 7}, "sandwich: dim must be even and at least 2, got 7"),
    ("sandwich", {"dim": 0}, "sandwich: dim must be even and at least 2, got 0"),
    ("fire", {"threshold": 0}, "fire: threshold: expected a whole, positive number of tokens, got 0"),
    ("fire", {"width": 0}, "fire: width must be at least 1, got 0"),
    ("t5", {"buckets": 1}, "t5: buckets must be at least 2, got 1"),
    ("t5", {"max_distance": 16}, "t5: max_distance must be above buckets / 2, the last distance with a bucket of its own; got 16"),
    ("t5", {"init": "ones"}, "t5: init: input should be 'zero' or 'normal', got 'ones'"),
    ("wavelet_bias", {"wavelet": "db4"}, "wavelet_bias: wavelet: input should be 'ricker' or 'haar', got 'db4'"),
    ("wavelet_bias", {"scales": 0}, "wavelet_bias: scales must be between 1 and 30 (widths up to 2^29 tokens), got 0"),
    ("wavelet_bias", {"shift": 17}, "wavelet_bias: shift must be between -16 and 16 widths, got 17"),
    ("mkl_alibi", {"kernels": ["gausian"]}, "mkl_alibi: kernels.0.kind: unknown kernel 'gausian'; did you mean 'gaussian'?"),
    ("mkl_alibi", {"kernels": ["gaussian", {"kind": "zzz"}]}, f"mkl_alibi: kernels.1.kind: unknown kernel 'zzz'; there is: {KINDS}"),
    ("mkl_alibi", {"kernels": [{"kind": "tanh", "multipler": 2}]}, "mkl_alibi: unknown key 'kernels.0.multipler'; did you mean 'multiplier'?"),
    ("mkl_alibi", {"kernels": [{"kind": "tanh", "multiplier": -2}]}, "mkl_alibi: kernels.0: multiplier must be a positive number, got -2.0"),
    ("mkl_alibi", {"kernels": [{"kind": "tanh", "slopes": [-1]}]}, "mkl_alibi: kernels.0: slopes must be finite and not negative, got -1.0"),
    ("mkl_alibi", {"kernels": [{}]}, "mkl_alibi: kernels.0.kind is required"),
    ("mkl_alibi", {"kernels": "gaussian"}, "mkl_alibi: kernels takes a list, got 'gaussian'"),
    (
        "mkl_alibi", {"kernels": [{"kind": "t5", "multiplier": 2}]},
        "mkl_alibi: kernels.0: a t5 kernel has no slopes: its shape is learned; leave slopes and multiplier out",
    ),
    (
        "mkl_alibi", {"kernels": ["tanh"], "preset": "mep"},
        "mkl_alibi: preset mep is a list of kernels already; keep preset or kernels",
    ),
    (
        "mkl_alibi", {"weights": [1, 2]},
        "mkl_alibi: 2 weights for 3 kernels (exponential, half_exponential, gaussian); give one a kernel",
    ),
    ("mkl_alibi", {"weights": [1, 2, 0]}, "mkl_alibi: weights must be positive numbers, got 1.0, 2.0, 0.0"),
    (
        "mkl_alibi", {"kernels": ["tanh"], "learn_weights": True},
        "mkl_alibi: learn_weights needs two kernels or more: the weight of a single one is 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), ERRORS)
def test_errors_say_what_is_wrong(name, fields, message):
    with pytest.raises(ValueError) as error:
        method(name, **fields)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "fields", "where"),
    [("alibi", {"slopes": OWN}, "alibi"), ("mkl_alibi", {"kernels": ("exponential", {"kind": "gaussian", "slopes": OWN})}, "mkl_alibi: gaussian")],
)
def test_slopes_must_match_the_heads(name, fields, where):
    found = method(name, **fields)
    found.bias(shape_of(4))
    for use in (found.bias, found.converges):
        with pytest.raises(ValueError) as error:
            use(shape_of(6))
        assert str(error.value) == f"{where}: 4 slopes for a model of 6 heads; give one a head, or leave slopes out"


def test_kernels_may_be_named_or_spelled_out():
    short = method("mkl_alibi", kernels=["exponential", "gaussian"])
    assert short == method("mkl_alibi", kernels=[{"kind": "exponential"}, {"kind": "gaussian", "multiplier": 1}])
    assert short == build(type(short), {"kernels": short.kernels}, "mkl_alibi")


def test_schema_offers_kernel_names_and_blocks():
    """What an editor completes: a name of the list, or a block with a kind."""
    schema = TypeAdapter(type(method("mkl_alibi"))).json_schema()
    block, name = schema["properties"]["kernels"]["items"]["anyOf"]
    assert block == {"$ref": "#/$defs/Kernel"}
    assert name["enum"] == schema["$defs"]["Kernel"]["properties"]["kind"]["enum"]
    assert sorted(name["enum"]) == KINDS.split(", ")


def test_listing_bias_methods_costs_no_torch():
    code = "import sys; from hf_longctx.method import method_names; assert method_names('bias'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
