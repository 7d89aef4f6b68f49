"""Confidence intervals."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Z95 = 1.959963984540054


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927)."""
    if trials == 0:
        return 0.0, 1.0
    p, z2 = successes / trials, Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # At 0 and 1 the formula ends exactly there; rounding must not push it outside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def paired_shares(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the difference of two proportions of the same trials (Newcombe 1998, method 10).

    Unlike a bootstrap it does not shrink to a point where all pairs agree.

    Args:
        first, second: 1 for a hit, 0 for a miss, trial by trial.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    n, p, q = len(a), a.mean(), b.mean()
    both, neither, only_a, only_b = (int(x.sum()) for x in (a & b, ~a & ~b, a & ~b, ~a & b))
    spread = math.sqrt(float(a.sum()) * float((~a).sum()) * float(b.sum()) * float((~b).sum()))
    product = both * neither - only_a * only_b
    corrected = max(product - n / 2, 0) if product > 0 else product
    phi = corrected / spread if spread else 0.0
    (low_a, high_a), (low_b, high_b) = wilson(int(a.sum()), n), wilson(int(b.sum()), n)

    def half(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return float(p - q - half(p - low_a, high_b - q)), float(p - q + half(high_a - p, q - low_b))


def bootstrap(statistic: Callable[[np.ndarray], float], clusters: Sequence[object], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval, resampling whole clusters.

    Args:
        statistic: a number from the indices of the resampled observations.
        clusters: the cluster of each observation (its document): observations of one cluster are drawn together.
        seed, draws: of the resampling.

    Returns:
        The interval; NaN, NaN if there are fewer than two clusters, which say nothing about the next one.
    """
    rng = np.random.default_rng(seed)
    members: dict[object, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    groups = [np.array(indices) for indices in members.values()]
    if len(groups) < 2:
        return math.nan, math.nan
    values = [statistic(np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_means(values: np.ndarray, clusters: Sequence[object], seed: int = 0, draws: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """As `bootstrap`, of the mean of each column of `values` [observations, columns], all at once."""
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return np.full(values.shape[1], math.nan), np.full(values.shape[1], math.nan)
    sums, counts = np.zeros((len(names), values.shape[1])), np.bincount(member)
    np.add.at(sums, member, values)
    taken = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)  # how often each cluster is
    low, high = np.percentile(taken @ sums / (taken @ counts)[:, None], [2.5, 97.5], axis=0)
    return low, high
