"""Plots, pictures and the final table show every kind of point of a study."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import torch
from example_study import policy, study_result
from PIL import Image, ImageSequence
from rich.console import Console

from autoprune.policy_text import schedule_lines
from autoprune.rules import BranchRule, KeyRule, ScalePruning, StopRule
from autoprune.search.picture_grid import save_picture_grid
from autoprune.search.plots import save_pareto_image
from autoprune.search.progress import RichProgress
from autoprune.search.records import Rivalry
from autoprune.search.report_page import PageDetails, save_report_page
from autoprune.search.study_points import CONTROL, DENSE, FRONT, PRESET, REJECTED, TRIAL, study_points
from autoprune.search.tables import findings, result_table

LABELS = {"dense", "fastvar", "fastvar-hart", "fastvar-hart-random", "lossless, high", "balanced", "fast"}


def test_dense_presets_control_and_tiers_are_labelled_points(tmp_path):
    points = study_points(study_result(tmp_path))
    assert {point.label for point in points if point.label} == LABELS
    kinds = {point.trial.number: point.kind for point in points}
    assert [kinds[number] for number in (0, 1, 3, 6, 8, 9)] == [DENSE, PRESET, CONTROL, FRONT, TRIAL, REJECTED]
    assert 10 not in kinds, "a failed trial has no place"


def test_presets_stand_where_the_held_out_prompts_put_them(tmp_path):
    presets = {point.label: point.measured.speed_up for point in study_points(study_result(tmp_path)) if point.kind == PRESET}
    assert presets == {"fastvar": 1.88, "fastvar-hart": 1.47}


def test_the_image_is_drawn(tmp_path):
    image = np.asarray(Image.open(save_pareto_image(study_result(tmp_path), tmp_path / "pareto.png")).convert("RGB"))
    assert image.shape == (825, 1350, 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100


def test_the_picture_grid_shows_dense_policy_and_their_difference(tmp_path):
    dense, pruned = torch.zeros(2, 3, 128, 128), torch.zeros(2, 3, 128, 128)
    dense[0, 0], pruned[1] = 1.0, 0.2
    path = save_picture_grid(tmp_path / "grid.png", dense=dense, pruned=pruned, prompts=["one", "two"], title="fast")
    grid = np.asarray(Image.open(path))
    height, width = grid.shape[:2]
    middles = [[tuple(grid[height - 128 - row * 266, width - 138 - column * 266]) for column in (2, 1, 0)] for row in (1, 0)]
    assert middles[0] == [(255, 0, 0), (0, 0, 0), (255, 255, 255)]
    assert middles[1] == [(0, 0, 0), (51, 51, 51), (153, 153, 153)]


def test_the_picture_grid_of_videos_moves_in_step(tmp_path):
    dense, pruned = torch.zeros(1, 3, 3, 64, 64), torch.zeros(1, 3, 3, 64, 64)
    for frame, green in enumerate((0.2, 0.6, 1.0)):
        dense[:, 0, frame], pruned[:, 1, frame] = 1.0 - green, green
    path = save_picture_grid(tmp_path / "grid.png", dense=dense, pruned=pruned, prompts=["one"], title="fast", rate=4)
    assert path == tmp_path / "grid.webp" and list(tmp_path.iterdir()) == [path]
    with Image.open(path) as moving:
        sheets = [np.asarray(sheet.convert("RGB")) for sheet in ImageSequence.Iterator(moving)]
        assert moving.info["duration"] == 250
    height, width = sheets[0].shape[:2]
    middles = [[tuple(sheet[height - 138, width - 138 - column * 266]) for column in (2, 1, 0)] for sheet in sheets]
    assert middles == [
        [(204, 0, 0), (0, 51, 0), (255, 255, 255)],
        [(102, 0, 0), (0, 153, 0), (255, 255, 255)],
        [(0, 0, 0), (0, 255, 0), (255, 255, 255)],
    ]


def test_the_table_has_a_row_a_tier_and_a_preset(tmp_path):
    text = io.StringIO()
    Console(file=text, width=110).print(result_table(study_result(tmp_path)))
    shown = text.getvalue()
    for tier in ("lossless", "high", "balanced", "fast"):
        assert re.search(rf"{tier} .*x .*\[.*\].* MB .*policies/{tier}\.json", shown)
    assert re.search(r"fastvar +1\.88x +0\.280 +\+9\.0 \[\+7\.0, \+11\.0\] +512 MB +\(preset\)", shown)


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_without_scores_no_drop_is_shown(tmp_path):
    result, none = study_result(tmp_path), dict.fromkeys(("score_dense", "score", "score_drop", "score_drop_interval"))
    trials = tuple(
        replace(trial, measurement=trial.measurement and replace(trial.measurement, **none)) for trial in result.trials
    )
    front = tuple(
        replace(member, trial=trials[member.trial.number], held_out=replace(member.held_out, **none)) for member in result.front
    )
    presets = {name: replace(measured, **none) for name, measured in result.presets.items()}
    bare = replace(result, dense=replace(result.dense, **none), trials=trials, front=front, presets=presets)
    page = save_report_page(bare, PageDetails({}, {}), tmp_path / "report.html").read_text()
    assert "score drop [95 %]" not in json.dumps(page_data(page)) and "PSNR" in json.dumps(page_data(page))
    text = io.StringIO()
    Console(file=text, width=110).print(result_table(bare))
    assert re.search(r"fastvar +1\.88x +0\.280 +- +512 MB", text.getvalue())
    assert "raise quality.max_loss or" in result_table(replace(bare, front=())).caption


def test_a_schedule_reads_as_one_line_a_decision():
    lines = schedule_lines(policy(0.5, 0.25, cond_from=5, skip=1))
    assert lines == [
        "scale 5 (12x12): keep 50 % (dc, sublayer, area from scale 4)",
        "from scale 5: cond branch only",
        "last 1 scale skipped",
    ]
    assert schedule_lines(policy(1, 1)) == ["dense"]
    rule = ScalePruning(0.25, None, {"structure": 1.0, "texture": 0.5}, "scale", restorer="nearest", normalise="rank")
    guidance, keys = BranchRule("adaptive", 4, "extrapolate", "kl_bits", 0.01), KeyRule(2, 1)
    assert schedule_lines(
        replace(policy(1, 1), scales={6: rule}, guidance=guidance, keys=keys, stop=StopRule(5, 0.1, 0.02))
    ) == [
        "scale 6 (16x16): keep 25 % (1 structure + 0.5 texture, scale, nearest)",
        "from scale 4: unconditional branch dropped when kl_bits is below 0.01, its effect extrapolated",
        "from scale 5: stop when less than 2 % still changes",
        "keys of the first 2 and the last 1 scales only",
    ]


def test_progress_shows_the_best_speed_up_and_the_time_left(tmp_path):
    text = io.StringIO()
    result = study_result(tmp_path)
    with RichProgress(Console(file=text, width=120, force_terminal=True)) as progress:
        progress.phase("search", len(result.trials))
        for trial in result.trials:
            progress.trial_done(trial, best_speed_up=1.83, seconds_left=65.0)
    assert "best 1.83x, 1:05 left" in text.getvalue()
    assert "11/11" in text.getvalue()


def test_presets_without_hypervolume_are_not_divided_by(tmp_path) -> None:  # noqa: ANN001
    result = replace(study_result(tmp_path), rivalry=Rivalry(front=0.1, presets=0.0, ratios={"skip-1": 1.0}, best="skip-1"))
    assert not any("hypervolume" in sentence for sentence in findings(result))
