"""A fresh point when the sampler repeats itself: one to three dimensions of a front member changed, or any."""

from collections.abc import Container, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from autoprune.search.space import SearchSpace, Vector

TRIES = 200
NEAR_SHARE = 2 / 3  # the rest is drawn anywhere: a sampler that repeats itself has stopped exploring


def unseen_neighbour(
    space: SearchSpace, front: Sequence[Vector], *, known: Container[str], seed: int
) -> dict[str, float | int | str] | None:
    """Returns a vector whose policy is not `known` (policy keys), mostly near a vector of the front.

    None when TRIES draws found nothing new: the space is nearly exhausted.
    """
    rng, flat = np.random.default_rng(seed), space.distributions()
    for _ in range(TRIES):
        if front and rng.random() < NEAR_SHARE:
            vector = dict(front[rng.integers(len(front))])
            for name in rng.choice(list(flat), size=rng.integers(1, min(4, len(flat) + 1)), replace=False):
                vector[name] = _draw(flat[name], rng)
        else:
            vector = {name: _draw(distribution, rng) for name, distribution in flat.items()}
        if space.policy(vector).key() not in known:
            return vector
    return None


def _draw(distribution: BaseDistribution, rng: np.random.Generator) -> float | int | str:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[rng.integers(len(distribution.choices))]
    steps = round((distribution.high - distribution.low) / distribution.step)
    value = distribution.low + distribution.step * int(rng.integers(steps + 1))
    return int(value) if isinstance(distribution.low, int) else min(round(value, 9), distribution.high)
