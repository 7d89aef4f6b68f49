"""State passing with the kernels of mamba-ssm and causal-conv1d on a GPU: the numbers are those of the torch paths on a CPU.

Transformers chooses when it is imported, so the CPU's numbers come from a process that knows no kernels.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longctx.integration import state
from hf_longctx.integration.state import CACHE_ARGUMENT, StatePassingCache, prepare
from hf_longctx.kernels.carried_state import LAUNCHES
from tests.test_carried_state import SHAPES, compare, inputs

KERNELS = torch.cuda.is_available() and all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d"))
pytestmark = pytest.mark.skipif(not KERNELS, reason="needs a GPU, mamba-ssm and causal-conv1d")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "mamba": {"state_size": 16},
    "falcon_mamba": {"state_size": 16},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 32},  # causal-conv1d: strides are multiples of 8
}
TOKENS, CUT, TOLERANCE = 96, 40, 3e-3  # the kernels multiply in TF32


def build(family, device):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | FAMILIES[family])), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("dt_proj.bias", "dt_bias")):  # otherwise the state forgets within a few tokens or never moves
            torch.nn.init.uniform_(parameter, -3.0, 0.0)
    prepare(model)
    return model.to(device).train()


def ids(device):
    return torch.randint(3, 50, (2, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)


def passed(model, tokens, cut, detach):
    """Logits of a text in two pieces, and the cache after it."""
    cache, found = StatePassingCache(model.config, detach=detach), []
    for piece in (tokens[:, :cut], tokens[:, cut:]):
        found.append(model(piece, **{CACHE_ARGUMENT[model.config.model_type]: cache}).logits)
        last, cache = cache, cache.next()
    return torch.cat(found, 1), last


def measure(device):
    """By family: logits of the text in one piece and in two, the states after it, and gradients that reach the first piece through the state."""
    found = {}
    for family in FAMILIES:
        model = build(family, device)
        with torch.no_grad():
            cache = StatePassingCache(model.config)
            whole = model(ids(device), **{CACHE_ARGUMENT[family]: cache}).logits
        logits, last = passed(model, ids(device), CUT, False)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (logits[:, CUT:] * weights[:, CUT:]).sum().backward()
        found[family] = {"whole": whole, "pieces": logits.detach()}
        found[family] |= {f"state {i}": ssm.detach() for i, (_, ssm) in enumerate(last.states())}
        found[family] |= {name: p.grad for name, p in model.named_parameters()}
    return {family: {name: tensor.cpu() for name, tensor in tensors.items()} for family, tensors in found.items()}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Of the CPU and of the GPU."""
    path = tmp_path_factory.mktemp("cpu") / "numbers.pt"
    code = (
        "import sys; sys.modules['mamba_ssm'] = sys.modules['causal_conv1d'] = None\n"
        f"import torch; from tests.test_state_kernels import measure; torch.save(measure('cpu'), {str(path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return torch.load(path), measure("cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_give_the_numbers_of_torch(family, numbers):
    want, got = (found[family] for found in numbers)
    torch.testing.assert_close(want["pieces"], want["whole"], atol=1e-4, rtol=1e-4)
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.float32, 2e-5, 1e-4), (torch.bfloat16, 2e-2, 3e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 100, 777, 16), (8, 128, 2048, 16)], ids=str)
def test_the_completion_of_the_scan_is_that_of_float64(shape, dtype, forward, backward, launch):
    compare(inputs(*shape, dtype), forward, backward, launch=launch)


@pytest.mark.parametrize("tokens", [TOKENS, 40, 7])
def test_the_scan_from_a_state_is_the_scan_in_torch(tokens):
    """mamba-ssm's kernel and ours through `scan_from`: outputs, last state, and the gradients of all that goes in, the last state's included."""
    from transformers.models.mamba import modeling_mamba

    prepare(build("mamba", "cpu"))
    stock = getattr(modeling_mamba, state._SCAN).stock
    given = inputs(2, 24, tokens, 16)
    u, dt, a, c, start, z, bias = given.values()
    b = torch.randn(c.shape, generator=torch.Generator().manual_seed(5)).cuda().requires_grad_()
    leaves, found = [u, dt, a, b, c, start, z, bias], []
    for initial in (start, None):
        for kernel in (stock, None):
            outputs = state.scan_from(initial, kernel, u, dt, a, b, c, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True)
            weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(7)).cuda() for t in outputs]
            found.append([*outputs, *torch.autograd.grad(outputs, leaves, weights, allow_unused=True)])
    for got, want in (found[:2], found[2:]):
        for x, y in zip(got, want, strict=True):
            assert (x is None and y is None) or (x - y).abs().max() <= 1e-4 * y.abs().max()


def test_the_scan_of_mamba_is_the_kernel():
    """Not the loop over time that Transformers falls back to."""
    assert state.has_kernel(torch.zeros(1, device="cuda"))
    from transformers.models.mamba import modeling_mamba

    prepare(build("mamba", "cpu"))
    scan = getattr(modeling_mamba, state._SCAN)
    u = torch.randn(1, 128, 4096, device="cuda")
    a, b = -torch.rand(128, 16, device="cuda"), torch.randn(1, 16, 4096, device="cuda")
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for event in (start, end):
        scan.stock(u, u.sigmoid(), a, b, b, return_last_state=True)
        event.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) < 20  # a loop over 4,096 steps launches some ten thousand kernels
