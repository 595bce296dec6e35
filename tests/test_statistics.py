"""Intervals against scipy and against naive versions of their definitions."""

from itertools import combinations

import numpy as np
import pytest
from scipy import optimize, stats

from autoprune.measure.statistics import (
    bootstrap_interval,
    holm,
    interval_p,
    mcnemar_p,
    median_and_spread,
    paired_interval,
    ratio_interval,
    score_flips,
    tango_interval,
    tango_p,
)


def score_statistic(lost: int, gained: int, pairs: int, difference: float) -> float:
    """Tango's statistic with the nuisance probability found by maximising the trinomial likelihood numerically."""

    def negative(q: float) -> float:
        both = 1 - 2 * q - difference
        terms = ((lost, q + difference), (gained, q), (pairs - lost - gained, both))
        return -sum(count * np.log(max(p, 1e-300)) for count, p in terms)

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (lost - gained - pairs * difference) / np.sqrt(pairs * (2 * q + difference - difference**2))


@pytest.mark.parametrize(("lost", "gained", "pairs"), [(4, 1, 48), (7, 0, 112), (3, 9, 60), (1, 1, 20), (30, 2, 40)])
def test_tango_bounds_are_where_the_score_statistic_reaches_the_normal_quantile(lost: int, gained: int, pairs: int) -> None:
    low, high = tango_interval(lost, gained, pairs=pairs)
    z = stats.norm.ppf(0.975)
    assert score_statistic(lost, gained, pairs, low) == pytest.approx(z, abs=1e-3)
    assert score_statistic(lost, gained, pairs, high) == pytest.approx(-z, abs=1e-3)


@pytest.mark.parametrize("lost", range(9))
@pytest.mark.parametrize("gained", range(4))
def test_tango_contains_zero_exactly_when_mcnemar_does_not_reject(lost: int, gained: int) -> None:
    low, high = tango_interval(lost, gained, pairs=100)
    statistic = (lost - gained) ** 2 / max(lost + gained, 1)
    assert (low <= 0 <= high) == (stats.chi2.sf(statistic, 1) >= 0.05)


def test_no_differing_pair_still_leaves_doubt_and_more_pairs_leave_less() -> None:
    low, high = tango_interval(0, 0, pairs=50)
    assert low == pytest.approx(-high) and high == pytest.approx(
        stats.norm.ppf(0.975) ** 2 / (50 + stats.norm.ppf(0.975) ** 2), rel=1e-6
    )
    assert tango_interval(0, 0, pairs=500)[1] < high


def test_tango_is_antisymmetric_and_bounded() -> None:
    low, high = tango_interval(5, 2, pairs=30)
    assert tango_interval(2, 5, pairs=30) == pytest.approx((-high, -low))
    assert tango_interval(10, 0, pairs=10)[1] == 1.0


def test_tango_covers_the_truth_about_95_percent_of_the_time() -> None:
    rng, truth = np.random.default_rng(0), 0.05 - 0.02
    draws = rng.multinomial(112, [0.05, 0.02, 0.93], size=1500)
    covered = [low <= truth <= high for low, high in (tango_interval(int(b), int(c), pairs=112) for b, c, _ in draws)]
    assert 0.93 <= np.mean(covered) <= 0.985


def test_bootstrap_agrees_with_scipy() -> None:
    differences = np.random.default_rng(1).normal(0.1, 0.5, 80)
    reference = stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=20000, random_state=2)
    assert bootstrap_interval(differences) == pytest.approx(tuple(reference.confidence_interval), abs=0.01)


def test_paired_interval_takes_tango_for_right_or_wrong_and_bootstrap_otherwise() -> None:
    dense, pruned = np.array([1.0, 1, 1, 0, 1] * 8), np.array([1.0, 1, 0, 1, 1] * 8)
    assert paired_interval(dense, pruned) == tango_interval(8, 8, pairs=40)
    soft = pruned * 0.7
    assert paired_interval(dense, soft) == bootstrap_interval(dense - soft)


def test_median_and_spread_are_numpys() -> None:
    samples = [3.0, 1.0, 2.0, 10.0]
    assert median_and_spread(samples) == (2.5, (np.percentile(samples, 75) - np.percentile(samples, 25)) / 2)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (4, 1), (3, 9), (7, 7), (30, 12)])
def test_mcnemar_is_the_exact_binomial_test_of_flips(lost: int, gained: int) -> None:
    reference = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(reference)


@pytest.mark.parametrize(("lost", "gained", "pairs"), [(0, 0, 40), (4, 1, 48), (19, 0, 160), (3, 9, 60)])
def test_the_tango_interval_ends_where_its_p_value_is_a_half_of_5_percent(lost: int, gained: int, pairs: int) -> None:
    _, high = tango_interval(lost, gained, pairs=pairs)
    assert tango_p(lost, gained, pairs=pairs, limit=high) == pytest.approx(0.025, abs=1e-6)
    assert tango_p(lost, gained, pairs=pairs, limit=high + 0.02) < 0.025 < tango_p(lost, gained, pairs=pairs, limit=high - 0.02)
    assert tango_p(lost, gained, pairs=pairs, limit=1.0) == 0


def test_the_p_value_of_an_interval_is_that_of_a_t_test_at_many_prompts() -> None:
    losses = np.random.default_rng(3).gamma(4, 0.02, 400)
    reference = stats.ttest_1samp(losses, 0.087, alternative="less").pvalue
    assert interval_p(losses.mean(), bootstrap_interval(losses), limit=0.087) == pytest.approx(reference, rel=0.15)
    assert interval_p(0.05, (0.05, 0.05), limit=0.05) == 0 and interval_p(0.06, (0.06, 0.06), limit=0.05) == 1


@pytest.mark.parametrize("seed", range(4))
def test_holm_is_the_closed_test_of_bonferroni_over_every_subset(seed: int) -> None:
    p_values = np.random.default_rng(seed).choice([0.001, 0.01, 0.012, 0.02, 0.04, 0.3, 0.9], 6)
    subsets = [subset for size in range(1, 7) for subset in combinations(range(6), size)]
    closed = [
        max(min(1.0, len(subset) * p_values[list(subset)].min()) for subset in subsets if index in subset) for index in range(6)
    ]
    assert holm(p_values.tolist()) == pytest.approx(closed)
    assert holm([]) == [] and holm([0.2]) == [0.2]


def test_flips_are_counted_for_right_or_wrong_scores_only() -> None:
    dense, pruned = np.array([1.0, 1, 1, 0, 0]), np.array([1.0, 0, 0, 1, 0])
    assert score_flips(dense, pruned) == (2, 1) and score_flips(dense, pruned * 0.5) is None


def test_the_speed_up_interval_covers_the_truth_when_slow_spells_hit_both_sides() -> None:
    rng, covered, widths = np.random.default_rng(0), [], []
    for _ in range(200):
        slow = rng.choice([1.0, 1.6], 12, p=[0.7, 0.3])
        dense, pruned = (median * slow * rng.lognormal(0, 0.02, 12) for median in (1.0, 0.5))
        low, high = ratio_interval(dense, pruned, resamples=1000)
        covered.append(low <= 2 <= high)
        widths.append(high - low)
    assert np.mean(covered) >= 0.9 and np.median(widths) < 0.15
