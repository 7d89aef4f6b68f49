"""Intervals: Wilson and Newcombe against published numbers and by coverage, the bootstrap by whole clusters."""

import math

import numpy as np
import pytest

from hf_longctx.stats import bootstrap, paired_shares, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),  # Newcombe 1998, table I, method 3
    ],
)  # fmt: skip
def test_wilson_gives_the_published_numbers(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_touches_the_ends_and_knows_nothing_without_trials():
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


# --- paired proportions


def pairs(both, only_a, only_b, neither):
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return a, b


@pytest.mark.parametrize("swap", [False, True])
def test_the_paired_interval_holds_its_difference_and_turns_with_it(swap):
    a, b = pairs(20, 12, 2, 16)
    low, high = paired_shares(b, a) if swap else paired_shares(a, b)
    difference = -0.2 if swap else 0.2
    assert low < difference < high
    assert (low > 0) == (not swap)
    assert (high < 0) == swap
    assert paired_shares(b, a) == pytest.approx(tuple(-end for end in reversed(paired_shares(a, b))))


def test_agreement_of_all_pairs_is_not_certainty():
    low, high = paired_shares([1] * 20, [1] * 20)
    assert low == pytest.approx(-high)
    assert 0.05 < high < 0.3
    assert paired_shares([1] * 20, [0] * 20)[0] < 0.9


def test_pairing_narrows_the_interval():
    together, apart = paired_shares(*pairs(25, 3, 2, 20)), paired_shares(*pairs(14, 14, 13, 9))
    assert together[1] - together[0] < 0.7 * (apart[1] - apart[0])


def test_the_paired_interval_covers_what_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        drawn = rng.choice(4, size=60, p=[0.5, 0.2, 0.1, 0.2])  # both, only a, only b, neither
        low, high = paired_shares(np.isin(drawn, (0, 1)), np.isin(drawn, (0, 2)))
        covered += low <= 0.1 <= high
    assert 0.935 <= covered / 1000 <= 0.975  # 0.95 +- 3 standard deviations, and a little: the method is conservative


# --- bootstrap


def mean_of(values):
    return lambda index: float(values[index].mean())


def test_the_bootstrap_is_deterministic():
    values = np.random.default_rng(1).standard_normal(30)
    assert bootstrap(mean_of(values), range(30)) == bootstrap(mean_of(values), range(30))
    assert bootstrap(mean_of(values), range(30)) != bootstrap(mean_of(values), range(30), seed=1)


def test_whole_clusters_are_drawn():
    drawn = []
    clusters = ["a", "a", "b", "a", "c", "c"]
    bootstrap(lambda index: drawn.append(index) or 0.0, clusters, draws=50)
    for index in drawn:
        count = np.bincount(index, minlength=6)
        assert count[0] == count[1] == count[3]
        assert count[4] == count[5]
        assert count[0] + count[2] + count[4] == 3  # as many clusters as there are
    assert len({tuple(sorted(index)) for index in drawn}) > 5


def test_copies_of_an_observation_do_not_narrow_the_interval():
    values = np.random.default_rng(2).standard_normal(20)
    alone = bootstrap(mean_of(values), range(20))
    copied = np.repeat(values, 10)
    assert bootstrap(mean_of(copied), np.repeat(np.arange(20), 10).tolist()) == pytest.approx(alone)
    naive = bootstrap(mean_of(copied), range(200))
    assert naive[1] - naive[0] < 0.5 * (alone[1] - alone[0])


@pytest.mark.parametrize("clusters", [[7], [7, 7, 7]])
def test_one_document_has_no_interval(clusters):
    assert all(map(math.isnan, bootstrap(lambda index: 1.0, clusters)))


def test_a_paired_difference_is_covered():
    """Two models on the same clustered texts: the texts' own spread is large and cancels."""
    rng, covered = np.random.default_rng(3), 0
    clusters = np.repeat(np.arange(30), 4)
    for _ in range(300):
        text = rng.normal(0, 5, 30)[clusters]
        change = 0.3 + rng.normal(0, 0.5, 30)[clusters] + rng.normal(0, 0.3, 120)
        low, high = bootstrap(mean_of((text + change) - text), clusters.tolist(), draws=300)
        covered += low <= 0.3 <= high
        assert high - low < 1  # far below the 5 of the texts
    assert 0.88 <= covered / 300 <= 0.98
