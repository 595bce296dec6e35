"""The default sampler: asks for the unseen policy that adds most to the front, as a Gaussian process believes.

Works on policies, not on vectors: dimensions that a policy does not use count as neutral, and no policy is asked twice.
Optuna's own GP sampler sees every inactive dimension and asked known policies in two of three trials of this space.
"""

import itertools
import math
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from autoprune.measure.device import one_blas_thread
from autoprune.search.beliefs import Beliefs, Parameters
from autoprune.search.history import History, HistoryReader, best, selected
from autoprune.search.neighbour import crossed, joined, mutated, random_vector
from autoprune.search.space import SearchSpace, Vector

POOL = 200  # candidates of the first round; a second one of half as many looks around the best of them
BEST = 8
FEWEST = 4  # trials with values that are modelled, where faults are most of all
# Of the candidates: a member changed, two members crossed, a member joined by any feasible trial; the rest is anything.
CHANGED, CROSSED, JOINED = 0.4, 0.2, 0.25
MODELLED = 300  # told trials, at most: the cost of a model is cubic in them
CAREFUL = 0.5  # of all asks keep a part of the score budget
GROWTH = 1.1  # of the told trials until hyperparameters are fitted again


class ModelSampler(BaseSampler):
    """Unseen changes and crosses of the best told (presets at first) until `startup` trials are told, then the candidate with
    the best expected improvement, in every other ask of a part of the front that is drawn.

    Drawn, because one place would be asked for ever: where a model is unsure of the fastest policy, hundreds that behave like
    it promise the largest hypervolume (of 135 trials of the unified space 80 gave one policy's images).

    CAREFUL of all asks are those of a search that must keep `margin` more of the score budget: of policies of one latency and
    loss some drop less, and what uses the whole budget on the search's prompts may be beyond it on others.

    Losses are modelled as they are: those of independent decisions about add up, as their log latencies do. What other workers
    run is never asked again and counts as told according to `pending` (Beliefs.expect). An ask follows from the seed, the
    number of the trial and the trials of the study, whichever process asks: hyperparameters are those of the first told
    trials, up to a number that grows by GROWTH.
    """

    def __init__(self, space: SearchSpace, *, startup: int, seed: int, pending: str = "believer", margin: float = 0.0) -> None:
        self._space, self._startup, self._seed, self._pending, self._margin = space, startup, seed, pending, margin
        self._fallback = RandomSampler(seed=seed)
        self._readers: WeakKeyDictionary[Study, HistoryReader] = WeakKeyDictionary()
        self._fits: WeakKeyDictionary[Study, tuple[int, Parameters]] = WeakKeyDictionary()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns every dimension; part of Optuna's sampler interface, as the methods below."""
        return self._space.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, object]:
        rng = np.random.default_rng((self._seed, trial.number))
        whole = self._readers.setdefault(study, HistoryReader(self._space, self._margin)).read(study)
        history = whole.careful() if rng.random() < CAREFUL else whole
        if len(history.told) < self._startup or history.valued < min(self._startup, FEWEST):
            members = [trial.vector for trial in best(history.told)] or [random_vector(self._space, rng)]
            fresh = self._fresh(self._around(members, history, rng), history, POOL)
            return next((vector for vector in fresh if self._unseen(vector, history)), {})
        with one_blas_thread():
            belief = Beliefs(selected(history.told, MODELLED), self._space.distributions, self._parameters(study, whole))
            belief.expect(history.running, self._pending)
            return self._best(belief, history, rng)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _parameters(self, study: Study, history: History) -> Parameters:
        count = int(GROWTH ** math.floor(math.log(history.valued, GROWTH)))
        if self._fits.get(study, (0, None))[0] != count:
            told = selected(history.first(count), MODELLED)
            self._fits[study] = count, Beliefs(told, self._space.distributions).parameters
        return self._fits[study][1]

    def _best(self, belief: Beliefs, history: History, rng: np.random.Generator) -> Vector:
        window = belief.window(rng)
        members = [trial.vector for trial in best(history.told) or history.told]
        first = list(self._fresh(self._around(members, history, rng), history, POOL))
        if not first:
            return {}
        gains = belief.gain(first, window)
        promising = [first[index] for index in (-gains).argsort()[:BEST]]
        second = list(self._fresh(self._around(promising, history, rng), history, POOL // 2))
        pool = first + second
        if second:
            gains = np.append(gains, belief.gain(second, window))
        ranked = (pool[index] for index in (-gains).argsort(kind="stable"))
        return next((vector for vector in ranked if self._unseen(vector, history)), {})

    def _around(self, members: list[Vector], history: History, rng: np.random.Generator) -> Iterator[Vector]:
        used, neutral = [self._space.used(member) for member in members], self._space.normal({})
        feasible = [trial.vector for trial in history.told if trial.feasible] or members
        while True:
            first, second = rng.integers(len(members), size=2).tolist()
            kind = rng.random()
            if kind < CHANGED:
                yield mutated(self._space, members[first], rng, used=used[first])
            elif kind < CHANGED + CROSSED:
                yield crossed(members[first], members[second], rng)
            elif kind < CHANGED + CROSSED + JOINED:
                yield joined(members[first], feasible[rng.integers(len(feasible))], neutral)
            else:
                yield random_vector(self._space, rng)

    def _fresh(self, candidates: Iterator[Vector], history: History, count: int) -> Iterator[Vector]:
        """Yields up to `count` different normal vectors that are neither told nor running."""
        seen = {tuple(vector.values()) for vector in (*(trial.vector for trial in history.told), *history.running)}
        for vector in itertools.islice(candidates, 4 * count):
            normal = self._space.normal(vector)
            values = tuple(normal.values())
            if values not in seen:
                seen.add(values)
                yield normal
                count -= 1
                if not count:
                    return

    def _unseen(self, vector: Vector, history: History) -> bool:
        """Returns whether the policy is new; vectors that differ may still keep the same tokens."""
        return self._space.policy(vector).key() not in history.keys
