"""State passing against float64 NumPy: one token after the other through a mixer, and what each state method draws.

The mixers follow Mamba (arXiv 2312.00752, algorithm 2 and section 3.4; B discretised as Delta B, as in its code), FalconMamba
(arXiv 2410.05355: RMS norms on Delta, B and C) and Mamba-2 (arXiv 2405.21060, section 7 and listing 1: one decay a head, B and C
shared by groups of heads, gated norm). None of them shares a line with the library. The methods follow arXiv 2507.02782.
"""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longctx.integration import state
from hf_longctx.integration.state import StatePassingCache, prepare
from hf_longctx.method import method

HIDDEN, STATE, TOKENS, ROWS = 16, 4, 21, 2


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def convolve(x, before, weight, bias):
    """Causal depthwise convolution of x [tokens, channels] that `before` [kernel, channels] precedes; also what precedes the next."""
    kernel = weight.shape[-1]
    joined = np.concatenate([before, x])
    out = np.stack([np.sum(joined[t + 1 : t + 1 + kernel] * weight[:, 0].T, axis=0) for t in range(len(x))])
    return silu(out + bias), joined[-kernel:]


def mamba_1(p, x, before, h, eps=None):
    """One row: x [tokens, hidden], convolution inputs before it [kernel, channels], h [channels, state]."""
    u, z = np.split(x @ p["in_proj.weight"].T, 2, axis=-1)
    u, before = convolve(u, before, p["conv1d.weight"], p["conv1d.bias"])
    low = u @ p["x_proj.weight"].T
    rank = low.shape[-1] - 2 * STATE
    dt, b, c = low[:, :rank], low[:, rank : rank + STATE], low[:, rank + STATE :]
    if eps is not None:
        dt, b, c = rms(dt, eps), rms(b, eps), rms(c, eps)
    dt = softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    a = -np.exp(p["A_log"])
    out = []
    for t in range(len(x)):
        h = np.exp(dt[t][:, None] * a) * h + dt[t][:, None] * b[t] * u[t][:, None]
        out.append(h @ c[t] + p["D"] * u[t])
    return (np.array(out) * silu(z)) @ p["out_proj.weight"].T, before, h


def falcon_mamba(p, x, before, h):
    return mamba_1(p, x, before, h, eps=1e-6)


def mamba_2(p, x, before, h):
    """As above, with h [heads, head_dim, state]; two groups, and a norm over each (Transformers 5.17: over both)."""
    heads, size, _ = h.shape
    inner = heads * size
    z, u, dt = np.split(x @ p["in_proj.weight"].T, [inner, 2 * inner + 2 * 2 * STATE], axis=-1)
    u, before = convolve(u, before, p["conv1d.weight"], p["conv1d.bias"])
    u, b, c = np.split(u, [inner, inner + 2 * STATE], axis=-1)
    dt = softplus(dt + p["dt_bias"])
    a = -np.exp(p["A_log"])
    out = []
    for t in range(len(x)):
        y = np.empty_like(u[t])
        for i in range(heads):
            group = slice(i // (heads // 2) * STATE, (i // (heads // 2) + 1) * STATE)
            own = u[t][i * size : (i + 1) * size]
            h = h.copy()
            h[i] = np.exp(dt[t, i] * a[i]) * h[i] + dt[t, i] * np.outer(own, b[t][group])
            y[i * size : (i + 1) * size] = h[i] @ c[t][group] + p["D"][i] * own
        out.append(y)
    gated = np.array(out) * silu(z)
    normed = np.concatenate([rms(part, 1e-5) for part in np.split(gated, p["norms"], axis=-1)], axis=-1)
    return (normed * p["norm.weight"]) @ p["out_proj.weight"].T, before, h


MIXERS = {
    "mamba": (mamba_1, {"time_step_rank": 3}),
    "falcon_mamba": (falcon_mamba, {"time_step_rank": 3}),
    "mamba2": (mamba_2, {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8, "layer_norm_epsilon": 1e-5}),
}


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("family", MIXERS)
def test_a_mixer_from_a_given_state(family, kernel, monkeypatch):
    """Outputs and final states, by our scan and by Transformers' with the correction."""
    if kernel:
        monkeypatch.setattr(state, "has_kernel", lambda tensor: True)
    monkeypatch.setattr(state, "_BLOCK", 1)  # blocks of 16 tokens
    oracle, fields = MIXERS[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, hidden_size=HIDDEN, state_size=STATE, num_hidden_layers=1, vocab_size=20, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prepare(model)
    mixer = model.backbone.layers[0].mixer
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(ROWS, TOKENS, HIDDEN)
    ((conv, ssm),) = state.map_states(lambda t: torch.randn_like(t) * 2, state.zeros(model, ROWS))
    cache = StatePassingCache(config, [(conv, ssm)])
    with torch.no_grad():
        out = mixer(x, cache_params=cache)
    ((conv_end, ssm_end),) = cache.states()

    parameters = {name: p.detach().double().numpy() for name, p in mixer.named_parameters()}
    parameters["norms"] = 2 if hasattr(getattr(mixer, "norm", None), "group_size") else 1
    for row in range(ROWS):
        inputs = (t[row].double().numpy() for t in (x, conv.transpose(1, 2), ssm))
        wanted = oracle(parameters, *inputs)
        for got, want in zip((out[row], conv_end[row].T, ssm_end[row]), wanted, strict=True):
            np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=2e-5 * np.abs(want).max())


# --- Methods -----------------------------------------------------------------------------------------------------------


def states(rows=6, seed=0, heads=3):
    """Two layers as Mamba-2 has them, in float64: each head with a mean and a spread of its own."""
    rng = np.random.default_rng(seed)

    def tensor(*sizes):
        spread = rng.uniform(0.5, 3, (1, sizes[0], *[1] * (len(sizes) - 1)))
        return torch.from_numpy(rng.normal(3 * spread, spread, (rows, *sizes)))

    return [(tensor(5, 4), tensor(heads, 7, 2)) for _ in range(2)]


def arrays(found):
    return [t.numpy() for pair in found for t in pair]


def start(name, final, ended=None, seed=0, observed=(), **fields):
    source = method(name, **fields).state()
    for each in observed:
        source.observe(each)
    ended = torch.zeros(len(final[0][0]), dtype=torch.bool) if ended is None else torch.tensor(ended)
    return arrays(source.start(final, ended, np.random.default_rng(seed)))


def test_zero():
    assert all((each == 0).all() and len(each) == 6 for each in start("zero", states()))


def test_carry():
    """Row by row: what it left, or nothing where its document ended."""
    ended = [False, True, False, False, True, True]
    for got, given in zip(start("carry", states(), ended), arrays(states()), strict=True):
        np.testing.assert_array_equal(got, [np.zeros_like(row) if over else row for row, over in zip(given, ended, strict=True)])


def test_shuffled_carry():
    """Every row of every layer is the same other row's; each is used once; each pair is met equally often."""
    given = arrays(states())
    met = np.zeros((6, 6))
    for seed in range(600):
        found = start("shuffled_carry", states(), [True, False] * 3, seed)
        source = [next(j for j in range(6) if np.array_equal(row, given[0][j])) for row in found[0]]
        assert sorted(source) == list(range(6))
        assert all(i != j for i, j in enumerate(source))
        for got, want in zip(found, given, strict=True):
            np.testing.assert_array_equal(got, want[source])
        met[range(6), source] += 1
    expected = 600 / 5  # chi-squared over the 30 pairs, some 24 degrees of freedom: above 60 once in ten thousand times
    assert sum((met[i, j] - expected) ** 2 / expected for i, j in itertools.permutations(range(6), 2)) < 60


def test_rows_may_change_in_number_where_no_order_is_kept():
    for name, fields in (("zero", {}), ("shuffled_carry", {}), ("noise", {"sigma": 1}), ("fitted_noise", {})):
        for rows in (2, 11):
            assert {len(each) for each in start(name, states(), [False] * rows, observed=[states()], **fields)} == {rows}


def assert_normal(x, mean, deviation):
    """First four moments, each within five standard errors."""
    z = (x - mean) / deviation
    n = z.size
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * np.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_noise():
    """N(0, sigma^2) everywhere, independent across rows and layers; no noise in the convolution."""
    conv, ssm, other_conv, other = start("noise", states(), [False] * 3000, sigma=0.7)
    assert (conv == 0).all()
    assert (other_conv == 0).all()
    for each in (ssm, other):
        assert_normal(each, 0, 0.7)
    assert abs(np.corrcoef(ssm.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(ssm.size)
    assert abs(np.corrcoef(ssm[:-1].ravel(), ssm[1:].ravel())[0, 1]) < 5 / np.sqrt(ssm.size)


def recorded(parts, weights):
    """Mean and standard deviation of each head over everything seen, window i weighing weights[i] a number."""
    heads = parts[0].shape[1]
    values = [np.concatenate([part[:, head].ravel() for part in parts]) for head in range(heads)]
    each = np.concatenate([np.full(part[:, 0].size, weight) for part, weight in zip(parts, weights, strict=True)])
    means = np.array([np.average(v, weights=each) for v in values])
    return means, np.array([np.sqrt(np.average((v - m) ** 2, weights=each)) for v, m in zip(values, means, strict=True)])


@pytest.mark.parametrize("horizon", [None, 4.0])
def test_fitted_noise(horizon):
    """The statistics are those of all final states seen, by layer and head; what is drawn has them."""
    windows = [states(rows, seed) for seed, rows in enumerate((6, 2, 9))]
    weights = [1.0] * 3 if horizon is None else [(1 - 1 / horizon) ** age for age in (2, 1, 0)]
    source = method("fitted_noise", horizon=horizon).state()
    for window in windows:
        source.observe(window)
    drawn = arrays(source.start(windows[0], torch.zeros(4000, dtype=torch.bool), np.random.default_rng(0)))
    for i, got in enumerate(drawn):
        mean, deviation = recorded([arrays(window)[i] for window in windows], weights)
        kept = source.state_dict()[f"{i // 2}.{('conv', 'ssm')[i % 2]}"].numpy()
        np.testing.assert_allclose(kept[1], mean, rtol=1e-12)
        np.testing.assert_allclose(np.sqrt(kept[2]), deviation, rtol=1e-12)
        for head in range(got.shape[1]):
            assert_normal(got[:, head], mean[head], deviation[head])
    assert all((each == 0).all() for each in start("fitted_noise", states()))  # nothing recorded yet


def test_statistics_of_large_states_keep_their_digits():
    """A spread of 1 around 1e6, in float32: sums of squares would lose it."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e6, 1, (4, 2, 50)).astype(np.float32) for _ in range(20)]
    source = method("fitted_noise").state()
    for part in parts:
        source.observe([(torch.zeros(4, 1, 1), torch.from_numpy(part))])
    _, deviation = recorded([part.astype(np.float64) for part in parts], [1.0] * 20)
    np.testing.assert_allclose(source.state_dict()["0.ssm"][2].sqrt().numpy(), deviation, rtol=1e-9)


@pytest.mark.parametrize(("name", "fields"), [("carry", {}), ("shuffled_carry", {}), ("noise", {"sigma": 1.0}), ("fitted_noise", {})])
def test_fresh_starts(name, fields):
    """Each row is zero with the given probability, all layers of it, independently."""
    given = states(rows=4000)
    found = start(name, given, observed=[given], probability=0.3, **fields)
    zero = np.array([[(row == 0).all() for row in each] for each in found[1::2]])
    assert (zero[0] == zero[1]).all()
    assert abs(zero[0].mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 4000)
    assert abs(np.corrcoef(zero[0][:-1], zero[0][1:])[0, 1]) < 5 / np.sqrt(4000)
