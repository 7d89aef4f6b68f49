"""The delta slot against float64 NumPy: whole models, one token after the other, with the step sizes that each method makes.

mamba_extend: MambaExtend (ICLR 2025), a factor a layer, and its search by simultaneous perturbation with the numbers of the
released code, except that nothing but the calibration text is looked at. delta_filter: LongMamba (arXiv 2504.16053), with thresholds
found by plain loops over sorted numbers. No line is shared with the library, a few with the oracles of states; the mixers' recurrences are Mamba's (arXiv 2312.00752,
algorithm 2) and Mamba-2's (arXiv 2405.21060, listing 1). Hybrids have attention with RoPE (arXiv 2104.09864) in their second layer and
SwiGLU in each; what Granite multiplies is not 1 here.
"""

import functools
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_longctx.method import StateShape, method
from hf_longctx.methods.delta_filter import least_kept
from hf_longctx.methods.mamba_extend import search
from hf_longctx.patching import patch_model
from tests.oracles.test_state_oracles import rms, silu, softplus

STATE, TOKENS, VOCABULARY, LAYERS = 4, 19, 30, 2  # layers with a state; hybrids have one more
HYBRID = {
    "num_hidden_layers": LAYERS + 1, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": STATE, "mamba_chunk_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "rms_norm_eps": 1e-5,
}  # fmt: skip
FIELDS = {
    "mamba": {"time_step_rank": 3},
    "falcon_mamba": {"time_step_rank": 3},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "bamba": HYBRID | {"attn_layer_indices": [1]},
    "granitemoehybrid": HYBRID | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "position_embedding_type": "rope",
        "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 24,
        "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.4, "logits_scaling": 3.0,
    },
}  # fmt: skip
HYBRIDS = ("bamba", "granitemoehybrid")
EVERY = pytest.mark.parametrize("family", FIELDS)
SCALES = (0.4, 1.7)


@functools.cache
def made(family):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "state_size": STATE,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | FIELDS[family])), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.double().eval()


def model_of(family):
    config = made(family).config
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{k: v for k, v in config.to_dict().items() if k != "model_type"}), dtype=torch.float64
    )
    model.load_state_dict(made(family).state_dict())
    return model.eval()


def arrays(family):
    return {name.removeprefix("backbone.").removeprefix("model."): p.detach().numpy() for name, p in made(family).named_parameters()}


def convolve(x, p):
    """Causal and depthwise, x [tokens, channels]."""
    kernel = p["conv1d.weight"][:, 0].T
    padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    return silu(np.stack([(padded[t : t + len(kernel)] * kernel).sum(0) for t in range(len(x))]) + p["conv1d.bias"])


def mixer_1(p, x, change, seen, eps):
    u, z = np.split(x @ p["in_proj.weight"].T, 2, axis=-1)
    u = convolve(u, p)
    low = u @ p["x_proj.weight"].T
    parts = np.split(low, [low.shape[1] - 2 * STATE, low.shape[1] - STATE], axis=1)
    dt, b, c = (rms(part, eps) for part in parts) if eps else parts
    delta = softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    seen.append(delta)
    a, h, out = -np.exp(p["A_log"]), np.zeros_like(p["A_log"]), []
    for t in range(len(x)):
        step = change(delta[t])[:, None]
        h = np.exp(step * a) * h + step * b[t] * u[t][:, None]
        out.append((h @ c[t] + p["D"] * u[t]) * silu(z[t]))
    return np.array(out) @ p["out_proj.weight"].T


def mixer_2(p, x, change, seen, eps):
    heads = len(p["A_log"])
    inner = p["out_proj.weight"].shape[1]
    z, u, dt = np.split(x @ p["in_proj.weight"].T, [inner, 2 * inner + 2 * STATE], axis=-1)
    u, b, c = np.split(convolve(u, p), [inner, inner + STATE], axis=-1)
    delta = softplus(dt + p["dt_bias"])
    seen.append(delta)
    a, h, out = -np.exp(p["A_log"])[:, None, None], np.zeros((heads, inner // heads, STATE)), []
    for t in range(len(x)):
        step, own = change(delta[t])[:, None, None], u[t].reshape(heads, -1, 1)
        h = np.exp(step * a) * h + step * own * b[t]
        y = (h @ c[t] + p["D"][:, None] * own[:, :, 0]).ravel()
        out.append(rms(y * silu(z[t]), 1e-5) * p["norm.weight"])
    return np.array(out) @ p["out_proj.weight"].T


def rotate(x, pairs):
    """RoPE of x [tokens, dims] at positions 0, 1, ...: the first dimensions, two halves of `pairs` each."""
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(pairs) / pairs)
    a, b, rest = np.split(x, [pairs, 2 * pairs], axis=1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], axis=1)


def attention(p, x, pairs, scale):
    """Two query heads over one head of keys and values."""
    k, v = rotate(x @ p["k_proj.weight"].T, pairs), x @ p["v_proj.weight"].T
    out = []
    for q in np.split(x @ p["q_proj.weight"].T, 2, axis=1):
        weights = np.exp(rotate(q, pairs) @ k.T * scale) * np.tri(len(x))
        out.append(weights / weights.sum(1, keepdims=True) @ v)
    return np.concatenate(out, axis=1) @ p["o_proj.weight"].T


def forward_hybrid(family, ids, changes, seen):
    p, granite = arrays(family), family == "granitemoehybrid"
    embedding, residual, scale, scaling, pairs = (2.0, 0.7, 0.4, 3.0, 4) if granite else (1.0, 1.0, 8**-0.5, 1.0, 2)  # bamba turns half of the dimensions
    x, change = embedding * p["embed_tokens.weight"][ids], iter(changes)
    for layer in range(LAYERS + 1):
        own = {name.removeprefix(f"layers.{layer}."): value for name, value in p.items() if name.startswith(f"layers.{layer}.")}
        normed = rms(x, 1e-5) * own["input_layernorm.weight"]
        if layer == 1:
            mixed = attention({name.removeprefix("self_attn."): value for name, value in own.items()}, normed, pairs, scale)
        else:
            mixed = mixer_2({name.removeprefix("mamba."): value for name, value in own.items()}, normed, next(change), seen, None)
        x = x + residual * mixed
        if granite:
            gate, up = np.split(own["shared_mlp.input_linear.weight"], 2)
            down, norm = own["shared_mlp.output_linear.weight"], own["post_attention_layernorm.weight"]
        else:
            gate, up, down = (own[f"feed_forward.{name}_proj.weight"] for name in ("gate", "up", "down"))
            norm = own["pre_ff_layernorm.weight"]
        normed = rms(x, 1e-5) * norm
        x = x + residual * (silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return rms(x, 1e-5) * p["norm.weight" if granite else "final_layernorm.weight"] @ p["lm_head.weight"].T / scaling


def forward(family, ids, changes, seen=None):
    """Logits [tokens, vocabulary]; `changes[layer]` of the step sizes of one token, by layer with a state."""
    p, seen = arrays(family), [] if seen is None else seen
    if family in HYBRIDS:
        return forward_hybrid(family, ids, changes, seen)
    eps = made(family).config.layer_norm_epsilon
    x = p["embeddings.weight"][ids]
    for layer in range(LAYERS):
        own = {name.removeprefix(f"layers.{layer}.mixer."): value for name, value in p.items() if name.startswith(f"layers.{layer}.mixer.")}
        normed = rms(x, eps) * p[f"layers.{layer}.norm.weight"]
        mixer = mixer_2 if family == "mamba2" else mixer_1
        x = x + mixer(own, normed, changes[layer], seen, 1e-6 if family == "falcon_mamba" else None)
    return rms(x, eps) * p["norm_f.weight"] @ (p.get("lm_head.weight", p["embeddings.weight"])).T


def token_ids(seed=0, tokens=TOKENS):
    return np.random.default_rng(seed).integers(3, VOCABULARY, tokens)


def logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].double().numpy()


def by_tokens(model, ids):
    hybrid = model.config.model_type.endswith(HYBRIDS)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for position, token in enumerate(ids):
            given = {"past_key_values": cache, "position_ids": torch.tensor([[position]])} if hybrid else {"cache_params": cache}
            found.append(model(torch.tensor([[token]]), use_cache=True, **given).logits[0].double().numpy())
    return np.concatenate(found)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@EVERY
def test_the_oracle_is_the_model(family):
    assert_close(logits(made(family), token_ids()), forward(family, token_ids(), [lambda delta: delta] * LAYERS))


@EVERY
@pytest.mark.parametrize("scales", [0.3, SCALES])
def test_mamba_extend(family, scales):
    model = patch_model(model_of(family), [method("mamba_extend", scales=scales)])
    want = forward(family, token_ids(), [lambda delta, s=s: s * delta for s in (SCALES if scales is SCALES else [scales] * LAYERS)])
    assert_close(logits(model, token_ids()), want)
    assert_close(by_tokens(model, token_ids()), want)


# --- delta_filter ------------------------------------------------------------------------------------------------------


def thresholds(windows, a, trained, target, threshold):
    """[channels]: from step sizes [tokens, channels] of each window, one number after the other."""
    found = []
    for channel in range(windows[0].shape[1]):
        sums = [sum(window[:, channel]) for window in windows]
        slowest = max(np.atleast_1d(a[channel]))
        if math.exp(slowest * sum(sums) / len(sums)) <= threshold:
            found.append(0.0)
            continue
        kept, wanted = 0.0, sum(sums) * trained / target
        for value in sorted((v for window in windows for v in window[:, channel]), reverse=True):
            kept += value
            if kept >= wanted:
                found.append(value)
                break
    return np.array(found)


class Windows:
    """Step sizes of the oracle, as the method asks for them."""

    def __init__(self, family, windows):
        self.recorded = [[] for _ in range(LAYERS)]
        for ids in windows:
            seen = []
            forward(family, ids, [lambda delta: delta] * LAYERS, seen)
            for layer, delta in enumerate(seen):
                self.recorded[layer].append(delta)
        self.a = [-np.exp(value) for name, value in arrays(family).items() if name.endswith("A_log")]
        self.shape = StateShape(family, LAYERS, self.recorded[0][0].shape[1])

    def layers(self):
        for delta, a in zip(self.recorded, self.a, strict=True):
            yield torch.from_numpy(np.stack(delta)), torch.from_numpy(a.reshape(len(a), -1))


@EVERY
@pytest.mark.parametrize("threshold", [1e-30, 1e-4])
def test_delta_filter(family, threshold):
    """Thresholds from text of the trained length, and the filtered model on a longer text, whole and token by token."""
    trained, target = 12, 40
    item = method("delta_filter", trained=trained, target=target, threshold=threshold)
    windows = Windows(family, [token_ids(seed, trained) for seed in range(5)])
    want = [thresholds(delta, a, trained, target, threshold) for delta, a in zip(windows.recorded, windows.a, strict=True)]
    tensors = item.calibrate(windows).tensors
    for got, expected in zip(tensors, want, strict=True):
        np.testing.assert_allclose(got["least"].numpy(), expected, rtol=1e-12)
    share = np.mean([each > 0 for each in want])
    assert share == 1 if threshold == 1e-30 else 0 < share < 1, "the threshold divides nothing"

    middle = [between(delta, g) for delta, g in zip(windows.recorded, want, strict=True)]  # away from every step size, so that rounding decides nothing
    model = patch_model(model_of(family), [item], [{"least": torch.from_numpy(g)} for g in middle])
    ids = token_ids(seed=9, tokens=target)
    skipped = []

    def change(delta, g):
        skipped.append(delta < g)
        return np.where(delta < g, 0, delta)

    expected = forward(family, ids, [functools.partial(change, g=g.astype(np.float32)) for g in middle])
    assert 0.1 < np.mean(skipped) < 0.9
    assert_close(logits(model, ids), expected)
    assert_close(by_tokens(model, ids), expected)


def between(windows, least):
    """Halfway to the next smaller step size, or 0."""
    values = np.concatenate(windows)
    below = np.where(values < least, values, 0).max(0)
    return np.where(least > 0, (least + below) / 2, 0.0)


def test_what_is_kept_at_the_target_forgets_as_much_as_the_trained_window():
    """The sum that the method is there to keep, on other step sizes of the same distribution: within 3 %."""
    trained, target = 500, 2000
    rng = np.random.default_rng(0)
    shapes = rng.uniform(0.3, 3, 6)
    least = least_kept(torch.from_numpy(rng.gamma(shapes, 0.01, (200, trained, 6))), torch.full((6, 1), -1.0), trained / target, 1e-300).numpy()
    sums, kept = rng.gamma(shapes, 0.01, (200, trained, 6)).sum(1), rng.gamma(shapes, 0.01, (100, target, 6))
    kept = np.where(kept < least, 0, kept).sum(1)
    assert (least > 0).all()
    np.testing.assert_allclose(kept.mean(0), sums.mean(0), rtol=0.03)


def test_ties_and_a_share_of_almost_everything():
    delta = torch.tensor([[[2.0, 1.0], [2.0, 0.5], [2.0, 0.25], [2.0, 0.25]]], dtype=torch.float64)
    a = torch.tensor([[-1.0, -9.0], [-2.0, -3.0]], dtype=torch.float64)
    assert least_kept(delta, a, 0.5, 1e-30).tolist() == [2.0, 1.0]
    assert least_kept(delta, a, 0.51, 1e-30).tolist() == [2.0, 0.5]
    assert least_kept(delta, a, 1 - 1e-16, 1e-30).tolist() == [2.0, 0.25]
    assert least_kept(delta, a, 0.5, math.exp(-7.9)).tolist() == [0.0, 1.0]  # exp(-8) and exp(-4): the slowest state of each decides
    assert least_kept(delta, a, 0.5, math.exp(-3.9)).tolist() == [0.0, 0.0]


def test_a_step_size_at_the_threshold_is_kept():
    module = method("delta_filter", trained=2, target=4).delta(StateShape("mamba", 1, 2), 0)
    module.least.copy_(torch.tensor([0.5, 0.0]))
    assert module(torch.tensor([[[0.5, 0.0], [0.25, 0.125]]])).tolist() == [[[0.5, 0.0], [0.0, 0.125]]]


# --- the search of mamba_extend ----------------------------------------------------------------------------------------


def perturb(loss, start, steps, rng):
    """The points in the order in which they are evaluated, and the best of them."""
    points = [np.ones(len(start)), start]
    values = [loss(point) for point in points]
    now = start
    for k in range(steps):
        c, a = 0.1 * (1 + k) ** -0.1, 0.001 * np.cos(np.pi * k / 198)
        p = rng.choice([-1.0, 1.0], len(start))
        plus, minus = np.maximum(now + c * p, 0.01), np.maximum(now - c * p, 0.01)
        f_plus, f_minus = loss(plus), loss(minus)
        moved = np.maximum(now - a * (f_plus - f_minus) / (2 * c) * p, 0.01)
        f_moved = loss(moved)
        points += [moved, plus, minus]
        values += [f_moved, f_plus, f_minus]
        now = [moved, plus, minus][int(np.argmin([f_moved, f_plus, f_minus]))]
    return points, points[int(np.argmin(values))]


def quadratic(center):
    return lambda point: 40 + 300 * float(((point - center) ** 2).sum())


@pytest.mark.parametrize("center", [0.6, 0.95, -0.2])
def test_the_search_on_a_quadratic(center):
    asked = []

    def loss(point):
        asked.append(point.copy())
        return quadratic(center)(point)

    start = np.random.default_rng(1).uniform(0.75, 1, 4)
    found = search(loss, start, 50, np.random.default_rng(7))
    points, best = perturb(quadratic(center), start, 50, np.random.default_rng(7))
    asked.sort(key=tuple)
    np.testing.assert_allclose(asked, sorted(points, key=tuple), rtol=1e-12)
    np.testing.assert_allclose(found, best, rtol=1e-12)
    goal = np.maximum(center, 0.01)
    assert np.abs(found - goal).max() < 0.1
    assert quadratic(center)(found) < quadratic(center)(start)
    assert min(point.min() for point in points) >= 0.01


def test_the_search_never_ends_above_no_scaling_and_survives_infinity():
    def loss(point):
        return 1.0 if (point == 1).all() else math.inf

    assert (search(loss, np.full(3, 0.8), 5, np.random.default_rng(0)) == 1).all()

    def hopeless(point):
        assert np.isfinite(point).all(), "a model cannot be scaled by that"
        return math.inf if point.max() > 0.85 else 1.0

    assert np.isfinite(search(hopeless, np.full(3, 0.8), 5, np.random.default_rng(1))).all()


def test_calibration_searches_with_the_perplexity_of_the_windows():
    center = np.array([0.5, 0.9, 0.7])

    class Steps:
        shape = StateShape("mamba", 3, 8)

        def perplexity(self, item):
            assert item.name == "mamba_extend"
            return quadratic(center)(np.array(item.scales))

    item = method("mamba_extend", target=100, steps=30, seed=5)
    rng = np.random.default_rng(5)
    _, best = perturb(quadratic(center), rng.uniform(0.75, 1, 3), 30, rng)
    found = item.calibrate(Steps())
    np.testing.assert_allclose(found.method.scales, best, atol=1e-6)
    assert found.method.target == 100
    assert not found.tensors
    assert found.method.calibration is None
    assert item.calibration == (20, 100)
