"""The Optuna study that all workers share: presets and trials wait in it, are asked, told, given back and taken from the dead.

The storage is the truth; what a process remembers is only what `sync` has read. Everything a record holds travels along.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autoprune.policy import Policy
from autoprune.search.faults import VALUES, VIOLATION, Fault, broke
from autoprune.search.front import objectives
from autoprune.search.presence import Presence, Worker
from autoprune.search.records import Measurement, TrialRecord, preset_of
from autoprune.search.space import Preset, SearchSpace, Vector
from autoprune.search.storage import PatientStorage
from autoprune.search.study_board import StudyBoard
from autoprune.search.trial_attributes import (
    ATTEMPT,
    FIRST,
    POLICY,
    RECORD,
    RETRY_OF,
    SOURCE,
    WORKER,
    first_of,
    plain_record,
    record_of,
    source_of,
)

_LOG = logging.getLogger("autoprune")
MOST_RETRIES = 2

Finished = tuple[TrialRecord, Measurement | None]


@dataclass(frozen=True)
class Asked:
    """A trial this worker holds. `outside` is a preset or control that no vector of the space stands for.

    `error` is why its policy could not be built; `policy` is the dense one then.
    """

    trial: Trial
    source: str
    policy: Policy
    outside: bool
    error: Exception | None = None

    @property
    def number(self) -> int:
        """Returns its number in the study."""
        return self.trial.number


class SharedStudy:
    """An Optuna study of two minimised objectives (log relative latency, loss), as one worker sees it."""

    def __init__(self, storage: PatientStorage, *, name: str, space: SearchSpace) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage, self._space = storage, space
        self._study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
        self._trials: list[FrozenTrial] = []
        self.board = StudyBoard(self._study, storage)
        self._told: set[int] = set()
        self._keys: dict[int, str] = {}
        self._seconds = 0.0

    def use(self, sampler: BaseSampler) -> None:
        """Lets a sampler propose what is asked."""
        self._study.sampler = sampler

    def sync(self) -> None:
        """Reads everything."""
        self._trials = self._study.get_trials(deepcopy=False)
        self.board.sync()

    def news(self) -> list[Finished]:
        """Returns the finished records that were not returned before, each with its first batch, as of the last `sync`."""
        done = [trial for trial in self._trials if trial.state.is_finished() and trial.number not in self._told]
        self._told.update(trial.number for trial in done)
        return [(record_of(trial), first_of(trial)) for trial in done if RECORD in trial.user_attrs]

    def size(self) -> int:
        """Returns how many trials there are, of every kind."""
        return len(self._trials)

    def running(self, *, but: int = -1) -> dict[int, str | None]:
        """Returns the policy keys of the trials that are being evaluated, by number, `but` one; None while it is not known."""
        return {trial.number: self._key(trial) for trial in self._in(TrialState.RUNNING) if trial.number != but}

    def workers(self) -> int:
        """Returns how many workers hold a trial."""
        return len({trial.user_attrs.get(WORKER) for trial in self._in(TrialState.RUNNING)})

    def waiting(self) -> list[str]:
        """Returns the sources of what waits, in order; what was taken from a dead worker, or given back, is `again`."""
        return ["again" if RETRY_OF in t.user_attrs else source_of(t) for t in self._in(TrialState.WAITING)]

    def waiting_presets(self) -> int:
        """Returns how many presets and controls wait, those taken from dead workers too."""
        return sum(bool(preset_of(source_of(trial))) for trial in self._in(TrialState.WAITING))

    def vectors(self, numbers: Iterable[int]) -> dict[int, Vector]:
        """Returns the vectors of the trials with these numbers, without those outside the space."""
        wanted = set(numbers)
        return {trial.number: dict(trial.params) for trial in self._trials if trial.number in wanted and trial.params}

    def enqueue(self, vector: Vector, source: str) -> None:
        """Queues a vector, to be asked before anything the sampler proposes."""
        self._study.enqueue_trial(dict(vector), user_attrs={SOURCE: source})

    def enqueue_presets(self, presets: Sequence[Preset]) -> None:
        """Queues the presets and controls that neither wait nor run nor were told: first those that have a vector."""
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
        there = {source_of(trial) for trial in self._trials if trial.state in states}
        for preset in sorted(presets, key=lambda preset: preset.vector is None):
            if preset.trial_source in there:
                continue
            if preset.vector is not None:
                self.enqueue(preset.vector, preset.trial_source)
            else:
                self._enqueue_outside(preset.policy.to_json(), {SOURCE: preset.trial_source})

    def ask(self, worker: Worker) -> Asked:
        """Returns the next trial, held by `worker`: what waits first, then what the sampler proposes."""
        with self._sampling():
            trial = self._study.ask()
            trial.set_user_attr(WORKER, worker.token)
            policy = trial.user_attrs.get(POLICY)
            if policy is not None:
                return Asked(trial, source_of(trial), Policy.from_json(policy, source=f"trial {trial.number}"), outside=True)
            vector = {name: _suggested(trial, name, kind) for name, kind in self._space.distributions.items()}
            try:
                return Asked(trial, source_of(trial), self._space.policy(vector), outside=False)
            except Exception as error:
                return Asked(trial, source_of(trial), self._space.presets()[0].policy, outside=False, error=error)

    def spent_sampling(self) -> float:
        """Returns the seconds spent in asking and telling since it was last called."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def tell(self, asked: Asked, record: TrialRecord, *, first: Measurement, constraints: Mapping[str, float]) -> None:
        """Finishes a trial with its values; the record is stored before the trial counts as finished.

        What is outside the space is kept out of what the sampler models (PRUNED). A trial that another worker was given
        meanwhile, because nothing was heard of this one, is left alone.
        """
        with self._sampling(), self._lenient(asked):
            for key, value in constraints.items():
                asked.trial.set_constraint(key, value)
            asked.trial.set_user_attr(FIRST, first.to_plain())
            asked.trial.set_user_attr(RECORD, plain_record(record))
            self._finish(asked.number, record, outside=asked.outside)

    def fail(self, asked: Asked, record: TrialRecord, fault: Fault | None) -> None:
        """Finishes a trial that raised: infeasible with a fault, which the sampler learns from, else failed."""
        with self._lenient(asked):
            if fault is not None:
                asked.trial.set_constraint(fault.constraint, VIOLATION)
            asked.trial.set_user_attr(RECORD, plain_record(record))
            self._finish(asked.number, record, outside=asked.outside)

    def drop(self, asked: Asked) -> None:
        """Ends a trial that this worker does not evaluate, without a trace in the records."""
        with self._lenient(asked):
            self._study.tell(asked.number, state=TrialState.FAIL, skip_if_finished=True)

    def give_back(self, asked: Asked) -> None:
        """Queues a trial again that this worker does not go on with."""
        self._again(self._study.get_trials(deepcopy=False)[asked.number], attempts=0)

    def reclaim(self, presence: Presence) -> list[str]:
        """Takes the trials of dead workers back and returns a sentence for each; if there are any, `sync` again. Only the
        leader may.

        What was told but not finished is finished; else it is queued again, after MOST_RETRIES times recorded as failed.
        """
        gone = {trial.number for trial in self._in(TrialState.RUNNING) if _is_gone(trial, presence)}
        if gone:
            self.sync()  # what they told last may be newer than what was read before
        said = []
        for trial in [trial for trial in self._trials if trial.number in gone]:
            token = trial.user_attrs.get(WORKER)
            who, attempt = presence.label(token), trial.user_attrs.get(ATTEMPT, 0)
            if trial.state.is_finished():
                said.append(f"trial {trial.number}: its worker {who} is gone, and was done with it.")
            elif RECORD in trial.user_attrs:
                self._finish(trial.number, record_of(trial), outside=POLICY in trial.user_attrs)
                said.append(f"trial {trial.number}: its worker {who} is gone; its result was there.")
            elif attempt >= MOST_RETRIES:
                note = f"its worker is gone, as {attempt} before it; the last was {who}"
                self._storage.set_trial_user_attr(trial._trial_id, RECORD, plain_record(self._lost(trial, note)))
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                said.append(f"trial {trial.number}: {note}; it is not tried again.")
            else:
                self._again(trial, attempts=1)
                said.append(f"trial {trial.number}: its worker {who} is gone; the trial is tried again.")
        return said

    def _again(self, trial: FrozenTrial, *, attempts: int) -> None:
        """Queues a running trial again, then ends it. Who dies between leaves it twice; the second is known by its policy."""
        attributes = {SOURCE: source_of(trial), RETRY_OF: trial.number}
        attributes[ATTEMPT] = trial.user_attrs.get(ATTEMPT, 0) + attempts
        if not any(other.user_attrs.get(RETRY_OF) == trial.number for other in self._trials):
            if POLICY in trial.user_attrs:
                self._enqueue_outside(trial.user_attrs[POLICY], attributes)
            elif vector := self._vector(trial):
                self._study.enqueue_trial(vector, user_attrs=attributes)
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _enqueue_outside(self, policy: str, attributes: Mapping[str, object]) -> None:
        self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={**attributes, POLICY: policy}))

    def _finish(self, number: int, record: TrialRecord, *, outside: bool) -> None:
        """Ends a trial as its record has it; one without numbers that broke a constraint has those that Optuna wants."""
        known = record.measurement is not None
        values = list(objectives(record.measurement)) if known else list(VALUES)
        if not known and not broke(self._study.get_trials(deepcopy=False)[number].constraints):
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        elif outside:
            self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._study.tell(number, values, skip_if_finished=True)

    def _lost(self, trial: FrozenTrial, note: str) -> TrialRecord:
        return replace(TrialRecord.begun(trial.number, source_of(trial), self._policy(trial)), note=note)

    def _in(self, state: TrialState) -> list[FrozenTrial]:
        return [trial for trial in self._trials if trial.state == state]

    def _key(self, trial: FrozenTrial) -> str | None:
        """Returns the key of a trial's policy, None while its vector is being written."""
        if trial.number not in self._keys:
            if POLICY not in trial.user_attrs and trial.params.keys() != self._space.distributions.keys():
                return None
            self._keys[trial.number] = self._policy(trial).key()
        return self._keys[trial.number]

    def _policy(self, trial: FrozenTrial) -> Policy:
        policy = trial.user_attrs.get(POLICY)
        if policy is not None:
            return Policy.from_json(policy, source=f"trial {trial.number}")
        return self._space.policy(self._vector(trial))

    def _vector(self, trial: FrozenTrial) -> Vector:
        """Returns the vector of a trial, empty where its worker died before it had one."""
        whole = trial.params.keys() == self._space.distributions.keys()
        return trial.params if whole else trial.system_attrs.get("fixed_params", {})

    @contextmanager
    def _lenient(self, asked: Asked) -> Iterator[None]:
        """Leaves a trial alone that was taken from this worker."""
        try:
            yield
        except UpdateFinishedTrialError:
            _LOG.warning("trial %d was given to another worker, as nothing was heard of this one.", asked.number)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began


def _is_gone(trial: FrozenTrial, presence: Presence) -> bool:
    token = trial.user_attrs.get(WORKER)
    return token != presence.worker.token and presence.is_gone(token or f"of trial {trial.number}")


def _suggested(trial: Trial, name: str, kind: BaseDistribution) -> object:
    if isinstance(kind, CategoricalDistribution):
        return trial.suggest_categorical(name, kind.choices)
    suggest = trial.suggest_int if isinstance(kind, IntDistribution) else trial.suggest_float
    return suggest(name, kind.low, kind.high, step=kind.step, log=kind.log)
