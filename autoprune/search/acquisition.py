"""How much hypervolume a policy can be expected to add, from independent normal beliefs about its two objectives."""

import itertools
import math

import torch
from torch import Tensor

from autoprune.search.front import Point, non_dominated

Belief = tuple[Tensor, Tensor]


def expected_improvement(latency: Belief, loss: Belief, *, points: list[Point], window: tuple[float, float]) -> Tensor:
    """Returns the expected hypervolume a candidate adds to `points`, both objectives minimised, below dense latency (0) and
    between two levels of loss (low, high).

    Beliefs are mean and standard deviation [m]. Exact: at a level of loss the best latency so far is that of one point of
    the front, so the area splits into strips in which height and width are independent expected shortfalls.
    """
    low, high = window
    front = [point for point in non_dominated(points, lambda point: point) if point[0] < 0][::-1]
    edges = [min(max(level, low), high) for level in (-math.inf, *(point[1] for point in front), math.inf)]
    best = [0.0, *(point[0] for point in front)]
    improvement = torch.zeros_like(latency[0])
    for (floor, ceiling), rival in zip(itertools.pairwise(edges), best, strict=True):
        if floor < ceiling:
            improvement += shortfall(latency, rival) * (shortfall(loss, ceiling) - shortfall(loss, floor))
    return improvement


def shortfall(belief: Belief, level: float) -> Tensor:
    """Returns E[max(0, level - value)] [m]."""
    mean, deviation = belief
    if level == -math.inf:
        return torch.zeros_like(mean)
    z = (level - mean) / deviation
    return (level - mean) * torch.special.ndtr(z) + deviation * (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)


def probability_below(belief: Belief, level: float) -> Tensor:
    """Returns P(value <= level) [m]."""
    return torch.special.ndtr((level - belief[0]) / belief[1])
