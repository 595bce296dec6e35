"""The study that workers share: what waits, is held, told, given back and taken from the dead; seconds of the sampler."""

import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from example_study import study_result
from formula_study import SPACES, FormulaEvaluator

from autoprune.backbones.schedules import scale_schedule
from autoprune.search.discard import constraint_values
from autoprune.search.presence import SIGN, Presence, Worker
from autoprune.search.records import TrialRecord
from autoprune.search.settings import QualitySettings, StorageSettings
from autoprune.search.shared_study import MOST_RETRIES, Asked, SharedStudy
from autoprune.search.space import SearchSpace, Target
from autoprune.search.space_file import read_space
from autoprune.search.storage import open_storage
from autoprune.search.study_board import Run
from autoprune.search.tables import findings

SPACE = SearchSpace(read_space(SPACES / "fastvar.yaml"), Target("tiny", 6, scale_schedule()))


def opened(folder: Path, sampler: optuna.samplers.BaseSampler | None = None) -> SharedStudy:
    study = SharedStudy(open_storage(StorageSettings(), folder), name="x", space=SPACE)
    study.use(sampler or optuna.samplers.RandomSampler(seed=0))
    study.sync()
    return study


def elsewhere(name: str) -> Worker:
    """Returns a worker of a machine that cannot be looked into."""
    return Worker(name, "another-host", "another-boot", 1, 1)


def gone(study: SharedStudy, worker: Worker) -> Presence:
    """Returns the presence of a live worker for which the other one has been silent for longer than its lease."""
    study.board.put(SIGN + worker.token, {**vars(worker), "count": 3})
    presence = Presence(Worker.here("live"), study.board, lease=0.05)
    assert not presence.is_gone(worker.token), "a lease begins when it is first looked at"
    time.sleep(0.1)
    assert presence.is_gone(worker.token)
    return presence


def told(study: SharedStudy, asked: Asked) -> TrialRecord:
    measurement = FormulaEvaluator(6).measure(asked.policy)
    record = TrialRecord(asked.number, asked.source, asked.policy, measurement, True, "complete", 1.0)
    constraints = constraint_values(measurement, QualitySettings())
    study.tell(asked, record, first=measurement, constraints=constraints)
    return record


def test_presets_are_queued_once_whoever_queues_them_and_those_outside_the_space_last(tmp_path: Path) -> None:
    study, presets = opened(tmp_path), SPACE.presets()
    study.enqueue_presets(presets)
    other = opened(tmp_path)
    other.enqueue_presets(presets)
    other.sync()
    waiting = other.waiting()
    inside = [preset.trial_source for preset in presets if preset.vector is not None]
    assert waiting[: len(inside)] == inside and sorted(waiting) == sorted(preset.trial_source for preset in presets)
    policies = {preset.trial_source: preset.policy.key() for preset in presets}
    for _ in presets:
        asked = other.ask(Worker.here("one"))
        assert asked.policy.key() == policies[asked.source] and asked.outside == (asked.source not in inside)
        told(other, asked)
    study.sync()
    records = [record for record, _ in study.news()]
    assert [record.source for record in records] == waiting and study.news() == []
    assert set(study.vectors(range(99))) == {record.number for record in records if record.source in inside}


def test_the_trial_of_a_silent_worker_is_tried_again_twice_and_then_recorded_as_failed(tmp_path: Path) -> None:
    study, dead = opened(tmp_path), elsewhere("worker-7")
    presence = gone(study, dead)
    asked = study.ask(dead)
    for attempt in range(MOST_RETRIES):
        study.sync()
        (sentence,) = study.reclaim(presence)
        assert "worker-7 (another-host, process 1) is gone; the trial is tried again" in sentence
        study.sync()
        assert study.waiting() == ["again"] and not study.running() and not study.news()
        again = study.ask(dead)
        assert again.policy.key() == asked.policy.key() and again.number > asked.number + attempt
    study.sync()
    (sentence,) = study.reclaim(presence)
    study.sync()
    ((record, first),) = study.news()
    assert "it is not tried again" in sentence and not study.waiting() and not study.running() and first is None
    assert (
        record.state == "failed"
        and record.note == "its worker is gone, as 2 before it; the last was worker-7 (another-host, process 1)"
    )
    assert record.policy.key() == asked.policy.key()


def test_a_result_that_was_stored_before_its_worker_died_is_kept(tmp_path: Path) -> None:
    study, dead = opened(tmp_path), elsewhere("worker-7")
    presence, asked = gone(study, dead), study.ask(dead)
    finish, study._finish = study._finish, lambda *arguments, outside: None  # it dies before the trial counts as finished
    record = told(study, asked)
    study._finish = finish
    study.sync()
    assert list(study.running()) == [asked.number]
    assert "its result was there" in study.reclaim(presence)[0]
    study.sync()
    assert [known for known, _ in study.news()] == [record] and not study.running() and not study.waiting()


def test_a_trial_whose_worker_died_before_it_wrote_its_name_is_tried_again(tmp_path: Path) -> None:
    study = opened(tmp_path)
    vector = next(preset.vector for preset in SPACE.presets() if preset.vector and preset.name == "fastvar")
    study.enqueue(vector, "preset:fastvar")
    presence = Presence(Worker.here("live"), study.board, lease=0.05)
    for attempt in range(MOST_RETRIES + 1):
        number = study._study.ask().number
        study.sync()
        assert study.reclaim(presence) == [], "its lease begins"
        time.sleep(0.1)
        study.sync()
        (sentence,) = study.reclaim(presence)
        assert "of unknown name" in sentence and str(number) in sentence
        study.sync()
        assert study.waiting() == ["again"] * (attempt < MOST_RETRIES)
    ((record, _),) = study.news()
    assert record.policy.key() == SPACE.policy(vector).key() and record.source == "preset:fastvar"


@pytest.mark.parametrize("finishes", [False, True])
def test_a_result_that_is_stored_while_its_worker_is_looked_for_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finishes: bool
) -> None:
    study, dead = opened(tmp_path), elsewhere("worker-7")
    presence, asked = gone(study, dead), study.ask(dead)
    study.sync()
    if not finishes:
        monkeypatch.setattr(SharedStudy, "_finish", lambda *arguments, outside: None)
    records = []

    def told_and_died(token: str) -> bool:
        records.append(told(opened(tmp_path), asked))
        monkeypatch.undo()
        return True

    monkeypatch.setattr(presence, "is_gone", told_and_died)
    (sentence,) = study.reclaim(presence)
    assert ("was done with it" if finishes else "its result was there") in sentence
    study.sync()
    assert [known for known, _ in study.news()] == records and not study.running() and not study.waiting()


def test_a_trial_that_was_given_away_is_not_told_twice(tmp_path: Path) -> None:
    study, slow = opened(tmp_path), elsewhere("slow")
    presence, asked = gone(study, slow), study.ask(slow)
    study.sync()
    study.reclaim(presence)
    told(study, asked)  # it was only slow
    study.sync()
    assert study.news() == [] and study.waiting() == ["again"]
    told(study, study.ask(slow))
    study.sync()
    assert len(study.news()) == 1


def test_what_is_given_back_waits_and_does_not_count_as_a_try(tmp_path: Path) -> None:
    study, me = opened(tmp_path), Worker.here("me")
    asked = study.ask(me)
    for _ in range(2 * MOST_RETRIES):
        study.sync()
        study.give_back(asked)
        study.sync()
        assert study.waiting() == ["again"]
        asked = study.ask(me)
    told(study, asked)
    study.sync()
    assert len(study.news()) == 1


def test_a_run_and_its_leader_are_read_by_everybody(tmp_path: Path) -> None:
    study, other, me = opened(tmp_path), opened(tmp_path), Worker.here("me")
    assert other.board.run() == Run() and other.board.leader() == "" and other.board.identity() is None
    study.board.set_run(Run(3, True, 12.5, "token"))
    study.board.set_leader(me)
    study.board.set_identity({"device": {"threads": 2}})
    other.sync()
    assert other.board.run() == Run(3, True, 12.5, "token") and other.board.leader() == me.token
    assert other.board.identity() == {"device": {"threads": 2}}


class SlowSampler(optuna.samplers.RandomSampler):
    def sample_relative(self, study, trial, search_space):  # noqa: ANN001, ANN201
        time.sleep(0.05)
        return super().sample_relative(study, trial, search_space)


def test_seconds_of_the_sampler_are_counted_apart_from_those_of_trials(tmp_path: Path) -> None:
    study, began = opened(tmp_path, SlowSampler(seed=0)), time.perf_counter()
    for _ in range(2):
        study.ask(Worker.here("me"))
    asked = time.perf_counter() - began
    time.sleep(0.01)
    assert 0.1 <= study.spent_sampling() <= asked and study.spent_sampling() == 0


def test_the_share_of_the_sampler_is_a_median_over_searched_trials(tmp_path: Path) -> None:
    result = study_result(tmp_path)
    assert result.sampler_share is None and not any("sampler took" in line for line in findings(result))
    spent = zip(result.trials, [9, 9, 9, 9, 0.15, 0.3, 0.45, 0.6, 1.2, 1.2, 0], strict=True)  # presets do not count
    result = replace(result, trials=tuple(replace(trial, sampler_seconds=seconds) for trial, seconds in spent))
    assert result.sampler_share == pytest.approx(0.35)
    assert findings(result)[-1] == "The sampler took 35.0 % of a trial's seconds (median)."
