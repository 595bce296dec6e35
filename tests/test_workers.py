"""Many processes on one study: killed at random, on a journal and on a real PostgreSQL server, which is stopped too."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from formula_study import FormulaEvaluator, search, settings
from postgres_server import PostgresServer, postgres_server

from autoprune.backbones import load_backbone
from autoprune.policy import Policy
from autoprune.search.crew import Crew
from autoprune.search.evaluation import Evaluation, Stop
from autoprune.search.front import may_lead, non_dominated, objectives, search_front
from autoprune.search.records import Measurement, StudyResult
from autoprune.search.settings import StorageSettings, StudySettings
from autoprune.search.shared_study import SharedStudy
from autoprune.search.space import space_for
from autoprune.search.storage import open_storage

TRIALS = 60
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["autoprune.search.study", "autoprune.search.evaluator", "formula_study"])


class SlowEvaluator(FormulaEvaluator):
    """Takes a while for each policy, and notes in a file that it began."""

    def __init__(self, notes: Path, seconds: float) -> None:
        super().__init__(6)
        self._notes, self._seconds = notes, seconds

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        with self._notes.open("a") as notes:
            notes.write(f"{policy.key()}\n")
        time.sleep(self._seconds * random.uniform(0.5, 1.5))
        return super().evaluate(policy, stop=lambda first: "")


def work(config: StudySettings, crew: Crew, seconds: float) -> None:
    search(config, load_backbone("tiny", weights="random"), SlowEvaluator(config.directory / "notes", seconds), crew=crew)


class Workers:
    """Processes 0 to count - 1 of one study; `kill` ends one without a word and starts it again."""

    def __init__(self, config: StudySettings, count: int, *, seconds: float) -> None:
        self._config, self._seconds, self.token = config, seconds, os.urandom(4).hex()
        self.processes = [self._started(rank) for rank in range(count)]

    def _started(self, rank: int) -> multiprocessing.Process:
        process = CONTEXT.Process(target=work, args=(self._config, Crew(rank, self.token, shared=True), self._seconds))
        process.start()
        return process

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)
        self.processes[rank].join()
        self.processes[rank] = self._started(rank)

    def join(self, seconds: float) -> list[int | None]:
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["journal", "postgresql"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> StudySettings:
    made = settings(tmp_path, trials=TRIALS, sampler="random", space="unified")
    if request.param == "journal":
        return made
    url = request.getfixturevalue("server").url
    return replace(made, name=tmp_path.name, storage=StorageSettings("postgresql", url, patience=2))


def finished(config: StudySettings) -> int:
    """Returns how many rows the leader has published."""
    path = config.folder / "trials.csv"
    return len([line for line in path.read_text().splitlines()[1:] if ",repeat," not in line]) if path.exists() else 0


def wait_for(config: StudySettings, count: int, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while finished(config) < count:
        assert time.monotonic() < until, f"{finished(config)} of {count} trials after {seconds} s"
        time.sleep(0.05)


def test_workers_that_are_killed_lose_nothing_and_repeat_nothing(config: StudySettings, backbone) -> None:  # noqa: ANN001
    rng, workers = random.Random(0), Workers(config, 4, seconds=0.4)
    turns = [rank for rank in range(4) for _ in range(3)]
    rng.shuffle(turns)
    for place, rank in enumerate(turns):
        wait_for(config, 4 * (place + 1))
        time.sleep(rng.uniform(0, 0.4))
        workers.kill(rank)
    assert workers.join(240) == [0] * 4
    evaluator = FormulaEvaluator(6)
    result = search(config, backbone, evaluator)
    assert not evaluator.asked, "everything was finished"
    check(config, result, backbone)


def check(config: StudySettings, result: StudyResult, backbone) -> None:  # noqa: ANN001
    """Asserts that a study holds exactly its trials, each once, none stuck, and the front that its policies have."""
    trials = [trial for trial in result.trials if trial.source != "repeat"]
    assert len(trials) == TRIALS
    unlucky = [trial for trial in trials if trial.state == "failed"]  # killed at the third try too
    assert all(trial.note.startswith("its worker is gone, as 2 before it") for trial in unlucky) and len(unlucky) <= 2
    trials = [trial for trial in trials if trial not in unlucky]
    own = [trial for trial in trials if not trial.source.startswith("control:") and "same policy" not in trial.note]
    keys = [trial.policy.key() for trial in own]
    assert len(set(keys)) == len(keys)
    assert {trial.state for trial in trials} == {"complete"}
    assert all(trial.preset and trial.note.startswith("same policy as trial") for trial in trials if trial.note)
    presets = {preset.trial_source for preset in space_for(config.space, backbone).presets()}
    assert sorted(trial.source for trial in result.trials if trial.preset) == sorted(presets)
    study = SharedStudy(open_storage(config.storage, config.folder), name=config.name, space=space_for(config.space, backbone))
    study.sync()
    assert not study.running() and not study.board.run().is_open
    again = [replace(trial, measurement=measured(trial.policy)) for trial in trials]
    front = non_dominated(filter(may_lead, again), lambda trial: objectives(trial.measurement))
    assert [trial.policy.key() for trial in search_front(result.trials)] == [trial.policy.key() for trial in front]
    assert (config.folder / "front.json").exists() and result.front


def measured(policy: Policy) -> Measurement:
    evaluator = FormulaEvaluator(6)
    return evaluator.dense() if policy.is_dense() else evaluator.measure(policy)


def test_a_database_that_is_stopped_for_a_while_loses_nothing(server: PostgresServer, tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config = settings(tmp_path, trials=TRIALS, sampler="random", space="unified", name=tmp_path.name)
    config = replace(config, storage=StorageSettings("postgresql", server.url, patience=2))
    workers = Workers(config, 3, seconds=0.3)
    wait_for(config, 20)
    server.stop()
    time.sleep(20)
    server.start()
    assert workers.join(240) == [0] * 3
    notes = (tmp_path / "notes").read_text().splitlines()
    assert len(notes) == len(set(notes)), "no policy was evaluated twice"
    check(config, search(config, backbone, FormulaEvaluator(6)), backbone)
