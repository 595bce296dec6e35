"""Fronts and hypervolume against brute force."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formula_study import SPACES

from autoprune.policy import Policy, ScalePruning
from autoprune.search.folder import StudyFolder
from autoprune.search.front import hypervolume, hypervolume_history, most_valuable, non_dominated, objectives, search_front
from autoprune.search.prompt_files import PromptFile, TextPrompt
from autoprune.search.records import Measurement, StudyResult, TrialRecord
from autoprune.search.settings import BudgetSettings, QualitySettings, StudySettings
from autoprune.search.space_file import read_space
from autoprune.search.validation import validate_front

SCHEDULE = ((1, 1, 1), (1, 2, 2), (1, 4, 4))


def measured(latency: float, loss: float) -> Measurement:
    fields = dict.fromkeys(("latency_spread", "ssim", "psnr", "score_dense", "score", "score_drop", "peak_memory_mb"), 0.0)
    return Measurement(
        latency=latency,
        dense_latency=1.0,
        speed_up=1 / latency,
        loss=loss,
        score_drop_interval=(0.0, 0.0),
        loss_interval=(loss, loss),
        prompts=8,
        seed=0,
        batch=8,
        latency_source="measured",
        **fields,
    )


def record(number: int, latency: float, loss: float, **changes: object) -> TrialRecord:
    policy = Policy("tiny", 6, SCHEDULE, skip_last=1)
    fields = {"source": "sampler", "feasible": True, "state": "complete", "seconds": 1.0} | changes
    return TrialRecord(number=number, policy=policy, measurement=measured(latency, loss), **fields)


def brute_force_front(points: np.ndarray) -> set[tuple[float, float]]:
    def beaten(p: np.ndarray) -> bool:
        return any((q <= p).all() and (q < p).any() for q in points)

    return {tuple(p) for p in points if not beaten(p)}


@pytest.mark.parametrize("seed", range(5))
def test_non_dominated_is_the_brute_force_set(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 12, (40, 2)).astype(float)
    found = non_dominated([tuple(p) for p in points], lambda p: p)
    assert set(found) == brute_force_front(points)
    assert found == sorted(found) and len(found) == len(set(found))


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_brute_force_area(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 20, (15, 2)).astype(float)
    reference = (18.0, 16.0)
    cells = [(x + 0.5, y + 0.5) for x in range(18) for y in range(16)]
    area = sum(any(px < x and py < y for px, py in points) for x, y in cells)
    assert hypervolume([tuple(p) for p in points], reference) == area


def test_hypervolume_agrees_with_optunas() -> None:
    from optuna._hypervolume import compute_hypervolume

    points = np.random.default_rng(9).random((30, 2))
    assert hypervolume([tuple(p) for p in points], (0.9, 0.8)) == pytest.approx(
        compute_hypervolume(points[(points < (0.9, 0.8)).all(axis=1)], np.array([0.9, 0.8]))
    )


def test_the_history_is_the_hypervolume_of_what_was_known_after_each_trial() -> None:
    draws = np.random.default_rng(3).uniform((0.2, 0.0), (1.2, 0.6), (30, 2))
    trials = [record(number, *draw, feasible=number % 5 > 0) for number, draw in enumerate(draws)]
    known = [[objectives(trial.measurement) for trial in trials[: count + 1] if trial.feasible] for count in range(30)]
    history = hypervolume_history(trials, (0.0, 0.5))
    assert history == pytest.approx([hypervolume(points, (0.0, 0.5)) for points in known])
    assert history == sorted(history) and history[0] == 0 < history[-1]


def test_objectives_of_dense_are_zero() -> None:
    assert objectives(measured(1.0, 0.0)) == (0.0, 0.0)


def test_search_front_leaves_out_what_must_not_be_exported() -> None:
    good = record(1, 0.5, 0.1)
    out = [
        record(2, 0.4, 0.05, source="control:random"),
        record(3, 0.4, 0.05, source="repeat"),
        record(4, 0.4, 0.05, feasible=False),
        record(5, 0.4, 0.05, state="discarded"),
        record(6, 1.1, 0.01),
        record(7, 0.6, 0.2),
    ]
    assert search_front([*out, good]) == [good]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_most_valuable_are_the_greedy_choice_by_added_area(count: int) -> None:
    points = [(0.2, 0.4), (0.21, 0.399), (0.49, 0.101), (0.5, 0.1), (0.9, 0.01)]
    trials = [record(index, latency, loss) for index, (latency, loss) in enumerate(points)]
    chosen = [trial.number for trial in most_valuable(trials, count, chosen=[])]
    assert chosen == {0: [], 1: [2], 2: [2, 0], 3: [2, 0, 4], 9: [2, 0, 4, 1, 3]}[count]
    beside = [trial.number for trial in most_valuable([*trials[:3], trials[4]], count, chosen=[trials[3]])]
    assert beside == {0: [3], 1: [3], 2: [3, 0], 3: [3, 0, 4], 9: [3, 0, 4, 2, 1]}[count]


class Asked:
    """An evaluator that notes which policies are to be measured again, and measures none."""

    def validate(self, policies: Mapping[str, Policy], *, step: Callable[[], bool]) -> dict[str, Measurement]:
        self.keys = list(policies)
        return {}


@pytest.mark.parametrize("name, chosen", [("scenes", [2, 7, 1, 6, 5, 3]), ("fidelity", [7, 3, 5, 8])])
def test_what_is_measured_again_are_the_fastest_of_ever_smaller_drops_and_the_most_valuable(
    tmp_path: Path, name: str, chosen: list[int]
) -> None:
    points = [  # latency, loss, score drop; the budget is 0.12
        (0.30, 0.40, 0.11),
        (0.32, 0.35, 0.08),
        (0.40, 0.38, 0.05),
        (0.42, 0.25, 0.04),
        (0.45, 0.37, 0.025),
        (0.50, 0.15, 0.01),
        (0.55, 0.36, -0.01),
        (0.70, 0.10, 0.07),
        (0.90, 0.01, 0.0),
        (0.80, 0.50, -0.05),
    ]
    trials, scored = [], name == "scenes"
    for index, (latency, loss, drop) in enumerate(points):
        trial = record(index, latency, loss, feasible=scored or loss <= 0.32)
        measurement = replace(trial.measurement, score_drop=drop if scored else None)
        policy = Policy("tiny", 6, SCHEDULE, {2: ScalePruning((1 + index) / 16, 0)})
        trials.append(replace(trial, policy=policy, measurement=measurement))
    for number in (2, 7):
        trials[number] = replace(trials[number], source=f"preset:{number}")
    twin = replace(trials[2], number=10, source="sampler")
    space = read_space(SPACES / "skip.yaml")
    own = None if scored else PromptFile("own", tuple(TextPrompt(f"prompt {index}") for index in range(999)))
    quality = QualitySettings(name=name)
    config = StudySettings(tmp_path, "x", space, budget=BudgetSettings(front=4), quality=quality, prompts=own)
    result, asked = StudyResult("tiny", "skip", {}, None, (*trials, twin), (), tmp_path, {}), Asked()
    validate_front(result, settings=config, folder=StudyFolder(tmp_path, {}), evaluator=asked, step=lambda: True)
    assert asked.keys[: len(chosen)] == [trials[number].policy.key() for number in chosen]
