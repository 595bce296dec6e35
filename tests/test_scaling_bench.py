"""Simulated workers: who overlaps with whom, what counts, and the shape of the synthetic objective."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoprune.measure.scaling_table import scaling_table
from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.search.scaling_bench import ScalingCase, Simulated, measure_scaling, simulate
from autoprune.search.scaling_plot import save_scaling_plot
from autoprune.search.synthetic import measured, outcome

CASE = ScalingCase(workers=(1, 4), samplers=("believer", "random"), trials=32, seeds=2, space="fastvar")
SCHEDULE = tuple((1, side, side) for side in (1, 2, 4, 8, 16))
DENSE = Policy("tiny", 6, SCHEDULE)


@pytest.fixture(scope="module")
def record() -> dict:
    return measure_scaling(CASE)


def test_workers_overlap_and_each_works_without_a_pause() -> None:
    alone, four = (simulate(CASE, Simulated("random", workers, 0)) for workers in (1, 4))
    draws = [np.random.default_rng((0, number)).lognormal(math.log(60), 0.4) for number in range(32)]
    assert alone.ends == pytest.approx(np.cumsum(draws))
    assert list(four.ends) == sorted(four.ends) and four.ends[0] == pytest.approx(min(draws[:4]))
    assert sum(draws) / 4 <= four.ends[-1] < sum(draws) / 4 + max(draws)


def test_many_workers_run_more_trials_each_at_least_its_share() -> None:
    case = replace(CASE, trials=8, each=3)
    assert [len(simulate(case, Simulated("random", workers, 0)).points) for workers in (2, 6)] == [8, 18]


def test_a_record_has_a_curve_for_every_sampler_and_number_of_workers(record: dict) -> None:
    assert {name: list(rows) for name, rows in record["scaling"].items()} == dict.fromkeys(CASE.samplers, ["1", "4"])
    for row in (row for rows in record["scaling"].values() for row in rows.values()):
        assert len(row["trials"]) == 32 and row["trials"] == sorted(row["trials"]) and 0 < row["trials"][-1] <= 1
        assert all(low <= high for low, high in zip(row["lowest"], row["highest"], strict=True))
        assert row["minutes"] == sorted(row["minutes"]) and 0 < row["ask"]["median"] <= row["ask"]["most"]
    assert len(list(scaling_table(record["scaling"]))) == 5


def test_the_plot_is_drawn(record: dict, tmp_path: Path) -> None:
    image = np.asarray(Image.open(save_scaling_plot(record, tmp_path / "x.png")).convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100


def test_dense_costs_and_loses_nothing_and_every_cut_is_faster_and_lossier() -> None:
    assert outcome(DENSE).point == (0.0, 0.0) and outcome(DENSE).constraint < 0
    half = ScalePruning(keep=0.5, cache_scale=2)
    cuts = [replace(DENSE, scales={4: half}), replace(DENSE, skip_last=1), replace(DENSE, guidance=BranchRule("cond", 4))]
    for policy in (*cuts, replace(DENSE, scales={3: half, 4: replace(half, keep=0.2)})):
        latency, loss = outcome(policy).point
        assert latency < 0 < loss
    assert outcome(replace(DENSE, skip_last=2)).constraint > 0


def test_noise_is_of_the_policy_and_the_seed() -> None:
    policy = replace(DENSE, scales={4: ScalePruning(keep=0.5, cache_scale=2)})
    true, told = outcome(policy), [measured(policy, seed) for seed in range(400)]
    assert measured(policy, 3) == told[3] and measured(DENSE, 3) == outcome(DENSE)
    assert np.std([each.point[0] for each in told]) == pytest.approx(0.02, rel=0.15)
    assert np.mean([each.point[1] for each in told]) == pytest.approx(true.point[1], rel=0.01)
    assert np.mean([each.constraint for each in told]) == pytest.approx(true.constraint, abs=0.003)
