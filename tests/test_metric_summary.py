"""Intervals of metrics: against scipy, and how often they cover a known truth; the dictionary of metrics as a whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy import stats

from autoprune.errors import UserError
from autoprune.measure.metrics import METRICS, MetricContext
from autoprune.measure.metrics.contract import KINDS, MetricInfo
from autoprune.measure.metrics.discrepancy import Discrepancy, cubic
from autoprune.measure.metrics.sets import Fid, Kid
from autoprune.measure.metrics.suite import MetricSuite, check_metrics, check_shape
from autoprune.measure.metrics.summary import MetricValue, of_images, of_sets
from autoprune.measure.statistics import tango_interval

PAIRED = MetricInfo("x", "paired", lower=True, source="")
ABSOLUTE = MetricInfo("x", "absolute", lower=False, source="")
PASSES = MetricInfo("x", "absolute", lower=False, source="", passes=True)


def bare(kind: type, reference: np.ndarray | None = None) -> object:
    """Returns a set metric of given features, without a network."""
    metric = object.__new__(kind)
    metric.reference = reference
    return metric


def test_a_paired_metric_is_a_mean_with_scipys_bootstrap_interval_and_means_of_its_parts() -> None:
    values = np.random.default_rng(0).gamma(2, 0.1, (70, 3))
    found = of_images(PAIRED, values, None)
    reference = stats.bootstrap((values[:, 0],), np.mean, method="percentile", n_resamples=20000, random_state=2)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval), abs=0.003)
    assert (found.value, found.n, found.dense, found.change) == (pytest.approx(values[:, 0].mean()), 70, None, None)
    assert found.parts == pytest.approx(values[:, 1:].mean(0))


def test_an_absolute_metric_compares_with_dense_prompt_by_prompt() -> None:
    rng = np.random.default_rng(1)
    dense = rng.normal(20, 5, 60)
    values = dense - 0.3 + 0.1 * rng.normal(size=60)
    found = of_images(ABSOLUTE, values, dense)
    assert found.interval[0] < found.change < found.interval[1] < -0.2 and found.interval[0] > -0.4
    assert found.change == pytest.approx(found.value - found.dense)


def test_passes_get_tangos_interval_of_the_change() -> None:
    dense, values = np.array([1.0, 1, 1, 0, 1] * 8), np.array([1.0, 1, 0, 1, 1] * 8)
    values[0] = 0
    low, high = tango_interval(9, 8, pairs=40)
    assert of_images(PASSES, values, dense).interval == pytest.approx((-high, -low))


def test_images_without_a_number_are_left_out_with_their_pair() -> None:
    values, dense = np.array([1.0, np.nan, 3, 4]), np.array([1.0, 2, np.nan, 5])
    found = of_images(ABSOLUTE, values, dense)
    assert (found.n, found.value, found.dense, found.change) == (2, 2.5, 3.0, -0.5)
    assert of_images(ABSOLUTE, values * np.nan, dense) is None


@pytest.mark.parametrize("against", ["dense", "reference"])
def test_intervals_of_set_distances_cover_the_truth_about_95_percent_of_the_time(against: str) -> None:
    rng, width = np.random.default_rng(3), 24
    mixing = rng.normal(size=(width, width)) / width**0.5

    def sample(count: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
        """Rectified and correlated, as a network's features are."""
        hidden = rng.normal(size=(count, width)) @ mixing + 0.3
        changed = hidden + shift * np.linspace(-1, 1, width) + 0.3 * rng.normal(size=hidden.shape)
        return np.maximum(changed, 0), np.maximum(hidden, 0)

    kid = Discrepancy(cubic, unbiased=True)
    reference = None if against == "dense" else sample(500, 0)[1]
    metric = bare(Kid, reference)
    own, dense = sample(2000, 0.4)
    if reference is None:
        truth = kid.of_pairs(own, dense, [np.arange(2000)])[0]
    else:
        within = kid.within(reference)
        truth = np.subtract(*(kid.to_reference(x, reference, within, [np.arange(2000)])[0] for x in (own, dense)))
    covered = []
    for _ in range(120):
        found = of_sets(metric, *sample(60, 0.4))
        covered.append(found.interval[0] <= truth <= found.interval[1])
    assert 0.9 <= np.mean(covered) < 1


def test_halves_of_prompts_do_not_shift_fid() -> None:
    rng = np.random.default_rng(4)
    dense = rng.normal(size=(50, 30))
    own = dense + 0.2 * rng.normal(size=dense.shape)
    found = of_sets(bare(Fid), own, dense)
    assert found.interval[0] < found.value < found.interval[1] < 2 * found.value
    assert of_sets(bare(Fid), own[:3], dense[:3]) is None


def test_a_value_survives_json() -> None:
    value = MetricValue(1.5, (1.0, 2.0), 7, dense=2.0, change=-0.5, parts=(0.25, 0.5))
    assert MetricValue.from_plain(value.to_plain()) == value and value.to_plain()["interval"] == [1.0, 2.0]


def test_every_metric_says_what_it_is_and_the_configuration_lists_all_weights() -> None:
    for name, metric in METRICS.items():
        info = metric.info
        assert info.name == name and info.kind in KINDS and info.source
        assert info.perfect is None or info.kind == "paired"
    needed = {need.key for metric in METRICS.values() for need in metric.info.needs}
    config = OmegaConf.load(Path(__file__).parent.parent / "conf" / "config.yaml")
    assert set(config.weights) == needed


def test_what_is_missing_is_said_with_key_path_and_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^unknown metric 'nope'; choose from psnr, ssim, "):
        check_metrics(["ssim", "nope"], {})
    with pytest.raises(UserError, match="^metric lpips needs weights.lpips_alexnet, got nothing; give .*download.pytorch.org"):
        check_metrics(["lpips"], {})
    with pytest.raises(UserError, match="^metric cmmd needs weights.cmmd_clip, but .*gone' does not exist; .*openai/clip"):
        check_metrics(["cmmd"], {"cmmd_clip": tmp_path / "gone"})
    with pytest.raises(UserError, match="at least 176 pixels a side for metric ms_ssim, got 128"):
        check_shape(["ssim", "ms_ssim"], (2, 3, 128, 256), {})
    assert MetricSuite(["ssim", "psnr"], MetricContext(torch.device("cpu"))).measure_dense(None) == {}
