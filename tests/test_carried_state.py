"""The Triton kernels that complete Mamba-1's scan from zeros, against torch in float64, in Triton's interpreter or on a GPU.

    TRITON_INTERPRET=1 pytest tests/test_carried_state.py

The interpreter runs kernels in Python on the CPU, so there are few channels and tokens.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longctx.integration import state
from hf_longctx.kernels import carried_state as kernel
from hf_longctx.kernels.carried_state import LAUNCHES, Launch, add_carried
from hf_longctx.method import method
from hf_longctx.passing import Passing
from tests.test_biased_kernel import DEVICE, needs_kernel

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
NAMES = ("y", "dt", "a", "c", "start", "z", "delta_bias")
WIDE = Launch(1, 16, 16, 16)  # all of a state at once: fewest operations, which are what the interpreter's time goes by
# Batch, channels, tokens, state. A tile has 128 tokens, 32 where the state is 64; programs of the backward have 8 channels or more.
SHAPES = [
    (2, 24, 70, 16),
    (2, 9, 75, 4),  # channels that are no multiple of a program's
    (1, 3, 261, 16),  # three tiles, the last with an odd number of tokens
    (1, 2, 256, 16),  # whole tiles
    (1, 3, 75, 64),
    (2, 3, 40, 16),
    (2, 3, 1, 16),
    (1, 2, 5, 1),
]


def inputs(batch, channels, tokens, size, dtype=torch.float32, rate=3.0, seed=0):
    """Arguments by name, with gradients; y, dt, z and c in `dtype`."""
    made = torch.Generator().manual_seed(seed)
    row = (batch, channels, tokens)
    shapes = [row, row, (channels, size), (batch, size, tokens), (batch, channels, size), row, (channels,)]
    found = dict(zip(NAMES, (torch.randn(*shape, generator=made) for shape in shapes), strict=True))
    found["a"], found["delta_bias"] = -rate * found["a"].abs(), found["delta_bias"] - 3
    found = {name: t.to(DEVICE, dtype if name in ("y", "dt", "z", "c") else torch.float32).requires_grad_() for name, t in found.items()}
    return found


def oracle(y, dt, a, c, start, z=None, delta_bias=None, delta_softplus=False):
    """`add_carried` in float64, by the torch path."""
    delta = state._delta(dt, delta_bias, delta_softplus)
    more, _ = state.carried(delta, a, c, start)
    return (y + more) * (1 if z is None else nn.functional.silu(z)), delta.sum(-1)


def compare(given, forward=1e-5, backward=1e-4, softplus=True, **options):
    """Outputs and gradients of kernel and oracle, with weights on both outputs: largest difference over largest value."""
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    ours = add_carried(**given, delta_softplus=softplus, **options)
    theirs = oracle(**exact, delta_softplus=softplus)
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(9)).to(t.device) for t in theirs]
    errors = {name: _error(got, want) / forward for name, got, want in zip(("out", "elapsed"), ours, theirs, strict=True)}
    gradients = [torch.autograd.grad([o for o in outputs], list(leaves.values()), [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)])
                 for outputs, leaves in ((ours, given), (theirs, exact))]  # fmt: skip
    errors |= {f"gradient of {name}": _error(got, want) / backward for name, got, want in zip(given, *gradients, strict=True)}
    wrong = {name: error for name, error in errors.items() if not error <= 1}
    assert not wrong, f"errors over what is allowed: {wrong}"
    for name, got in zip(given, gradients[0], strict=True):
        assert (got.shape, got.dtype) == (given[name].shape, given[name].dtype)


def _error(got, want):
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    compare(inputs(*shape), launch=WIDE)


@needs_kernel
@pytest.mark.parametrize("launch", [*LAUNCHES, Launch(1, 2, 8, 4)], ids=str)
def test_launches(launch):
    compare(inputs(1, 2, 140, 8), launch=launch)


@needs_kernel
@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.bfloat16, 2e-2, 3e-2), (torch.float16, 2e-3, 4e-3)], ids=["bfloat16", "float16"])
def test_half_precision(dtype, forward, backward):
    compare(inputs(1, 4, 140, 16, dtype), forward, backward, launch=WIDE)


@needs_kernel
@pytest.mark.parametrize("leave_out", [("z",), ("delta_bias",), ("z", "delta_bias")], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_without_gate_or_bias(leave_out, softplus):
    given = {name: t for name, t in inputs(1, 3, 40, 16).items() if name not in leave_out}
    if not softplus:
        for name in given.keys() & {"dt", "delta_bias"}:  # a step may be negative then
            given[name] = given[name].detach().add(3 if name == "delta_bias" else 0).mul(0.05).requires_grad_()
    compare(given, softplus=softplus, launch=WIDE)


@needs_kernel
def test_large_and_small_steps():
    """Softplus of -30 and of 30: each has its own digits, and a sum of the small ones too."""
    given = inputs(1, 3, 20, 4)
    given["dt"] = torch.tensor([-30.0, -12.0, 30.0], device=DEVICE)[None, :, None].expand(1, 3, 20).clone().requires_grad_()
    given["delta_bias"] = torch.zeros(3, device=DEVICE, requires_grad=True)
    _, elapsed = add_carried(**given, delta_softplus=True)
    want = nn.functional.softplus(given["dt"].double()).sum(-1)
    assert ((elapsed - want) / want).abs().max() < 2e-6  # a GPU's exponential of -30 is off by 1.2e-6
    (slope,) = torch.autograd.grad(elapsed.sum(), given["dt"])
    assert ((slope - given["dt"].double().sigmoid()) / slope).abs().max() < 2e-6


@needs_kernel
@pytest.mark.parametrize("launch", [Launch(1, 4, 4, 16), Launch(1, 1, 1, 16)], ids=str)
def test_what_has_decayed_is_skipped(launch):
    """Fast decays beside slow ones; infinity times 0, were it computed, would be seen in all tokens and not in the first tile alone."""
    given = inputs(1, 2, 300, 8)
    rate = torch.tensor([0.001, 0.01, 0.1, 1.0, 300.0, 300.0, 300.0, 300.0], device=DEVICE)
    given["a"] = (-rate).expand(2, 8).clone().requires_grad_()
    compare(given, launch=launch)
    with torch.no_grad():
        given["start"][0, 0, 5] = torch.inf
    out, _ = add_carried(**given, delta_softplus=True, launch=launch)
    assert not out[0, 0, :128].isfinite().all()
    assert out[0, 0, 128:].isfinite().all()
    assert out[0, 1].isfinite().all()
    given["delta_bias"].data.fill_(torch.nan)
    assert add_carried(**given, delta_softplus=True, launch=launch)[0].isnan().all()


@needs_kernel
def test_memory_layouts():
    """As projections leave them, token by token, and a broadcast gradient: the same numbers, bit for bit."""
    given = inputs(1, 4, 40, 4)
    turned = {name: t.detach().mT.contiguous().mT.requires_grad_() if t.dim() == 3 else t for name, t in given.items()}
    found = []
    for each in (given, turned):
        out, _ = add_carried(**each, delta_softplus=True, launch=WIDE)
        found.append([out, *torch.autograd.grad(out, list(each.values()), out.new_ones(()).expand_as(out))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@needs_kernel
def test_gradients_that_nobody_asked_for():
    """Of frozen rates and of a detached state, as in training with adapters: the others are what they were."""
    given = inputs(1, 4, 40, 4)
    want = torch.autograd.grad(add_carried(**given, delta_softplus=True)[0].sum(), [given["dt"], given["c"]])
    frozen = given | {name: given[name].detach() for name in ("a", "start", "delta_bias")}
    got = torch.autograd.grad(add_carried(**frozen, delta_softplus=True)[0].sum(), [given["dt"], given["c"]])
    assert all(_error(x, y) < 1e-6 for x, y in zip(got, want, strict=True))  # another kernel, which a GPU may round otherwise


@needs_kernel
def test_a_scan_in_two_pieces_is_the_scan_in_one(monkeypatch):
    """Through `scan_from` with the kernel, whose part is played by the scan from zero: outputs, last state, and gradients of the first piece."""
    used = []
    monkeypatch.setattr(state.carried_state, "add_carried", lambda *args: used.append(1) or add_carried(*args))
    given = inputs(1, 3, 48, 4)
    z, bias = given.pop("z"), given.pop("delta_bias")
    u, dt, a, c, _ = given.values()
    b = torch.randn(c.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE).requires_grad_()
    leaves = [u, dt, a, b, c, z, bias]

    def stock(*args, **options):
        return state.scan_from(None, None, *args, **options)

    def piece(start, kernel, span):
        at = [t[..., span] for t in (u, dt, b, c, z)]
        return state.scan_from(start, kernel, at[0], at[1], a, at[2], at[3], z=at[4], delta_bias=bias, delta_softplus=True, return_last_state=True)

    whole, last = piece(None, None, slice(None))
    first, between = piece(None, stock, slice(0, 20))
    second, end = piece(between, stock, slice(20, None))
    assert used
    found = []
    for outputs in ((whole, last), (torch.cat([first, second], -1), end)):
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE) for t in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, weights, retain_graph=True)])
    for got, want in zip(found[1], found[0], strict=True):
        assert _error(got, want) < 1e-4


@pytest.mark.parametrize(
    ("name", "fields", "states"),
    [("zero", {}, [False] * 4), ("carry", {}, [False, True, True, False]), ("shuffled_carry", {}, [False, True, True, True]),
     ("noise", {"sigma": 1.0}, [True] * 4), ("fitted_noise", {}, [False, True, True, True])],
)  # fmt: skip
def test_a_window_of_fresh_rows_is_given_no_state(name, fields, states):
    """As far as the host knows: then there is nothing to complete. A source is asked for states in all other windows."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20, "state_size": 4, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).to(DEVICE)  # where causal-conv1d is, it takes nothing else
    run = Passing(model, method(name, **fields), micro_batches=1, seed=0)
    found = []
    for fresh in ([True, True], [False, False], [True, False], [True, True]):
        with run.window({"input_ids": torch.randint(3, 20, (2, 5), device=DEVICE), "fresh": fresh}) as given, torch.no_grad():
            run.model(**given)
        found.append(given["cache_params"].layers[0].initial is not None)
    assert found == states


def test_what_is_served():
    y, a, c = torch.zeros(1, 4, 8), torch.zeros(4, 16), torch.zeros(1, 16, 8)
    assert kernel.serves(y, y, a, c, None) == kernel.interpreted()
    for wrong in (
        (y.double(), y, a, c, None),
        (y, y, torch.zeros(4, 12), c, None),
        (y, y, torch.zeros(4, 128), c, None),
        (y, y, a, c[:, None], None),
        (y, y, a, c, y.double()),
    ):
        assert not kernel.serves(*wrong)


def test_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; from hf_longctx.kernels import carried_state as k; import torch; "
        "x = torch.ones(1, 1, 1); assert not k.serves(x, x, x[0], x, None) and not k.interpreted()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
