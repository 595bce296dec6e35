"""The real command started in every way that starts several processes: one study, one report, a log for each."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ("experiment=smoke", "budget.trials=5", "quality.prompts=8", "quality.held_out_prompts=8", "latency.rounds=1")
PYTHON = [sys.executable, "-m", "autoprune"]
LAUNCHERS = {
    "workers": [*PYTHON, "workers=2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "autoprune"],
    "submitit": [*PYTHON, "-m", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"],
}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Runs a command with one thread a process, as launchers of several set it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_processes_are_one_study(launcher: str, tmp_path: Path) -> None:
    done = run([*LAUNCHERS[launcher], *SMALL, f"study.dir={tmp_path}", "study.name=study"], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "study"
    trials = list(csv.DictReader((folder / "trials.csv").open()))
    assert len(trials) == 5 and len({row["schedule"] for row in trials}) == 5
    logs = {path.stem: path.read_text() for path in (folder / "workers").iterdir()}
    assert set(logs) == {"worker-0", "worker-1"}
    for row in trials:
        assert f"trial {row['number']}: " in logs[row["worker"]]
    assert json.loads((folder / "front.json").read_text())["validated"] is not None and (folder / "report.html").exists()
    if launcher != "submitit":
        assert done.stdout.count("report: ") == 1, "one process reports"


def test_what_workers_refuse_is_one_sentence(tmp_path: Path) -> None:
    place = [f"study.dir={tmp_path}", "study.name=study"]
    missing = run([*PYTHON, "workers=2", "backbone.weights=nowhere.safetensors", *SMALL, *place], tmp_path)
    assert missing.returncode == 2 and missing.stderr.count("autoprune: ") == 1, missing.stderr
    assert "nowhere.safetensors" in missing.stderr and "Traceback" not in missing.stderr
    several = run([*PYTHON, "-m", "workers=2", "study.seed=0,1", *SMALL, *place], tmp_path)
    assert several.returncode == 2 and "workers must be 1 under a multirun" in several.stderr
    twice = run([*LAUNCHERS["torchrun"], "workers=2", *SMALL, *place], tmp_path)
    assert twice.returncode != 0 and "workers must be 1 under torchrun or Slurm" in twice.stderr
