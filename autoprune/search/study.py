"""The study: presets first, then ask, evaluate, tell; stops cleanly, resumes by the same command, validates its front."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from optuna.trial import Trial

from autoprune.backbones import Backbone
from autoprune.measure.device import device_conditions, device_identity
from autoprune.measure.latency import LatencyTable
from autoprune.policy import fingerprint
from autoprune.search.ablation import dimension_rows
from autoprune.search.clock import StudyClock, ValidationCost
from autoprune.search.discard import constraint_values, discard_reason
from autoprune.search.evaluation import Evaluation, Evaluator
from autoprune.search.evaluator import GenerationEvaluator
from autoprune.search.export import write_front, write_trials
from autoprune.search.faults import Streak, fault_of
from autoprune.search.folder import StudyFolder
from autoprune.search.front import search_front
from autoprune.search.journal import StudyJournal
from autoprune.search.neighbour import unseen_neighbour
from autoprune.search.progress import NullProgress
from autoprune.search.quality import check_prompts
from autoprune.search.records import DimensionRow, Measurement, StudyResult, TrialRecord
from autoprune.search.sampler import make_sampler
from autoprune.search.settings import StudySettings
from autoprune.search.space import Preset, SearchSpace, space_for
from autoprune.search.tracking import NullTracker
from autoprune.search.validation import validate_front

_LOG = logging.getLogger("autoprune")
MOST_REPEATS = 40
TABLE_FILE = "latency_table.json"


def run_study(
    settings: StudySettings,
    *,
    backbone: Backbone,
    tracker: NullTracker,
    progress: NullProgress,
    evaluator: Evaluator | None = None,
) -> StudyResult:
    """Runs or continues the study in `settings.folder` and validates its front.

    Ctrl-C ends it with `interrupted` set and everything finished stored; the same call continues. `evaluator` replaces
    what measures policies. Raises UserError for unreadable prompts and a folder that is unwritable, in use, or another study's.
    """
    check_prompts(settings, backbone)
    space = space_for(settings.space, backbone)
    presets = space.presets()
    _LOG.info("%s", " ".join(space.missing))
    identity = {
        "backbone": backbone.name,
        "sampling": backbone.sampling.identity(),
        "weights": backbone.revision,
        "scale_schedule": fingerprint(space.target.scale_schedule),
        "space": settings.space.name,
        "space_sha256": settings.space.sha256(),
        "calibration": space.calibration.digest() if space.calibration else "",
        "device": device_identity(backbone.device, backbone.dtype),
        "settings": settings.measurement_identity(),
    }
    with StudyFolder(settings.folder, identity) as folder:
        if evaluator is None:
            saved = folder.read_json(TABLE_FILE)
            evaluator = GenerationEvaluator(backbone, settings, table=saved and LatencyTable.from_plain(saved))
        study = _Study(settings, folder=folder, space=space, evaluator=evaluator, observers=(tracker, progress))
        conditions, loss = device_conditions(backbone.device, backbone.dtype), settings.quality.loss_text
        study.result = replace(study.result, backbone=backbone.name, device=conditions, loss_text=loss)
        try:
            study.search(presets)
            return study.validated()
        except KeyboardInterrupt:
            study.result = replace(study.result, interrupted=True)
            return study.saved()


class _Study:
    """One run of the loop. `result` grows with every trial; `known` maps policy keys to the first record of each."""

    def __init__(
        self,
        settings: StudySettings,
        *,
        folder: StudyFolder,
        space: SearchSpace,
        evaluator: Evaluator,
        observers: tuple[NullTracker, NullProgress],
    ) -> None:
        self.settings, self.folder, self.space, self.evaluator = settings, folder, space, evaluator
        self.tracker, self.progress = observers
        self.clock = StudyClock(settings.budget)
        self.trials: list[TrialRecord] = []
        self.first: dict[int, Measurement] = {}
        self.known: dict[str, TrialRecord] = {}
        self.repeats, self.streak, self.tracker_broken = 0, Streak(), False
        self.result = StudyResult("", space.definition.name, {}, None, (), (), folder.path, {})

    def search(self, presets: tuple[Preset, ...]) -> None:
        """Measures dense, then presets, controls and searched trials until the budget is spent."""
        self.progress.phase("dense reference", 1)
        dense = self.evaluator.dense()
        self.progress.step()
        self._open_journal(presets)
        reference = next((trial for trial in self.trials if trial.preset == "dense"), None)
        self.result = replace(self.result, dense=reference.measurement if reference else dense)
        self.progress.phase("search", max(1, self.settings.budget.trials - self._spent()))
        waiting = [preset for preset in presets if preset.vector is not None and preset.trial_source not in self._sources()]
        for _ in range(len(waiting) + self.reclaimed):
            if self._spent() < self.settings.budget.trials:
                self._one_trial()
        for preset in presets:
            if preset.vector is None and preset.trial_source not in self._sources() and self._within_budget():
                self._one_outside(preset)
        while self._within_budget():
            self._one_trial()

    def validated(self) -> StudyResult:
        """Measures the front on held-out prompts and exports its tiers."""
        self.result = replace(self.result, trials=tuple(self.trials))
        self.clock.start_round()
        self.progress.phase("held-out measurement", self.evaluator.validation_steps())
        self.result = validate_front(
            self.result, settings=self.settings, folder=self.folder, evaluator=self.evaluator, step=self._validation_step
        )
        self.result = replace(self.result, dimensions=self._dimensions())
        return self.saved()

    def saved(self) -> StudyResult:
        """Writes everything known so far and returns it."""
        self.trials.sort(key=lambda trial: trial.number)
        self.result = replace(self.result, trials=tuple(self.trials))
        write_trials(self.folder, self.trials)
        if self.result.dense is not None:
            write_front(self.folder, self.result, search_front(self.trials))
        self.folder.write(TABLE_FILE, json.dumps(self.evaluator.state()))
        return self.result

    def _open_journal(self, presets: tuple[Preset, ...]) -> None:
        settings, path = self.settings, self.folder.file("study.journal")
        seed = settings.seed + (path.stat().st_size if path.exists() else 0)
        self.journal = StudyJournal(path, name=settings.name, sampler=make_sampler(self.space, settings.sampler, seed))
        for record, first in self.journal.records():
            self._remember(record, first)
        self.reclaimed = self.journal.reclaim()
        for preset in presets:
            source = preset.trial_source
            if preset.vector is not None and not self.journal.waits_or_is_done(source):
                self.journal.enqueue(preset.vector, source)

    def _one_trial(self) -> None:
        began = time.monotonic()
        trial = self.journal.ask(self.space.distributions)
        source = self.journal.source(trial)
        try:
            policy = self.space.policy(trial.params)
        except Exception as error:  # nothing was built, so the record shows the dense policy
            self._failed(trial, TrialRecord.begun(trial.number, source, self.space.presets()[0].policy), error)
            return
        record = TrialRecord.begun(trial.number, source, policy)
        known = self.known.get(policy.key())
        if known is not None:
            self._repeat(trial, record, known)
            return
        if (evaluation := self._tried(trial, record)) is None:
            return
        record = self._finished(record, evaluation, began)
        constraints = constraint_values(evaluation.measurement, self.settings.quality)
        self.journal.tell(trial, record, first=evaluation.first, constraints=constraints)
        self._done(record, evaluation.first)

    def _one_outside(self, preset: Preset) -> None:
        """Measures a preset or control that no vector of the space stands for."""
        began = time.monotonic()
        record = TrialRecord.begun(self.journal.next_number(), preset.trial_source, preset.policy)
        if (evaluation := self._tried(None, record)) is None:
            return
        record = self._finished(record, evaluation, began)
        self.journal.add_outside(record, evaluation)
        self._done(record, evaluation.first)

    def _tried(self, trial: Trial | None, record: TrialRecord) -> Evaluation | None:
        """Returns None for a trial that failed: one bad policy (memory, a kernel) must not end the study."""
        try:
            evaluation = self._evaluate(record)
        except Exception as error:
            self._failed(trial, record, error)
            return None
        self.streak, self.repeats = Streak(), 0
        return evaluation

    def _evaluate(self, record: TrialRecord) -> Evaluation:
        if record.policy.is_dense():
            return Evaluation(self.result.dense, self.result.dense)
        rivals = list(self._rivals()) if self.settings.discard else []

        def stop(first: Measurement) -> str:
            return discard_reason(first, rivals, self.settings.quality) if rivals else ""

        return self.evaluator.evaluate(record.policy, stop=stop)

    def _rivals(self) -> Iterator[Measurement]:
        for trial in self.trials:
            if trial.state == "complete" and trial.feasible and not trial.source.startswith("control:"):
                yield self.first[trial.number]

    def _finished(self, record: TrialRecord, evaluation: Evaluation, began: float) -> TrialRecord:
        return replace(
            record,
            measurement=evaluation.measurement,
            feasible=max(constraint_values(evaluation.measurement, self.settings.quality).values()) <= 0,
            state="discarded" if evaluation.stopped else "complete",
            seconds=time.monotonic() - began,
            sampler_seconds=self.journal.spent_sampling(),
            note=evaluation.stopped,
        )

    def _repeat(self, trial: Trial, record: TrialRecord, known: TrialRecord) -> None:
        """Tells what is known about a policy asked again, and queues an unseen neighbour of the front in its place."""
        source = record.source if record.preset else "repeat"
        told = replace(known, number=record.number, source=source, seconds=0.0, sampler_seconds=0.0)
        told = replace(told, note=f"same policy as trial {known.number}")
        constraints = constraint_values(known.measurement, self.settings.quality)
        self.journal.tell(trial, told, first=self.first[known.number], constraints=constraints)
        self._remember(told, self.first[known.number])
        self.repeats += 1
        if not record.preset:
            vectors = self.journal.vectors(member.number for member in search_front(self.trials))
            near = unseen_neighbour(self.space, list(vectors.values()), known=self.known, seed=record.number)
            if near is not None:
                self.journal.enqueue(near, "neighbour")

    def _failed(self, trial: Trial | None, record: TrialRecord, error: Exception) -> None:
        fault = fault_of(error)
        record = replace(record, note=fault.note if fault else f"{type(error).__name__}: {error}".splitlines()[0])
        self.journal.fail(trial, record, fault)
        _LOG.warning("trial %d failed (%s); the study goes on.", record.number, record.note)
        self._done(record, None)
        self.streak.add(error, fault)

    def _remember(self, record: TrialRecord, first: Measurement | None) -> None:
        self.trials.append(record)
        if first is not None:
            self.first[record.number] = first
            if not record.source.startswith("control:"):
                self.known.setdefault(record.policy.key(), record)

    def _done(self, record: TrialRecord, first: Measurement | None) -> None:
        self._remember(record, first)
        self.saved()
        best = max((trial.measurement.speed_up for trial in search_front(self.trials)), default=1.0)
        self.progress.trial_done(record, best_speed_up=best, seconds_left=self._seconds_left())
        if self.tracker_broken:
            return
        try:
            self.tracker.trial_done(record, trials=self.trials, dimensions=self._dimensions_so_far())
        except Exception as error:  # a tracker error never loses a trial
            self.tracker_broken = True
            _LOG.warning("tracker: %s: %s; the study goes on without it.", type(error).__name__, error)

    def _dimensions_so_far(self) -> tuple[DimensionRow, ...]:
        """Returns the dimensions now and then, as often as the tracker wants them."""
        every = self.tracker.tables_every
        return self._dimensions() if every and len(self.trials) % every == 0 else ()

    def _dimensions(self) -> tuple[DimensionRow, ...]:
        vectors = self.journal.vectors(trial.number for trial in self.trials)
        used = [(vectors[trial.number], trial) for trial in self.trials if trial.number in vectors]
        return tuple(dimension_rows(self.space, used))

    def _sources(self) -> set[str]:
        return {trial.source for trial in self.trials}

    def _spent(self) -> int:
        return sum(trial.source != "repeat" for trial in self.trials)

    def _within_budget(self) -> bool:
        if self._spent() >= self.settings.budget.trials or self.repeats >= MOST_REPEATS:
            return False
        return self.clock.has_time(self._validation())

    def _validation(self) -> ValidationCost:
        return ValidationCost(self.result.dense.latency, self.evaluator.validation_steps() + 1)

    def _validation_step(self) -> bool:
        """Counts a round of validation; returns whether the budget has time for another."""
        self.progress.step()
        return self.clock.has_another_round()

    def _seconds_left(self) -> float:
        recent = [trial.seconds for trial in self.trials if trial.source != "repeat" and trial.preset != "dense"][-12:]
        mean = sum(recent) / len(recent) if recent else self.result.dense.latency
        trials = max(0, self.settings.budget.trials - self._spent())
        return self.clock.seconds_left(trials * mean, self._validation())
