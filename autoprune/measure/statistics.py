"""95 % intervals and p-values of paired measurements, and Holm's correction where several policies are looked at.

Published drops without pairs or intervals are mostly noise at a few hundred prompts. The unit is the prompt: prompts are
distinct and give one image each, so images are independent given the policies.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

Z95 = 1.959963984540054
Interval = tuple[float, float]


def paired_interval(dense: np.ndarray, pruned: np.ndarray) -> Interval:
    """Returns the 95 % interval of mean(dense - pruned) for scores [n] of the same prompts.

    Right/wrong scores get Tango's interval, which stays honest when no pair differs; other scores a bootstrap.
    """
    flips = score_flips(dense, pruned)
    if flips is not None:
        return tango_interval(*flips, pairs=len(dense))
    return bootstrap_interval(np.asarray(dense, dtype=float) - np.asarray(pruned, dtype=float))


def score_flips(dense: np.ndarray, pruned: np.ndarray) -> tuple[int, int] | None:
    """Returns how many prompts [n] were lost (right to wrong) and gained; None for scores that are not all right or wrong."""
    dense, pruned = np.asarray(dense, dtype=float), np.asarray(pruned, dtype=float)
    if not set(np.unique(dense)) | set(np.unique(pruned)) <= {0.0, 1.0}:
        return None
    return int((dense > pruned).sum()), int((dense < pruned).sum())


def mcnemar_p(lost: int, gained: int) -> float:
    """Returns the exact two-sided p-value of no difference (McNemar, Psychometrika 12, 1947): flips are fair coins then."""
    flips = lost + gained
    tail = sum(math.comb(flips, count) for count in range(min(lost, gained) + 1)) / 2**flips
    return min(1.0, 2 * tail)


def tango_p(lost: int, gained: int, *, pairs: int, limit: float) -> float:
    """Returns the one-sided p-value of a paired drop above `limit`, by the statistic behind tango_interval."""
    return _normal_tail(-_tango_statistic(lost, gained, pairs, limit))


def interval_p(estimate: float, interval: Interval, *, limit: float) -> float:
    """Returns the one-sided p-value of a mean above `limit`, from its estimate and 95 % interval.

    The standard error is the upper half of the interval over 1.96 (Altman and Bland, BMJ 343, 2011).
    """
    error = (interval[1] - estimate) / Z95
    if error <= 0:
        return 0.0 if estimate <= limit else 1.0
    return _normal_tail((limit - estimate) / error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns adjusted p-values: rejecting those at most alpha errs anywhere with probability alpha at most.

    Holm, Scandinavian Journal of Statistics 6 (1979); holds for dependent tests too, such as policies on the same prompts.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def tango_interval(lost: int, gained: int, *, pairs: int) -> Interval:
    """Returns the 95 % score interval of a difference of paired proportions, (lost - gained) / pairs.

    Tango, Statistics in Medicine 17 (1998). It contains 0 exactly when McNemar's test without correction does not reject.
    """

    def excess(difference: float) -> float:
        return _tango_statistic(lost, gained, pairs, difference)

    estimate = (lost - gained) / pairs
    low = -1.0 if estimate <= -1 else _root(lambda d: excess(d) - Z95, -1.0, estimate)
    high = 1.0 if estimate >= 1 else _root(lambda d: excess(d) + Z95, estimate, 1.0)
    return low, high


def bootstrap_interval(differences: np.ndarray, *, resamples: int = 4000, seed: int = 0) -> Interval:
    """Returns the 95 % percentile-bootstrap interval of the mean of paired differences [n]."""
    differences = np.asarray(differences, dtype=float)
    return _percentiles(_shares(len(differences), resamples, seed) @ differences)


def ratio_interval(dense: Sequence[float], pruned: Sequence[float], *, resamples: int = 4000, seed: int = 0) -> Interval:
    """Returns the 95 % percentile-bootstrap interval of median(dense) / median(pruned) over interleaved rounds [n].

    A round is resampled as a whole: what slows the machine for a while slows both.
    """
    picks = np.random.default_rng(seed).integers(0, len(dense), (resamples, len(dense)))
    above, below = (np.median(np.asarray(seconds)[picks], axis=1) for seconds in (dense, pruned))
    return _percentiles(above / below)


def median_and_spread(samples: list[float] | tuple[float, ...]) -> tuple[float, float]:
    """Returns the median and half the interquartile range."""
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return float(median), float(high - low) / 2


def _percentiles(samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(low), float(high)


@lru_cache(maxsize=4)
def _shares(count: int, resamples: int, seed: int) -> np.ndarray:
    """Returns what share of each resample every one of `count` items is, [resamples, count]: the same for all policies."""
    picks = np.random.default_rng(seed).integers(0, count, (resamples, count))
    flat = (picks + count * np.arange(resamples)[:, None]).ravel()
    return (np.bincount(flat, minlength=resamples * count) / count).reshape(resamples, count)


def _normal_tail(z: float) -> float:
    """Returns the probability that a standard normal variable is above z."""
    return math.erfc(z / math.sqrt(2)) / 2


def _tango_statistic(lost: int, gained: int, pairs: int, difference: float) -> float:
    """Returns the score statistic of `difference`, with the nuisance probability at its constrained maximum."""
    a = 2 * pairs
    b = -lost - gained + (2 * pairs - lost + gained) * difference
    c = -gained * difference * (1 - difference)
    nuisance = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = pairs * (2 * nuisance + difference * (1 - difference))
    distance = lost - gained - pairs * difference
    if variance <= 1e-15:
        return math.copysign(math.inf, distance) if abs(distance) > 1e-12 else 0.0
    return distance / math.sqrt(variance)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Bisects a decreasing function between `low` and `high`."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
