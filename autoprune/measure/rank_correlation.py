"""How alike two measures rank a dozen policies: Spearman's and Kendall's coefficients, with bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autoprune.measure.statistics import Interval


@dataclass(frozen=True)
class RankCorrelation:
    """A coefficient in [-1, 1] with its 95 % interval; both None where one of the measures is the same for every policy."""

    value: float | None
    interval: Interval | None


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns Spearman's rho of values [..., n], ties sharing their mean rank; NaN where one side is constant."""
    return _cosine(_orders(x).sum(axis=-1), _orders(y).sum(axis=-1))


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns Kendall's tau-b of values [..., n] (Kendall, Biometrika 33, 1945); NaN where one side is constant."""
    flat = (*np.shape(x)[:-1], -1)
    return _cosine(_orders(x).reshape(flat), _orders(y).reshape(flat))


def correlated(
    coefficient: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray, *, resamples: int = 2000
) -> RankCorrelation:
    """Returns a coefficient of values [n] of the same policies with its percentile-bootstrap interval, seed 0.

    Resamples in which one side is constant say nothing and are left out.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    value = float(coefficient(x, y))
    if np.isnan(value):
        return RankCorrelation(None, None)
    picks = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    low, high = np.nanquantile(coefficient(x[picks], y[picks]), (0.025, 0.975))
    return RankCorrelation(value, (float(low), float(high)))


def _orders(values: np.ndarray) -> np.ndarray:
    """Returns the sign of every difference, [..., n, n]; a row's sum is twice the centred mean rank."""
    return np.sign(np.expand_dims(values, -1) - np.expand_dims(values, -2))


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    norm = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)
