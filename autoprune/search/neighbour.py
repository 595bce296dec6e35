"""Vectors drawn at random and near others: what the model sampler chooses from, and what replaces a repeated ask."""

from collections.abc import Container, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from autoprune.search.space import SearchSpace, Vector

TRIES = 200
USED_SHARE = 0.8
NEAR_SHARE = 2 / 3  # the rest is drawn anywhere: a sampler that repeats itself has stopped exploring


def random_vector(space: SearchSpace, rng: np.random.Generator) -> Vector:
    """Returns a vector drawn uniformly."""
    return {name: _draw(distribution, rng) for name, distribution in space.distributions.items()}


def mutated(space: SearchSpace, vector: Vector, rng: np.random.Generator) -> Vector:
    """Returns the vector with one to three dimensions drawn anew, mostly of those that its policy uses."""
    flat = space.distributions
    used = space.used(vector) if rng.random() < USED_SHARE else frozenset(flat)
    names = [name for name in flat if name in used] or list(flat)
    names = rng.choice(names, size=rng.integers(1, min(4, len(names) + 1)), replace=False)
    return {**vector, **{name: _draw(flat[name], rng) for name in names}}


def crossed(first: Vector, second: Vector, rng: np.random.Generator) -> Vector:
    """Returns the first vector with each dimension taken from the second with even odds."""
    return {name: second[name] if rng.random() < 0.5 else value for name, value in first.items()}


def unseen_neighbour(space: SearchSpace, front: Sequence[Vector], *, known: Container[str], seed: int) -> Vector | None:
    """Returns a vector whose policy is not `known` (policy keys), mostly near a vector of the front.

    None when TRIES draws found nothing new: the space is nearly exhausted.
    """
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        near = front and rng.random() < NEAR_SHARE
        vector = mutated(space, front[rng.integers(len(front))], rng) if near else random_vector(space, rng)
        if space.policy(vector).key() not in known:
            return vector
    return None


def _draw(distribution: BaseDistribution, rng: np.random.Generator) -> float | int | str:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[rng.integers(len(distribution.choices))]
    steps = round((distribution.high - distribution.low) / distribution.step)
    value = distribution.low + distribution.step * int(rng.integers(steps + 1))
    return int(value) if isinstance(distribution.low, int) else min(round(value, 9), distribution.high)
