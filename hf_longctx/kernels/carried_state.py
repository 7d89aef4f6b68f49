"""What an initial state adds to Mamba-1's scan from zeros, and the gate: forward and backward in Triton.

    h_T is left to the caller; out_t = (y_t + sum_n c_tn exp(a_n e_t) h_n) silu(z_t), e_t = delta_1 + .. + delta_t, delta = softplus(dt + bias)

y is what mamba-ssm's kernel gives when it starts from zeros and does not gate: one pass reads dt, y, z and writes out. (If that kernel
gated, out and its gradients would each be read and written once more.) The backward pass gives the gradient of y, which that
kernel takes on, and those of what is above; y + .. is computed again and not kept.

The cost is that of the exponentials, [batch, channels, state, tokens] of them. They stay in registers: a thread has a few tokens and
all n of a group. They are skipped in tiles of time at whose beginning 2^x is below 2^-24, where float32 rounds, for a whole group
of n: steps are positive, so it stays so. Within a tile, elapsed time is a prefix sum.

A program of the forward walks through time with one channel. One of the backward has one tile of time and walks through channels,
because dc is a sum over channels, kept in registers; sums over programs are done by torch, so that results do not depend on the order
in which programs run. The gradient of elapsed time becomes that of dt in a pass of its own, a suffix sum.

Importing this module needs no Triton; `serves()` says whether the kernels can run.
"""
# mypy: disable-error-code="no-untyped-def"
# Arguments of the kernels are Triton's own types. Annotations must stay strings, for where there is no Triton.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_longctx.kernels._triton import interpreted, jit, tl, triton

_LOG2E = triton is not None and tl.constexpr(1.4426950408889634)
_LEAST = triton is not None and tl.constexpr(-24.0)  # of x, such that 2^x counts
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STATES = 64  # the largest state: the backward pass has one number for each in registers
_ELEMENTS = 64  # of a thread in [state, tokens], in the backward pass
_PROGRAMS = 4096  # of the backward pass, that a GPU is busy; fewer channels a program if there would be fewer
_FEWEST = 8  # channels of such a program: each writes a float32 of dc a token and n
_SIZES = ("channels", "tiles", "count")  # no kernel is compiled anew for another value; the length is not among them, since alignment follows from it
_jit = jit(_SIZES)


class Launch(NamedTuple):
    """How the kernels are launched.

    Attributes:
        warps: of a program. A thread has four tokens of a tile, fewer where the state is larger than 16.
        group, group_back: numbers of a state that are computed or skipped together, forward and backward; powers of two.
        channels: that a program of the backward adds up, at most.
    """

    warps: int
    group: int
    group_back: int
    channels: int


# The first is used, the fastest on an H200; tests/benchmarks/state_speed.py compares them.
LAUNCHES = (Launch(1, 4, 4, 16), Launch(1, 4, 4, 32), Launch(1, 4, 1, 32), Launch(1, 1, 1, 64))


def serves(y: Tensor, dt: Tensor, a: Tensor, c: Tensor, z: Tensor | None) -> bool:
    """Whether the kernels run on arguments of `add_carried`: there is Triton and a GPU, or its interpreter; and a state of a power of two, up to 64."""
    if triton is None or not (y.is_cuda or (y.device.type == "cpu" and interpreted())):
        return False
    size = a.shape[-1]
    fit = a.dim() == 2 and c.dim() == 3 and not a.is_complex() and size <= _STATES and size & (size - 1) == 0
    return fit and all(x.dtype in _DTYPES for x in (y, dt, c, *(() if z is None else (z,))))


# --- the kernels ---
#
# Names: b, d, n, t run over batch, channels, state and the tokens of a tile; `row` = b * channels + d. All tensors are contiguous,
# c is [B, tiles, N, TILE].


@_jit
def _steps(dt, bias, d, inside, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """delta of a tile, zero outside, and its derivative with respect to dt."""
    x = dt.to(tl.float32)
    if BIAS:
        x += tl.load(bias + d).to(tl.float32)
    if SOFTPLUS:
        e = tl.exp(-tl.abs(x))
        s = e / (2 + e)  # log(1 + e) = 2 artanh(s), and s is at most 1/3
        q = s * s
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
        delta = tl.maximum(x, 0.0) + 2 * s * series
        slope = tl.where(x >= 0, 1.0, e) / (1 + e)
    else:
        delta = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return tl.where(inside, delta, 0.0), slope


@_jit
def _alive(a, elapsed, GROUP: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Whether some of the first GROUP 2^(a log2(e) time) counts from `elapsed` on. Steps that may be negative promise nothing.

    One by one, since a reduction would exchange them between threads, and the compiler would no longer see that all go the same way."""
    if SOFTPLUS:
        slowest = tl.load(a)
        for i in tl.static_range(1, GROUP):
            slowest = tl.maximum(slowest, tl.load(a + i))
        return (slowest * _LOG2E * elapsed < _LEAST) == 0  # so that NaN is alive
    else:
        return elapsed == elapsed


@_jit
def _read(dt, y, z, t, inside, GATE: tl.constexpr):
    """Of a tile, what is not kept from one to the next."""
    of_y = tl.load(y + t, mask=inside, other=0.0)
    return tl.load(dt + t, mask=inside, other=0.0), of_y, tl.load(z + t, mask=inside, other=0.0) if GATE else of_y


@_jit
def _forward(
    y, dt, z, a, c, start, bias, out, starts, total, channels, tokens, tiles,
    N: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """out [B, D, T]; elapsed time at all, total [B, D], and with KEEP where tiles begin, starts [B, D, tiles]. Grid: channels, B."""
    d, b = tl.program_id(0), tl.program_id(1)
    row = tl.cast(b, tl.int64) * channels + d
    at = row * tokens
    c += tl.cast(b, tl.int64) * tiles * (N * TILE)
    elapsed = tl.full([], 0.0, tl.float32)
    for tile in range(0, tiles):
        t = tile * TILE + tl.arange(0, TILE)
        inside = (t < tokens) | EVEN
        this_dt, this_y, this_z = _read(dt + at, y + at, z + at if GATE else z, t, inside, GATE)
        delta, _ = _steps(this_dt, bias, d, inside, BIAS, SOFTPLUS)
        if KEEP:
            tl.store(starts + row * tiles + tile, elapsed)
        time = elapsed + tl.cumsum(delta, 0)
        value = this_y.to(tl.float32)
        for first in tl.static_range(0, N, GROUP):
            n = first + tl.arange(0, GROUP)
            if _alive(a + d * N + first, elapsed, GROUP, SOFTPLUS):
                rate = tl.load(a + d * N + n) * _LOG2E
                h = tl.load(start + row * N + n)
                weights = tl.load(c + tile * (N * TILE) + n[:, None] * TILE + tl.arange(0, TILE)[None, :])
                value += tl.sum(weights * (h[:, None] * tl.exp2(rate[:, None] * time[None, :])), 0)
        if GATE:
            gate = this_z.to(tl.float32)
            value = value * (gate / (1 + tl.exp(-gate)))
        tl.store(out + at + t, value.to(out.dtype.element_ty), mask=inside)
        elapsed += tl.sum(delta, 0)
    tl.store(total + row, elapsed)


@_jit
def _backward(
    dout, y, dt, z, a, c, start, bias, starts, dy, dz, dtime, da, dc, dstart, channels, tokens, tiles, count,
    N: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr,
    RATES: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Gradients: dy and dz like y, where gated; dtime, of elapsed time, float32 [B, D, T]; and, to be summed over the first dimension, float32
    da [B * tiles, D, N], dc [blocks of channels, B, tiles, N, TILE], dstart [tiles, B, D, N]. Grid: tiles, blocks of `count` channels, B."""
    tile, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = tile * TILE + tl.arange(0, TILE)
    inside = (t < tokens) | EVEN
    wide = tl.cast(b, tl.int64)
    c += (wide * tiles + tile) * (N * TILE) + tl.arange(0, TILE)[None, :]
    dc += ((tl.cast(block, tl.int64) * tl.num_programs(2) + b) * tiles + tile) * (N * TILE) + tl.arange(0, TILE)[None, :]
    sums = ()
    for first in tl.static_range(0, N, GROUP):
        weights = tl.load(c + (first + tl.arange(0, GROUP))[:, None] * TILE)
        # Zeros, in registers as c is: a loop keeps the layout that it begins with, and another would have all be computed twice.
        sums += (weights - weights,)  # type: ignore[assignment]
    end = tl.minimum(block * count + count, channels)
    for d in range(block * count, end):
        row = wide * channels + d
        at = row * tokens
        this_dt, this_y, this_z = _read(dt + at, y + at, z + at if GATE else z, t, inside, GATE)
        this_g, elapsed = tl.load(dout + at + t, mask=inside, other=0.0), tl.load(starts + row * tiles + tile)
        delta, _ = _steps(this_dt, bias, d, inside, BIAS, SOFTPLUS)
        time = elapsed + tl.cumsum(delta, 0)
        g = this_g.to(tl.float32)
        value = this_y.to(tl.float32)
        slope = tl.zeros([TILE], tl.float32)
        if GATE:
            gate = this_z.to(tl.float32)
            share = 1 / (1 + tl.exp(-gate))
            slope = g * share * (1 + gate * (1 - share))
            g = g * gate * share
            tl.store(dy + at + t, g.to(dy.dtype.element_ty), mask=inside)
        moved = tl.zeros([TILE], tl.float32)
        added = ()
        for i in tl.static_range(0, N // GROUP):
            n = i * GROUP + tl.arange(0, GROUP)
            mine = sums[i]  # type: ignore[var-annotated]
            summed = tl.zeros([GROUP], tl.float32)
            from_start = tl.zeros([GROUP], tl.float32)
            if _alive(a + d * N + i * GROUP, elapsed, GROUP, SOFTPLUS):
                rate = tl.load(a + d * N + n)
                weights = tl.load(c + n[:, None] * TILE)
                h = tl.load(start + row * N + n)
                decay = tl.exp2((rate * _LOG2E)[:, None] * time[None, :])
                if START:
                    from_start = tl.sum(decay * weights * g[None, :], 1)
                decay = decay * h[:, None]
                mine += decay * g[None, :]
                decay = decay * weights
                value += tl.sum(decay, 0)
                moved += tl.sum(decay * rate[:, None], 0)
                if RATES:
                    summed = tl.sum(decay * (g * time)[None, :], 1)
            added += (mine,)  # type: ignore[assignment]
            if RATES:
                tl.store(da + ((wide * tiles + tile) * channels + d) * N + n, summed)
            if START:
                tl.store(dstart + ((tl.cast(tile, tl.int64) * tl.num_programs(2) + b) * channels + d) * N + n, from_start)
        sums = added
        if GATE:
            tl.store(dz + at + t, (slope * value).to(dz.dtype.element_ty), mask=inside)
        tl.store(dtime + at + t, g * moved, mask=inside)
    for i in tl.static_range(0, N // GROUP):
        n = i * GROUP + tl.arange(0, GROUP)
        tl.store(dc + n[:, None] * TILE, sums[i])


@_jit
def _to_steps(
    dtime, dtotal, dt, bias, ddt, dbias, channels, tokens, tiles,
    TILE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of dt, and of bias before the sum over the batch [B, D], from that of elapsed time. Grid: channels, B."""
    d, b = tl.program_id(0), tl.program_id(1)
    row = tl.cast(b, tl.int64) * channels + d
    at = row * tokens
    later = tl.load(dtotal + row)
    sums = tl.zeros([TILE], tl.float32)
    for i in range(0, tiles):
        t = (tiles - 1 - i) * TILE + tl.arange(0, TILE)
        inside = (t < tokens) | EVEN
        moved, this_dt = tl.load(dtime + at + t, mask=inside, other=0.0), tl.load(dt + at + t, mask=inside, other=0.0)
        _, slope = _steps(this_dt, bias, d, inside, BIAS, SOFTPLUS)
        found = (tl.cumsum(moved, 0, reverse=True) + later) * slope
        tl.store(ddt + at + t, found.to(ddt.dtype.element_ty), mask=inside)
        sums += tl.where(inside, found, 0.0)
        later += tl.sum(moved, 0)
    if BIAS:
        tl.store(dbias + row, tl.sum(sums, 0))


# --- launching them ---


def _tile(launch: Launch, size: int) -> int:
    """Tokens of a tile."""
    return 32 * launch.warps * max(1, min(4, _ELEMENTS // size))


def _float(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _in_tiles(c: Tensor, tile: int) -> Tensor:
    """float32 [B, tiles, N, tile], zeros past the last token: what a program reads at a time lies together."""
    return _float(nn.functional.pad(c, (0, -c.shape[2] % tile)).unflatten(2, (-1, tile)).transpose(1, 2))


class _AddCarried(torch.autograd.Function):
    """See `add_carried`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, dt: Tensor, a: Tensor, c: Tensor, start: Tensor, z: Tensor | None, bias: Tensor | None, softplus: bool, launch: Launch
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = [None if x is None else x.dtype for x in (a, c, start, bias)]
        y, dt, z = y.contiguous(), dt.contiguous(), None if z is None else z.contiguous()
        (batch, channels, tokens), size = y.shape, a.shape[1]
        tile = _tile(launch, size)
        tiles = -(-tokens // tile)
        a, c, start, bias = _float(a), _in_tiles(c, tile), _float(start), None if bias is None else _float(bias)
        keep = any(ctx.needs_input_grad)
        out, total = torch.empty_like(y), a.new_empty(batch, channels)
        starts = a.new_empty(batch, channels, tiles) if keep else None
        ctx.constants = {
            "TILE": tile, "BIAS": bias is not None, "SOFTPLUS": softplus, "EVEN": tokens % tile == 0, "num_warps": launch.warps, "num_stages": 1
        }  # fmt: skip
        _forward[channels, batch](
            y, dt, z, a, c, start, bias, out, starts, total, channels, tokens, tiles,
            N=size, GROUP=min(launch.group, size), GATE=z is not None, KEEP=keep, **ctx.constants,
        )  # fmt: skip
        ctx.save_for_backward(y, dt, z, a, c, start, bias, starts)
        ctx.launch = launch
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, dt, z, a, c, start, bias, starts = ctx.saved_tensors
        (batch, channels, tokens), size, tiles = y.shape, a.shape[1], starts.shape[2]
        count = min(ctx.launch.channels, max(_FEWEST, channels * batch * tiles // _PROGRAMS))
        blocks = -(-channels // count)
        dout, gated = dout.contiguous(), z is not None
        dy, dz = (torch.empty_like(y), torch.empty_like(z)) if gated else (dout, None)
        dtime, dc = torch.empty_like(y, dtype=torch.float32), a.new_empty(blocks, *c.shape)
        da = a.new_empty(batch * tiles, channels, size) if ctx.needs_input_grad[2] else None
        dstart = a.new_empty(tiles, *start.shape) if ctx.needs_input_grad[4] else None
        _backward[tiles, blocks, batch](
            dout, y, dt, z, a, c, start, bias, starts, dy, dz, dtime, da, dc, dstart, channels, tokens, tiles, count,
            N=size, GROUP=min(ctx.launch.group_back, size), GATE=gated, RATES=da is not None, START=dstart is not None, **ctx.constants,
        )  # fmt: skip
        ddt, dbias = torch.empty_like(dt), None if bias is None else a.new_empty(batch, channels)
        _to_steps[channels, batch](dtime, dtotal.contiguous(), dt, bias, ddt, dbias, channels, tokens, tiles, **ctx.constants)
        dc = dc.sum(0).transpose(1, 2).flatten(2)[..., :tokens]
        da, dstart, dbias = (None if x is None else x.sum(0) for x in (da, dstart, dbias))
        da, dc, dstart, dbias = (None if x is None else x.to(dtype) for x, dtype in zip((da, dc, dstart, dbias), ctx.dtypes, strict=True))
        return dy, ddt, da, dc, dstart, dz, dbias, None, None


def add_carried(
    y: Tensor, dt: Tensor, a: Tensor, c: Tensor, start: Tensor, z: Tensor | None = None, delta_bias: Tensor | None = None,
    delta_softplus: bool = False, launch: Launch = LAUNCHES[0],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan outputs y from zeros, completed by what an initial state adds, and gated.

    Args:
        y, dt, z: [batch, channels, tokens] in single or half precision; y before the gate.
        a: [channels, state], real. c: [batch, state, tokens]. delta_bias: [channels].
        start: [batch, channels, state].

    Returns:
        (y + ..) silu(z), in y's dtype; and the sum of the steps, float32 [batch, channels]. Both have gradients.
    """
    found: tuple[Tensor, Tensor] = _AddCarried.apply(y, dt, a, c, start, z, delta_bias, delta_softplus, launch)  # type: ignore[no-untyped-call]
    return found
