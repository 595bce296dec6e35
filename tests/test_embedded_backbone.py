"""The shipped checkpoint: its record, that it draws what prompts say, and that scores and guidance mean something on it."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from autoprune.backbones import Backbone, load_backbone
from autoprune.backbones.embedded import WEIGHTS
from autoprune.generation import generate
from autoprune.policy import Policy, ScalePruning
from autoprune.testbed.captions import TASKS, Prompt, prompt_set
from autoprune.testbed.motion_captions import motion_prompts
from autoprune.testbed.motion_score import score_videos
from autoprune.testbed.scenes import DATA_VERSION
from autoprune.testbed.score import score_images
from autoprune.testbed.worlds import VIDEOS

BATCH = 14


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return prompt_set("held_out", 84, seed=7)


@pytest.fixture(scope="module")
def dense(backbone: Backbone, prompts: list[Prompt]) -> torch.Tensor:
    return draw(backbone, prompts)


def draw(backbone: Backbone, prompts: list[Prompt], **options) -> torch.Tensor:
    texts, images = [prompt.text for prompt in prompts], []
    base = options.pop("sampling", backbone.sampling)
    for start in range(0, len(texts), BATCH):
        sampling = replace(base, first_sample=start)
        images.append(generate(backbone, texts[start : start + BATCH], seed=7, sampling=sampling, **options))
    return torch.cat(images)


@pytest.mark.parametrize(
    ("name", "most", "version"), [("tiny", 16 * 2**20, DATA_VERSION), ("tiny_video", 12e6, VIDEOS.version)]
)
def test_file_is_small_and_its_record_says_how_it_was_made(name: str, most: float, version: str) -> None:
    content = (WEIGHTS / f"{name}.safetensors").read_bytes()
    record = json.loads((WEIGHTS / f"{name}.json").read_text())
    assert len(content) <= most
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["data_version"] == version
    assert {"recipe", "seconds", "scores"} <= record.keys()
    assert "seed" in record["recipe"]


def test_images_show_what_the_prompts_say(prompts: list[Prompt], dense: torch.Tensor) -> None:
    scores = score_images(dense, prompts)
    assert scores.overall >= 0.88
    assert min(scores.per_task[task] for task in TASKS[:6]) >= 0.6


def test_videos_show_what_the_prompts_say() -> None:
    backbone, asked = load_backbone("tiny_video", device="cpu"), motion_prompts("held_out", 84, seed=7)
    videos = draw(backbone, asked)
    assert score_videos(videos, asked).overall >= 0.3
    assert score_videos(videos, asked[3:] + asked[:3]).overall <= 0.05  # each is asked for what another one shows


def test_guidance_helps(backbone: Backbone, prompts: list[Prompt], dense: torch.Tensor) -> None:
    without = draw(backbone, prompts, sampling=replace(backbone.sampling, guidance=1.0))
    assert score_images(dense, prompts).correct.mean() > score_images(without, prompts).correct.mean()


def test_dc_scores_keep_images_closer_to_dense_than_random_ones(
    backbone: Backbone, prompts: list[Prompt], dense: torch.Tensor
) -> None:
    errors = {}
    for scorer in ("dc", "random"):
        pruning = ScalePruning(keep=0.5, cache_scale=5, scorer=scorer)
        policy = Policy(backbone.name, backbone.depth, backbone.scale_schedule(), scales={6: pruning})
        errors[scorer] = (draw(backbone, prompts, policy=policy) - dense).square().mean((1, 2, 3))
    closer = errors["dc"] < errors["random"]
    assert closer.float().mean() > 0.75
    assert errors["dc"].mean() < 0.8 * errors["random"].mean()
