"""Causal attention with a bias of the distance on its logits, which may be learned: forward and backward in Triton.

The kernels know no method. They read a float32 table, `table[h, d]` the bias of head h at distance d, and return its gradient;
whatever made the table (ordinary torch, O(heads x length)) takes the gradient on to its parameters.

Reading the table once per logit would cost about as much as the attention itself. But a tile of logits spans few distances, and away
from the diagonal almost any bias is a parabola there: `fit` finds it, by tile diagonal, and two multiply-adds replace the read.
Tiles are *near* up to the last diagonal where some head's parabola misses by more than a tolerance, and *far* beyond; only
near tiles read the table. Logits are in units of log 2 within the kernels, because the hardware's exponential is 2^x.

The gradient of the table is a third pass of the backward. Tiles on one diagonal hold the same distances element by element, so a
program walks along a diagonal, adds up its tiles in registers, and touches memory once at the end: no atomics per logit.

Positions may skip (`Chunks`), as in training with skips. Between the queries of one chunk and the keys of another, distances are
those of indices plus a constant, so tiles that do not straddle chunks are computed like all others, with that constant as `shift`.

Importing this module needs no Triton; `serves()` says whether the kernels can run. Lengths are ordinary arguments of the
kernels, so one compilation serves every length and every method.
"""
# mypy: disable-error-code="no-untyped-def"
# Arguments of the kernels are Triton's own types. Annotations must stay strings, for where there is no Triton.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from hf_longctx.kernels._triton import interpreted, jit, tl, triton

_ASSEMBLY = triton is not None and tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
LOG2E = math.log2(math.e)
# Of a bias, in nats: how far a parabola may be from the table. Half precision rounds each weight by 2^-9 as it is.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
ROUNDING = 2.0**-21  # of a bias, relative: what float32 tables cannot hold anyway
FIT_ELEMENTS = 2**23  # at once, in `fit`: 32 MiB

# Lengths, and what is derived from them: no kernel is compiled anew for another value.
_LENGTHS = ("heads", "group", "tq", "tk", "longest", "windows", "phase", "above", "rows", "chunks")
_jit = jit(_LENGTHS)


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows, columns: queries and keys of a tile.
        warps, stages: Triton's `num_warps` and `num_stages`.
    """

    rows: int
    columns: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """The launches of the four kernels. Rows and columns are powers of two from 16 to 128, and one divides the other:
    columns divide rows in `forward`, `dq` and `dtable`, rows divide columns in `dkv`.

    Attributes:
        forward, dq, dkv, dtable: of the output; of the gradients of queries, of keys and values, and of the table.
        walk: tiles that one program of `dtable` adds up.
    """

    forward: Launch
    dq: Launch
    dkv: Launch
    dtable: Launch
    walk: int = 32


# By the bytes of an element and the head dimension, rounded up to a power of two. Chosen by hand; see tests/benchmarks.
BLOCKS = {
    (2, 64): Blocks(Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3), Launch(128, 64, 8, 2)),
    (2, 128): Blocks(Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(32, 64, 4, 3), Launch(128, 64, 8, 2)),
    (2, 256): Blocks(Launch(128, 32, 8, 2), Launch(128, 32, 8, 1), Launch(32, 64, 8, 2), Launch(64, 64, 8, 1)),
    (4, 64): Blocks(Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 32, 8, 2), Launch(64, 64, 8, 1)),
    (4, 128): Blocks(Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 8, 2), Launch(32, 32, 4, 1)),
    (4, 256): Blocks(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1), Launch(32, 32, 8, 1)),
}

# Bytes a GPU must have for one block of threads: an A100's. The tiles were chosen to fit there; consumer GPUs have 99 KiB.
SHARED_MEMORY = 163 * 1024


def serves(x: Tensor) -> bool:
    """Whether the kernels run on a tensor: there is Triton, and it lies on a GPU with room for the tiles; or on a CPU with the interpreter."""
    if x.is_cuda and triton is not None and x.dtype in TOLERANCE and x.shape[-1] <= 256:
        return _shared_memory(x.device.index) >= SHARED_MEMORY
    return x.device.type == "cpu" and interpreted()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shared_memory(device: int) -> int:
    """Bytes that a block may have."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))  # AMD's have no such number


# --- the table ---


def padded_table(table: Tensor, front: int, back: int) -> Tensor:
    """[H, front + L + back], in units of log 2: minus infinity at distances below zero, zero beyond the longest.

    A kernel can then read any distance its tiles reach without a bounds check, and what lies ahead of a query masks itself.
    """
    padded = pad(table, (front, back)).mul_(LOG2E)
    padded[:, :front] = -math.inf
    return padded


def fit(table: Tensor, phase: int, step: int, width: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """A parabola for each window of distances, and how many windows need the table instead.

    Window w is the `width` distances from `phase + w * step` on, those in the table. The parabola goes through three of its
    points near where the error of the best one changes sign, which is within a factor of two of the best.

    Args:
        table: float32 [H, L].
        tolerance: largest error of a far window, in the table's units, on top of float32 rounding.

    Returns:
        coefficients, float32 [H, W, 3]: a, b, c of a u^2 + b u + c, u the distance from the window's middle, `(width - 1) / 2`;
        near, int32 [H]: windows from `near[h]` on are all within the tolerance.
    """
    longest = table.shape[1]
    windows = max(1, -(-(longest - phase) // step))
    first = phase + step * torch.arange(windows, device=table.device)
    last = (first + width - 1).clamp(max=longest - 1)
    middle = (width - 1) / 2
    spread = 0.5 + (torch.arange(3, device=table.device) - 1).double() * math.sqrt(0.75) / 2  # of a cubic's zeros; no copy from the host
    nodes = (first[:, None] + (last - first).clamp(min=0)[:, None] * spread).round().long().clamp(max=longest - 1)
    coefficients = _parabola(nodes - first[:, None] - middle, table[:, nodes].double()).float()
    inside = torch.arange(width, device=table.device) - middle
    index = (first[:, None] + torch.arange(width, device=table.device)).clamp(max=longest - 1)
    inside = torch.minimum(inside, (last - first - middle)[:, None])  # past the table's end: its last distance again
    good = torch.cat([_fits(t, c, index, inside, tolerance) for t, c in _chunks(table, coefficients, windows * width)])
    bad = torch.arange(1, windows + 1, device=table.device) * ~good
    return coefficients, bad.amax(1).int()


def _parabola(x: Tensor, y: Tensor) -> Tensor:
    """Coefficients [H, W, 3] of u^2, u, 1 through y [H, W, 3] at x [W, 3]; of lower degree where points coincide."""
    x0, x1, x2 = x.unbind(-1)
    y0, y1, y2 = y.unbind(-1)
    first, second = (y1 - y0) / (x1 - x0).clamp(min=1), (y2 - y1) / (x2 - x1).clamp(min=1)
    a = (second - first) / (x2 - x0).clamp(min=1)
    b = first - a * (x0 + x1)
    return torch.stack([a, b, y0 - first * x0 + a * x0 * x1], -1)


def _chunks(table: Tensor, coefficients: Tensor, elements: int) -> Any:
    """Some heads at a time, of `elements` errors each."""
    count = max(1, FIT_ELEMENTS // elements)
    return zip(table.split(count), coefficients.split(count))


def _fits(table: Tensor, coefficients: Tensor, index: Tensor, inside: Tensor, tolerance: float) -> Tensor:
    """bool [h, W]: whether each window's parabola is within the tolerance."""
    a, b, c = (x[..., None] for x in coefficients.unbind(-1))
    error = table[:, index].sub_(c)  # first the constant, so that the rest is small and exact enough
    error.sub_((a * inside).add_(b).mul_(inside))
    return error.abs_().amax(-1) <= tolerance + ROUNDING * c.squeeze(-1).abs()


class Table:
    """A bias by distance, made ready once for all layers and passes that read it.

    Attributes:
        values: float32 [H, L] in nats; what is differentiated.
    """

    def __init__(self, values: Tensor):
        self.values = values
        self._made: dict[Any, Any] = {}

    def padded(self, front: int) -> Tensor:
        """`padded_table`, with as much room on both sides."""
        return self._once(front, lambda: padded_table(self.values.detach(), front, front))

    def fit(self, phase: int, step: int, width: int, tolerance: float) -> tuple[Tensor, Tensor]:
        """`fit`, in units of log 2."""
        return self._once((phase, step, width, tolerance), lambda: fit(self.values.detach() * LOG2E, phase, step, width, tolerance))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


# --- the kernels ---
#
# Names: r and c run over a tile's rows (queries) and columns (keys); m0 and n0 are its first query and key; `shift` = tk - tq, so that
# query m sees keys up to m + shift. With CUT, positions skip: `cuts` and `skips` hold the chunks of each batch row, tiles begin anew with
# each chunk and end with it, and `shift` is the skip of the queries less that of the keys. Parabolas are written in r and c, each from the
# tile's middle, as
#     bias = (a r^2 + b r + c0) + (a c^2 - b c) - 2 a r c,
# a term of the row, one of the column and one rank-one product, so that a logit costs two multiply-adds and a difference.


@_jit
def _head(x, b, h, stride_b, stride_h):
    """Where head h of batch row b begins; 64 bits, since long batches pass 2^31 elements."""
    return x + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h


@_jit
def _tile(x, first, stride, rows, limit, D: tl.constexpr, DP: tl.constexpr, CHECK: tl.constexpr):
    """Rows first .. of x, [rows, DP]; with CHECK, those from `limit` on are zero. Dimensions past D are zero."""
    d = tl.arange(0, DP)
    at = x + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + d[None, :]
    if CHECK and D != DP:
        return tl.load(at, mask=(first + rows < limit)[:, None] & (d < D)[None, :], other=0.0)
    elif CHECK:
        return tl.load(at, mask=(first + rows < limit)[:, None], other=0.0)
    elif D != DP:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@_jit
def _keep(x, first, stride, rows, limit, value, D: tl.constexpr, DP: tl.constexpr):
    """Write a tile that `_tile` would read."""
    d = tl.arange(0, DP)
    at = x + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + d[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(first + rows < limit)[:, None] & (d < D)[None, :])


@_jit
def _row(x, index, rows):
    """Row `index` of x [.., rows], rows a multiple of 16."""
    return x + tl.multiple_of(tl.cast(index, tl.int64) * rows, 16)


@_jit
def _window(distance, STEP: tl.constexpr):
    """The window of a tile whose least distance is so far from the phase, and how far from the middle of the first STEP it begins."""
    window = distance // STEP
    return window, (distance - window * STEP).to(tl.float32) - (STEP - 1) / 2


@_jit
def _terms(coef, window, slide, r, c, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr):
    """The terms of a far tile's bias: of rows; of columns; and the two factors of the product."""
    a = tl.load(coef + window * 3)
    b = tl.load(coef + window * 3 + 1)
    c0 = tl.load(coef + window * 3 + 2)
    x = r.to(tl.float32) - (BM - 1) / 2
    if CUT:  # elsewhere tiles fill their windows
        x += slide
    y = c.to(tl.float32) - (BN - 1) / 2
    return (a * x + b) * x + c0, (a * y - b) * y, -2 * a * x, y


@_jit
def _read(table, distance):
    """The table at a tile's distances.

    Not tl.load: Triton would fetch in an order fit for memory, stage every logit's 4 bytes through shared memory, and convert. A warp's
    distances are all within one cache line or two as they lie, so each thread reads what it needs.
    """
    if _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .u64 at; mad.wide.s32 at, $1, 4, $2; ld.global.nc.f32 $0, [at]; }", "=f,r,l", [distance, table],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.load(table + distance)


@_jit
def _logits(
    q, kt, bias, coef, m0, n0, start, limit, shift, phase, scale, r, c, BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """Logits of a tile [BM, BN] and what each row adds to all of its own, [BM]: left out of the tile, since only sums over rows need it."""
    s = tl.dot(q, tl.trans(kt), input_precision="ieee") * scale
    valid = n0 + c >= start
    if CUT:  # the keys that follow in memory stand elsewhere
        valid = valid & (n0 + c < limit)
    if FAR:
        window, slide = _window(m0 + shift - n0 - (BN - 1) - phase, BN)
        row, column, x, y = _terms(coef, window, slide, r, c, BM, BN, CUT)
        s = s + tl.where(valid, column, -float("inf"))[None, :]
        s = s + x[:, None] * y[None, :]
    else:
        row = tl.zeros([BM], tl.float32)
        s = s + _read(bias, (m0 + shift - n0) + (r[:, None] - c[None, :]))
        s = s + tl.where(valid, 0.0, -float("inf"))[None, :]
    return s, row


@_jit
def _forward_step(
    q, k, v, bias, coef, m0, n0, start, limit, shift, phase, scale, stride_k, stride_v, high, total, values, r, c,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Largest logit, sum of weights and weighted values of each row, after one more tile of keys."""
    kt = _tile(k, n0, stride_k, c, limit, D, DP, CUT or not FAR)
    s, row = _logits(q, kt, bias, coef, m0, n0, start, limit, shift, phase, scale, r, c, BM, BN, FAR, CUT)
    peak = tl.maximum(high, tl.max(s, 1) + row)
    zero = tl.where(peak == -float("inf"), 0.0, peak)  # a row that has seen no key yet
    p = tl.exp2(s - (zero - row)[:, None])
    fade = tl.exp2(high - zero)
    vt = _tile(v, n0, stride_v, c, limit, D, DP, CUT or not FAR)
    values = tl.dot(p.to(vt.dtype), vt, values * fade[:, None], input_precision="ieee")
    return peak, total * fade + tl.sum(p, 1), values


@_jit
def _far_end(m0, shift, phase, near, low, top, BN: tl.constexpr):
    """Keys from `low` up to here are in far tiles of the queries from m0 on."""
    return tl.minimum(tl.maximum(low, m0 + shift + 1 - phase - near * BN), top)


@_jit
def _place(cuts, chunks, tile, BLOCK: tl.constexpr):
    """The first index of a row's tile, the end of its chunk, and the chunk; tiles are of BLOCK, fewer at the end of a chunk.

    Past the last tile, the index is no less than the end.
    """
    chunk = 0
    for i in range(chunks - 1):
        tiles = tl.cdiv(tl.load(cuts + i + 1) - tl.load(cuts + i), BLOCK)
        beyond = (chunk == i) & (tile >= tiles)
        tile = tl.where(beyond, tile - tiles, tile)
        chunk = tl.where(beyond, i + 1, chunk)
    return tl.load(cuts + chunk) + tile * BLOCK, tl.load(cuts + chunk + 1), chunk


@_jit
def _keys_of(cuts, skips, i, j, m0, start, phase, near, BM: tl.constexpr, BN: tl.constexpr):
    """Of chunk j, for the queries of chunk i from m0 on: its first key tile, the ends of its far tiles and of its keys, and the shift."""
    begin = tl.load(cuts + j)
    shift = tl.load(skips + i) - tl.load(skips + j)
    low = begin + tl.maximum(start - begin, 0) // BN * BN
    top = tl.minimum(tl.load(cuts + j + 1), m0 + BM)
    far = tl.maximum(m0 + shift + 1 - phase - near * BN - low, 0) // BN * BN
    return low, tl.minimum(low + far, top), top, shift


@_jit
def _numbers(x, first, rows, end, other, CUT: tl.constexpr):
    """A number of each query first + rows; `other` from `end` on, where another chunk begins."""
    if CUT:
        return tl.load(x + first + rows, mask=first + rows < end, other=other)
    else:
        return tl.load(x + first + rows)


@_jit
def _forward_keys(
    q, k, v, bias, coef, m0, low, far_end, top, start, limit, shift, phase, scale, stride_k, stride_v, high, total, values, r, c,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """`_forward_step` for the far tiles from `low` on and the near ones up to `top`."""
    for n0 in range(low, far_end, BN):
        high, total, values = _forward_step(
            q, k, v, bias, coef, m0, n0, start, limit, shift, phase, scale, stride_k, stride_v, high, total, values, r, c, D, DP, BM, BN, True, CUT
        )  # fmt: skip
    for n0 in range(far_end, top, BN):
        high, total, values = _forward_step(
            q, k, v, bias, coef, m0, n0, start, limit, shift, phase, scale, stride_k, stride_v, high, total, values, r, c, D, DP, BM, BN, False, CUT
        )  # fmt: skip
    return high, total, values


@_jit
def _forward(
    q, k, v, bias, coef, near, starts, cuts, skips, out, lse, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sob, soh, sot,
    heads, group, tq, tk, rows, longest, windows, phase, chunks, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """out [B, H, tq, D] and lse [B, H, rows]: log2 of the sum of weights, infinite in rows that see no key. Without CUT, lse is infinite
    from tq on too; with it, nobody reads it there. Grid: query tiles, B * H.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    if CUT:
        cuts += b * (chunks + 1)
        skips += b * chunks
        m0, end, chunk = _place(cuts, chunks, tile, BM)
    else:
        m0, end, shift = tile * BM, tq, tk - tq
    start = tl.load(starts + b)
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    qt = _tile(_head(q, b, h, sqb, sqh), m0, sqt, r, end, D, DP, True)
    k = _head(k, b, h // group, skb, skh)
    v = _head(v, b, h // group, svb, svh)
    bias += tl.cast(h, tl.int64) * longest
    coef += tl.cast(h, tl.int64) * windows * 3
    high, total = tl.full([BM], -float("inf"), tl.float32), tl.zeros([BM], tl.float32)
    values = tl.zeros([BM, DP], tl.float32)
    if CUT:
        for j in range(0, tl.where(m0 < end, chunk + 1, 0)):
            low, far_end, top, shift = _keys_of(cuts, skips, chunk, j, m0, start, phase, tl.load(near + h), BM, BN)
            high, total, values = _forward_keys(
                qt, k, v, bias, coef, m0, low, far_end, top, start, top, shift, phase, scale, skt, svt, high, total, values, r, c, D, DP, BM, BN, CUT
            )  # fmt: skip
    else:
        top = tl.minimum(tk, m0 + BM + shift)
        low = tl.where(m0 < tq, start // BN * BN, top)  # nothing to do in a tile of rounded-up rows alone
        far_end = _far_end(m0, shift, phase, tl.load(near + h), low, top, BN)
        high, total, values = _forward_keys(
            qt, k, v, bias, coef, m0, low, far_end, top, start, tk, shift, phase, scale, skt, svt, high, total, values, r, c, D, DP, BM, BN, CUT
        )  # fmt: skip
    seen = total > 0
    values = values / tl.where(seen, total, 1.0)[:, None]
    _keep(_head(out, b, h, sob, soh), m0, sot, r, end, values, D, DP)
    high = tl.where(seen & (m0 + r < end), high + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(_row(lse, tl.program_id(1), rows) + m0 + r, high, mask=m0 + r < (end if CUT else rows))


@_jit
def _row_dot(out, dout, delta, sob, soh, sot, sgb, sgh, sgt, heads, tq, rows, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """delta [B, H, rows]: the sum over a row of out * dout, zero from tq on. Grid: query tiles, B * H."""
    m0 = tl.program_id(0) * BM
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    r = tl.arange(0, BM)
    x = _tile(_head(out, b, h, sob, soh), m0, sot, r, tq, D, DP, True)
    y = _tile(_head(dout, b, h, sgb, sgh), m0, sgt, r, tq, D, DP, True)
    tl.store(_row(delta, tl.program_id(1), rows) + m0 + r, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), mask=m0 + r < rows)


@_jit
def _dq_step(
    q, g, k, v, bias, coef, lse, delta, m0, n0, start, limit, shift, phase, scale, stride_k, stride_v, dq, r, c,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """dq [BM, DP], up to the factor `scale`, after one tile of keys; g is the gradient of the output."""
    kt = _tile(k, n0, stride_k, c, limit, D, DP, CUT or not FAR)
    s, row = _logits(q, kt, bias, coef, m0, n0, start, limit, shift, phase, scale, r, c, BM, BN, FAR, CUT)
    p = tl.exp2(s - (lse - row)[:, None])
    vt = _tile(v, n0, stride_v, c, limit, D, DP, CUT or not FAR)
    dp = tl.dot(g, tl.trans(vt), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(kt.dtype), kt, dq, input_precision="ieee")


@_jit
def _dq_keys(
    q, g, k, v, bias, coef, lse, delta, m0, low, far_end, top, start, limit, shift, phase, scale, stride_k, stride_v, dq, r, c,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """`_dq_step` for the far tiles from `low` on and the near ones up to `top`."""
    for n0 in range(low, far_end, BN):
        dq = _dq_step(q, g, k, v, bias, coef, lse, delta, m0, n0, start, limit, shift, phase, scale, stride_k, stride_v, dq, r, c, D, DP, BM, BN, True, CUT)
    for n0 in range(far_end, top, BN):
        dq = _dq_step(q, g, k, v, bias, coef, lse, delta, m0, n0, start, limit, shift, phase, scale, stride_k, stride_v, dq, r, c, D, DP, BM, BN, False, CUT)
    return dq


@_jit
def _dq(
    q, k, v, dout, bias, coef, near, starts, cuts, skips, lse, delta, dq, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt,
    heads, group, tq, tk, rows, longest, windows, phase, chunks, scale, factor,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """dq [B, H, tq, D]. `scale` is in units of log 2, `factor` is not. Grid: query tiles, B * H."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    if CUT:
        cuts += b * (chunks + 1)
        skips += b * chunks
        m0, end, chunk = _place(cuts, chunks, tile, BM)
    else:
        m0, end, shift = tile * BM, tq, tk - tq
    start = tl.load(starts + b)
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    qt = _tile(_head(q, b, h, sqb, sqh), m0, sqt, r, end, D, DP, True)
    gt = _tile(_head(dout, b, h, sgb, sgh), m0, sgt, r, end, D, DP, True)
    k = _head(k, b, h // group, skb, skh)
    v = _head(v, b, h // group, svb, svh)
    high = _numbers(_row(lse, tl.program_id(1), rows), m0, r, end, float("inf"), CUT)
    mean = _numbers(_row(delta, tl.program_id(1), rows), m0, r, end, 0.0, CUT)
    bias += tl.cast(h, tl.int64) * longest
    coef += tl.cast(h, tl.int64) * windows * 3
    sums = tl.zeros([BM, DP], tl.float32)
    if CUT:
        for j in range(0, tl.where(m0 < end, chunk + 1, 0)):
            low, far_end, top, shift = _keys_of(cuts, skips, chunk, j, m0, start, phase, tl.load(near + h), BM, BN)
            sums = _dq_keys(
                qt, gt, k, v, bias, coef, high, mean, m0, low, far_end, top, start, top, shift, phase, scale, skt, svt, sums, r, c, D, DP, BM, BN, CUT
            )  # fmt: skip
    else:
        low, top = start // BN * BN, tl.minimum(tk, m0 + BM + shift)
        far_end = _far_end(m0, shift, phase, tl.load(near + h), low, top, BN)
        sums = _dq_keys(
            qt, gt, k, v, bias, coef, high, mean, m0, low, far_end, top, start, tk, shift, phase, scale, skt, svt, sums, r, c, D, DP, BM, BN, CUT
        )  # fmt: skip
    _keep(_head(dq, b, h, sdb, sdh), m0, sdt, r, end, sums * factor, D, DP)


@_jit
def _dkv_step(
    q, g, k, v, bias, coef, lse, delta, m0, n0, valid, shift, phase, limit, scale, stride_q, stride_g, dk, dv, r, c,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """dk (up to a factor) and dv [BN, DP] after one tile of queries. Logits are transposed here, [keys, queries]."""
    qt = _tile(q, m0, stride_q, r, limit, D, DP, True)
    high = _numbers(lse, m0, r, limit, float("inf"), CUT)
    s = tl.dot(k, tl.trans(qt), input_precision="ieee") * scale
    if FAR:
        window, slide = _window(m0 + shift - n0 - (BN - 1) - phase, BM)
        row, column, x, y = _terms(coef, window, slide, r, c, BM, BN, CUT)
        s = s + (row - high)[None, :]
        s = s + y[:, None] * x[None, :]
        s = s + tl.where(valid, column, -float("inf"))[:, None]
    else:
        s = s + _read(bias, (m0 + shift - n0) + (r[None, :] - c[:, None]))
        s = s + tl.where(valid, 0.0, -float("inf"))[:, None]
        s = s - high[None, :]
    p = tl.exp2(s)
    gt = _tile(g, m0, stride_g, r, limit, D, DP, True)
    dv = tl.dot(p.to(gt.dtype), gt, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(gt), input_precision="ieee")
    mean = _numbers(delta, m0, r, limit, 0.0, CUT)
    ds = p * (dp - mean[None, :])
    return tl.dot(ds.to(qt.dtype), qt, dk, input_precision="ieee"), dv


@_jit
def _queries_of(first, low, end, n0, shift, phase, near, BM: tl.constexpr, BN: tl.constexpr):
    """Where the far tiles of the queries from `low` to `end` begin; tiles count from `first` on."""
    middle = n0 + BN - 1 - shift + phase + near * BM
    middle = tl.minimum(tl.maximum(middle, low), tl.maximum(end, low))
    return first + (middle - first + BM - 1) // BM * BM


@_jit
def _dkv_queries(
    q, g, k, v, bias, coef, lse, delta, low, middle, end, n0, valid, shift, phase, limit, scale, stride_q, stride_g, dk, dv, r, c,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """`_dkv_step` for the near tiles from `low` on and the far ones from `middle` to `end`."""
    for m0 in range(low, tl.minimum(middle, end), BM):
        dk, dv = _dkv_step(
            q, g, k, v, bias, coef, lse, delta, m0, n0, valid, shift, phase, limit, scale, stride_q, stride_g, dk, dv, r, c, D, DP, BM, BN, False, CUT
        )  # fmt: skip
    for m0 in range(middle, end, BM):
        dk, dv = _dkv_step(
            q, g, k, v, bias, coef, lse, delta, m0, n0, valid, shift, phase, limit, scale, stride_q, stride_g, dk, dv, r, c, D, DP, BM, BN, True, CUT
        )  # fmt: skip
    return dk, dv


@_jit
def _dkv(
    q, k, v, dout, bias, coef, near, starts, cuts, skips, lse, delta, dk, dv,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdkb, sdkh, sdkt, sdvb, sdvh, sdvt,
    heads, group, tq, tk, rows, longest, windows, phase, chunks, scale, factor,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, heads / group, tk, D]: a program adds up the queries of all heads that share its keys. Grid: key tiles, B * key heads."""
    b, shared = tl.program_id(1) // (heads // group), tl.program_id(1) % (heads // group)
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    if CUT:
        cuts += b * (chunks + 1)
        skips += b * chunks
        n0, limit, chunk = _place(cuts, chunks, tl.program_id(0), BN)
    else:
        n0, limit, shift = tl.program_id(0) * BN, tk, tk - tq  # the first keys are seen by most queries
    kt = _tile(_head(k, b, shared, skb, skh), n0, skt, c, limit, D, DP, True)
    vt = _tile(_head(v, b, shared, svb, svh), n0, svt, c, limit, D, DP, True)
    start = tl.load(starts + b)
    valid = n0 + c >= start
    if CUT:
        valid = valid & (n0 + c < limit)
        own = tl.load(skips + chunk)
        last = tl.where((n0 < limit) & (n0 + BN > start), chunks, chunk)
    else:
        low = tl.maximum(n0 - shift, 0) // BM * BM
        end = tl.where(n0 + BN > start, tq, low)  # nobody sees padding
    sum_k, sum_v = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    for h in range(shared * group, shared * group + group):
        qh = _head(q, b, h, sqb, sqh)
        gh = _head(dout, b, h, sgb, sgh)
        lses, deltas = _row(lse, b * heads + h, rows), _row(delta, b * heads + h, rows)
        table = bias + tl.cast(h, tl.int64) * longest
        parabolas = coef + tl.cast(h, tl.int64) * windows * 3
        if CUT:
            for i in range(chunk, last):
                first, end = tl.load(cuts + i), tl.load(cuts + i + 1)
                shift = tl.load(skips + i) - own
                low = first + tl.maximum(n0 - first, 0) // BM * BM
                middle = _queries_of(first, low, end, n0, shift, phase, tl.load(near + h), BM, BN)
                sum_k, sum_v = _dkv_queries(
                    qh, gh, kt, vt, table, parabolas, lses, deltas, low, middle, end, n0, valid, shift, phase, end, scale, sqt, sgt, sum_k, sum_v, r, c,
                    D, DP, BM, BN, CUT,
                )  # fmt: skip
        else:
            middle = _queries_of(0, low, end, n0, shift, phase, tl.load(near + h), BM, BN)
            sum_k, sum_v = _dkv_queries(
                qh, gh, kt, vt, table, parabolas, lses, deltas, low, middle, end, n0, valid, shift, phase, tq, scale, sqt, sgt, sum_k, sum_v, r, c,
                D, DP, BM, BN, CUT,
            )  # fmt: skip
    _keep(_head(dk, b, shared, sdkb, sdkh), n0, sdkt, c, limit, sum_k * factor, D, DP)
    _keep(_head(dv, b, shared, sdvb, sdvh), n0, sdvt, c, limit, sum_v, D, DP)


@_jit
def _dtable_step(
    q, g, k, v, bias, lse, delta, m0, n0, start, query_end, key_end, scale, stride_q, stride_g, stride_k, stride_v, sums, r, c, reads, row, column, x, y,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits [BM, BN], added up, after one more tile of the diagonal."""
    qt = _tile(q, m0, stride_q, r, query_end, D, DP, True)
    kt = _tile(k, n0, stride_k, c, key_end, D, DP, True)
    high = _numbers(lse, m0, r, query_end, float("inf"), CUT)
    mean = _numbers(delta, m0, r, query_end, 0.0, CUT)
    s = tl.dot(qt, tl.trans(kt), input_precision="ieee") * scale
    s = s + (row - high)[:, None]
    s = s + x[:, None] * y[None, :]
    valid = n0 + c >= start
    if CUT:
        valid = valid & (n0 + c < key_end)
    s = s + tl.where(valid, column, -float("inf"))[None, :]
    if reads:
        s = s + _read(bias, r[:, None] - c[None, :])
    gt = _tile(g, m0, stride_g, r, query_end, D, DP, True)
    vt = _tile(v, n0, stride_v, c, key_end, D, DP, True)
    dp = tl.dot(gt, tl.trans(vt), input_precision="ieee")
    return sums + tl.exp2(s) * (dp - mean[:, None])


@_jit
def _walk_between(cuts, skips, chunks, t, walk, BM: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr):
    """A walk between the queries of a chunk and the keys of the same or an earlier one, `walk` counting the pairs of chunks first.

    Returns where its tiles of queries begin and stop, how far a tile's first key lies from its first query, the ends of the chunks, and the shift.
    """
    pairs = chunks * (chunks + 1) // 2
    pair, i = walk % pairs, 0
    for n in range(1, chunks):
        i = tl.where(pair >= n * (n + 1) // 2, n, i)
    j = pair - i * (i + 1) // 2
    first, end = tl.load(cuts + i), tl.load(cuts + i + 1)
    begin, key_end = tl.load(cuts + j), tl.load(cuts + j + 1)
    above = tl.where(i == j, BM // BN, tl.cdiv(key_end - begin, BN)) - 1  # diagonals whose first tile is not one of the first queries
    back = (t - above) * BN
    m0 = first + tl.cdiv(tl.maximum(back, 0), BM) * BM + walk // pairs * STRIDE
    stop = tl.minimum(tl.minimum(m0 + STRIDE, end), first + back + key_end - begin)
    return m0, stop, begin - first - back, end, key_end, tl.load(skips + i) - tl.load(skips + j)


@_jit
def _dtable(
    q, k, v, dout, bias, coef, near, starts, cuts, skips, lse, delta, dtable, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt,
    heads, group, tq, tk, rows, longest, windows, phase, above, chunks, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WALK: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Adds to dtable, [H, longest] like `bias`. Grid: tile diagonals, walks along one (times pairs of chunks), B * H.

    Diagonal t holds, for the queries from m0 on, the keys from (floor((m0 + shift) / BN) + above - t) BN on. With CUT, tiles and
    their diagonals count from the corner of each pair of chunks, the diagonal of the chunk's last keys first.
    """
    b, h = tl.program_id(2) // heads, tl.program_id(2) % heads
    if CUT:
        begin, stop, behind, end, key_end, shift = _walk_between(
            cuts + b * (chunks + 1), skips + b * chunks, chunks, tl.program_id(0), tl.program_id(1), BM, BN, WALK * BM
        )  # fmt: skip
    else:
        shift = tk - tq
        back = (tl.program_id(0) - above) * BN  # keys of a tile begin this far behind those that the division gives
        begin = tl.maximum(back - shift + BM - 1, 0) // BM * BM + tl.program_id(1) * (WALK * BM)
        stop = tl.minimum(begin + WALK * BM, tq)
        behind, end, key_end = shift // BN * BN - back, tq, tk
    if begin < stop:
        r, c = tl.arange(0, BM), tl.arange(0, BN)
        start = tl.load(starts + b)
        q = _head(q, b, h, sqb, sqh)
        g = _head(dout, b, h, sgb, sgh)
        k = _head(k, b, h // group, skb, skh)
        v = _head(v, b, h // group, svb, svh)
        lse, delta = _row(lse, tl.program_id(2), rows), _row(delta, tl.program_id(2), rows)
        apart = shift - behind  # distance of the first query and key of each tile
        bias += tl.cast(h, tl.int64) * longest + apart
        window, slide = _window(apart - (BN - 1) - phase, BN)
        reads = window < tl.load(near + h)
        if CUT:  # elsewhere windows begin where tiles do; here the division rounds a distance below zero up to the first window
            reads = reads | (apart < BN - 1 + phase)
        # One loop for near and far, unlike elsewhere: shared memory is too small for the tiles of two that exclude each other.
        row, column, x, y = _terms(coef + tl.cast(h, tl.int64) * windows * 3, tl.maximum(window, 0), slide, r, c, BM, BN, CUT)
        far = tl.where(reads, 0.0, 1.0)
        row, column, x = row * far, column * far, x * far
        sums = tl.zeros([BM, BN], tl.float32)
        for m0 in range(begin, stop, BM):
            sums = _dtable_step(
                q, g, k, v, bias, lse, delta, m0, m0 + behind, start, end, key_end, scale, sqt, sgt, skt, svt, sums, r, c, reads, row, column, x, y,
                D, DP, BM, BN, CUT,
            )  # fmt: skip
        _add_diagonals(dtable + tl.cast(h, tl.int64) * longest + apart, sums, r, c, BM, BN)


@_jit
def _add_diagonals(to, x, r, c, BM: tl.constexpr, BN: tl.constexpr):
    """Add x[r, c] to to[r - c]: turn each row until a diagonal is a column, then sum the columns."""
    turned = tl.gather(x, (r[:, None] + c[None, :]) % BN, 1)  # [r, j] holds column r + j - BN * lap
    lap = (r[:, None] + c[None, :]) // BN
    for i in tl.static_range(BM // BN + 1):
        tl.atomic_add(to + i * BN - c, tl.sum(tl.where(lap == i, turned, 0.0), 0), sem="relaxed")


# --- launching them ---


ROWS = 128  # numbers per query are allocated in multiples of it, so that tiles of queries need no bounds for them


def _per_query(q: Tensor) -> Tensor:
    """float32 [B, H, rows], uninitialised; rows: queries, rounded up."""
    return q.new_empty(q.shape[0], q.shape[1], -(-q.shape[2] // ROWS) * ROWS, dtype=torch.float32)


class Chunks(NamedTuple):
    """Positions that are consecutive but for some jumps upward, row by row.

    Attributes:
        cuts: int32 [B, C + 1], contiguous: 0, the first index of each further chunk, and the number of tokens. Equal neighbours are an empty chunk.
        skips: int32 [B, C], contiguous: position minus index in each chunk, up to a constant of the row; never decreasing.
        reach: more than the distance of any two positions of a row. It is trusted, so that no launch waits for the device:
            positions further apart would read past the table.
    """

    cuts: Tensor
    skips: Tensor
    reach: int


class _Problem(NamedTuple):
    """What the launches share. Lengths in tokens; `bias`, `front`: `padded_table`; `scale`: of logits, in nats."""

    table: Table
    bias: Tensor
    front: int
    starts: Tensor
    chunks: Chunks | None
    scale: float
    tolerance: float
    blocks: Blocks


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Batch, head and token strides of each."""
    return tuple(s for x in tensors for s in x.stride()[:3])


def _problem(table: Table, starts: Tensor, chunks: Chunks | None, scale: float, tolerance: float, blocks: Blocks) -> _Problem:
    front = max(launch.rows + launch.columns for launch in blocks[:4])
    return _Problem(table, table.padded(front), front, starts, chunks, scale, tolerance, blocks)


def _fits_of(p: _Problem, launch: Launch, shift: int) -> tuple[Tensor, Tensor, int]:
    """Parabolas for tiles of that shape, how many diagonals are near, and the distance where the first window begins."""
    step, width = min(launch.rows, launch.columns), launch.rows + launch.columns - 1
    phase = (shift + 1 - launch.columns) % step
    if p.chunks is not None:  # skips are any number: a tile's distances begin in the first `step` of a window, wherever it has its phase
        phase, width = 0, width + step - 1
    return *p.table.fit(phase, step, width, p.tolerance * LOG2E), phase


def _tiles(p: _Problem, length: int, size: int) -> int:
    """Tiles of a row, at most: each chunk but one may end in a tile of its own."""
    return -(-length // size) + (0 if p.chunks is None else p.chunks.skips.shape[1] - 1)


def _rows(p: _Problem) -> tuple[Tensor | None, ...]:
    """What is known of each batch row: first valid keys, cuts and skips."""
    return (p.starts, None, None) if p.chunks is None else (p.starts, p.chunks.cuts, p.chunks.skips)


def _common(p: _Problem, q: Tensor, k: Tensor, launch: Launch, coefficients: Tensor, phase: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments by name: those of every kernel that reads the table, and those that fix a compilation."""
    group = q.shape[1] // k.shape[1]
    lengths = {"heads": q.shape[1], "group": group, "tq": q.shape[2], "tk": k.shape[2], "rows": -(-q.shape[2] // ROWS) * ROWS}
    lengths |= {"longest": p.bias.shape[1], "windows": coefficients.shape[1], "phase": phase, "chunks": 0 if p.chunks is None else p.chunks.skips.shape[1]}
    return lengths | {"scale": p.scale * LOG2E}, _constants(q, launch) | {"CUT": p.chunks is not None}


def _constants(q: Tensor, launch: Launch) -> dict[str, Any]:
    dim = q.shape[3]
    padded = max(16, 1 << (dim - 1).bit_length())
    return {"D": dim, "DP": padded, "BM": launch.rows, "BN": launch.columns, "num_warps": launch.warps, "num_stages": launch.stages}


def _run_forward(p: _Problem, q: Tensor, k: Tensor, v: Tensor, fits: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor]:
    launch = p.blocks.forward
    out, lse = torch.empty_like(q), _per_query(q)
    lengths, constants = _common(p, q, k, launch, fits[0], fits[2])
    grid = (_tiles(p, lse.shape[2], launch.rows), q.shape[0] * q.shape[1])
    _forward[grid](q, k, v, p.bias[:, p.front :], *fits[:2], *_rows(p), out, lse, *_strides(q, k, v, out), **lengths, **constants)
    return out, lse


def _run_row_dot(p: _Problem, out: Tensor, dout: Tensor) -> Tensor:
    delta = _per_query(out)
    launch = p.blocks.forward
    constants = _constants(out, launch)
    del constants["BN"]
    grid = (delta.shape[2] // launch.rows, out.shape[0] * out.shape[1])
    _row_dot[grid](out, dout, delta, *_strides(out, dout), heads=out.shape[1], tq=out.shape[2], rows=delta.shape[2], **constants)
    return delta


def _run_dq(p: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, fits: tuple[Tensor, Tensor, int]) -> Tensor:
    launch, dq = p.blocks.dq, torch.empty_like(q)
    lengths, constants = _common(p, q, k, launch, fits[0], fits[2])
    grid = (_tiles(p, q.shape[2], launch.rows), q.shape[0] * q.shape[1])
    _dq[grid](
        q, k, v, dout, p.bias[:, p.front :], *fits[:2], *_rows(p), lse, delta, dq, *_strides(q, k, v, dout, dq), factor=p.scale, **lengths, **constants
    )  # fmt: skip
    return dq


def _run_dkv(p: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, fits: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor]:
    launch, dk, dv = p.blocks.dkv, torch.empty_like(k), torch.empty_like(v)
    lengths, constants = _common(p, q, k, launch, fits[0], fits[2])
    grid = (_tiles(p, k.shape[2], launch.columns), k.shape[0] * k.shape[1])
    _dkv[grid](
        q, k, v, dout, p.bias[:, p.front :], *fits[:2], *_rows(p), lse, delta, dk, dv, *_strides(q, k, v, dout, dk, dv), factor=p.scale, **lengths, **constants
    )  # fmt: skip
    return dk, dv


def _run_dtable(p: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, fits: tuple[Tensor, Tensor, int]) -> Tensor:
    """float32 [H, L], summed over the batch."""
    launch, walk = p.blocks.dtable, p.blocks.walk
    lengths, constants = _common(p, q, k, launch, fits[0], fits[2])
    tq, shift = q.shape[2], k.shape[2] - q.shape[2]
    tiles = triton.cdiv(tq, launch.rows)
    above = (launch.rows - 1 + shift % launch.columns) // launch.columns
    diagonals = ((tiles - 1) * launch.rows + shift) // launch.columns + above + 1
    sums = torch.zeros_like(p.bias)
    pairs = max(1, lengths["chunks"] * (lengths["chunks"] + 1) // 2)
    grid = (diagonals, triton.cdiv(tiles, walk) * pairs, q.shape[0] * q.shape[1])
    _dtable[grid](
        q, k, v, dout, p.bias[:, p.front :], *fits[:2], *_rows(p), lse, delta, sums[:, p.front :], *_strides(q, k, v, dout), above=above,
        **lengths, **constants, WALK=walk,
    )  # fmt: skip
    return sums[:, p.front : p.bias.shape[1] - p.front]


class _Attention(torch.autograd.Function):
    """Of q, k, v and the table; the rest is settled by `biased_attention`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, values: Tensor, table: Table, starts: Tensor, chunks: Chunks | None, scale: float,
        tolerance: float, blocks: Blocks,
    ) -> Tensor:  # fmt: skip
        p = _problem(table, starts, chunks, scale, tolerance, blocks)
        out, lse = _run_forward(p, q, k, v, _fits_of(p, blocks.forward, k.shape[2] - q.shape[2]))
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.rest = table, chunks, scale, tolerance, blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, starts = ctx.saved_tensors
        table, *rest = ctx.rest
        p = _problem(table, starts, *rest)
        shift = k.shape[2] - q.shape[2]
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        delta = _run_row_dot(p, out, dout)
        dq = dk = dv = dvalues = None
        if ctx.needs_input_grad[0]:
            dq = _run_dq(p, q, k, v, dout, lse, delta, _fits_of(p, p.blocks.dq, shift))
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dk, dv = _run_dkv(p, q, k, v, dout, lse, delta, _fits_of(p, p.blocks.dkv, shift))
        if ctx.needs_input_grad[3]:
            dvalues = _run_dtable(p, q, k, v, dout, lse, delta, _fits_of(p, p.blocks.dtable, shift))
        return dq, dk, dv, dvalues, None, None, None, None, None, None


_differentiable = torch.compiler.disable(_Attention.apply)  # the table keeps what was made of it, which is no tensor's business


def blocks_for(head_dim: int, dtype: torch.dtype) -> Blocks:
    """The hand-chosen tiles for a head dimension up to 256."""
    size = 4 if dtype == torch.float32 else 2
    return next(BLOCKS[size, dim] for dim in (64, 128, 256) if head_dim <= dim)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | Table, scale: float | None = None, *,
    k_start: Tensor | None = None, chunks: Chunks | None = None, tolerance: float | None = None, blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + bias) v over keys at distance 0 and more, the bias of head h at distance d being `table[h, d]`.

    Differentiable in q, k, v and the table. Rows that see no key are zero.

    Args:
        q: [B, H, Tq, D], the last Tq of Tk positions: query i sees keys j <= i + Tk - Tq, at distance i + Tk - Tq - j.
        k, v: [B, Hkv, Tk, D]; head h of q reads head h * Hkv // H. float16, bfloat16 or float32, like q; D at most 256.
        table: float32 [H, Tk] or longer, finite, in nats; a `Table` of [H, Tk] where several calls share it. With chunks it is
            `reach` distances long, not Tk.
        scale: of the dot products; 1 / sqrt(D) by default.
        k_start: integers [B], the first valid key of each row; keys before it are left padding.
        chunks: of self-attention, Tq = Tk, at positions that skip: distances are those of positions.
        tolerance: largest error of the bias in tiles that do not read the table, in nats; `TOLERANCE` by default.
        blocks: tile shapes, in place of `blocks_for`.

    Returns:
        [B, H, Tq, D], laid out in memory like q.

    Raises:
        ValueError: shapes that do not fit together.
    """
    longest = k.shape[2] if chunks is None else chunks.reach
    table = table if isinstance(table, Table) else Table(table[:, :longest].float())
    _check(q, k, v, table.values, longest)
    if chunks is not None:
        _check_chunks(q, k, chunks)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    starts = q.new_zeros(q.shape[0], dtype=torch.int32) if k_start is None else k_start.to(q.device, torch.int32)
    tolerance = TOLERANCE[q.dtype] if tolerance is None else tolerance
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and blocks is None:
        return _in_graph(q, k, v, _problem(table, starts, chunks, scale, tolerance, blocks_for(q.shape[3], q.dtype)))
    return _differentiable(q, k, v, table.values, table, starts, chunks, scale, tolerance, blocks or blocks_for(q.shape[3], q.dtype))


def _in_graph(q: Tensor, k: Tensor, v: Tensor, p: _Problem) -> Tensor:
    """The output, with the launch as one node of the graph of torch.compile; what is made of the table stays outside of it, shared by the layers."""
    coefficients, near, phase = _fits_of(p, p.blocks.forward, k.shape[2] - q.shape[2])
    cuts, skips = (None, None) if p.chunks is None else p.chunks[:2]
    return _node(q, k, v, p.bias, coefficients, near, p.starts, cuts, skips, p.front, phase, p.scale)


@torch.library.custom_op("longctx::biased_attention", mutates_args=())
def _node(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, coefficients: Tensor, near: Tensor, starts: Tensor, cuts: Tensor | None, skips: Tensor | None,
    front: int, phase: int, scale: float,
) -> Tensor:  # fmt: skip
    chunks = None if cuts is None or skips is None else Chunks(cuts, skips, 0)  # the reach was for the table
    p = _Problem(Table(bias), bias, front, starts, chunks, scale, 0.0, blocks_for(q.shape[3], q.dtype))
    return _run_forward(p, q, k, v, (coefficients, near, phase))[0]


@_node.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q)


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, longest: int) -> None:
    (batch, heads, tq, dim), (_, kv_heads, tk, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape != (batch, kv_heads, tk, dim) or heads % kv_heads:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: want [B, H, Tq, D] and twice [B, Hkv, Tk, D], Hkv dividing H")
    if not 0 < tq <= tk or dim > 256:
        raise ValueError(f"{tq} queries of {tk} keys, head dimension {dim}: want no more queries than keys, and at most 256 dimensions")
    if table.dim() != 2 or table.shape[0] != heads or table.shape[1] != longest:
        raise ValueError(f"table {list(table.shape)}: want {heads} heads and at least {longest} distances")


def _check_chunks(q: Tensor, k: Tensor, chunks: Chunks) -> None:
    cuts, skips = chunks.cuts, chunks.skips
    if q.shape[2] != k.shape[2] or chunks.reach < k.shape[2]:
        raise ValueError(f"chunks that reach {chunks.reach} with {q.shape[2]} queries of {k.shape[2]} keys: want as many queries as keys, and no shorter reach")
    if skips.dim() != 2 or cuts.shape != (q.shape[0], skips.shape[1] + 1) or skips.shape[0] != q.shape[0] or not skips.shape[1]:
        raise ValueError(f"cuts {list(cuts.shape)}, skips {list(skips.shape)}: want [{q.shape[0]}, C + 1] and [{q.shape[0]}, C], C at least 1")
    if any(x.dtype != torch.int32 or not x.is_contiguous() or x.device != q.device for x in (cuts, skips)):
        raise ValueError(f"cuts and skips must be int32, contiguous and on {q.device}")
