"""Who leads a study: one at a time, also where folders differ; who comes late, helps, or finds nobody."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from formula_study import FormulaEvaluator, search, settings
from postgres_server import postgres_server

from autoprune.backbones import load_backbone
from autoprune.errors import UserError
from autoprune.policy import Policy
from autoprune.search import leadership
from autoprune.search.crew import Crew
from autoprune.search.evaluation import Evaluation, Stop
from autoprune.search.settings import StorageSettings, StudySettings
from autoprune.search.study import of_device


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random")


class Waiting(FormulaEvaluator):
    """Fails at its third policy, evaluates nothing after its tenth until the gate opens, and says when it is there."""

    def __init__(self, gate: Path) -> None:
        super().__init__(6, fail_at=(3,))
        self._gate = gate

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        if len(self.asked) == 10:
            self._gate.with_suffix(".reached").touch()
            while not self._gate.exists():
                time.sleep(0.02)
        return super().evaluate(policy, stop=stop)


def _lead(config: StudySettings, crew: Crew, gate: Path) -> None:
    search(config, load_backbone("tiny", weights="random"), Waiting(gate), crew=crew)


def started(config: StudySettings, crew: Crew, gate: Path) -> multiprocessing.Process:
    """Returns a process that leads a study and waits in the middle of it."""
    process = multiprocessing.get_context("spawn").Process(target=_lead, args=(config, crew, gate))
    process.start()
    until = time.monotonic() + 120
    while not gate.with_suffix(".reached").exists() and time.monotonic() < until:
        time.sleep(0.02)
    return process


def test_a_second_command_is_refused_where_only_the_storage_is_shared_and_helps_with_join(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    with postgres_server() as server:
        storage = StorageSettings("postgresql", server.url)
        one = replace(settings(tmp_path / "one", trials=20, sampler="random"), storage=storage, lease=1.0)
        two = replace(one, directory=tmp_path / "two")
        process = started(one, Crew(), tmp_path / "gate")
        with pytest.raises(UserError, match=r"this study is led by the study \(.*, process \d+\); wait for it, .* join=true"):
            search(two, backbone, FormulaEvaluator(6))
        helper = FormulaEvaluator(6)
        helping = threading.Timer(3, (tmp_path / "gate").touch)
        helping.start()
        assert search(two, backbone, helper, crew=Crew(rank=1, shared=True, may_lead=False)) is None
        process.join(120)
        assert process.exitcode == 0 and helper.asked and not (two.folder / "trials.csv").exists()
        result = search(one, backbone, FormulaEvaluator(6))
        assert len([trial for trial in result.trials if trial.source != "repeat"]) == 20
        assert {trial.worker for trial in result.trials} == {"", "worker-1"}


def test_when_the_leader_is_killed_another_worker_leads_to_the_end(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config, gate = settings(tmp_path, trials=20, sampler="random"), tmp_path / "gate"
    process = started(config, Crew(0, "token", shared=True), gate)
    killer = threading.Timer(2, lambda: os.kill(process.pid, signal.SIGKILL))
    killer.start()
    evaluator = FormulaEvaluator(6)
    result = search(config, backbone, evaluator, crew=Crew(1, "token", shared=True))
    process.join()
    assert result is not None and result.front and evaluator.validated
    assert len([trial for trial in result.trials if trial.source != "repeat"]) == 20
    late = FormulaEvaluator(6)
    assert search(config, backbone, late, crew=Crew(0, "token", shared=True)) is None and not late.asked, "it is over"
    assert search(config, backbone, late, crew=Crew(0, "other", shared=True)).trials == result.trials
    (failed,) = [trial.policy.key() for trial in result.trials if trial.state == "failed"]
    assert failed not in evaluator.asked, "it was the leader before that tried it, in this run"
    more = replace(config, budget=replace(config.budget, trials=21))
    search(more, backbone, late, crew=Crew(0, "another", shared=True))
    assert late.asked == [failed], "another run tries it again"


def test_help_without_anybody_to_help_is_one_sentence(tmp_path: Path, backbone, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    monkeypatch.setattr(leadership, "PATIENCE_SECONDS", 0.5)
    joining, config = Crew(rank=5, shared=True, may_lead=False), settings(tmp_path, trials=12, sampler="random")
    with pytest.raises(UserError, match="has no study to help; start one without join=true"):
        search(config, backbone, FormulaEvaluator(6), crew=joining)
    search(config, backbone, FormulaEvaluator(6))
    with pytest.raises(UserError, match="nobody leads this study; start it once without join=true"):
        search(config, backbone, FormulaEvaluator(6), crew=joining)


def test_a_study_of_a_device_is_named_after_what_latencies_depend_on(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config = settings(tmp_path)
    names = {of_device(config, loaded).name for loaded in (backbone, load_backbone("tiny", weights="random", dtype="bfloat16"))}
    assert len(names) == 2 and all(name.startswith("study@") and "torch" not in name.split("@")[0] for name in names)
    assert all("/" not in name and " " not in name for name in names)
