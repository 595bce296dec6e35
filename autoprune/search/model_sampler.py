"""The default sampler: asks for the unseen policy that adds most to the front, as a Gaussian process believes.

Works on policies, not on vectors: dimensions that a policy does not use count as neutral, and no policy is asked twice.
Optuna's own GP sampler sees every inactive dimension and asked known policies in two of three trials of this space.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from autoprune.measure.device import one_torch_thread
from autoprune.search.acquisition import expected_improvement, probability_below
from autoprune.search.faults import broke
from autoprune.search.front import Point, non_dominated, reference_of
from autoprune.search.gaussian_process import GaussianProcess
from autoprune.search.neighbour import crossed, mutated, random_vector
from autoprune.search.space import SearchSpace, Vector

POOL = 400  # candidates of the first round; a second one of half as many looks around the best of them
BEST = 8
FEWEST = 4  # trials with numbers that are modelled, where faults are most of all
WINDOW = 0.2  # of the losses below the reference
KINDS = (0.5, 0.3, 0.2)  # of the candidates: a member changed, two members crossed, anything


@dataclass(frozen=True)
class _Told:
    """What finished trials say: normal vectors, policy keys, (log latency, loss) and the worst constraint.

    `faults` are the normal vectors of trials that ended without numbers (faults.py): points of the constraint's model alone,
    since whatever latency and loss they were given would bend the other two. `keys` are of both.
    """

    vectors: list[Vector]
    keys: frozenset[str]
    points: list[Point]
    constraints: list[float]
    faults: list[Vector]

    def suffices(self, startup: int) -> bool:
        """Returns whether so many trials ended, enough of them with numbers."""
        return len(self.vectors) >= min(startup, FEWEST) and len(self.vectors) + len(self.faults) >= startup

    def violations(self) -> list[float]:
        """Returns the worst constraint of every measured trial, then that of faults: as far out as any other one at either
        side, so that the scale of the model stays that of what was measured."""
        return self.constraints + [max(map(abs, self.constraints)) or 1.0] * len(self.faults)

    def feasible(self) -> list[int]:
        """Returns the numbers of the trials that keep every constraint."""
        return [index for index, worst in enumerate(self.constraints) if worst <= 0]

    def front(self) -> list[int]:
        """Returns the numbers of the feasible trials that no other one beats."""
        return non_dominated(self.feasible(), lambda index: self.points[index])

    def best(self) -> list[Vector]:
        """Returns the vectors of the front."""
        return [self.vectors[index] for index in self.front()]


class ModelSampler(BaseSampler):
    """Unseen changes and crosses of the best told (presets at first) until `startup` trials are told, then the candidate with
    the best expected improvement, in every other ask of a part of the front that is drawn.

    Drawn, because one place would be asked for ever: where a model is unsure of the fastest policy, hundreds that behave like
    it promise the largest hypervolume (of 135 trials of the unified space 80 gave one policy's images).

    Losses are modelled as they are: those of independent decisions about add up, as their log latencies do. Only told trials
    are modelled, so workers that ask at once may ask the same.
    """

    def __init__(self, space: SearchSpace, *, startup: int, seed: int) -> None:
        self._space, self._startup, self._seed = space, startup, seed
        self._fallback = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns every dimension; part of Optuna's sampler interface, as the methods below."""
        return self._space.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, object]:
        rng = np.random.default_rng((self._seed, trial.number))
        told = self._told(study)
        if not told.suffices(self._startup):
            candidates = self._around(told.best() or [random_vector(self._space, rng)], rng)
            return next((vector for vector in self._fresh(candidates, told, POOL) if self._unseen(vector, told)), {})
        with one_torch_thread():
            return self._best(told, rng)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _told(self, study: Study) -> _Told:
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        measured = [trial for trial in trials if not broke(trial.constraints)]
        return _Told(
            vectors=[self._space.normal(trial.params) for trial in measured],
            keys=frozenset(self._space.policy(trial.params).key() for trial in trials),
            points=[(trial.values[0], trial.values[1]) for trial in measured],
            constraints=[max(trial.constraints.values(), default=0.0) for trial in measured],
            faults=[self._space.normal(trial.params) for trial in trials if broke(trial.constraints)],
        )

    def _best(self, told: _Told, rng: np.random.Generator) -> Vector:
        belief = _Beliefs(told, self._space)
        window = belief.window(rng)
        members = told.best() or told.vectors
        first = list(self._fresh(self._around(members, rng), told, POOL))
        if not first:
            return {}
        promising = [first[index] for index in belief.gain(first, window).argsort(descending=True)[:BEST]]
        pool = first + list(self._fresh(self._around(promising, rng), told, POOL // 2))
        ranked = (pool[index] for index in belief.gain(pool, window).argsort(descending=True))
        return next((vector for vector in ranked if self._unseen(vector, told)), {})

    def _around(self, members: list[Vector], rng: np.random.Generator) -> Iterator[Vector]:
        while True:
            first, second = (members[index] for index in rng.integers(len(members), size=2))
            kind = rng.choice(3, p=KINDS)
            if kind == 0:
                yield mutated(self._space, first, rng)
            else:
                yield crossed(first, second, rng) if kind == 1 else random_vector(self._space, rng)

    def _fresh(self, candidates: Iterator[Vector], told: _Told, count: int) -> Iterator[Vector]:
        """Yields up to `count` different normal vectors that were not told."""
        seen = {tuple(vector.values()) for vector in (*told.vectors, *told.faults)}
        for vector in itertools.islice(candidates, 4 * count):
            normal = self._space.normal(vector)
            values = tuple(normal.values())
            if values not in seen:
                seen.add(values)
                yield normal
                count -= 1
                if not count:
                    return

    def _unseen(self, vector: Vector, told: _Told) -> bool:
        """Returns whether the policy is new; vectors that differ may still keep the same tokens."""
        return self._space.policy(vector).key() not in told.keys


class _Beliefs:
    """Gaussian processes of both objectives and of the constraint, fitted to what was told."""

    def __init__(self, told: _Told, space: SearchSpace) -> None:
        self._flat = space.distributions
        inputs = self._inputs(told.vectors)
        latency, loss = torch.tensor(told.points, dtype=torch.float64).unbind(1)
        self._latency, self._loss = (GaussianProcess(inputs, values) for values in (latency, loss))
        violations = torch.tensor(told.violations(), dtype=torch.float64)
        self._constraint = GaussianProcess(self._inputs([*told.vectors, *told.faults]), violations)
        feasible = told.feasible()
        self._points = [told.points[index] for index in told.front()]
        _, self._highest = reference_of(told.points[index] for index in feasible or range(len(told.points)))

    def window(self, rng: np.random.Generator) -> tuple[float, float]:
        """Returns the levels of loss between which the front is to gain: in half of all asks every one, else WINDOW of them."""
        if rng.random() < 0.5:
            return -math.inf, self._highest
        low = rng.uniform(0, 1 - WINDOW) * self._highest
        return low, low + WINDOW * self._highest

    def gain(self, vectors: list[Vector], window: tuple[float, float]) -> Tensor:
        """Returns the expected hypervolume gained in a window of losses times the probability of keeping the constraint [m]."""
        inputs = self._inputs(vectors)
        latency, loss = self._latency.predict(inputs), self._loss.predict(inputs)
        gain = expected_improvement(latency, loss, points=self._points, window=window)
        return gain * probability_below(self._constraint.predict(inputs), 0.0)

    def _inputs(self, vectors: list[Vector]) -> Tensor:
        return torch.tensor([self._row(vector) for vector in vectors], dtype=torch.float64)

    def _row(self, vector: Vector) -> list[float]:
        return [place for name, value in vector.items() for place in _coordinates(self._flat[name], value)]


def _coordinates(distribution: BaseDistribution, value: object) -> list[float]:
    """Returns a number as its place in the range, a choice as one coordinate each."""
    if isinstance(distribution, CategoricalDistribution):
        return [float(choice == value) for choice in distribution.choices]
    return [(float(value) - distribution.low) / (distribution.high - distribution.low)]
