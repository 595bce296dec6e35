"""95 % intervals of a paired drop. Published drops without pairs or intervals are mostly noise at a few hundred prompts."""

import math
from collections.abc import Callable

import numpy as np

Z95 = 1.959963984540054


def paired_interval(dense: np.ndarray, pruned: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of mean(dense - pruned) for scores [n] of the same prompts.

    Right/wrong scores get Tango's interval, which stays honest when no pair differs; other scores a bootstrap.
    """
    dense, pruned = np.asarray(dense, dtype=float), np.asarray(pruned, dtype=float)
    if set(np.unique(dense)) | set(np.unique(pruned)) <= {0.0, 1.0}:
        lost, gained = int(((dense == 1) & (pruned == 0)).sum()), int(((dense == 0) & (pruned == 1)).sum())
        return tango_interval(lost, gained, pairs=len(dense))
    return bootstrap_interval(dense - pruned)


def tango_interval(lost: int, gained: int, *, pairs: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a difference of paired proportions, (lost - gained) / pairs.

    Tango, Statistics in Medicine 17 (1998). It contains 0 exactly when McNemar's test without correction does not reject.
    """

    def excess(difference: float) -> float:
        return _tango_statistic(lost, gained, pairs, difference)

    estimate = (lost - gained) / pairs
    low = -1.0 if estimate <= -1 else _root(lambda d: excess(d) - Z95, -1.0, estimate)
    high = 1.0 if estimate >= 1 else _root(lambda d: excess(d) + Z95, estimate, 1.0)
    return low, high


def bootstrap_interval(differences: np.ndarray, *, resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % percentile-bootstrap interval of the mean of paired differences [n]."""
    differences = np.asarray(differences, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(differences), (resamples, len(differences)))
    low, high = np.quantile(differences[picks].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def median_and_spread(samples: list[float] | tuple[float, ...]) -> tuple[float, float]:
    """Returns the median and half the interquartile range."""
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return float(median), float(high - low) / 2


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
