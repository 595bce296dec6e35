"""The embedded video backbone: its tokenizer, its training forward against generation, its recipe and its quality."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import autoprune
from autoprune.backbones import Backbone, load_backbone
from autoprune.backbones.clip_tokenizer import ClipTokenizer
from autoprune.backbones.tiny_video import RUNS, TOKENIZER, clip_schedule
from autoprune.errors import UserError
from autoprune.generation import Observer
from autoprune.policy import token_count
from autoprune.search.quality import make_quality
from autoprune.search.settings import QualitySettings
from autoprune.testbed.distributed import Team
from autoprune.testbed.evaluate import evaluate, save_grid
from autoprune.testbed.generator_checkpoint import GeneratorRun, load_tokenizer, read_record
from autoprune.testbed.generator_recipe import GeneratorRecipe
from autoprune.testbed.generator_session import GeneratorSession
from autoprune.testbed.image_store import open_images
from autoprune.testbed.latents import open_latents
from autoprune.testbed.lessons import VIDEO_LESSONS
from autoprune.testbed.motion_captions import TASKS, motion_prompts
from autoprune.testbed.motion_score import MAIN_THRESHOLD
from autoprune.testbed.reconstruction import reconstruct, reconstruction_psnr
from autoprune.testbed.star_training import star_logits, star_teacher
from autoprune.testbed.train_text import pretrain_text
from autoprune.testbed.worlds import VIDEOS

PROMPTS = ["a red circle moving left above a still blue square", "a green ring growing"]
SCHEDULE = clip_schedule()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny_video", weights="random", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return 0.5 * torch.randn(2, TOKENIZER.bits, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_schedules_are_an_image_clip_and_a_clip_of_three_latent_frames() -> None:
    assert SCHEDULE == ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (3, 1, 1), (3, 2, 2), (3, 4, 4), (3, 8, 8))
    assert clip_schedule(frames=1) == SCHEDULE[:4]
    for wrong in ({"h_div_w": 0.5}, {"frames": 8}):
        with pytest.raises(UserError, match="must be 1"):
            clip_schedule(**wrong)


def test_most_tokens_are_of_the_last_scales(backbone: Backbone) -> None:
    scales = backbone.model.course(SCHEDULE).by_step(len(SCHEDULE))
    tokens = [token_count(SCHEDULE[scale]) for scale in scales]
    assert sum(tokens[index] for index, scale in enumerate(scales) if scale in (3, 7)) > 0.6 * sum(tokens)


def test_a_latent_frame_is_four_frames_and_the_first_one_alone(backbone: Backbone, features: torch.Tensor) -> None:
    changed = features.clone()
    changed[:, :, 1] += 1
    with torch.no_grad():
        before, after = (backbone.tokenizer.decode(latent) for latent in (features, changed))
    assert before.shape == (2, 3, 13, 64, 64)
    assert [frame for frame in range(13) if not torch.equal(before[:, :, frame], after[:, :, frame])] == [1, 2, 3, 4]
    frames = torch.rand(1, 3, 13, 64, 64) * 2 - 1
    other = frames.clone()
    other[:, :, 10] = 0
    with torch.no_grad():
        one, two = (backbone.tokenizer.encode(video) for video in (frames, other))
    assert one.shape == (1, TOKENIZER.bits, 4, 8, 8)
    assert torch.equal(one[:, :, :3], two[:, :, :3]) and not torch.equal(one[:, :, 3], two[:, :, 3])
    with pytest.raises(UserError, match="4k \\+ 1 frames, got 8"):
        backbone.tokenizer.encode(frames[:, :, :8])


def test_quantisation_is_what_generation_adds_up(backbone: Backbone, features: torch.Tensor) -> None:
    tokenizer, latent = backbone.tokenizer, torch.zeros_like(features)
    for (_, side, _), step in zip(RUNS, tokenizer.quantisation_steps(features, RUNS), strict=True):
        places, bits = 8 // side, TOKENIZER.bits if side == 8 else TOKENIZER.semantic_bits
        rest = (features - latent).view(2, bits, TOKENIZER.bits // bits, 4, side, places, side, places).mean((2, 5, 7))
        torch.testing.assert_close(step.residual, rest, atol=1e-6, rtol=0)
        drawn = (step.residual > 0).movedim(1, -1)
        codes = tokenizer.codes(drawn, TOKENIZER.sides.index(side))
        latent = tokenizer.accumulate(latent, codes, 0, 4)
        torch.testing.assert_close(step.latent, latent)


def test_pairs_of_channels_differ_by_motion_alone_and_semantic_codes_leave_them_alone(backbone: Backbone) -> None:
    tokenizer, still = backbone.tokenizer, torch.rand(1, 3, 1, 64, 64).expand(-1, -1, 13, -1, -1) * 2 - 1
    moving = torch.cat([still[:, :, :12], still[:, :, 12:].roll(5, dims=4)], dim=2)
    with torch.no_grad():
        differences = [(tokenizer.encode(video)[:, ::2] - tokenizer.encode(video)[:, 1::2]).abs() for video in (still, moving)]
    assert differences[0].max() < 1e-4 and differences[1][:, :, :3].max() < 1e-4 and differences[1][:, :, 3].max() > 0.01
    codes = tokenizer.codes(torch.randint(2, (1, 1, 4, 4, TOKENIZER.semantic_bits)), 2)
    added = tokenizer.accumulate(torch.zeros(1, TOKENIZER.bits, 1, 8, 8), codes, 2, 4)
    assert torch.equal(added[:, ::2], added[:, 1::2]) and added.abs().max() > 0


def test_every_run_comes_nearer_with_fitting_magnitudes(features: torch.Tensor) -> None:
    tokenizer = ClipTokenizer(TOKENIZER)
    for scale, size in enumerate((0.02, 0.03, 0.05, 0.4)):
        tokenizer.magnitudes[scale] = size
    errors = [(features - step.latent).square().mean() for step in tokenizer.quantisation_steps(features, RUNS)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * features.square().mean()


class Logits(Observer):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def scale_done(self, scale: object, logits: torch.Tensor, bits: torch.Tensor, latent: torch.Tensor) -> None:
        self.seen.append(logits)
        self.latent = latent


def test_teacher_forcing_computes_the_logits_that_generation_computes(backbone: Backbone, features: torch.Tensor) -> None:
    teacher = star_teacher(backbone.tokenizer, features, 2 * len(RUNS), max_flip=0.0, generator=torch.Generator())
    with torch.no_grad():
        ours = star_logits(backbone.model, backbone.encode_text(PROMPTS), teacher.inputs)
    observer = Logits()
    sampling = replace(
        backbone.sampling, guidance=1.0, temperature=1.0, given=tuple(target.long() for target in teacher.targets)
    )
    autoprune.generate(backbone, PROMPTS, sampling=sampling, observer=observer)
    assert len(ours) == len(observer.seen) == 2 * len(RUNS)
    for mine, theirs in zip(ours, observer.seen, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    last = [list(backbone.tokenizer.quantisation_steps(features, RUNS))[-1].latent]
    torch.testing.assert_close(observer.latent, last[0], atol=1e-5, rtol=1e-5)


def test_dropped_samples_see_the_unconditional_text(backbone: Backbone, features: torch.Tensor) -> None:
    teacher = star_teacher(backbone.tokenizer, features, len(RUNS), max_flip=0.0, generator=torch.Generator())
    text = backbone.encode_text(PROMPTS)
    with torch.no_grad():
        mixed = star_logits(backbone.model, text, teacher.inputs, dropped=torch.tensor([True, False]))
        whole = backbone.model.with_unconditional(text, None).text
        both = star_logits(backbone.model, whole, [entry.repeat(2, 1, 1) for entry in teacher.inputs])
    for ours, theirs in zip(mixed, both, strict=True):
        torch.testing.assert_close(ours, theirs[[2, 1]], atol=1e-4, rtol=1e-4)


def test_flipped_bits_change_the_targets_of_later_runs(backbone: Backbone, features: torch.Tensor) -> None:
    clean, flipped = (
        star_teacher(backbone.tokenizer, features, 12, max_flip=rate, generator=torch.Generator().manual_seed(1))
        for rate in (0.0, 0.5)
    )
    for first in (0, 6):
        assert torch.equal(clean.targets[first], flipped.targets[first])
        assert not torch.equal(clean.targets[first + 5], flipped.targets[first + 5])


def test_a_few_updates_bring_the_reconstruction_closer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ClipTokenizer(TOKENIZER)
    pixels = np.array(open_images(tmp_path, 4, seed=2, team=Team(), world=VIDEOS))
    optimiser = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    before = reconstruction_psnr(tokenizer, pixels, world=VIDEOS)[-1]
    for _ in range(6):
        result = reconstruct(tokenizer, VIDEOS.batch(pixels), train_encoder=True, flip_rate=0.0, world=VIDEOS)
        optimiser.zero_grad()
        result.loss.backward()
        optimiser.step()
    assert VIDEOS.by_scale(result.residual_sizes).shape == tokenizer.magnitudes.shape
    assert reconstruction_psnr(tokenizer, pixels, world=VIDEOS)[-1] > before + 1


def test_a_run_saves_resumes_and_its_file_generates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ClipTokenizer(TOKENIZER)
    path = tmp_path / "tokenizer.safetensors"
    save_file(tokenizer.state_dict(), path)
    recipe = GeneratorRecipe(minutes=10, images=8, text_steps=1, batch_share=0.05)
    out, cache = tmp_path / "tiny_video.safetensors", tmp_path / "latents"
    run = GeneratorRun(recipe, path, out, cache, "cpu", resume=True, lessons=VIDEO_LESSONS)
    loaded = load_tokenizer(run)
    latents = open_latents(cache, loaded, 8, seed=0, team=Team(), world=VIDEOS)
    first = GeneratorSession(Team(), run, loaded)
    assert len(first.parameters) == sum(len(group["params"]) for group, _ in first.optimisers._groups)
    first.prepare(started=0.0)
    first.elapsed = 0.0
    first.step(latents)
    first.finish(latents)
    second = GeneratorSession(Team(), run, loaded)
    second.prepare(started=0.0)
    assert second.steps == 1
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict())
    second.step(latents)
    assert read_record(out)["data_version"] == VIDEOS.version and out.stat().st_size < 12e6
    again = replace(run, tokenizer=None, out=tmp_path / "again.safetensors", start=out)
    third = GeneratorSession(Team(), again, load_tokenizer(again))
    for part, before in zip(third.averages, first.averages, strict=True):
        torch.testing.assert_close(part.state_dict(), before.state_dict(), rtol=0, atol=1e-3)  # a file has float16
    third.prepare(started=0.0)
    third.elapsed = 0.0
    third.step(latents)
    third.save(again.out)
    assert read_record(again.out)["start"] == read_record(out)
    videos = autoprune.generate(load_backbone("tiny_video", weights=out), PROMPTS)
    assert videos.shape == (2, 3, 13, 64, 64)


def test_text_pre_training_learns_places() -> None:
    torch.manual_seed(0)
    text = load_backbone("tiny_video", weights="random", dtype="float32").text_encoder.requires_grad_(True)
    assert pretrain_text(Team(), text, steps=30, seed=0, exam=VIDEO_LESSONS.exam) > 0.05


def test_the_quality_of_motion_scores_videos_of_its_own_prompts(backbone: Backbone) -> None:
    quality = make_quality(QualitySettings(name="motion"), None)
    prompts = quality.prompts("search", 3)
    videos = autoprune.generate(backbone, quality.texts(prompts), seed=1)
    assert quality.score(videos, prompts).tolist() == [0.0] * 3


def test_samples_are_scored_at_the_thresholds_of_their_world_and_shown_moving(backbone: Backbone, tmp_path: Path) -> None:
    prompts = motion_prompts("held_out", 6)
    evaluation, videos = evaluate(backbone, prompts, backbone.sampling, batch=4)
    assert list(evaluation.overall) == [0.5, MAIN_THRESHOLD, 0.75] and set(evaluation.per_task[0.5]) == set(TASKS)
    with Image.open(save_grid(tmp_path / "grid.png", videos, prompts, rate=backbone.frame_rate)) as shown:
        assert shown.format == "WEBP" and shown.n_frames == 13
