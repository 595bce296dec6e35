"""Every metric with videos: frames one by one against the same metric on images, or one sentence."""

import numpy as np
import pytest
import torch
from tiny_clip import save_clip

from autoprune.errors import UserError
from autoprune.measure.metrics import METRICS, ImageBatch, MetricContext
from autoprune.measure.metrics.frames import SEEN, TOGETHER, by_frame, mean_score, seen_frames
from autoprune.measure.metrics.lpips import ALEXNET, VGG16, Trunk
from autoprune.measure.metrics.similarity import ms_ssim, psnr, ssim
from autoprune.measure.metrics.suite import check_shape
from autoprune.search.settings import QualitySettings

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "a photo of a blue dog"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> MetricContext:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, stages in (("alexnet", ALEXNET), ("vgg16", VGG16)):
        torch.save(Trunk(stages).state_dict(), folder / name)
    trunks = {"lpips_alexnet": folder / "alexnet", "lpips_vgg16": folder / "vgg16"}
    return MetricContext(CPU, trunks | dict.fromkeys(("clip", "pickscore"), save_clip(folder / "clip")))


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim", "lpips", "lpips_vgg"])
def test_pairs_are_compared_in_every_frame_and_the_worst_is_a_part(name: str, context: MetricContext) -> None:
    side = METRICS[name].info.least_side + 16
    dense = noise(2, 3, 3, side, side)
    videos = (dense + torch.tensor([0.05, 0.1, 0.4]).view(3, 1, 1) * (noise(2, 3, 3, side, side, seed=1) - 0.5)).clamp(0, 1)
    metric = METRICS[name](context)
    alone = [metric.measure(ImageBatch(videos[:, :, frame], PROMPTS, dense=dense[:, :, frame])).tolist() for frame in range(3)]
    found = metric.measure(ImageBatch(videos, PROMPTS, dense=dense))
    worst = np.max(alone, 0) if metric.info.lower else np.min(alone, 0)
    np.testing.assert_allclose(found, np.stack([np.mean(alone, 0), worst], 1), rtol=1e-4)
    one = metric.measure(ImageBatch(videos[:, :, 2:], PROMPTS, dense=dense[:, :, 2:]))
    np.testing.assert_allclose(one, alone[2], rtol=1e-4)
    plain = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    if name in plain:
        np.testing.assert_allclose(plain[name](videos, dense), found[:, 0], rtol=1e-5)


def test_frames_equal_to_dense_have_no_psnr_and_do_not_count() -> None:
    dense = 0.5 * noise(2, 3, 5, 8, 8)
    videos = dense.clone()
    videos[0, :, 2:] += torch.tensor([0.1, 0.01, 0.001]).view(3, 1, 1)  # 20, 40 and 60 dB
    found = METRICS["psnr"](MetricContext(CPU)).measure(ImageBatch(videos, PROMPTS, dense=dense))
    np.testing.assert_allclose(found, [[40, 20], [100, 100]], atol=1e-3)
    np.testing.assert_allclose(psnr(videos, dense), found[:, 0])
    videos[1, 0, 3, 0, 0] = torch.nan
    assert psnr(videos, dense)[1] == 0, "a broken frame is not left out"


def test_long_videos_are_compared_some_frames_at_a_time() -> None:
    sizes, videos = [], noise(2, 3, 2 * TOGETHER + 3, 4, 4)

    def compare(images: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return (images - dense).flatten(1).sum(1)

    found = by_frame(compare, videos, torch.zeros_like(videos))
    assert max(sizes) == TOGETHER and sum(sizes) == 2 * videos.shape[2]
    torch.testing.assert_close(found, videos.sum(dim=(1, 3, 4)))


def test_models_see_a_few_frames_spread_over_the_video() -> None:
    videos = torch.arange(81.0).view(1, 1, 81, 1, 1).expand(2, 3, 81, 4, 4)
    seen = seen_frames(videos)[0, 0, :, 0, 0].tolist()
    assert len(seen) == SEEN and seen[0] == 0 and seen[-1] == 80 and {11, 12} >= set(np.diff(seen))
    for few in (videos[:, :, :SEEN], videos[:, :, 0]):
        assert torch.equal(seen_frames(few), few)


@pytest.mark.parametrize("name", ["clip_score", "pick_score"])
def test_scores_of_videos_are_means_over_frames(name: str, context: MetricContext) -> None:
    metric, videos = METRICS[name](context), noise(2, 3, 5, 40, 40)
    alone = [metric.measure(ImageBatch(videos[:, :, frame], PROMPTS)) for frame in range(5)]
    np.testing.assert_allclose(metric.measure(ImageBatch(videos, PROMPTS)), np.mean(alone, 0), rtol=1e-4)


def test_each_frame_is_judged_by_the_prompt_of_its_video() -> None:
    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0, 0, 0] * torch.tensor([float(prompt) for prompt in prompts])

    videos = torch.arange(6.0).view(2, 1, 3, 1, 1).expand(2, 3, 3, 2, 2)
    assert mean_score(score, videos, ["1", "10"]).tolist() == [1, 40]
    assert mean_score(score, videos[:, :, 0], ["1", "10"]).tolist() == [0, 30]


def test_metrics_that_take_no_videos_say_so() -> None:
    refused = []
    for name in METRICS.keys() - {"external"}:
        try:
            check_shape([name], (1, 3, 9, 256, 256), {})
        except UserError as error:
            assert str(error).startswith(f"metric {name} takes images only, got videos of 9 frames; leave it out of quality.")
            refused.append(name)
    assert refused == ["geneval"]


def test_the_side_of_a_video_is_not_its_number_of_frames() -> None:
    check_shape(["lpips"], (1, 3, 9, 64, 64), {})
    with pytest.raises(UserError, match="at least 64 pixels a side for metric lpips, got 63;"):
        check_shape(["lpips"], (1, 3, 81, 80, 63), {})


def test_the_shipped_quality_of_motion_measures_over_time() -> None:
    chosen = QualitySettings(name="motion").metrics
    assert list(chosen) == ["psnr", "ssim", "tokens", "temporal_error", "flicker"] and set(chosen) <= METRICS.keys()
