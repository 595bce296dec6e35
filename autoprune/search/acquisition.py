"""How much hypervolume a policy can be expected to add, from independent normal beliefs about its two objectives."""

import math

import numpy as np
from scipy.special import ndtr

from autoprune.search.front import Point, non_dominated

Belief = tuple[np.ndarray, np.ndarray]


def expected_improvement(latency: Belief, loss: Belief, *, points: list[Point], window: tuple[float, float]) -> np.ndarray:
    """Returns the expected hypervolume a candidate adds to `points`, both objectives minimised, below dense latency (0) and
    between two levels of loss (low, high).

    Beliefs are mean and standard deviation [m]. Exact: at a level of loss the best latency so far is that of one point of
    the front, so the area splits into strips in which height and width are independent expected shortfalls.
    """
    front = [point for point in non_dominated(points, lambda point: point) if point[0] < 0][::-1]
    best = np.array([0.0, *(point[0] for point in front)])
    edges = np.clip([-math.inf, *(point[1] for point in front), math.inf], *window)
    heights = np.diff(shortfall(loss, edges), axis=0)
    return (shortfall(latency, best) * heights).sum(0)


def shortfall(belief: Belief, levels: np.ndarray) -> np.ndarray:
    """Returns E[max(0, level - value)] [levels, m], 0 for a level of -inf."""
    mean, deviation = belief
    gap = np.where(np.isfinite(levels), levels, 0.0)[:, None] - mean
    z = gap / deviation
    expected = gap * ndtr(z) + deviation * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return np.where(np.isfinite(levels)[:, None], expected, 0.0)


def probability_below(belief: Belief, level: float) -> np.ndarray:
    """Returns P(value <= level) [m]."""
    return ndtr((level - belief[0]) / belief[1])
