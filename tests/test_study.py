"""The ask/tell loop on the real journal, with an evaluator that computes its numbers instead of generating images."""

import base64
import csv
import io
import json
import math
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formula_study import SPACES, FormulaEvaluator, search, settings
from PIL import Image, ImageSequence
from rich.console import Console
from tiny_star import star

from autoprune.backbones import load_backbone
from autoprune.backbones.star_schedules import FRAMES_PER_SECOND
from autoprune.errors import UserError
from autoprune.policy import Policy
from autoprune.search.evaluation import Evaluation, Stop
from autoprune.search.neighbour import random_vector
from autoprune.search.progress import NullProgress
from autoprune.search.prompt_files import read_prompts
from autoprune.search.records import StudyResult, TrialRecord
from autoprune.search.report import write_report
from autoprune.search.settings import BudgetSettings, LatencySettings, QualitySettings, SamplerSettings, StudySettings
from autoprune.search.shared_study import SharedStudy
from autoprune.search.space import SearchSpace, Target, space_for
from autoprune.search.space_file import read_space
from autoprune.search.storage import open_storage
from autoprune.search.study import run_study
from autoprune.search.tables import metric_tables, result_table
from autoprune.search.tracking import NullTracker


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random")


def evaluated(result: StudyResult) -> list[TrialRecord]:
    return [trial for trial in result.trials if trial.source != "repeat" and trial.state != "failed"]


def test_presets_come_first_and_dense_is_the_first_trial(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config = settings(tmp_path, trials=20, space="fastvar")
    result = search(config, backbone, FormulaEvaluator(6))
    presets = SearchSpace(config.space, Target("tiny", 6, backbone.scale_schedule())).presets()
    sources = [trial.source for trial in result.trials]
    searched = [f"preset:{preset.name}" for preset in presets if preset.vector is not None]
    controls = [f"control:{preset.name}" for preset in presets if preset.vector is None]
    assert sources[: len(presets)] == searched + controls
    first = result.trials[0]
    assert first.policy.is_dense() and first.measurement.loss == 0 and first.measurement.speed_up == 1 and first.feasible
    assert len(evaluated(result)) == 20 and [trial.number for trial in result.trials] == list(range(len(result.trials)))


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random"])
def test_every_sampler_runs_and_evaluates_no_policy_twice(tmp_path: Path, backbone, sampler: str) -> None:  # noqa: ANN001
    evaluator = FormulaEvaluator(6)
    config = settings(tmp_path, trials=18, sampler=sampler)
    result = search(replace(config, sampler=SamplerSettings(sampler, startup=11)), backbone, evaluator)
    assert len(evaluator.asked) == len(set(evaluator.asked)) == len(evaluated(result)) - 1
    assert all(math.isfinite(trial.measurement.loss) for trial in evaluated(result))


def test_a_stopped_study_resumes_and_asks_nothing_twice(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    first = FormulaEvaluator(6, interrupt_at=15)
    stopped = search(settings(tmp_path), backbone, first)
    assert stopped.interrupted and not stopped.front and len(evaluated(stopped)) == 15
    second = FormulaEvaluator(6)
    result = search(settings(tmp_path), backbone, second)
    assert not result.interrupted and len(evaluated(result)) == 26
    assert second.asked[0] == first.asked[-1], "the interrupted trial is asked again, before anything new"
    finished = set(first.asked[:-1])
    assert not finished & set(second.asked) and len(second.asked) == len(set(second.asked))
    assert {trial.policy.key() for trial in evaluated(stopped)} <= {trial.policy.key() for trial in evaluated(result)}
    third = FormulaEvaluator(6)
    again = search(settings(tmp_path), backbone, third)
    assert third.asked == [] and again.trials == result.trials and third.validated


def test_an_interrupted_preset_is_evaluated_after_all(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    search(settings(tmp_path), backbone, FormulaEvaluator(6, interrupt_at=2))
    result = search(settings(tmp_path), backbone, FormulaEvaluator(6))
    names = [trial.preset for trial in result.trials if trial.preset]
    expected = {"dense", *(preset.name for preset in settings(tmp_path).space.presets if not preset.videos)}
    assert set(names) == expected and len(names) == len(expected)


def _run_until_killed(folder: str, gate: str) -> None:
    class Stalling(FormulaEvaluator):
        def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
            if len(self.asked) == 13:
                Path(gate).write_text("evaluating")
                time.sleep(600)
            return super().evaluate(policy, stop=stop)

    search(settings(Path(folder)), load_backbone("tiny", weights="random"), Stalling(6))


def test_a_killed_study_resumes(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    gate = tmp_path / "gate"
    process = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(str(tmp_path), str(gate)))
    process.start()
    deadline = time.monotonic() + 120
    while not gate.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match="in use by another run"):
        search(settings(tmp_path), backbone, FormulaEvaluator(6))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = list(csv.DictReader((tmp_path / "study" / "trials.csv").open()))
    evaluator = FormulaEvaluator(6)
    result = search(settings(tmp_path), backbone, evaluator)
    assert len(evaluated(result)) == 26 and len(evaluator.asked) == 26 - len([row for row in done if row["source"] != "repeat"])


def test_a_failing_trial_is_recorded_and_the_study_goes_on(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    result = search(settings(tmp_path), backbone, FormulaEvaluator(6, fail_at=(14, 17)))
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert [trial.note for trial in failed] == ["RuntimeError: out of memory"] * 2 and result.front
    with pytest.raises(RuntimeError):
        search(settings(tmp_path / "b"), backbone, FormulaEvaluator(6, fail_at=(14, 15, 16)))


def test_a_broken_tracker_loses_no_trial(tmp_path: Path, backbone, caplog: pytest.LogCaptureFixture) -> None:  # noqa: ANN001
    class Broken(NullTracker):
        def trial_done(self, record: TrialRecord, *, best_speed_up: float) -> None:
            raise ConnectionError("no route")

    result = search(settings(tmp_path, trials=14), backbone, FormulaEvaluator(6), Broken())
    assert len(evaluated(result)) == 14
    assert sum("tracker" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"space": read_space(SPACES / "stepvar.yaml")}, "another search space"),
        ({"seed": 3}, "measurement settings"),
        ({"quality": QualitySettings(prompts=8)}, "measurement settings"),
    ],
)
def test_a_folder_of_another_study_is_refused(tmp_path: Path, backbone, change: dict, what: str) -> None:  # noqa: ANN001
    search(settings(tmp_path, trials=2), backbone, FormulaEvaluator(6))
    before = (tmp_path / "study" / "trials.csv").read_text()
    with pytest.raises(UserError, match=what):
        search(replace(settings(tmp_path), **change), backbone, FormulaEvaluator(6))
    assert (tmp_path / "study" / "trials.csv").read_text() == before


def test_a_folder_of_another_backbone_is_refused(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    search(settings(tmp_path, trials=2), backbone, FormulaEvaluator(6))
    with pytest.raises(UserError, match="weights"):
        search(settings(tmp_path), replace(backbone, revision="other"), FormulaEvaluator(6))


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .* set study.dir"):
        search(settings(tmp_path / "file"), backbone, FormulaEvaluator(6))


def test_the_budget_may_grow_on_resume_and_the_clock_ends_a_search(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    assert len(evaluated(search(settings(tmp_path, trials=12), backbone, FormulaEvaluator(6)))) == 12
    assert len(evaluated(search(settings(tmp_path, trials=15), backbone, FormulaEvaluator(6)))) == 15
    short = replace(settings(tmp_path / "b"), budget=BudgetSettings(trials=50, minutes=1e-6, front=2))
    assert all(trial.preset for trial in search(short, backbone, FormulaEvaluator(6)).trials), "presets are always measured"


def test_a_preset_that_waits_late_keeps_its_place_in_the_budget(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config = settings(tmp_path, trials=24, sampler="random")
    result = search(config, backbone, FormulaEvaluator(6, fail_at=(2,)))
    (failed,) = [trial for trial in result.trials if trial.state == "failed"]
    space = space_for(config.space, backbone)
    study = SharedStudy(open_storage(config.storage, config.folder), name=config.name, space=space)
    vector = random_vector(space, np.random.default_rng(99))
    study.enqueue(vector, "neighbour")  # before the preset, which the next run queues again
    evaluator = FormulaEvaluator(6)
    search(replace(config, budget=replace(config.budget, trials=25)), backbone, evaluator)
    assert failed.preset and evaluator.asked == [failed.policy.key()]
    search(replace(config, budget=replace(config.budget, trials=26)), backbone, evaluator)
    assert evaluator.asked[1:] == [space.policy(vector).key()], "what gave way was not lost"


def test_exported_numbers_are_held_out_ones_and_every_file_reads_back(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    result = search(settings(tmp_path, trials=30), backbone, FormulaEvaluator(6))
    tiers = {member.tier: member for member in result.front if member.tier}
    assert {"balanced", "fast"} <= set(tiers)
    for tier, member in tiers.items():
        policy = Policy.load(member.policy_path)
        assert policy.key() == member.trial.policy.key() and policy.tier == tier
        assert policy.measured["split"] == "held_out" and policy.measured["seed"] == 7
        assert policy.measured["latency_source"] == "measured" and policy.measured["device"] == "cpu"
        assert policy.measured["loss_interval"][1] == pytest.approx(policy.measured["loss"] + 0.004)
        validated = {entry.trial.number for entry in (*result.front, *result.rejected)}
        assert policy.measured["holm"]["members"] == len(validated) and policy.measured["holm"]["promise_p"] <= 0.05
        assert policy.measured["table_error"] == pytest.approx(0.1) and "fastest validated policy" in policy.provenance["rule"]
        assert policy.provenance["trial"] == member.trial.number and policy.provenance["space"] == "fastvar"
    assert result.table_error == pytest.approx(0.1)
    assert tiers["fast"].held_out.speed_up >= tiers["balanced"].held_out.speed_up
    assert "fastvar" in result.presets and not any("random" in name for name in result.presets)
    document = json.loads((tmp_path / "study" / "front.json").read_text())
    assert document["validated"] and len(document["members"]) == len(result.front)
    assert all((member["holm"]["promise_p"] is None) == (not member["tier"]) for member in document["members"])
    rows = list(csv.DictReader((tmp_path / "study" / "trials.csv").open()))
    assert [int(row["number"]) for row in rows] == [trial.number for trial in result.trials]
    assert float(rows[3]["loss"]) == result.trials[3].measurement.loss


def test_hopeless_trials_are_discarded_on_their_first_prompts(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    result = search(settings(tmp_path, trials=40, sampler="random"), backbone, FormulaEvaluator(6))
    discarded = [trial for trial in result.trials if trial.state == "discarded"]
    assert discarded and all(trial.note and trial.measurement.prompts == 16 for trial in discarded)
    front = {member.trial.number for member in result.front}
    assert not front & {trial.number for trial in discarded}
    everything = search(
        replace(settings(tmp_path, trials=40, sampler="random", discard=False), name="all"), backbone, FormulaEvaluator(6)
    )
    assert all(trial.state == "complete" for trial in everything.trials)


OWN = [f"a {colour} {shape} on a {tone} background" for colour in ("red", "blue") for shape in ("circle", "ring", "square")
       for tone in ("dark", "light")]  # fmt: skip


def own_study(folder: Path, prompts: list[str]) -> StudySettings:
    file = folder / "own.txt"
    file.write_text("\n".join(prompts))
    quality = QualitySettings(name="fidelity", prompts=3, held_out_prompts=3, max_loss=1.0)
    return settings(
        folder,
        trials=2,
        space="skip",
        prompts=read_prompts(file),
        quality=quality,
        latency=LatencySettings(batch=2, rounds=1),
    )


def test_own_prompts_go_through_a_whole_study_without_scores(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config = own_study(tmp_path, OWN)
    result = run_study(config, backbone=backbone, tracker=NullTracker(), progress=NullProgress())
    rows = list(csv.DictReader((config.folder / "trials.csv").open()))
    assert len(rows) == len(result.trials) >= 2 and {row["score_drop"] + row["score_drop_interval"] for row in rows} == {""}
    again = run_study(config, backbone=backbone, tracker=NullTracker(), progress=NullProgress())
    assert again.trials == result.trials, "the journal reads back"
    document = json.loads((config.folder / "front.json").read_text())
    assert (
        document["dense"]["score"] is None and document["members"] and document["members"][-1]["held_out"]["score_drop"] is None
    )
    (fast,) = [member for member in again.front if member.tier == "fast"]
    policy = Policy.load(fast.policy_path)
    assert policy.measured["score_drop"] is None and policy.measured["prompts"] == 3
    metrics = document["members"][-1]["held_out"]["metrics"]
    assert policy.measured["metrics"] == metrics and list(metrics) == ["psnr", "ssim", "tokens"] and metrics["ssim"]["n"] == 3
    assert "a loss (1 - SSIM to dense) of at most 1," in policy.provenance["rule"] and "score" not in policy.provenance["rule"]
    files = write_report(again, backbone, config, command="python -m autoprune")
    assert len(files.picture_grids) == len({member.tier for member in again.front if member.tier})
    text = io.StringIO()
    Console(file=text, width=110).print(result_table(again), *metric_tables(again))
    assert re.search(r"fast +\d\.\d\dx ± \d\.\d\d +0\.\d{3} ± 0\.\d{3} +- +\d+ MB +<\.001", text.getvalue())
    assert re.search(r"psnr \(dB\) ↑ +ssim ↑ +tokens ↑", text.getvalue())
    assert re.search(r"fast +\d\d\.\d+ \[[\d., ]+\] +0\.\d+ \[0\.", text.getvalue())


def test_the_report_of_a_study_of_videos_moves_at_their_rate(tmp_path: Path) -> None:
    backbone, config = star(), own_study(tmp_path, OWN)
    result = search(config, backbone, FormulaEvaluator(backbone.depth))
    files = write_report(result, backbone, config, command="python -m autoprune")
    assert files.picture_grids and {path.suffix for path in files.picture_grids} == {".webp"}
    for path in files.picture_grids:
        with Image.open(path) as grid:
            shown = [frame.convert("RGB") and frame.info["duration"] for frame in ImageSequence.Iterator(grid)]
        assert sum(shown) == 17 * round(1000 / backbone.frame_rate) and backbone.frame_rate == FRAMES_PER_SECOND
    document = json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', files.page.read_text())[1])
    height, width = 64, 112
    clip = {"frames": 17, "columns": 5, "rate": FRAMES_PER_SECOND, "ratio": width / height}
    assert document["pictures"]["clip"] == clip
    film = Image.open(io.BytesIO(base64.b64decode(document["pictures"]["dense"][0].partition(",")[2])))
    assert film.size == (5 * width, 4 * height)
    assert any(purpose.startswith("A video with ") for purpose in document["commands"])


def test_a_folder_of_other_prompts_is_refused(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    search(own_study(tmp_path, OWN), backbone, FormulaEvaluator(6))
    search(own_study(tmp_path, OWN[::-1]), backbone, FormulaEvaluator(6))
    with pytest.raises(UserError, match="belongs to another measurement settings .*prompts"):
        search(own_study(tmp_path, [*OWN, "a green cross"]), backbone, FormulaEvaluator(6))


def test_a_prompt_that_the_backbone_cannot_read_is_refused_before_a_folder_is_made(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config, evaluator = own_study(tmp_path, [prompt + " with a hat" for prompt in OWN]), FormulaEvaluator(6)
    with pytest.raises(UserError, match="closed vocabulary, got 'with', 'hat'; use the words: "):
        search(config, backbone, evaluator)
    assert not config.folder.exists() and not evaluator.asked


@pytest.mark.parametrize("name", sorted(path.stem for path in SPACES.glob("*.yaml")))
def test_every_search_space_runs_its_presets_and_two_trials(tmp_path: Path, backbone, name: str) -> None:  # noqa: ANN001
    config = settings(tmp_path, space=name)
    count = len(space_for(config.space, backbone).presets()) + 2
    result = search(replace(config, budget=BudgetSettings(trials=count, minutes=None, front=3)), backbone, FormulaEvaluator(6))
    assert sum(trial.source in ("sampler", "neighbour") for trial in result.trials) >= 2
    assert all(trial.state in ("complete", "discarded") for trial in result.trials)
