"""Errors over time against loops, and what they must and must not see: still errors, fades, flicker that is put in."""

import numpy as np
import pytest
import torch

from autoprune.errors import UserError
from autoprune.measure.metrics import METRICS, ImageBatch, MetricContext
from autoprune.measure.metrics.suite import MetricSuite, check_shape
from autoprune.measure.metrics.temporal import flicker, temporal_error
from autoprune.testbed.motion import realise_motion, render_motion
from autoprune.testbed.motion_captions import motion_prompts

NAMES = ("temporal_error", "flicker")
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def measured(name: str, videos: torch.Tensor, dense: torch.Tensor) -> np.ndarray:
    return METRICS[name](MetricContext(CPU)).measure(ImageBatch(videos, [""] * len(videos), dense=dense))


def scenes(count: int = 4) -> torch.Tensor:
    """Returns rendered moving scenes [B, 3, 13, 64, 64] in [0, 1]."""
    descriptions = [prompt.description for prompt in motion_prompts("search", count)]
    rng = np.random.default_rng(0)
    videos = np.stack([render_motion(realise_motion(one, rng), seed) for seed, one in enumerate(descriptions)])
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 255


def test_both_are_the_loops_of_their_formulas_with_the_worst_as_a_part() -> None:
    videos, dense = noise(2, 3, 5, 6, 7), noise(2, 3, 5, 6, 7, seed=1)
    for own, other, error, more in zip(
        videos.double().numpy(), dense.double().numpy(), *(measured(name, videos, dense) for name in NAMES), strict=True
    ):
        steps = [255 * np.abs(own[:, t + 1] - own[:, t] - other[:, t + 1] + other[:, t]).mean() for t in range(4)]
        assert error == pytest.approx([np.mean(steps), max(steps)], rel=1e-5)
        lone = [[np.abs(x[:, t] - (x[:, t - 1] + x[:, t + 1]) / 2).mean() for t in range(1, 4)] for x in (own, other)]
        frames = 255 * (np.array(lone[0]) - lone[1])
        assert more == pytest.approx([frames.mean(), frames.max()], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_still_error_and_no_error_cost_nothing(name: str) -> None:
    dense = 0.5 * scenes()
    still = dense + 0.5 * noise(4, 3, 1, 64, 64)
    assert measured(name, dense, dense).tolist() == [[0, 0]] * 4
    np.testing.assert_allclose(measured(name, still, dense), 0, atol=2e-5)


def test_brightness_that_alternates_is_counted_in_levels_and_a_fade_is_no_flicker() -> None:
    still = 0.5 * noise(1, 3, 1, 8, 8).expand(1, 3, 6, 8, 8)
    turns = torch.tensor([1.0, -1, 1, -1, 1, -1]).view(6, 1, 1) * 10 / 255
    fade = torch.arange(6).view(6, 1, 1) * 10 / 255
    assert measured("flicker", still + turns, still)[0] == pytest.approx([20, 20], abs=1e-3)
    assert measured("flicker", still, still + turns)[0] == pytest.approx([-20, -20], abs=1e-3), "calmer than dense"
    assert measured("flicker", still + fade, still)[0] == pytest.approx([0, 0], abs=1e-3)
    assert measured("temporal_error", still + fade, still)[0] == pytest.approx([10, 10], abs=1e-3)


def test_flicker_tells_noise_of_each_frame_from_the_same_noise_in_all() -> None:
    dense = 0.25 + 0.5 * scenes()
    same, each = (0.05 * (noise(4, 3, frames, 64, 64) - 0.5) for frames in (1, 13))
    same, each = dense + same, dense + each
    assert METRICS["psnr"](MetricContext(CPU)).info.lower is False
    close = [measured("psnr", videos, dense)[:, 0].mean() for videos in (same, each)]
    assert close[0] == pytest.approx(close[1], abs=0.1), "single frames are equally far off"
    for name in NAMES:
        assert (measured(name, each, dense)[:, 0] > 1).all() and (measured(name, same, dense)[:, 0] < 0.01).all()


def test_a_frozen_video_is_calm_but_changes_otherwise_than_dense() -> None:
    dense = scenes()
    frozen = dense[:, :, :1].expand_as(dense)
    assert (measured("flicker", frozen, dense) <= 0).all() and (measured("temporal_error", frozen, dense)[:, 0] > 0.5).all()


def test_precision_of_the_generator_does_not_matter() -> None:
    videos, dense = noise(1, 3, 4, 8, 8).bfloat16(), noise(1, 3, 4, 8, 8, seed=1).bfloat16()
    torch.testing.assert_close(temporal_error(videos, dense), temporal_error(videos.float(), dense.float()))
    torch.testing.assert_close(flicker(videos), flicker(videos.float()))


def test_images_and_too_short_videos_are_one_sentence_at_the_start_and_later() -> None:
    for shape, name, given in (((2, 3, 8, 8), "temporal_error", "images"), ((2, 3, 2, 8, 8), "flicker", "videos of 2 frames")):
        needed = METRICS[name].info.least_frames
        rule = rf"^metric {name} needs videos of at least {needed} frames, got {given}; leave it out of quality\.metrics"
        with pytest.raises(UserError, match=rule):
            check_shape(["psnr", name], shape, {})
        images = torch.zeros(shape)
        with pytest.raises(UserError, match=rule):
            MetricSuite([name], MetricContext(CPU)).measure(ImageBatch(images, ["", ""], dense=images))
    check_shape(NAMES, (2, 3, 3, 8, 8), {})
