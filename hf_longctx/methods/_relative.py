"""What several relative position biases share: slopes per head, T5's buckets, KERPLE's kernel. No torch at import."""

import math
from bisect import bisect_right
from random import Random
from typing import TYPE_CHECKING

from hf_longctx.method import require

if TYPE_CHECKING:
    from torch import Tensor


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8h/n) for h = 1..n, n the largest power of two within `heads`; then every other slope of 2n heads."""
    n = 1 << (heads.bit_length() - 1)
    return [2 ** (-8 * h / n) for h in range(1, n + 1)] + [2 ** (-8 * h / (2 * n)) for h in range(1, 2 * (heads - n), 2)]


def head_slopes(slopes: tuple[float, ...] | None, heads: int, where: str) -> list[float]:
    """The user's slopes, one a head, or ALiBi's."""
    if slopes is None:
        return alibi_slopes(heads)
    require(len(slopes) == heads, f"{where}: {len(slopes)} slopes for a model of {heads} heads; give one a head, or leave slopes out")
    return list(slopes)


def require_slopes(slopes: tuple[float, ...] | None) -> None:
    """A negative slope would favour far tokens without bound."""
    bad = [s for s in slopes or () if not (math.isfinite(s) and s >= 0)]
    require(not bad, f"slopes must be finite and not negative, got {', '.join(str(s) for s in bad)}")


def require_buckets(buckets: int, max_distance: int) -> None:
    """Each bucket holds a distance, and the logarithmic ones span some."""
    require(buckets >= 2, f"buckets must be at least 2, got {buckets}")
    require(max_distance > buckets // 2, f"max_distance must be above buckets / 2, the last distance with a bucket of its own; got {max_distance}")


def t5_buckets(buckets: int, max_distance: int) -> list[int]:
    """The bucket of each distance 0..max_distance; farther ones share the last.

    d below e = buckets // 2, then e + floor(n ln(d/e) / ln(max_distance/e)), n = buckets - e, at most buckets - 1. Whole numbers
    decide the edges: a logarithm rounds on them (ln 8 / ln 2), and differently from one device to the next.
    """
    e, n = buckets // 2, buckets - buckets // 2
    edges = []
    for k in range(1, n):
        edge = int(e * (max_distance / e) ** (k / n)) - 1
        while edge**n * e**k < max_distance**k * e**n:
            edge += 1
        edges.append(edge)
    return [d if d < e else e + bisect_right(edges, d) for d in range(max_distance + 1)]


def t5_lookup(table: "Tensor", bucket: "Tensor", head: "Tensor", distance: "Tensor") -> "Tensor":
    """table[bucket of distance, head], where `bucket` lists `t5_buckets`."""
    return table[bucket[distance.clamp(max=bucket.shape[0] - 1)].long(), head]


def xavier_normal(rows: int, columns: int, rng: Random) -> list[list[float]]:
    """A table of N(0, 2 / (rows + columns))."""
    return [[rng.gauss(0, math.sqrt(2 / (rows + columns))) for _ in range(columns)] for _ in range(rows)]


LEAST = 0.01  # KERPLE's a and p


def kerple_draw(heads: int, rng: Random) -> dict[str, list[float]]:
    """Where KERPLE's code starts: a uniform in [0, 1), p in [0, 2); at least 0.01."""
    return {"a": [max(rng.random(), LEAST) for _ in range(heads)], "p": [max(2 * rng.random(), LEAST) for _ in range(heads)]}


def clamped(value: "Tensor", most: float | None = None) -> "Tensor":
    """`value` within [0.01, most], with the gradient of `value` itself.

    KERPLE's code clamps the stored parameter before each step, so that one at the end of its range can return. A plain clamp
    would give it no gradient there.
    """
    stored = value.detach()
    return stored.clamp(min=LEAST, max=most) + (value - stored)


def log_polynomial(a: "Tensor", p: "Tensor", distance: "Tensor") -> "Tensor":
    """-p log(1 + a d), the logarithm of (1 + a d)^(-p)."""
    return -clamped(p) * (clamped(a) * distance).log1p()
