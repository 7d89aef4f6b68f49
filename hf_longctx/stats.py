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


def bootstrap(statistic: Callable[[np.ndarray], float], clusters: Sequence[object], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval, resampling whole clusters.

    Args:
        statistic: a number from the indices of the resampled observations.
        clusters: the cluster of each observation (its document): observations of one cluster are drawn together.
        seed, draws: of the resampling.
    """
    rng = np.random.default_rng(seed)
    members: dict[object, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    groups = [np.array(indices) for indices in members.values()]
    values = [statistic(np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
