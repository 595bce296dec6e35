"""Vectors drawn at random and near others: what the model sampler chooses from, and what replaces a repeated ask."""

from collections.abc import Collection, Container, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from autoprune.search.space import SearchSpace, Vector

TRIES = 200
USED_SHARE = 0.8
NEAR_SHARE = 2 / 3  # the rest is drawn anywhere: a sampler that repeats itself has stopped exploring


def random_vector(space: SearchSpace, rng: np.random.Generator) -> Vector:
    """Returns a vector drawn uniformly."""
    places = rng.random(len(space.distributions)).tolist()
    pairs = zip(space.distributions.items(), places, strict=True)
    return {name: _at(distribution, place) for (name, distribution), place in pairs}


def mutated(space: SearchSpace, vector: Vector, rng: np.random.Generator, *, used: Collection[str] | None = None) -> Vector:
    """Returns the vector with one to three dimensions drawn anew, mostly of those that its policy uses (`used`, if known)."""
    flat = space.distributions
    of = (space.used(vector) if used is None else used) if rng.random() < USED_SHARE else flat
    names = [name for name in flat if name in of] or list(flat)
    drawn = rng.permutation(len(names))[: rng.integers(1, min(4, len(names) + 1))].tolist()
    return {**vector, **{names[index]: _at(flat[names[index]], rng.random()) for index in drawn}}


def crossed(first: Vector, second: Vector, rng: np.random.Generator) -> Vector:
    """Returns the first vector with each dimension taken from the second with even odds."""
    taken = (rng.random(len(first)) < 0.5).tolist()
    return {name: second[name] if take else value for (name, value), take in zip(first.items(), taken, strict=True)}


def joined(first: Vector, second: Vector, neutral: Vector) -> Vector:
    """Returns the first vector with every decision of the second, a normal one: what it has that is not neutral."""
    return {name: value if second[name] == neutral[name] else second[name] for name, value in first.items()}


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


def _at(distribution: BaseDistribution, place: float) -> float | int | str:
    """Returns the value at a place in [0, 1) of all that the distribution has, each as wide as the others."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(place * len(distribution.choices))]
    steps = round((distribution.high - distribution.low) / distribution.step)
    value = distribution.low + distribution.step * int(place * (steps + 1))
    return value if isinstance(distribution.low, int) else min(round(value, 9), distribution.high)
