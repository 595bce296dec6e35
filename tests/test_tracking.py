"""The tracker: one offline W&B run that holds the whole study, and a study that survives any tracker error."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wandb
from example_study import study_result
from PIL import Image, ImageSequence
from wandb_file import history, records
from wandb_server import StandIn

from autoprune.search import tracking
from autoprune.search.background import TRIAL_SECONDS, BackgroundTracker
from autoprune.search.picture_grid import save_picture_grid
from autoprune.search.plots import save_pareto_image
from autoprune.search.records import DimensionRow
from autoprune.search.report_page import PageDetails, ScaleTimes, save_report_page
from autoprune.search.tracking import TABLES_EVERY, NullTracker, ReportFiles, WandbTracker


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def record(tracker: NullTracker, folder: Path, *, grids: tuple[Path, ...] = ()) -> None:
    result = study_result(folder)
    files = ReportFiles(
        pareto_image=save_pareto_image(result, folder / "pareto.png"),
        dimensions_image=folder / "pareto.png",
        page=save_report_page(result, PageDetails({}, {}), folder / "report.html"),
        picture_grids=(folder / "pareto.png", *grids),
        policies=tuple(member.policy_path for member in result.front if member.policy_path),
        scale_times=(ScaleTimes("dense", (("scale 0 (1x1)", 0, 0.001, 0.0001),)),),
    )
    for trial in result.trials:
        tracker.trial_done(trial, trials=result.trials[: trial.number + 1])
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


def test_a_picture_grid_of_videos_is_recorded_as_a_video_that_browsers_play(no_key, tmp_path):
    moving = torch.zeros(1, 3, 3, 16, 16)
    for frame in range(3):
        moving[:, 0, frame] = (frame + 1) / 3
    grid = save_picture_grid(tmp_path / "pictures-fast.png", dense=moving, pruned=moving, prompts=["a"], title="b", rate=4)
    lines = []
    record(WandbTracker(tmp_path, project="autoprune", settings={}, say=lines.append), tmp_path, grids=(grid,))
    assert len(lines) == 1 and "offline" in lines[0]
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    last = history(records(path))[-1]
    assert last["pictures/pictures-fast._type"] == "video-file" and "pareto.path" in last
    with Image.open(path.parent / "files" / last["pictures/pictures-fast.path"]) as played:
        assert (played.format, played.n_frames, played.info["loop"], played.info["duration"]) == ("GIF", 3, 0, 250)
        reds = []
        for frame in ImageSequence.Iterator(played):
            shown = frame.convert("RGB")
            reds.append(shown.getpixel((shown.width - 138 - 2 * 266, shown.height - 138))[0])
    assert reds == pytest.approx([85, 170, 255], abs=8)


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


def growing(folder: Path) -> list:
    """Returns more trials than one table covers, from those of the example study."""
    trials = study_result(folder).trials
    return [replace(trials[number % len(trials)], number=number) for number in range(TABLES_EVERY + 3)]


def test_tables_hypervolume_and_dimensions_grow_with_the_trials(no_key, tmp_path):
    tracker = WandbTracker(tmp_path, project="autoprune", settings={}, say=lambda line: None)
    trials, rows = growing(tmp_path), [DimensionRow("skip_last", 3, 0.5, 0.4, 0.3)]
    for trial in trials:
        dimensions = rows if trial.number == TABLES_EVERY - 1 else ()
        tracker.trial_done(trial, trials=trials[: trial.number + 1], dimensions=dimensions)
    tracker.close()
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = history(records(path))
    areas = [row["study/hypervolume"] for row in found]
    assert areas == sorted(areas) and areas[-1] > areas[0] == 0
    assert found[-1]["study/front_members"] == 4 and found[-1]["study/best_speed_up"] == 2.2
    tables = {row["_step"]: {key for key in row if key.endswith(".nrows")} for row in found}
    assert tables.pop(TABLES_EVERY - 1) == {"trials.nrows", "search_front.nrows", "dimensions.nrows"}
    assert not any(tables.values())


@pytest.fixture
def online(monkeypatch, tmp_path):
    server = StandIn()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield server
    wandb.teardown()
    server.close()


def test_a_server_gets_trials_tables_and_a_policy_with_the_alias_of_every_tier(online, tmp_path):
    lines = []
    tracker = WandbTracker(tmp_path, project="autoprune", settings={"seed": 3}, say=lines.append)
    record(BackgroundTracker(tracker, say=lines.append), tmp_path)
    assert lines == []
    assert [row["_step"] for row in online.rows if "trial/feasible" in row] == list(range(11))
    sent = [call["input"] for call in online.called("CreateArtifact")]
    aliases = {alias["alias"] for each in sent if each["artifactTypeName"] == "autoprune-policy" for alias in each["aliases"]}
    assert {"lossless", "high", "balanced", "fast"} <= aliases
    assert {each["artifactCollectionName"] for each in sent if each["artifactTypeName"] == "autoprune-policy"} == {
        f"{tmp_path.name}-policy"
    }
    assert any("scales" in path for path in online.uploads) and any("report" in path for path in online.uploads)


def test_a_resumed_study_goes_on_in_the_same_run(online, tmp_path):
    for _ in range(2):
        tracker = WandbTracker(tmp_path, project="autoprune", settings={}, say=pytest.fail)
        trials = study_result(tmp_path).trials
        tracker.trial_done(trials[0], trials=trials[:1])
        tracker.close()
    assert len({call["name"] for call in online.called("UpsertBucket") if call.get("name")}) == 1
    assert len(online.called("RunResumeStatus")) == 2


def test_a_server_that_never_answers_holds_up_neither_trials_nor_the_end(online, tmp_path, monkeypatch):
    online.delay = None
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 5.0)
    lines, trials = [], study_result(tmp_path).trials
    tracker = BackgroundTracker(
        WandbTracker(tmp_path, project="autoprune", settings={}, say=lines.append), say=lines.append, patience=0.5
    )
    began = time.monotonic()
    for trial in trials:
        tracker.trial_done(trial, trials=trials[: trial.number + 1])
    tracker.close()
    waited = time.monotonic() - began
    assert TRIAL_SECONDS <= waited < 2 * TRIAL_SECONDS + 5, "one wait for the first trial, none after it, and the patience"
    assert lines == ["tracker: no answer for 0 s; what it lacks of this study is in the study folder."]


def test_one_failure_costs_that_record_alone(no_key, tmp_path, monkeypatch):
    lines, trials = [], study_result(tmp_path).trials
    tracker = WandbTracker(tmp_path, project="autoprune", settings={}, say=lines.append)
    tracker.trial_done(trials[0], trials=trials[:1])
    with monkeypatch.context() as patch:
        patch.setattr(tracker._run, "log", lambda *values, **options: 1 / 0)
        tracker.trial_done(trials[1], trials=trials[:2])
    tracker.trial_done(trials[2], trials=trials[:3])
    tracker.close()
    wandb.teardown()
    assert [line for line in lines if "ZeroDivisionError" in line] == lines[1:]
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["_step"] for row in history(records(path))] == [0, 2]


def test_trials_that_end_out_of_order_are_all_recorded(no_key, tmp_path):
    trials = study_result(tmp_path).trials
    order = [trials[number] for number in (0, 2, 1, 4, 3)]
    tracker = WandbTracker(tmp_path, project="autoprune", settings={}, say=str)
    for count, trial in enumerate(order, start=1):
        tracker.trial_done(trial, trials=order[:count])
    tracker.close()
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [(row["_step"], row["trial/number"]) for row in history(records(path))] == list(enumerate((0, 2, 1, 4, 3)))
