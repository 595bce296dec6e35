"""How much hypervolume a policy can be expected to add, from independent normal beliefs about its two objectives."""

import math

import torch
from torch import Tensor

from autoprune.search.front import Point, non_dominated

Belief = tuple[Tensor, Tensor]


def expected_improvement(first: Belief, second: Belief, *, points: list[Point], reference: Point) -> Tensor:
    """Returns the expected hypervolume a candidate adds to `points`, both objectives minimised, below `reference`.

    Beliefs are mean and standard deviation [m]. Exact: the area splits into strips between neighbouring points of
    the front, and in each strip width and height are independent expected shortfalls.
    """
    front = [point for point in non_dominated(points, lambda point: point) if point[0] < reference[0]]
    edges = [-math.inf, *(point[0] for point in front), reference[0]]
    ceilings = [reference[1], *(min(point[1], reference[1]) for point in front)]
    improvement = torch.zeros_like(first[0])
    for left, right, ceiling in zip(edges, edges[1:], ceilings, strict=False):
        improvement += (shortfall(first, right) - shortfall(first, left)) * shortfall(second, ceiling)
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
