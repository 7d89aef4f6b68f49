"""Every embedding method against float64 NumPy written from the paper's formula, or for those that are ours from the docstring.

An oracle takes positions, the hidden size, the trained window and the method's fields, and returns [positions, hidden]. The one of
`learned` reads the module's table too. None of them shares a line with the library.
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

HIDDEN, WINDOW = 48, 256
ORACLES = {}


def oracle(function):
    ORACLES[function.__name__] = function
    return function


@oracle
def sinusoidal(positions, hidden, window, module, *, base=10000.0):
    """Vaswani et al. 2017, section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d))."""
    return np.array([[(math.cos if c % 2 else math.sin)(p / base ** ((c - c % 2) / hidden)) for c in range(hidden)] for p in positions])


@oracle
def learned(positions, hidden, window, module, *, length=None, seed=0):
    """Gehring et al. 2017, section 3.1: a vector for each position; past the table, ours, the last."""
    rows = module.table.detach().double().numpy()
    assert rows.shape == (length or window, hidden)
    return np.array([rows[p] if p < len(rows) else rows[-1] for p in positions])


@oracle
def legendre(positions, hidden, window, module, *, length=None):
    """Laplace's integral, P_k(x) = 1/pi int_0^pi (x + i sqrt(1 - x^2) cos t)^k dt; the midpoint rule is exact with more points than k."""
    points = np.cos((np.arange(hidden + 8) + 0.5) * math.pi / (hidden + 8))
    x = np.minimum(2 * np.array(positions) / ((length or window) - 1) - 1, 1.0)
    base = x[:, None] + 1j * np.sqrt(1 - x[:, None] ** 2) * points
    return np.stack([math.sqrt(2 * k + 1) * (base**k).mean(-1).real for k in range(hidden)], -1)


def haar(u):
    return 1.0 if 0 <= u < 0.5 else -1.0 if 0.5 <= u < 1 else 0.0


def ricker(u):
    """Second derivative of a Gaussian, of unit norm, about 1/2."""
    return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - (u - 0.5) ** 2) * math.exp(-((u - 0.5) ** 2) / 2)


@oracle
def wavelet(positions, hidden, window, module, *, psi="haar", length=None):
    """The docstring, a number at a time: of a column's repeats, those n cells apart, the one whose middle is nearest."""
    length = length or window
    coarsest = math.ceil(math.log2(length))
    columns = []
    for j in reversed(range(1, coarsest + 1)):
        cells = 2**coarsest // 2**j
        n = min(cells, (hidden - len(columns)) // j)
        columns += [(j, m, n < cells, n) for m in range(n)]
    found = np.zeros((len(positions), hidden))
    for row, p in enumerate(positions):
        for c, (j, m, repeats, n) in enumerate(columns):
            u = min(p, length - 1) / 2**j - m
            if repeats:
                near = round((0.5 - u) / n)
                u = min((u + times * n for times in range(near - 2, near + 3)), key=lambda u: abs(u - 0.5))
            found[row, c] = 2 ** (-j / 2) * {"haar": haar, "ricker": ricker}[psi](u)
    return found


CASES = [
    ("sinusoidal", {}),
    ("sinusoidal", {"base": 500.0}),
    ("learned", {}),
    ("learned", {"length": 100, "seed": 3}),
    ("legendre", {}),
    ("legendre", {"length": 1000}),
    *(("wavelet", {"psi": psi, **length}) for psi in ("haar", "ricker") for length in ({}, {"length": 1000}, {"length": 37})),
]
ids = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
each_case = pytest.mark.parametrize(("name", "fields"), CASES, ids=ids)
POSITIONS = [*range(0, 40), 63, 64, 98, 99, 100, 101, 127, 128, 254, 255, 256, 257, 511, 998, 999, 1000, 1023, 1024, 1500]


def module_of(name, fields, hidden=HIDDEN, window=WINDOW):
    shape = Shape(
        family="llama", hidden=hidden, layers=1, heads=4, kv_heads=2, head_dim=hidden // 4, rotary_dim=hidden // 4, theta=1e4,
        trained=Frequencies((1.0,)), rope_type="default", window=window,
    )  # fmt: skip
    return method(name, **fields).embedding(shape)


def encoding(module, positions, hidden=HIDDEN):
    """What a module of gain 1 adds to zeros."""
    positions = torch.as_tensor(np.asarray(positions))[None]
    return module(torch.zeros(*positions.shape, hidden), positions)[0].detach().double().numpy()


def assert_encoding(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_every_embedding_method_has_an_oracle():
    assert set(ORACLES) == set(method_names("embedding")) == {name for name, _ in CASES}


@each_case
def test_encoding_equals_the_oracle(name, fields):
    """Past `length` too."""
    module = module_of(name, fields | {"gain": 1})
    assert_encoding(encoding(module, POSITIONS), ORACLES[name](POSITIONS, HIDDEN, WINDOW, module, **fields))


@pytest.mark.parametrize(("name", "fields"), [("sinusoidal", {}), ("legendre", {}), ("wavelet", {}), ("wavelet", {"psi": "ricker"})])
@pytest.mark.parametrize("hidden", [1, 7, 300])
def test_any_hidden_size(name, fields, hidden):
    """Odd ones, fewer columns than scales, more than a wavelet basis has (63 at length 64)."""
    module = module_of(name, fields | {"gain": 1}, hidden, window=64)
    positions = range(0, 70, 3)
    assert_encoding(encoding(module, positions, hidden), ORACLES[name](positions, hidden, 64, module, **fields))


@pytest.mark.parametrize(
    ("name", "fields"), [("sinusoidal", {}), ("wavelet", {"length": 2**20}), ("wavelet", {"psi": "ricker", "length": 2**20}), ("legendre", {"length": 131072})]
)
def test_far_positions_keep_their_accuracy(name, fields):
    positions = [0, 1, 99_999, 131_071]
    module = module_of(name, fields | {"gain": 1})
    assert_encoding(encoding(module, positions), ORACLES[name](positions, HIDDEN, WINDOW, module, **fields))


def test_legendre_of_high_degree():
    """Float64 recurrence to degree 1,023; the ends are sqrt(2k+1)."""
    module = module_of("legendre", {"gain": 1, "length": 4096}, 1024)
    positions = [0, 1, 2, 17, 2000, 2047, 2048, 4094, 4095]
    found = encoding(module, positions, 1024)
    assert_encoding(found, legendre(positions, 1024, 4096, module, length=4096))
    np.testing.assert_allclose(found[-1], np.sqrt(2 * np.arange(1024) + 1), rtol=1e-6)


def gram(name, fields, positions, columns=HIDDEN):
    found = encoding(module_of(name, fields | {"gain": 1}), range(positions))[:, :columns]
    return found.T @ found


def test_legendre_columns_are_nearly_orthogonal():
    """Orthonormal under the mean over the window, up to the grid: it errs by about (k + l)^2 / length at worst."""
    product = gram("legendre", {"length": 8192}, 8192, columns=16) / 8192
    np.testing.assert_allclose(product, np.eye(16), atol=0.01)
    assert np.abs(gram("legendre", {"length": 512}, 512, columns=16) / 512 - np.eye(16)).max() > 0.01  # so it is the grid


@pytest.mark.parametrize("length", [64, 256, 4096])
def test_haar_columns_are_orthogonal(length):
    """Exactly: a coarse wavelet is constant where a finer one sums to zero. Columns that do not repeat have norm 1."""
    product = gram("wavelet", {"length": length}, length)
    np.testing.assert_allclose(product - np.diag(np.diag(product)), 0, atol=1e-12)
    np.testing.assert_allclose(np.diag(product)[:7], 1, rtol=1e-6)
    assert (np.diag(product).round(5) >= 1).all()


@pytest.mark.parametrize("psi", ["haar", "ricker"])
def test_wavelets_tell_all_positions_apart(psi):
    found = encoding(module_of("wavelet", {"psi": psi, "length": 4096, "gain": 1}), range(4096))
    assert len(np.unique(found.round(4), axis=0)) == 4096
    assert (np.abs(np.diff(found, axis=0)).max(-1) > 1e-3).all()  # neighbours


@each_case
def test_gain_zero_changes_nothing_and_is_trained(name, fields):
    module = module_of(name, fields)
    embeds = torch.randn(2, len(POSITIONS), HIDDEN, requires_grad=True)
    positions = torch.tensor([POSITIONS, POSITIONS[::-1]])
    added = module(embeds, positions)
    assert torch.equal(added, embeds)
    cost = torch.randn(added.shape, generator=torch.Generator().manual_seed(0))
    (added * cost).sum().backward()
    assert torch.equal(embeds.grad, cost)
    wanted = ORACLES[name](POSITIONS, HIDDEN, WINDOW, module, **fields)
    slope = (np.stack([wanted, wanted[::-1]]) * cost.double().numpy()).sum()
    assert module.gain.grad.item() == pytest.approx(slope, rel=1e-4)
    assert slope != 0


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_is_the_gain_times_the_encoding(name, fields, dtype):
    module = module_of(name, fields | {"gain": -0.5})
    embeds = torch.randn(1, len(POSITIONS), HIDDEN, dtype=dtype)
    added = module(embeds, torch.tensor([POSITIONS]))
    assert added.dtype == dtype
    wanted = embeds[0].double().numpy() - 0.5 * ORACLES[name](POSITIONS, HIDDEN, WINDOW, module, **fields)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(added[0].detach().double().numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["learned", "legendre", "wavelet"])
def test_positions_past_the_end_count_as_the_last(name):
    module = module_of(name, {"length": 100, "gain": 1})
    found = encoding(module, [98, 99, 100, 5000])
    assert np.array_equal(found[1], found[2])
    assert np.array_equal(found[1], found[3])
    assert not np.array_equal(found[0], found[1])


def test_the_learned_table():
    """Normal, of deviation 0.02, by its seed; rows that were looked up get a gradient once the gain is not 0."""
    module = module_of("learned", {"gain": 1, "length": 4096})
    assert module.table.mean().item() == pytest.approx(0, abs=5 * 0.02 / math.sqrt(module.table.numel()))
    assert module.table.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(module.table, module_of("learned", {"length": 4096}).table)
    assert not torch.equal(module.table, module_of("learned", {"length": 4096, "seed": 1}).table)
    before = torch.random.get_rng_state()
    module_of("learned", {})
    assert torch.equal(before, torch.random.get_rng_state())  # the model's own initialisation is not disturbed
    module(torch.zeros(1, 2, HIDDEN), torch.tensor([[3, 9999]])).sum().backward()
    assert module.table.grad.any(-1).nonzero().flatten().tolist() == [3, 4095]


def test_only_what_is_learned_is_saved():
    for name, _ in CASES:
        assert set(module_of(name, {}).state_dict()) == ({"gain", "table"} if name == "learned" else {"gain"})


def test_sines_and_cosines_in_two_halves_are_caught():
    """The other common layout, of tensor2tensor's code, is not the paper's formula."""
    found = encoding(module_of("sinusoidal", {"gain": 1}), POSITIONS)
    halves = np.concatenate([found[:, ::2], found[:, 1::2]], -1)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_encoding(halves, sinusoidal(POSITIONS, HIDDEN, WINDOW, None))


@each_case
def test_round_trips(name, fields):
    item = method(name, **fields)
    assert item.slots == ("embedding",)
    assert load_method(json.loads(json.dumps(item.to_dict()))) == item
    module = module_of(name, fields | {"gain": 1})
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert np.array_equal(encoding(other, POSITIONS), encoding(module, POSITIONS))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        *((name, {"gain": math.nan}, f"{name}: gain must be a finite number, got nan") for name in ("sinusoidal", "learned", "legendre", "wavelet")),
        ("sinusoidal", {"base": 0}, "sinusoidal: base must be a positive number, got 0"),
        ("learned", {"seed": -1}, "learned: seed must be at least 0, got -1"),
        ("learned", {"length": 0}, "learned: length: expected a whole, positive number of tokens, got 0"),
        ("legendre", {"length": 1}, "legendre: length must be at least 2 positions, got 1: they span the interval from -1 to 1"),
        ("wavelet", {"length": 1}, "wavelet: length must be at least 2 positions, got 1: the finest wavelet spans two"),
        ("wavelet", {"psi": "db4"}, "wavelet: psi: input should be 'haar' or 'ricker', got 'db4'"),
    ],
)
def test_what_is_refused(name, fields, message):
    refused_in_a_line(lambda: method(name, **fields), message)
