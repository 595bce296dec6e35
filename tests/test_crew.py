"""How a process finds out what started it, what it sees of the GPUs, and how Ctrl-C ends its work."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from formula_study import FormulaEvaluator, search, settings

from autoprune.backbones import load_backbone
from autoprune.policy import Policy
from autoprune.search.crew import SUPERVISED, Crew, crew_here, use_own_device
from autoprune.search.evaluation import Evaluation, Stop

TORCHRUN = {"TORCHELASTIC_RUN_ID": "abc", "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
SUBMITIT = {
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_JOB_ID": "5",
}


@pytest.mark.parametrize(
    ("environment", "crew"),
    [
        ({}, Crew()),
        ({SUPERVISED: "2/token/41"}, Crew(2, "token", shared=True, parent=41)),
        (TORCHRUN, Crew(9, "abc", shared=True, local=1)),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, Crew(9, "", shared=True, local=1)),
        (TORCHRUN | {"WORLD_SIZE": "1"}, Crew()),
        (SLURM, Crew(3, "slurm-77-0", shared=True, local=1)),
        (SLURM | {"SLURM_NTASKS": "1"}, Crew()),
        (SUBMITIT, Crew(1, "submitit-5", shared=True, local=1)),
    ],
)
def test_a_process_knows_what_started_it(environment: dict[str, str], crew: Crew) -> None:
    assert crew_here(environment, join=False) == crew
    joined = crew_here(environment, join=True)
    assert joined.shared and not joined.may_lead


def test_without_gpus_nothing_is_hidden_and_a_process_is_left_when_its_parent_dies() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "4,6"}
    use_own_device(Crew(), environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "4,6"}
    assert not Crew(parent=os.getppid()).is_left() and Crew(parent=1 + os.getppid()).is_left() and not Crew().is_left()


class Slow(FormulaEvaluator):
    """Takes two seconds for every searched policy, and says when it begins."""

    def __init__(self, gate: Path) -> None:
        super().__init__(6)
        self._gate = gate

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        if len(self.asked) == 12:
            self._gate.touch()
            time.sleep(5)
        return super().evaluate(policy, stop=stop)


def _work(folder: str, gate: str, results) -> None:  # noqa: ANN001
    result = search(settings(Path(folder)), load_backbone("tiny", weights="random"), Slow(Path(gate)))
    evaluated = [trial.policy.key() for trial in result.trials if trial.preset != "dense" and "same policy" not in trial.note]
    results.put((result.interrupted, evaluated))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_the_first_signal_lets_the_trial_finish_and_the_second_stops_at_once(
    tmp_path: Path, number: signal.Signals, times: int
) -> None:
    context, gate = multiprocessing.get_context("spawn"), tmp_path / "gate"
    results = context.SimpleQueue()
    process = context.Process(target=_work, args=(str(tmp_path), str(gate), results))
    process.start()
    until = time.monotonic() + 120
    while not gate.exists() and time.monotonic() < until:
        time.sleep(0.02)
    for _ in range(times):
        os.kill(process.pid, number)
        time.sleep(0.3)
    interrupted, evaluated = results.get()
    process.join()
    assert interrupted and len(evaluated) == (13 if times == 1 else 12)
    evaluator = FormulaEvaluator(6)
    again = search(settings(tmp_path), load_backbone("tiny", weights="random"), evaluator)
    assert not again.interrupted and not set(evaluator.asked) & set(evaluated)
    assert len(evaluator.asked) + len(evaluated) == len({trial.policy.key() for trial in again.trials}) - 1
