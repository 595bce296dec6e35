"""Trials in and out of the Optuna journal, the one place a study is stored. Everything a record holds travels along."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autoprune.policy import Policy
from autoprune.search.evaluation import Evaluation
from autoprune.search.faults import VALUES, VIOLATION, Fault
from autoprune.search.front import objectives
from autoprune.search.journal_file import open_journal
from autoprune.search.records import Measurement, TrialRecord

_RECORD, _SOURCE, _FIRST = "record", "source", "first"


class StudyJournal:
    """An Optuna study of two minimised objectives (log relative latency, loss) on a journal file."""

    def __init__(self, path: Path, *, name: str, sampler: BaseSampler) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=open_journal(path),
            study_name=name,
            sampler=sampler,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        self._seconds = 0.0

    def reclaim(self) -> int:
        """Fails the trials a stopped run left unfinished and queues their vectors again; returns how many were queued.

        Presets are left to the caller, who queues every preset that `waits_or_is_done` does not know.
        """
        queued = 0
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            source = trial.user_attrs.get(_SOURCE, "sampler")
            if trial.params and not source.startswith("preset:"):
                self._study.enqueue_trial(trial.params, user_attrs={_SOURCE: source})
                queued += 1
        return queued

    def enqueue(self, vector: Mapping[str, object], source: str) -> None:
        """Queues a vector, to be asked before anything the sampler proposes."""
        self._study.enqueue_trial(dict(vector), user_attrs={_SOURCE: source})

    def waits_or_is_done(self, source: str) -> bool:
        """Returns whether a trial of this source is queued or has been told."""
        states = (TrialState.WAITING, TrialState.COMPLETE, TrialState.PRUNED)
        return any(trial.user_attrs.get(_SOURCE) == source for trial in self._study.get_trials(deepcopy=False, states=states))

    def vectors(self, numbers: Iterable[int]) -> dict[int, dict[str, object]]:
        """Returns the vectors of the trials with these numbers, without those outside the space."""
        wanted = set(numbers)
        trials = self._study.get_trials(deepcopy=False)
        return {trial.number: dict(trial.params) for trial in trials if trial.number in wanted and trial.params}

    def ask(self, space: dict[str, BaseDistribution]) -> Trial:
        """Returns the next trial, queued ones first."""
        with self._sampling():
            return self._study.ask(fixed_distributions=space)

    def spent_sampling(self) -> float:
        """Returns the seconds spent in asking and telling since it was last called."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @staticmethod
    def source(trial: Trial) -> str:
        """Returns where a trial's vector came from."""
        return trial.user_attrs.get(_SOURCE, "sampler")

    def tell(self, trial: Trial, record: TrialRecord, *, first: Measurement, constraints: Mapping[str, float]) -> None:
        """Finishes a trial with its values; the record is stored before the trial counts as finished."""
        with self._sampling():
            for key, value in constraints.items():
                trial.set_constraint(key, value)
            trial.set_user_attr(_RECORD, _plain(record))
            trial.set_user_attr(_FIRST, first.to_plain())
            self._study.tell(trial, list(objectives(record.measurement)))

    def fail(self, trial: Trial | None, record: TrialRecord, fault: Fault | None) -> None:
        """Finishes a trial that raised: infeasible with a fault, which the sampler learns from, else failed.

        Without a `trial` the record is of a preset or control outside the space.
        """
        if trial is None:
            attributes = {_SOURCE: record.source, _RECORD: _plain(record)}
            self._study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attributes))
            return
        trial.set_user_attr(_RECORD, _plain(record))
        if fault is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint(fault.constraint, VIOLATION)
        self._study.tell(trial, list(VALUES))

    def add_outside(self, record: TrialRecord, evaluation: Evaluation) -> None:
        """Stores a preset or control that has no vector in the space: it is kept out of what the sampler models (PRUNED)."""
        attributes = {_SOURCE: record.source, _RECORD: _plain(record), _FIRST: evaluation.first.to_plain()}
        self._study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=attributes))

    def next_number(self) -> int:
        """Returns the number the next added trial gets."""
        return len(self._study.get_trials(deepcopy=False))

    def records(self) -> Iterator[tuple[TrialRecord, Measurement | None]]:
        """Yields every finished record with the measurement of its first batch."""
        for trial in self._study.get_trials(deepcopy=False):
            if _RECORD in trial.user_attrs and trial.state.is_finished():
                yield _record(trial), _first(trial)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began


def _plain(record: TrialRecord) -> dict[str, object]:
    measurement = record.measurement and record.measurement.to_plain()
    plain = {
        name: getattr(record, name) for name in ("number", "source", "feasible", "state", "seconds", "note", "sampler_seconds")
    }
    return plain | {"policy": record.policy.to_json(), "measurement": measurement}


def _record(trial: FrozenTrial) -> TrialRecord:
    plain = dict(trial.user_attrs[_RECORD])
    measurement = plain.pop("measurement")
    policy = Policy.from_json(plain.pop("policy"), source=f"trial {trial.number}")
    return TrialRecord(policy=policy, measurement=measurement and Measurement.from_plain(measurement), **plain)


def _first(trial: FrozenTrial) -> Measurement | None:
    plain = trial.user_attrs.get(_FIRST)
    return plain and Measurement.from_plain(plain)
