"""The tracker: one offline W&B run that holds the whole study, and a study that survives any tracker error."""

from pathlib import Path

import pytest
import wandb
from example_study import study_result
from wandb_file import history, records

from autoprune.search.plots import save_pareto_image
from autoprune.search.report_page import PageDetails, save_report_page
from autoprune.search.tracking import NullTracker, ReportFiles, WandbTracker


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def record(tracker: NullTracker, folder: Path) -> None:
    result = study_result(folder)
    files = ReportFiles(
        pareto_image=save_pareto_image(result, folder / "pareto.png"),
        dimensions_image=folder / "pareto.png",
        page=save_report_page(result, PageDetails({}, {}), folder / "report.html"),
        picture_grids=(folder / "pareto.png",),
        policies=tuple(member.policy_path for member in result.front if member.policy_path),
    )
    for trial in result.trials:
        tracker.trial_done(trial, best_speed_up=1.5)
    tracker.finish(result, files)
    tracker.close()


def test_without_a_key_the_run_is_offline_and_holds_trials_table_pictures_and_policies(no_key, tmp_path):
    lines = []
    record(WandbTracker(tmp_path, project="autoprune", settings={"budget": {"trials": 11}}, say=lines.append), tmp_path)
    assert len(lines) == 1 and "offline" in lines[0] and "wandb sync" in lines[0]
    wandb.teardown()  # waits until the writing process has written
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = records(path)
    rows = history(found)
    assert [row["_step"] for row in rows if "trial/feasible" in row] == list(range(11))
    assert rows[6]["trial/speed_up"] == 1.83
    assert {row["trials.nrows"] for row in rows if "trials.nrows" in row} == {11}
    assert {"pareto.path", "report.path", "pictures/pareto.path"} <= rows[-1].keys()
    artifacts = [entry.artifact for entry in found if entry.WhichOneof("record_type") == "artifact"]
    assert sum(artifact.type == "autoprune-policy" for artifact in artifacts) == 4


def test_a_failing_tracker_is_reported_once_and_never_raises(no_key, tmp_path, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("no space left\nsecond line")

    monkeypatch.setattr(wandb, "init", refuse)
    lines = []
    record(WandbTracker(tmp_path, project="autoprune", settings={"budget": {"trials": 11}}, say=lines.append), tmp_path)
    assert lines == ["tracker: W&B failed (RuntimeError: no space left); the study goes on without it."]


def test_the_null_tracker_writes_nothing(tmp_path):
    record(NullTracker(), tmp_path)
    assert not list(tmp_path.rglob("*wandb*"))
