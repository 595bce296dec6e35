"""What the trials of a study say to the model sampler, read once each: the vector of a trial never changes."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autoprune.search.discard import SCORE_DROP
from autoprune.search.faults import broke
from autoprune.search.front import Point, non_dominated
from autoprune.search.space import SearchSpace, Vector

_STATES = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL)


@dataclass(frozen=True)
class Told:
    """A finished trial: its normal vector, (log latency, loss), None where it has no values, its worst constraint, and that of
    a search that keeps a part of the score budget (`careful`)."""

    vector: Vector
    point: Point | None
    constraint: float
    careful: float

    @property
    def feasible(self) -> bool:
        """Returns whether it has values and keeps every constraint."""
        return self.point is not None and self.constraint <= 0


@dataclass(frozen=True)
class History:
    """The told trials in the order in which they ended, the normal vectors of running ones, the policy keys of both."""

    told: list[Told]
    running: list[Vector]
    keys: frozenset[str]

    @property
    def valued(self) -> int:
        """Returns how many told trials have values."""
        return sum(trial.point is not None for trial in self.told)

    def careful(self) -> "History":
        """Returns the same for a search that keeps a part of the score budget."""
        return replace(self, told=[replace(trial, constraint=trial.careful) for trial in self.told])

    def first(self, count: int) -> list[Told]:
        """Returns what was told until `count` trials had values."""
        ends = [place for place, trial in enumerate(self.told) if trial.point is not None]
        return self.told[: ends[count - 1] + 1]


@dataclass
class HistoryReader:
    """Reads one study again and again. `margin` of the score drop is what a careful search keeps."""

    space: SearchSpace
    margin: float = 0.0
    _known: dict[int, tuple[Vector, str]] = field(default_factory=dict)

    def read(self, study: Study) -> History:
        """Returns what is known now, without trials outside the space or half asked, and failures that broke no constraint."""
        told, running, keys = [], [], set()
        for trial in sorted(study.get_trials(deepcopy=False, states=_STATES), key=_ended):
            outcome = self._outcome(trial)
            if outcome is None or not trial.params.keys() >= self.space.distributions.keys():
                continue
            vector, key = self._vector(trial)
            keys.add(key)
            if trial.state == TrialState.RUNNING:
                running.append(vector)
            else:
                told.append(Told(vector, *outcome))
        return History(told, running, frozenset(keys))

    def _vector(self, trial: FrozenTrial) -> tuple[Vector, str]:
        if trial.number not in self._known:
            self._known[trial.number] = self.space.normal(trial.params), self.space.policy(trial.params).key()
        return self._known[trial.number]

    def _outcome(self, trial: FrozenTrial) -> tuple[Point | None, float, float] | None:
        """Returns values, but those of faults (faults.py), and worst constraints; None where the policy is not to blame."""
        worst = max(trial.constraints.values(), default=0.0)
        careful = max(worst, trial.constraints.get(SCORE_DROP, -math.inf) + self.margin)
        if not broke(trial.constraints) and trial.values is not None and all(map(math.isfinite, trial.values)):
            return (trial.values[0], trial.values[1]), worst, careful
        return (None, worst, careful) if worst > 0 or trial.state == TrialState.RUNNING else None


def best(told: list[Told]) -> list[Told]:
    """Returns the feasible trials that no other one beats, fastest first."""
    return non_dominated((trial for trial in told if trial.feasible), lambda trial: trial.point)


def selected(told: list[Told], most: int) -> list[Told]:
    """Returns at most `most` trials in the order given: half of them those of least loss above the front at their latency,
    the others spread evenly over the rest, so that a model of them knows what lies far from the front too."""
    if len(told) <= most:
        return told
    latencies, losses = np.array([trial.point for trial in best(told)] or [(0.0, 0.0)]).T
    points = np.array([trial.point or (0.0, math.inf) for trial in told])
    beside = np.searchsorted(latencies, points[:, 0], side="right") - 1
    order = np.argsort(points[:, 1] - losses[beside.clip(0)], kind="stable")
    near, rest = order[: most // 2], np.sort(order[most // 2 :])
    spread = rest[np.linspace(0, len(rest) - 1, most - len(near)).round().astype(int)]
    return [told[index] for index in sorted((*near, *spread))]


def _ended(trial: FrozenTrial) -> tuple[float, int]:
    return (trial.datetime_complete.timestamp() if trial.datetime_complete else math.inf), trial.number
