"""Agreement of two measurements: by hand, and how often simulated files of known truth are found inside."""

import math

import numpy as np
import pytest
from scipy import stats

from autoprune.measure.reproduction import Estimate, agreement
from autoprune.measure.statistics import bootstrap_interval, paired_interval


def test_the_margin_is_that_of_a_normal_difference():
    one, other = Estimate(1.0, 1.0 - 1.96 * 0.3, 1.0 + 1.96 * 0.3), Estimate(1.7, 1.7 - 1.96 * 0.4, 1.7 + 1.96 * 0.4)
    found = agreement(one, other)
    assert (found.difference, found.margin) == pytest.approx((0.7, 1.96 * 0.5)) and found.inside
    joint = agreement(one, other, tolerance=0.1, looks=3)
    assert joint.margin == pytest.approx(0.1 + stats.norm.ppf(1 - 0.05 / 6) * 0.5, rel=1e-3)


def test_skewed_intervals_count_with_the_side_that_faces_the_other():
    there, here = Estimate(0.0, -0.1, 3.0), Estimate(2.0, 1.6, 9.0)
    assert agreement(there, here).margin == pytest.approx(math.hypot(3.0, 0.4))
    assert agreement(here, there).margin == pytest.approx(math.hypot(3.0, 0.4))
    assert not agreement(here, Estimate(-2.0, -3.0, -1.9)).inside


def measured(random: np.random.Generator, drop: float, prompts: int) -> tuple[Estimate, Estimate]:
    """Returns loss and score drop of one simulated measurement: skewed losses of mean 0.05, drops of right or wrong images."""
    losses = random.gamma(1.5, 0.05 / 1.5, prompts)
    flips = random.choice((1.0, 0.0, -1.0), prompts, p=(0.04 + drop, 0.92 - drop, 0.04))
    dense, pruned = (flips >= 0).astype(float), (flips <= 0).astype(float)
    lost = float((dense - pruned).mean())
    return Estimate(losses.mean(), *bootstrap_interval(losses, resamples=400)), Estimate(lost, *paired_interval(dense, pruned))


@pytest.mark.parametrize(("truth", "least", "most"), [(0.0, 0.93, 1.0), (0.25, 0.0, 0.02)], ids=["honest", "wrong"])
def test_honest_files_are_inside_19_times_of_20_and_wrong_ones_are_found(truth, least, most):
    random = np.random.default_rng(0)
    inside = []
    for _ in range(200):
        there, here = measured(random, 0.0, 160), measured(random, truth, 112)
        inside.append(all(agreement(*pair, looks=2).inside for pair in zip(there, here, strict=True)))
    assert least <= np.mean(inside) <= most
