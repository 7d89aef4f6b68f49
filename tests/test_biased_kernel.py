"""The Triton attention with a learned bias against dense float64, in Triton's interpreter or on a GPU.

    TRITON_INTERPRET=1 pytest tests/test_biased_kernel.py

The interpreter runs kernels in Python on the CPU: tiles are small here, lengths a few tiles.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_longctx import method
from hf_longctx.kernels import biased_attention as kernel
from hf_longctx.kernels.biased_attention import Blocks, Chunks, Launch, biased_attention, fit
from hf_longctx.method import Frequencies, Shape


def _why_not() -> str | None:
    if kernel.triton is None:
        return "Triton is not installed"
    if kernel.interpreted():
        if np.lib.NumpyVersion(np.__version__) >= "2.4.0":  # it takes int() of arrays of one element
            return f"Triton's interpreter does not work with NumPy {np.__version__}; install numpy<2.4"
        return None
    return None if torch.cuda.is_available() else "no CUDA GPU; set TRITON_INTERPRET=1 to run the kernels in Python"


pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
needs_kernel = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))
DEVICE = "cpu" if kernel.interpreted() or not torch.cuda.is_available() else "cuda"
SMALL = Blocks(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1), Launch(32, 32, 4, 1), walk=2)
UNEVEN = Blocks(Launch(64, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 64, 4, 1), Launch(64, 16, 4, 1), walk=1)


def oracle(q, k, v, table, scale, k_start=None, positions=None):
    """Attention in float64 with every logit in memory, at positions [B, T] or consecutive ones. Rows that see no key are zero."""
    (_, heads, tq, _), (_, kv_heads, tk, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    distance = (torch.arange(tq)[:, None] + tk - tq - torch.arange(tk)).to(q.device)
    if positions is not None:
        distance = (positions[:, :, None] - positions[:, None, :]).to(q.device)
    seen = distance.unsqueeze(-3) >= 0
    if k_start is not None:
        seen = seen & (torch.arange(tk, device=q.device) >= k_start.to(q.device)[:, None, None, None])
    logits = scale * q @ k.mT + table[:, distance.clamp(min=0)].movedim(0, -3)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0) @ v


def chunks_of(rows, length):
    """Chunks of rows that are given as (first index, skip) of each of their chunks."""
    most = max(map(len, rows))
    cuts = [[cut for cut, _ in row] + [length] * (most + 1 - len(row)) for row in rows]
    skips = [[skip for _, skip in row] + [row[-1][1]] * (most - len(row)) for row in rows]
    return Chunks(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cuts, skips)), length + max(row[-1] - row[0] for row in skips))


def positions_of(chunks, length):
    """[B, length], on the CPU."""
    index = torch.arange(length)
    chunk = (index[None, :, None] >= chunks.cuts.cpu()[:, None, 1:-1]).sum(-1)
    return index + chunks.skips.cpu().long().gather(1, chunk)


def tables(kind: str, heads: int, length: int) -> torch.Tensor:
    """float32 [heads, length]."""
    d = torch.arange(length, dtype=torch.float64)
    slopes = 2.0 ** (-torch.arange(1, heads + 1) * 8 / heads)[:, None].double()
    value = {
        "zero": 0 * slopes * d,
        "alibi": -slopes * d,
        "mep": torch.stack([-slopes * d, -slopes * d / 2, -slopes * d * d]).logsumexp(0) - np.log(3),
        "kerple": -(1 + slopes) * (slopes * d).log1p(),
        "kerple_slow": -(1 + slopes) * (slopes * d / 300).log1p(),
        "t5": torch.sin(40 * slopes * (d + 1).log2().floor().clamp(max=5)),
        "random": torch.randn(heads, length, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
        "half": torch.where(torch.arange(heads)[:, None] % 2 == 0, -slopes * d, torch.cos(d)),  # near in one head, far in another
    }[kind]
    return value.float()


def inputs(batch, heads, kv_heads, tq, tk, dim, table, dtype=torch.float32):
    """q, k, v, table with gradients, and the gradient of the output."""
    made = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, tq, dim), (batch, kv_heads, tk, dim), (batch, kv_heads, tk, dim), (batch, heads, tq, dim)]
    q, k, v, g = (torch.randn(*shape, generator=made).to(DEVICE, dtype) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v, table.to(DEVICE))], g


def compare(leaves, g, rtol, k_start=None, blocks=SMALL, chunks=None, **options):
    """out, dq, dk, dv, dtable of kernel and oracle: largest difference over largest value."""
    if k_start is not None:
        options["k_start"] = k_start
    out = biased_attention(*leaves, blocks=blocks, chunks=chunks, **options)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = oracle(*exact, leaves[0].shape[3] ** -0.5, k_start, None if chunks is None else positions_of(chunks, g.shape[2]))
    ours = (out, *torch.autograd.grad(out, leaves, g))
    theirs = (want, *torch.autograd.grad(want, exact, g.double()))
    for name, a, b in zip(("out", "dq", "dk", "dv", "dtable"), ours, theirs):
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        assert error <= rtol, f"{name} is off by {error:.1e}"


@needs_kernel
@pytest.mark.parametrize("kind", ["zero", "alibi", "mep", "kerple", "kerple_slow", "t5", "random", "half"])
def test_tables(kind):
    compare(*inputs(1, 2, 1, 110, 110, 16, tables(kind, 2, 110)), rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("kind", ["alibi", "random"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tq", "tk", "dim"),
    [
        (2, 2, 2, 64, 64, 32),  # one key head a query head, whole tiles
        (1, 3, 1, 70, 70, 64),  # all heads share keys
        (1, 2, 1, 50, 50, 128),
        (1, 4, 2, 40, 40, 48),  # a head dimension that is no power of two; two heads share keys
        (1, 2, 1, 33, 101, 32),  # a chunk after a cache
        (2, 2, 1, 1, 90, 32),  # decoding
        (1, 2, 1, 5, 5, 16),
    ],
)
def test_shapes(kind, batch, heads, kv_heads, tq, tk, dim):
    compare(*inputs(batch, heads, kv_heads, tq, tk, dim, tables(kind, heads, tk)), rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("kind", ["alibi", "kerple"])
@pytest.mark.parametrize(("tq", "tk"), [(100, 100), (45, 110)])
def test_uneven_tiles(kind, tq, tk):
    compare(*inputs(1, 2, 1, tq, tk, 32, tables(kind, 2, tk)), rtol=1e-5, blocks=UNEVEN)


@needs_kernel
@pytest.mark.parametrize("kind", ["kerple_slow", "random"])
@pytest.mark.parametrize(("tq", "tk", "starts"), [(70, 70, (0, 37)), (70, 70, (48, 69)), (30, 90, (80, 3))])
def test_left_padding(kind, tq, tk, starts):
    """Keys before `k_start` are nobody's, and rows with nothing to see are zero, in values and gradients."""
    k_start = torch.tensor(starts, dtype=torch.int32)
    leaves, g = inputs(2, 2, 1, tq, tk, 32, tables(kind, 2, tk))
    compare(leaves, g, rtol=1e-5, k_start=k_start)
    out = biased_attention(*leaves, k_start=k_start.to(DEVICE), blocks=SMALL)
    dq, dk, _ = torch.autograd.grad(out, leaves[:3], g)
    for row, start in enumerate(starts):
        blind = max(0, start - (tk - tq))
        assert not out[row, :, :blind].any()
        assert not dq[row, :, :blind].any()
        assert not dk[row, :, :start].any()


@needs_kernel
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=["bfloat16", "float16"])
def test_half_precision(dtype, rtol):
    if kernel.interpreted() and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 by its bits")
    compare(*inputs(1, 2, 1, 60, 60, 64, tables("kerple", 2, 60), dtype), rtol=rtol)


@needs_kernel
def test_the_tolerance_is_what_is_given_up():
    """With a loose tolerance the far tiles differ from the table, by about as much as asked for."""
    leaves, g = inputs(1, 2, 1, 110, 110, 32, tables("kerple", 2, 110))
    exact = biased_attention(*leaves, blocks=SMALL, tolerance=0.0)
    loose = biased_attention(*leaves, blocks=SMALL, tolerance=1e-2)
    assert 0 < (exact - loose).abs().max() < 4e-2 * leaves[2].abs().max()
    compare(leaves, g, rtol=3e-2, tolerance=1e-2)
    with pytest.raises(AssertionError, match="off by"):  # that the comparison can fail
        compare(leaves, g, rtol=1e-6, tolerance=1e-2)


@needs_kernel
def test_memory_layouts():
    """Queries laid out token by token, as projections leave them; a broadcast gradient; an output laid out like q."""
    (q, k, v, table), g = inputs(2, 2, 2, 40, 40, 32, tables("alibi", 2, 40))
    plain = biased_attention(q, k, v, table, blocks=SMALL)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = biased_attention(*turned, table, blocks=SMALL)
    assert out.stride() == turned[0].stride()
    assert torch.equal(out, plain)
    ones = g.new_ones(()).expand_as(out)
    for a, b in zip(torch.autograd.grad(out, turned, ones), torch.autograd.grad(plain, (q, k, v), ones.contiguous())):
        assert torch.equal(a, b)


@needs_kernel
def test_scale_and_a_longer_table():
    leaves, _ = inputs(1, 2, 1, 40, 40, 32, tables("t5", 2, 60))
    out = biased_attention(*leaves, 0.3, blocks=SMALL)
    want = oracle(*(x.double() for x in leaves), 0.3)
    assert (out - want).abs().max() < 1e-5
    (dtable,) = torch.autograd.grad(out.sum(), leaves[3:])
    assert dtable.shape == (2, 60)
    assert not dtable[:, 40:].any()


SKIPS = {  # length, and the (first index, skip) of each chunk of two rows
    "two": (90, [(0, 0), (37, 150)], [(0, 0), (61, 3)]),
    "three, and none": (100, [(0, 5), (17, 18), (70, 171)], [(0, 7)]),
    "shorter than a tile": (70, [(0, 0), (1, 40), (6, 41)], [(0, 0), (40, 100), (69, 130)]),
    "whole tiles": (128, [(0, 0), (64, 64)], [(0, 0), (32, 1)]),
    "four": (75, [(0, 0), (20, 30), (33, 60), (50, 200)], [(0, 0), (41, 10), (42, 90)]),
}


@needs_kernel
@pytest.mark.parametrize("kind", ["kerple_slow", "half"])
@pytest.mark.parametrize("skips", SKIPS)
def test_positions_that_skip(skips, kind):
    """Chunks at positions of their own, other ones in each row of the batch."""
    length, *rows = SKIPS[skips]
    chunks = chunks_of(rows, length)
    heads = 2 if kind == "half" else 1
    compare(*inputs(2, heads, 1, length, length, 16, tables(kind, heads, chunks.reach)), rtol=1e-5, chunks=chunks)


@needs_kernel
@pytest.mark.parametrize("kind", ["alibi", "t5", "random"])
def test_tables_with_skips(kind):
    length, *rows = SKIPS["three, and none"]
    chunks = chunks_of(rows[:1], length)
    compare(*inputs(1, 2, 2, length, length, 32, tables(kind, 2, chunks.reach)), rtol=1e-5, chunks=chunks)


@needs_kernel
def test_uneven_tiles_with_skips():
    length, *rows = SKIPS["two"]
    chunks = chunks_of(rows, length)
    compare(*inputs(2, 3, 1, length, length, 48, tables("kerple_slow", 3, chunks.reach)), rtol=1e-5, blocks=UNEVEN, chunks=chunks)


@needs_kernel
def test_left_padding_with_skips():
    """In the first chunk, up to its end, and beyond it."""
    chunks = chunks_of([[(0, -20), (50, 30)], [(0, 0), (40, 30)], [(0, 0), (20, 90), (40, 95)]], 70)
    compare(*inputs(3, 2, 1, 70, 70, 16, tables("half", 2, chunks.reach)), rtol=1e-5, k_start=torch.tensor([20, 40, 37]), chunks=chunks)


@needs_kernel
def test_half_precision_with_skips():
    length, *rows = SKIPS["two"]
    chunks = chunks_of(rows, length)
    compare(*inputs(2, 2, 1, length, length, 64, tables("kerple", 2, chunks.reach), torch.float16), rtol=4e-3, chunks=chunks)


@needs_kernel
def test_far_tiles_between_chunks_miss_by_the_tolerance():
    """Wherever in its window a tile of another chunk begins, its parabola is within the tolerance: with none, all tiles read the table."""
    chunks = chunks_of([[(0, 0), (35, skip)] for skip in (121, 126, 131)], 70)
    leaves, g = inputs(3, 2, 1, 70, 70, 16, tables("kerple", 2, chunks.reach))
    exact = biased_attention(*leaves, blocks=SMALL, tolerance=0.0, chunks=chunks)
    loose = biased_attention(*leaves, blocks=SMALL, tolerance=1e-3, chunks=chunks)
    assert 0 < (exact - loose).abs().max() < 4e-3 * leaves[2].abs().max()
    compare(leaves, g, rtol=3e-3, tolerance=1e-3, chunks=chunks)


@needs_kernel
def test_one_chunk_is_no_skip():
    leaves, g = inputs(1, 2, 1, 70, 70, 16, tables("kerple", 2, 70))
    chunks = chunks_of([[(0, 9)]], 70)
    one, plain = (biased_attention(*leaves, blocks=SMALL, chunks=given) for given in (chunks, None))
    for a, b in zip((one, *torch.autograd.grad(one, leaves, g)), (plain, *torch.autograd.grad(plain, leaves, g))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@needs_kernel
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take minutes")
@pytest.mark.parametrize("dim", [64, 128])
def test_skips_with_the_tiles_of_a_gpu(dim):
    chunks = chunks_of([[(0, 0), (413, 20000)], [(0, 0), (130, 7), (900, 30000)], [(0, 0)]], 1000)
    compare(*inputs(3, 4, 2, 1000, 1000, dim, tables("kerple", 4, chunks.reach), torch.bfloat16), rtol=3e-2, blocks=None, chunks=chunks)


def shape_of(heads: int, head_dim: int) -> Shape:
    trained = Frequencies((1.0,))
    return Shape("llama", heads * head_dim, 1, heads, heads, head_dim, head_dim, 10000.0, trained, "default", 64)


@needs_kernel
@pytest.mark.parametrize(
    "spec", [{"name": "kerple"}, {"name": "kerple", "form": "power"}, {"name": "mkl_alibi", "preset": "mep_learned", "learn_weights": True}]
)
def test_parameters_of_a_method_learn(spec):
    """The gradient of what made the table is that of dense attention."""
    heads, length = 2, 70
    bias = method(**spec).bias(shape_of(heads, 32)).to(DEVICE)
    head, distance = torch.arange(heads, device=DEVICE)[:, None], torch.arange(length, device=DEVICE)[None]
    (q, k, v, _), g = inputs(1, heads, 1, length, length, 32, tables("zero", heads, length))
    out = biased_attention(q, k, v, bias(head, distance, 0 * distance), blocks=SMALL)
    ours = torch.autograd.grad(out, list(bias.parameters()), g)
    dense = oracle(q.double(), k.double(), v.double(), bias(head, distance, 0 * distance).double(), 32**-0.5)
    theirs = torch.autograd.grad(dense, list(bias.parameters()), g.double())
    for a, b in zip(ours, theirs):
        assert b.any()
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@needs_kernel
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_one_compilation_for_all_lengths_and_methods():
    def compiled():
        return [len(f.device_caches[torch.cuda.current_device()][0]) for f in (kernel._forward, kernel._dq, kernel._dkv, kernel._dtable)]

    def run(kind, tq, tk, chunks=None):
        leaves, g = inputs(1, 2, 1, tq, tk, 64, tables(kind, 2, tk if chunks is None else chunks.reach))
        torch.autograd.grad(biased_attention(*leaves, chunks=chunks), leaves, g)

    run("alibi", 256, 256)
    before = compiled()
    for kind, tq, tk in (("random", 1, 300), ("kerple", 1000, 1000), ("t5", 77, 1024)):
        run(kind, tq, tk)
    assert compiled() == before
    run("alibi", 256, 256, chunks_of([[(0, 0), (100, 50)]], 256))
    assert compiled() == [n + 1 for n in before]
    run("kerple", 301, 301, chunks_of([[(0, 0)]], 301))
    run("random", 500, 500, chunks_of([[(0, 0), (1, 50), (77, 1000)]], 500))
    assert compiled() == [n + 1 for n in before]


def far_error(table, coefficients, phase, step, width):
    """[H, W]: how far each parabola is from the table, window by window, in float64."""
    heads, length = table.shape
    errors = torch.zeros(heads, coefficients.shape[1], dtype=torch.float64)
    for w in range(coefficients.shape[1]):
        d = torch.arange(phase + w * step, min(phase + w * step + width, length))
        u = d - (phase + w * step) - (width - 1) / 2
        a, b, c = coefficients[:, w].double().T[..., None]
        errors[:, w] = (a * u**2 + b * u + c - table[:, d].double()).abs().amax(1)
    return errors


@pytest.mark.parametrize("phase", [0, 7, 15])
@pytest.mark.parametrize("kind", ["zero", "alibi", "mep", "kerple", "kerple_slow", "t5", "random", "half"])
def test_windows_beyond_near_fit(kind, phase):
    """`near` is the least for which all later windows are within the tolerance."""
    table, step, width, tolerance = tables(kind, 4, 1001), 16, 47, 1e-4
    coefficients, near = fit(table, phase, step, width, tolerance)
    errors = far_error(table, coefficients, phase, step, width)
    allowed = tolerance + kernel.ROUNDING * coefficients[..., 2].abs()
    for h, n in enumerate(near.tolist()):
        assert (errors[h, n:] <= 1.1 * allowed[h, n:]).all()
        assert n == 0 or errors[h, n - 1] > 0.9 * allowed[h, n - 1]


def test_what_is_near():
    step, width = 64, 191
    assert fit(tables("alibi", 8, 131072), 0, step, width, 1e-5)[1].tolist() == [0] * 8
    windows = -(-5000 // step)
    assert fit(tables("random", 2, 5000), 0, step, width, 1e-5)[1].tolist() == [windows] * 2
    # The last step of t5 is from distance 30 to 31, inside the first window alone.
    assert fit(tables("t5", 4, 5000), 0, step, width, 1e-5)[1].tolist() == [1] * 4
    assert fit(tables("t5", 4, 5000), 31, step, width, 1e-5)[1].tolist() == [0] * 4
    loose, tight = (fit(tables("kerple", 4, 20000), 0, step, width, t)[1] for t in (1e-3, 1e-5))
    assert (loose < tight).all()
    assert (tight < 20000 // step).all()


def test_short_tables_fit():
    for length in (1, 2, 3, 20):
        table = tables("alibi", 2, length)
        coefficients, near = fit(table, 0, 16, 47, 1e-5)
        assert coefficients.isfinite().all()
        assert near.tolist() == [0, 0]
        assert far_error(table, coefficients, 0, 16, 47).max() < 1e-5


def test_the_padded_table_masks_what_lies_ahead():
    padded = kernel.padded_table(torch.tensor([[1.0, 2.0]]), 2, 1)
    assert padded[0, :2].tolist() == [-torch.inf] * 2
    torch.testing.assert_close(padded[0, 2:], torch.tensor([1.0, 2.0, 0.0]) * kernel.LOG2E)


def test_shapes_that_do_not_fit_together():
    q, k, table = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="Hkv dividing H"):
        biased_attention(q, k[:, :1].expand(1, 3, 8, 16), k, table)
    with pytest.raises(ValueError, match="no more queries than keys"):
        biased_attention(q, k[:, :, :4], k[:, :, :4], table)
    with pytest.raises(ValueError, match="at least 8 distances"):
        biased_attention(q, k, k, table[:, :7])


def test_chunks_that_do_not_fit_together():
    q, k, table = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 8, 16), torch.zeros(4, 20)
    chunks = Chunks(torch.tensor([[0, 3, 8]] * 2, dtype=torch.int32), torch.tensor([[0, 12]] * 2, dtype=torch.int32), 20)
    with pytest.raises(ValueError, match="at least 20 distances"):
        biased_attention(q, k, k, table[:, :19], chunks=chunks)
    with pytest.raises(ValueError, match="as many queries as keys"):
        biased_attention(q[:, :, :7], k, k, table, chunks=chunks)
    with pytest.raises(ValueError, match="no shorter reach"):
        biased_attention(q, k, k, table, chunks=chunks._replace(reach=7))
    with pytest.raises(ValueError, match="C at least 1"):
        biased_attention(q, k, k, table, chunks=chunks._replace(skips=chunks.skips[:1]))
    with pytest.raises(ValueError, match="int32"):
        biased_attention(q, k, k, table, chunks=chunks._replace(cuts=chunks.cuts.long()))


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from hf_longctx.kernels import biased_attention as b; import torch; assert not b.serves(torch.ones(1)) and not b.interpreted()"
    subprocess.run([sys.executable, "-c", code], check=True)
