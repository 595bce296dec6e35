"""What the model sampler believes: Gaussian processes of log latency, loss and the worst constraint, and what they expect."""

import math

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from autoprune.search.acquisition import expected_improvement, probability_below
from autoprune.search.front import reference_of
from autoprune.search.gaussian_process import GaussianProcess
from autoprune.search.history import Told, best
from autoprune.search.knobs import Vector

WINDOW = 0.2  # of the losses below the reference

Parameters = list[np.ndarray]


class Beliefs:
    """Fitted to told trials. Trials without values teach the constraint only.

    `parameters` are those of an earlier fit (`parameters`); without, hyperparameters are fitted too, nearly all of the cost.
    """

    def __init__(self, told: list[Told], flat: dict[str, BaseDistribution], parameters: Parameters | None = None) -> None:
        self._flat = flat
        rows = coordinates([trial.vector for trial in told], flat)
        valued = np.array([trial.point is not None for trial in told])
        latency, loss = np.array([trial.point for trial in told if trial.point is not None]).T
        samples = ((rows[valued], latency), (rows[valued], loss), (rows, _limited([trial.constraint for trial in told])))
        given = parameters or [None] * len(samples)
        self._processes = [GaussianProcess(*sample, fit) for sample, fit in zip(samples, given, strict=True)]
        self._points = [trial.point for trial in best(told)]
        points = [trial.point for trial in told if trial.feasible] or list(zip(latency, loss, strict=True))
        _, self._highest = reference_of(points)
        self._lies = [values.max() for _, values in samples]

    @property
    def parameters(self) -> Parameters:
        """Returns the hyperparameters of the three processes."""
        return [process.parameters for process in self._processes]

    def expect(self, running: list[Vector], pending: str) -> None:
        """Takes running vectors as told: with what is believed of them (`believer`) or the worst values told (`liar`)."""
        if not running or pending == "none":
            return
        rows = coordinates(running, self._flat)
        values = [process.mean(rows) for process in self._processes]
        if pending == "liar":
            values = [np.full(len(rows), lie) for lie in self._lies]
        for process, expected in zip(self._processes, values, strict=True):
            process.tell(rows, expected)
        latency, loss, constraint = values
        kept = constraint <= 0
        self._points += zip(latency[kept], loss[kept], strict=True)

    def window(self, rng: np.random.Generator) -> tuple[float, float]:
        """Returns the levels of loss between which the front is to gain: in half of all asks every one, else WINDOW of them."""
        if rng.random() < 0.5:
            return -math.inf, self._highest
        low = rng.uniform(0, 1 - WINDOW) * self._highest
        return low, low + WINDOW * self._highest

    def gain(self, vectors: list[Vector], window: tuple[float, float]) -> np.ndarray:
        """Returns the expected hypervolume gained in a window of losses times the probability of keeping the constraint [m]."""
        rows = coordinates(vectors, self._flat)
        latency, loss, constraint = (process.predict(rows) for process in self._processes)
        return expected_improvement(latency, loss, points=self._points, window=window) * probability_below(constraint, 0.0)


def coordinates(vectors: list[Vector], flat: dict[str, BaseDistribution]) -> np.ndarray:
    """Returns vectors [m, d]: a number as its place in the range, a choice as one coordinate each."""
    return np.concatenate([_columns([vector[name] for vector in vectors], each) for name, each in flat.items()], axis=1)


def _columns(values: list, distribution: BaseDistribution) -> np.ndarray:
    if isinstance(distribution, CategoricalDistribution):
        places = {choice: place for place, choice in enumerate(distribution.choices)}
        return np.eye(len(places))[[places[value] for value in values]]
    return (np.array(values, dtype=np.float64)[:, None] - distribution.low) / (distribution.high - distribution.low)


def _limited(constraints: list[float]) -> np.ndarray:
    """Returns constraints [n] of which none is broken by more than the safest trial keeps it.

    Memory is missed by hundreds, a loss by hundredths: beside those, all that is near the limit would look alike.
    """
    values = np.array(constraints)
    return values.clip(max=-values.min()) if values.min() < 0 else values
