"""Every rope method against float64 NumPy written from the paper's or the authors' formula.

An oracle takes the trained base, the rotary dimension, the trained window, the length seen and the method's fields, and
returns the frequencies and the factor on cos and sin. None of them shares a line with the library.
"""

import numpy as np
import pytest
import torch

from hf_longctx.method import Frequencies, Shape, method, method_names
from hf_longctx.patching import patch_model
from tests.conftest import tiny_model

ORACLES = {}


def oracle(function):
    ORACLES[function.__name__] = function
    return function


def plain(theta, dim):
    """RoFormer (Su et al. 2021), section 3.2.2: theta_j = base^(-2j/D)."""
    return 1 / np.power(float(theta), np.arange(0, dim, 2, dtype=np.float64) / dim)


@oracle
def linear(theta, dim, window, length, *, factor):
    """Chen et al. 2023, equation 4: f(x, m) -> f(x, m L / L')."""
    return plain(theta, dim) / factor, 1.0


@oracle
def ntk(theta, dim, window, length, *, factor):
    """bloc97's post, equation 16 of the YaRN paper v2: b' = b s^(D/(D-2))."""
    return plain(theta * np.power(factor, dim / (dim - 2)), dim), 1.0


@oracle
def dynamic_ntk(theta, dim, window, length, *, factor):
    """emozilla's post, as in Transformers: the base of `ntk` with s(l) = factor l / L - (factor - 1), l = max(length, L)."""
    longest = max(length, window)
    return plain(theta * np.power(factor * longest / window - (factor - 1), dim / (dim - 2)), dim), 1.0


@oracle
def yarn(
    theta, dim, window, length, *, factor, beta_fast=32, beta_slow=1, attention_factor=None, mscale=None, mscale_all_dim=None,
    truncate=True, blend="frequency",
):  # fmt: skip
    """The authors' code (jquesnelle/yarn, LlamaYaRNScaledRotaryEmbedding): the ramp runs over the dimension index. The options
    truncate, mscale and attention_factor are those of Transformers 4.57 (gpt-oss, DeepSeek); `wavelength` is PoSE's revised_yarn."""
    low, high = (dim / 2 * np.log(window / (2 * np.pi * beta)) / np.log(theta) for beta in (beta_fast, beta_slow))
    if truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, dim - 1.0)
    if low == high:
        high += 1e-3
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)  # 0: kept, 1: interpolated
    divisor = ramp * factor + 1 - ramp if blend == "wavelength" else 1 / (ramp / factor + 1 - ramp)
    frequencies = plain(theta, dim) / divisor

    def scale(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * np.log(factor) + 1

    if attention_factor is None:
        attention_factor = scale(1) if mscale is None else scale(mscale) / scale(mscale_all_dim)
    return frequencies, attention_factor


@oracle
def llama3(theta, dim, window, length, *, factor, low_freq_factor=1, high_freq_factor=4):
    """Meta's llama-models, `apply_scaling`: by wavelength, a loop over frequencies."""
    scaled = []
    for freq in plain(theta, dim):
        wavelength = 2 * np.pi / freq
        if wavelength < window / high_freq_factor:
            scaled.append(freq)
        elif wavelength > window / low_freq_factor:
            scaled.append(freq / factor)
        else:
            smooth = (window / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            scaled.append((1 - smooth) * freq / factor + smooth * freq)
    return np.array(scaled), 1.0


@oracle
def longrope(theta, dim, window, length, *, factor, long_factor, short_factor=None, attention_factor=None):
    """Ding et al. 2024, equation 2, with the two lists and the attention factor of Microsoft's Phi-3 code."""
    lists = long_factor if length > window or short_factor is None else short_factor
    temperature = np.sqrt(1 + np.log(factor) / np.log(window)) if attention_factor is None else attention_factor
    return 1 / (np.array(lists) * theta ** (np.arange(0, dim, 2) / dim)), temperature


@oracle
def theta(theta_, dim, window, length, *, theta, target):
    """Xiong et al. 2023, section 2.1: only the base changes."""
    return plain(theta, dim), 1.0


@oracle
def nope(theta, dim, window, length, *, target=None):
    """Kazemnejad et al. 2023: no rotation at all. Compared absolutely: the library leaves 1e-18 of it, zero has no saved form."""
    return np.zeros(dim // 2), 1.0


def lists(pairs):
    """A rising list of rescale factors, as LongRoPE's search yields."""
    return tuple(np.linspace(1, 6, pairs).tolist())


DIM, WINDOW = 64, 4096
CASES = [
    ("linear", {"factor": 4.0}),
    ("linear", {"factor": 2.5}),
    ("ntk", {"factor": 8.0}),
    ("dynamic_ntk", {"factor": 4.0}),
    ("dynamic_ntk", {"factor": 1.5}),
    ("yarn", {"factor": 16.0}),
    ("yarn", {"factor": 2.3}),
    ("yarn", {"factor": 1.0}),
    ("yarn", {"factor": 8.0, "truncate": False}),
    ("yarn", {"factor": 8.0, "beta_fast": 12.0, "beta_slow": 3.5}),
    ("yarn", {"factor": 8.0, "attention_factor": 1.05}),
    ("yarn", {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}),
    ("yarn", {"factor": 8.0, "blend": "wavelength"}),
    ("yarn", {"factor": 8.0, "blend": "wavelength", "truncate": False, "beta_fast": 16.0}),
    ("llama3", {"factor": 8.0}),
    ("llama3", {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.5}),
    ("longrope", {"factor": 8.0, "long_factor": lists(DIM // 2)}),
    ("longrope", {"factor": 8.0, "long_factor": lists(DIM // 2), "short_factor": (1.0,) * (DIM // 4) + (1.5,) * (DIM // 4)}),
    ("longrope", {"factor": 8.0, "long_factor": lists(DIM // 2), "attention_factor": 1.2}),
    ("theta", {"theta": 8e6, "target": 65536}),
    ("nope", {"target": 8192}),
]
ids = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]


def shape_of(base=1e4, dim=DIM, window=WINDOW, trained=None, rope_type="default"):
    return Shape(
        family="llama", hidden=64, layers=1, heads=1, kv_heads=1, head_dim=dim, rotary_dim=dim, theta=base,
        trained=trained or Frequencies(tuple(plain(base, dim))), rope_type=rope_type, window=window,
    )  # fmt: skip


def assert_same(found: Frequencies, wanted, rtol):
    frequencies, temperature = wanted
    np.testing.assert_allclose(found.inv_freq, frequencies, rtol=rtol, atol=1e-17)  # atol: nope's 1e-18 stands for zero
    np.testing.assert_allclose(found.attention_factor, temperature, rtol=rtol)


def test_every_rope_method_has_an_oracle():
    assert set(ORACLES) == set(method_names("rope"))
    assert {name for name, _ in CASES} == set(ORACLES)


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize(("name", "fields"), CASES, ids=ids)
def test_method_equals_its_oracle(name, fields, base):
    """At every length that the method names; both are float64."""
    change = method(name, **fields).rope(shape_of(base))
    for length, found in change.at.items():
        assert_same(found, ORACLES[name](base, DIM, WINDOW, length, **fields), rtol=1e-12)


@pytest.mark.parametrize(("dim", "window", "base"), [(8, 64, 1e4), (16, 8, 1e4), (128, 131072, 5e5), (20, 2048, 1e6)])
@pytest.mark.parametrize("fields", [{"factor": 4.0}, {"factor": 4.0, "truncate": False}, {"factor": 4.0, "blend": "wavelength"}])
def test_yarn_ramp_is_clipped_as_the_authors_do(fields, dim, window, base):
    """Short windows push the ramp's ends out of the dimensions, small heads make them meet."""
    (found,) = method("yarn", **fields).rope(shape_of(base, dim, window)).at.values()
    assert_same(found, yarn(base, dim, window, window, **fields), rtol=1e-12)


@pytest.mark.floor
@pytest.mark.parametrize(("name", "fields"), CASES, ids=ids)
def test_transformers_computes_the_oracle(name, fields):
    """On the rotary module of a built model, through its forward, in float32: powers err by some 1e-6."""
    model = patch_model(tiny_model(head_dim=DIM, num_hidden_layers=1, max_position_embeddings=WINDOW), [method(name, **fields)])
    rotary = model.model.rotary_emb
    for length in (WINDOW // 2, WINDOW, WINDOW + 1, 2 * WINDOW):  # ascending: the dynamic type grows
        cos, sin = rotary(torch.zeros(1), torch.tensor([[1, length - 1]]))
        frequencies, temperature = ORACLES[name](1e4, DIM, WINDOW, length, **fields)
        assert_same(Frequencies(tuple(rotary.inv_freq.double().tolist()), rotary.attention_scaling), (frequencies, temperature), rtol=1e-5)
        np.testing.assert_allclose(cos[0, 0, : DIM // 2], temperature * np.cos(frequencies), atol=1e-5)
        np.testing.assert_allclose(sin[0, 0, : DIM // 2], temperature * np.sin(frequencies), atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), [(n, f) for n, f in CASES if n in ("linear", "ntk", "yarn", "llama3")])
def test_partial_rotary_counts_only_the_rotated_dimensions(name, fields):
    """gpt_neox turns a quarter of each head: D is 16 here, in exponents and ramp alike."""
    model = patch_model(tiny_model("gpt_neox", hidden_size=256, num_hidden_layers=1, max_position_embeddings=WINDOW), [method(name, **fields)])
    rotary = model.gpt_neox.rotary_emb
    found = Frequencies(tuple(rotary.inv_freq.double().tolist()), rotary.attention_scaling)
    assert_same(found, ORACLES[name](1e4, 16, WINDOW, WINDOW, **fields), rtol=1e-5)


VENDORS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": WINDOW // 8,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW // 4},
}  # fmt: skip


def vendor_trained(vendor, base=1e4):
    fields = {k: v for k, v in VENDORS[vendor].items() if k not in ("rope_type", "original_max_position_embeddings")}
    window = VENDORS[vendor].get("original_max_position_embeddings", WINDOW)
    return ORACLES[vendor](base, DIM, window, window, **fields)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("name", ["linear", "ntk", "llama3", "yarn"])
def test_a_vendors_scaling_is_scaled_further(name, vendor):
    """Its trained frequencies take the place of base^(-2j/D) in each formula, its factor on cos and sin is multiplied."""
    trained, temperature = vendor_trained(vendor)
    pairs, turns = np.arange(DIM // 2), WINDOW * trained / (2 * np.pi)
    if name == "linear":
        wanted = trained / 4
    elif name == "ntk":
        wanted = trained * 4.0 ** (-2 * pairs / (DIM - 2))
    elif name == "llama3":
        smooth = np.clip((turns - 1) / 3, 0, 1)
        wanted = (1 - smooth) * trained / 4 + smooth * trained
    else:  # the ramp's ends: where the *trained* frequencies turn 32 times and once in the trained window
        low, high = (np.interp(-np.log(beta), -np.log(turns), pairs, right=np.nan) for beta in (32, 1))
        assert np.isfinite([low, high]).all()
        ramp = np.clip((pairs - np.floor(low)) / (np.ceil(high) - np.floor(low)), 0, 1)
        wanted = trained * (ramp / 4 + 1 - ramp)
        temperature *= 0.1 * np.log(4) + 1
    model = tiny_model(
        head_dim=DIM, num_hidden_layers=1, max_position_embeddings=WINDOW, rope_parameters={"rope_theta": 1e4, **VENDORS[vendor]}
    )
    rotary = patch_model(model, [method(name, factor=4)]).model.rotary_emb
    found = Frequencies(tuple(rotary.inv_freq.double().tolist()), rotary.attention_scaling)
    assert_same(found, (wanted, temperature), rtol=2e-5)  # the trained ones are read back in float32
    assert model.config.max_position_embeddings == 4 * WINDOW
