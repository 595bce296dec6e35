"""The loop every worker of a study runs: read what the others did, ask, evaluate, tell. The leader also shows and validates."""

import logging
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

from autoprune.measure.device_lock import DeviceLock
from autoprune.search.clock import StudyClock, ValidationCost
from autoprune.search.discard import constraint_values, discard_reason
from autoprune.search.evaluation import Evaluation, Evaluator
from autoprune.search.faults import Streak, fault_of
from autoprune.search.front import search_front
from autoprune.search.interrupts import Interrupts
from autoprune.search.leadership import POLL_SECONDS, Leadership
from autoprune.search.neighbour import unseen_neighbour
from autoprune.search.publication import Publication
from autoprune.search.records import Measurement, StudyResult, TrialRecord
from autoprune.search.settings import StudySettings
from autoprune.search.shared_study import Asked
from autoprune.search.space import SearchSpace
from autoprune.search.validation import validate_front

_LOG = logging.getLogger("autoprune")
MOST_REPEATS = 40


class StudyLoop:
    """`trials` holds every record that was read, `first` their first batches, `known` the first record of each policy key."""

    def __init__(
        self,
        settings: StudySettings,
        space: SearchSpace,
        *,
        leadership: Leadership,
        evaluator: Evaluator,
        publication: Publication,
        lock: DeviceLock,
    ) -> None:
        self.settings, self.space, self.evaluator, self.publication = settings, space, evaluator, publication
        self.leadership, self.study, self.crew, self.lock = leadership, leadership.study, leadership.crew, lock
        self.trials: list[TrialRecord] = []
        self.first: dict[int, Measurement] = {}
        self.known: dict[str, TrialRecord] = {}
        self.shown: int | None = None
        self.repeats, self.streak = 0, Streak()
        self.result = StudyResult("", space.definition.name, {}, None, (), (), leadership.folder.path, {})

    def run(self, interrupts: Interrupts) -> StudyResult | None:
        """Searches until the budget is spent, then validates if this worker leads; returns None if it does not."""
        self.interrupts = interrupts
        try:
            self._search()
            result = self._validated() if self.leadership.leads else None
        except KeyboardInterrupt:
            if not self.leadership.leads:
                raise
            self.result = replace(self.result, interrupted=True)
            result = self._saved()
        self.leadership.close()
        return result

    def _search(self) -> None:
        """Measures dense, then whatever waits, presets first, and searched trials until the budget is spent."""
        if self.leadership.leads:
            self.publication.progress.phase("dense reference", 1)
        with self.lock:
            self.dense = self.evaluator.dense()
        self.publication.progress.step()
        with self.interrupts.finishing():  # libraries that are interrupted in a lock raise what they like
            self._sync()
            while not self._is_stopped() and not self._is_over():
                if self._spent() + len(self.study.running()) < self.settings.budget.trials and self._may_ask():
                    self._one_trial()
                else:
                    time.sleep(POLL_SECONDS)
                self._sync()

    def _validated(self) -> StudyResult:
        """Measures the front on held-out prompts and exports its tiers."""
        clock = self._clock()
        clock.start_round()
        self.publication.progress.phase("held-out measurement", self.evaluator.validation_steps())

        def step() -> bool:
            self.publication.progress.step()
            return clock.has_another_round()

        self._saved()
        folder, settings = self.leadership.folder, self.settings
        with self.lock:
            result = validate_front(self.result, settings=settings, folder=folder, evaluator=self.evaluator, step=step)
        self.result = replace(result, dimensions=self.publication.dimensions(self.trials))
        return self._saved()

    def _saved(self) -> StudyResult:
        """Writes everything known so far and returns it."""
        trials = tuple(sorted(self.trials, key=lambda trial: trial.number))
        self.result = replace(self.result, trials=trials)
        self.publication.leave(self.result, self.evaluator.state())
        return self.result

    def _sync(self) -> None:
        """Reads what all workers finished. The leader takes trials back from dead ones and shows what is new."""
        self._remember_all()
        if not self.leadership.take():
            return
        if self.leadership.reclaim():
            self._remember_all()
        if self.shown is None:
            self.shown = len(self.trials)
            self.publication.progress.phase("search", max(1, self.settings.budget.trials - self._spent()))
        if self.shown < len(self.trials):
            self._saved()
        while self.shown < len(self.trials):
            self.shown += 1
            left = self._seconds_left()
            self.publication.trial_done(self.trials[self.shown - 1], self.trials[: self.shown], seconds_left=left)

    def _remember_all(self) -> None:
        self.study.sync()
        for record, first in self.study.news():
            self.trials.append(record)
            if first is not None:
                self.first[record.number] = first
                if not record.source.startswith("control:"):
                    self.known.setdefault(record.policy.key(), record)
        reference = next((trial.measurement for trial in self.trials if trial.preset == "dense"), None)
        self.result = replace(self.result, dense=reference or self.dense)

    def _is_stopped(self) -> bool:
        """Returns False; raises KeyboardInterrupt where somebody wants this worker to stop."""
        if self.interrupts.requested or self.crew.is_left():
            raise KeyboardInterrupt
        return False

    def _is_over(self) -> bool:
        """Returns whether this worker has nothing more to do: the leader waits until nobody evaluates anything."""
        if self.leadership.over:
            return True
        if self._spent() < self.settings.budget.trials and self.repeats < MOST_REPEATS and self._may_ask():
            return False
        return not (self.leadership.leads and self.study.running())

    def _may_ask(self) -> bool:
        """Returns whether there is time for a trial, or something waits that is measured in any case."""
        if self._clock().has_time(self._validation()):
            return True
        return any(source == "again" or source.startswith("preset:") for source in self.study.waiting())

    def _one_trial(self) -> None:
        began = time.monotonic()
        with self.lock if self.lock.is_processor else nullcontext():  # what is timed there would share it with the sampler
            asked = self.study.ask(self.leadership.worker)
        record = TrialRecord.begun(asked.number, asked.source, asked.policy, worker=self.crew.name)
        self._sync()
        running = self.study.running(but=asked.number)
        known = None if asked.outside else self.known.get(asked.policy.key())
        # A preset that a dead worker held comes late, and is measured in any case.
        kept = 0 if record.preset else self.study.waiting_presets()
        if self._spent() + len(running) + kept >= self.settings.budget.trials:
            self._leave(asked, back=True)
        elif asked.error is not None:
            self._failed(asked, record, asked.error)
        elif known is not None:
            self._repeat(asked, record, known)
        elif asked.policy.key() in running.values():
            self._leave(asked, back=bool(record.preset))
        else:
            self._measure(asked, record, began)

    def _measure(self, asked: Asked, record: TrialRecord, began: float) -> None:
        try:
            with self.lock:
                evaluation = self._evaluated(record)
        except KeyboardInterrupt:
            self.study.give_back(asked)
            raise
        except Exception as error:  # one bad policy (memory, a kernel) must not end the study
            self._failed(asked, record, error)
            return
        self.streak, self.repeats = Streak(), 0
        record, measured = self._finished(record, evaluation, began), evaluation.measurement
        constraints = constraint_values(measured, self.settings.quality)
        self.study.tell(asked, record, first=evaluation.first, constraints=constraints)
        _LOG.info("trial %d: %.2fx, loss %.3f, %s.", record.number, measured.speed_up, measured.loss, record.state)

    def _leave(self, asked: Asked, *, back: bool) -> None:
        """Does not evaluate what another worker evaluates, or what is beyond the budget; `back` to wait for its time."""
        if back:
            self.study.give_back(asked)
        else:
            self.study.drop(asked)
            self._queue_neighbour(asked.number)
        time.sleep(random.uniform(0, 2 * POLL_SECONDS))  # two that gave way to each other must not meet again

    def _evaluated(self, record: TrialRecord) -> Evaluation:
        if record.policy.is_dense():
            return Evaluation(self.result.dense, self.result.dense)
        rivals = list(self._rivals()) if self.settings.discard else []

        def stop(first: Measurement) -> str:
            return discard_reason(first, rivals, self.settings.quality) if rivals else ""

        return self.evaluator.evaluate(record.policy, stop=stop)

    def _rivals(self) -> Iterator[Measurement]:
        """Yields the first batches of careful trials: who beats others by using the whole budget may be beyond it elsewhere."""
        for trial in self.trials:
            careful = trial.feasible and trial.measurement.drop <= self.settings.quality.careful_drop
            if trial.state == "complete" and careful and not trial.source.startswith("control:"):
                yield self.first[trial.number]

    def _finished(self, record: TrialRecord, evaluation: Evaluation, began: float) -> TrialRecord:
        return replace(
            record,
            measurement=evaluation.measurement,
            feasible=max(constraint_values(evaluation.measurement, self.settings.quality).values()) <= 0,
            state="discarded" if evaluation.stopped else "complete",
            seconds=time.monotonic() - began,
            sampler_seconds=self.study.spent_sampling(),
            note=evaluation.stopped,
        )

    def _repeat(self, asked: Asked, record: TrialRecord, known: TrialRecord) -> None:
        """Tells what is known about a policy asked again, and queues an unseen neighbour of the front in its place."""
        source = record.source if record.preset else "repeat"
        told = replace(known, number=record.number, source=source, seconds=0.0, sampler_seconds=0.0, worker=record.worker)
        told = replace(told, note=f"same policy as trial {known.number}")
        constraints = constraint_values(known.measurement, self.settings.quality)
        self.study.tell(asked, told, first=self.first[known.number], constraints=constraints)
        self.repeats += 1
        if not record.preset:
            self._queue_neighbour(record.number)

    def _queue_neighbour(self, seed: int) -> None:
        vectors = self.study.vectors(member.number for member in search_front(self.trials))
        near = unseen_neighbour(self.space, list(vectors.values()), known=self.known, seed=seed)
        if near is not None:
            self.study.enqueue(near, "neighbour")

    def _failed(self, asked: Asked, record: TrialRecord, error: Exception) -> None:
        fault = fault_of(error)
        record = replace(record, note=fault.note if fault else f"{type(error).__name__}: {error}".splitlines()[0])
        self.study.fail(asked, record, fault)
        _LOG.warning("trial %d failed (%s); the study goes on.", record.number, record.note)
        self.streak.add(error, fault)

    def _spent(self) -> int:
        return sum(trial.source != "repeat" for trial in self.trials)

    def _clock(self) -> StudyClock:
        return StudyClock(self.settings.budget, self.study.board.run().began)

    def _validation(self) -> ValidationCost:
        return ValidationCost(self.result.dense.latency, self.evaluator.validation_steps() + 1)

    def _seconds_left(self) -> float:
        recent = [trial.seconds for trial in self.trials if trial.source != "repeat" and trial.preset != "dense"][-12:]
        mean = sum(recent) / len(recent) if recent else self.result.dense.latency
        trials = max(0, self.settings.budget.trials - self._spent()) / max(1, self.study.workers())
        return self._clock().seconds_left(trials * mean, self._validation())
