"""The evaluator on the real (randomly initialised) embedded backbone, with few prompts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoprune.backbones import load_backbone
from autoprune.errors import UserError
from autoprune.measure.metrics.lpips import ALEXNET, Trunk
from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.search.evaluator import GenerationEvaluator
from autoprune.search.records import Measurement
from autoprune.search.settings import LatencySettings, QualitySettings, StudySettings
from autoprune.search.space_file import read_space
from tests.test_sets import Pooled

SPACE = read_space(Path(__file__).parent.parent / "search_spaces" / "unified.yaml")


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # noqa: ANN201
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random")


def settings(**latency: object) -> StudySettings:
    quality = QualitySettings(prompts=5, held_out_prompts=3)
    return StudySettings(Path("unused"), "x", SPACE, latency=LatencySettings(batch=2, rounds=1, **latency), quality=quality)


def never(first: object) -> str:
    return ""


def policy_for(backbone, **decisions: object) -> Policy:  # noqa: ANN001
    return Policy("tiny", backbone.depth, backbone.scale_schedule(), **decisions)


def test_a_policy_that_changes_nothing_has_no_loss_at_all(backbone) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, settings())
    dense = evaluator.dense()
    assert dense.loss == pytest.approx(0, abs=1e-6) and dense.psnr == 100 and dense.score_drop == 0 and dense.prompts == 5
    same = evaluator.evaluate(policy_for(backbone), stop=never).measurement
    assert same.loss == pytest.approx(0, abs=1e-6) and same.psnr == 100 and same.batch == 2


def test_pruning_costs_fidelity_and_more_pruning_costs_more(backbone) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, settings())
    evaluator.dense()
    light = evaluator.evaluate(policy_for(backbone, guidance=BranchRule("cond", 6)), stop=never)
    heavy = evaluator.evaluate(policy_for(backbone, skip_last=2), stop=never)
    assert 0 < light.measurement.loss < heavy.measurement.loss < 1
    assert light.measurement.latency_source == "table" and heavy.measurement.speed_up > light.measurement.speed_up
    assert light.first.prompts == 2 and light.measurement.prompts == 5 and light.measurement.peak_memory_mb is None


def test_trials_measure_memory_where_it_is_limited_and_share_nothing_then(backbone) -> None:  # noqa: ANN001
    limited = replace(settings(), quality=QualitySettings(prompts=2, held_out_prompts=2, max_memory_mb=1e6))
    evaluator = GenerationEvaluator(backbone, limited)
    evaluator.dense()
    assert not limited.shares_prefixes
    assert evaluator.evaluate(policy_for(backbone, skip_last=2), stop=never).measurement.peak_memory_mb > 0


def test_shared_prefixes_change_no_quality(backbone) -> None:  # noqa: ANN001
    policies = [policy_for(backbone, skip_last=1), policy_for(backbone, guidance=BranchRule("cond", 5, "extrapolate"))]
    found = []
    for megabytes in (0, 2048):
        evaluator = GenerationEvaluator(backbone, replace(settings(), shared_prefix_mb=megabytes))
        evaluator.dense()
        measured = [evaluator.evaluate(policy, stop=never).measurement for policy in policies]
        found.append([(entry.loss, entry.psnr, entry.score) for entry in measured])
    assert found[0] == found[1]


def test_a_stopped_evaluation_covers_the_first_batch_only(backbone) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, settings())
    evaluator.dense()
    evaluation = evaluator.evaluate(policy_for(backbone, skip_last=1), stop=lambda first: "hopeless")
    assert evaluation.stopped == "hopeless" and evaluation.measurement == evaluation.first and evaluation.first.prompts == 2


def test_quality_does_not_depend_on_the_batch_split(backbone) -> None:  # noqa: ANN001
    pruned = policy_for(backbone, scales={6: ScalePruning(0.5, 5)})
    losses = []
    for batch in (2, 5):
        split = replace(settings(), latency=LatencySettings(batch=batch, rounds=1))
        evaluator = GenerationEvaluator(backbone, split)
        evaluator.dense()
        losses.append(evaluator.evaluate(pruned, stop=never).measurement.loss)
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_validation_measures_on_other_prompts_and_seeds_in_real_interleaved_runs(backbone) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, settings())
    evaluator.dense()
    pruned, steps = policy_for(backbone, skip_last=1), []
    searched = evaluator.evaluate(pruned, stop=never).measurement
    measured = evaluator.validate({"p": pruned, "q": policy_for(backbone)}, step=lambda: not steps.append(1))
    assert len(steps) == evaluator.validation_steps() == 2
    assert measured["p"].latency_source == "measured" and measured["p"].prompts == 3 and measured["q"].loss < 1e-6
    low, high = measured["p"].loss_interval
    assert low < measured["p"].loss < high and measured["q"].loss_interval[1] < 1e-6
    low, high = measured["p"].speed_up_interval
    assert 0 < low <= measured["p"].speed_up <= high and searched.speed_up_interval is None
    lost, gained = measured["p"].score_flips
    assert (lost - gained) / 3 == pytest.approx(measured["p"].score_drop)
    assert measured["p"].seed != searched.seed and measured["p"].loss != searched.loss
    estimate = evaluator.estimated_latency(pruned) / evaluator.estimated_latency(policy_for(backbone))
    assert 0 < estimate < 1


def test_measured_latency_is_not_called_an_estimate(backbone) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, settings(name="measured"))
    evaluator.dense()
    evaluation = evaluator.evaluate(policy_for(backbone, skip_last=1), stop=never)
    assert evaluation.measurement.latency_source == "measured" and evaluator.estimated_latency(policy_for(backbone)) is None


def test_validation_measures_the_chosen_metrics_and_trials_measure_none(backbone) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, settings())
    evaluator.dense()
    single = policy_for(backbone, guidance=BranchRule("cond", 6))
    assert not evaluator.evaluate(single, stop=never).measurement.metrics
    policies = {"single": single, "short": policy_for(backbone, skip_last=1), "same": policy_for(backbone)}
    found = evaluator.validate(policies, step=lambda: True)
    for name, measured in found.items():
        metrics = measured.metrics
        assert list(metrics) == ["psnr", "ssim", "tokens"] and {value.n for value in metrics.values()} == {3}
        assert metrics["ssim"].value == pytest.approx(measured.ssim) and metrics["psnr"].value == pytest.approx(measured.psnr)
        assert metrics["ssim"].interval[0] <= 1 - measured.loss <= metrics["ssim"].interval[1]
        assert Measurement.from_plain(json.loads(json.dumps(measured.to_plain()))) == measured, name
    tokens = {name: measured.metrics["tokens"] for name, measured in found.items()}
    assert tokens["same"].value == 1 and set(tokens["same"].parts) == {1.0}
    assert tokens["single"].parts[:6] == (1.0,) * 6 and 0.3 < tokens["single"].parts[6] < 1
    assert tokens["short"].parts == (1.0,) * 6 + (0.0,)


def test_another_paired_metric_is_the_loss_and_an_early_error_names_what_is_missing(backbone, tmp_path) -> None:  # noqa: ANN001
    quality = QualitySettings(prompts=2, held_out_prompts=4, loss="lpips", metrics=("kid_reference",))
    with pytest.raises(UserError, match="^metric lpips needs weights.lpips_alexnet, got nothing; give "):
        replace(settings(), quality=quality)
    torch.manual_seed(0)
    torch.save(Trunk(ALEXNET).state_dict(), tmp_path / "alexnet.pth")
    torch.jit.script(Pooled()).save(tmp_path / "pool.pt")
    for number in range(3):
        Image.new("RGB", (16, 16), (90 * number, 80, 200)).save(tmp_path / f"{number}.png")
    weights = {"lpips_alexnet": "alexnet.pth", "feature_network": "pool.pt", "reference_images": "."}
    chosen = replace(settings(), quality=quality, weights={key: tmp_path / name for key, name in weights.items()})
    evaluator = GenerationEvaluator(backbone, chosen)
    assert evaluator.dense().loss == 0
    pruned = policy_for(backbone, skip_last=1)
    measured = evaluator.evaluate(pruned, stop=never).measurement
    assert 0 < measured.loss < 1 and abs(measured.loss - (1 - measured.ssim)) > 1e-3
    metrics = evaluator.validate({"p": pruned}, step=lambda: True)["p"].metrics
    assert list(metrics) == ["kid_reference"] and metrics["kid_reference"].n == 4
    kid = metrics["kid_reference"]
    assert kid.change == pytest.approx(kid.value - kid.dense) and kid.interval[0] < kid.change < kid.interval[1]


def test_images_too_small_for_a_metric_are_said_in_the_first_batch(backbone) -> None:  # noqa: ANN001
    small = replace(settings(), quality=QualitySettings(prompts=2, held_out_prompts=2, metrics=("ms_ssim",)))
    with pytest.raises(UserError, match="^images must have at least 176 pixels a side for metric ms_ssim, got 128; "):
        GenerationEvaluator(backbone, small).dense()


def test_videos_are_measured_over_time_and_the_worst_frame_is_a_part() -> None:
    videos = load_backbone("tiny_video", weights="random", dtype="float32")
    quality = QualitySettings("motion", 2, 2, metrics=("psnr", "ssim", "temporal_error", "flicker"))
    evaluator = GenerationEvaluator(videos, replace(settings(), quality=quality))
    assert evaluator.dense().loss == pytest.approx(0, abs=1e-6)
    short = Policy("tiny_video", videos.depth, videos.scale_schedule(), skip_last=1)
    trial = evaluator.evaluate(short, stop=never).measurement
    assert 0 < trial.loss < 1 and 0 < trial.psnr < 60, "frames equal to dense, which nothing prunes, do not count"
    measured = evaluator.validate(
        {"p": short, "same": Policy("tiny_video", videos.depth, videos.scale_schedule())}, step=lambda: True
    )
    for name, worse in (("psnr", -1), ("ssim", -1), ("temporal_error", 1), ("flicker", 1)):
        value = measured["p"].metrics[name]
        assert len(value.parts) == 1 and worse * (value.parts[0] - value.value) > 0
    metrics = measured["same"].metrics
    assert [metrics[name].value for name in quality.metrics] == pytest.approx([100, 1, 0, 0])
    assert measured["p"].psnr == pytest.approx(measured["p"].metrics["psnr"].value)


def test_images_have_no_metric_over_time_which_is_said_in_the_first_batch(backbone) -> None:  # noqa: ANN001
    moving = replace(settings(), quality=QualitySettings(prompts=2, held_out_prompts=2, metrics=("flicker",)))
    with pytest.raises(UserError, match="^metric flicker needs videos of at least 3 frames, got images; leave it out of "):
        GenerationEvaluator(backbone, moving).dense()


def test_comparing_beside_the_next_generation_changes_no_measurement(backbone) -> None:  # noqa: ANN001
    pruned = policy_for(backbone, scales={6: ScalePruning(0.5, 5)}, guidance=BranchRule("cond", 5))
    adaptive = policy_for(backbone, guidance=BranchRule("adaptive", 4, threshold=1e9))
    found = []
    for overlaps in (False, True):
        evaluator = GenerationEvaluator(backbone, settings(), overlaps=overlaps)
        evaluator.dense()
        measured = [evaluator.evaluate(policy, stop=never) for policy in (pruned, adaptive)]
        found.append([timeless(entry) for each in measured for entry in (each.first, each.measurement)])
    assert found[0] == found[1]


def timeless(measurement: Measurement) -> Measurement:
    return replace(measurement, latency=0.0, latency_spread=0.0, dense_latency=0.0, speed_up=0.0)


def test_an_error_beside_the_next_generation_is_raised_by_the_trial(backbone) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, settings(), overlaps=True)
    evaluator.dense()
    evaluator._batches[1] = replace(evaluator._batches[1], images=torch.zeros(2, 3, 5, 5))
    with pytest.raises(RuntimeError, match="shape"):
        evaluator.evaluate(policy_for(backbone, skip_last=1), stop=never)
