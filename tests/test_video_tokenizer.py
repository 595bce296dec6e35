"""The video tokenizer beyond the traces: its encoder against the official one, sizes, and what it refuses."""

import numpy as np
import pytest
import torch
from goldens import FOLDER
from tiny_star import TOKENIZER, star

from autoprune.backbones.video_tokenizer import VideoTokenizer
from autoprune.errors import UserError
from autoprune.generation import Observer, generate

TRACE = FOLDER / "infinitystar_vae_encoder.npz"


@pytest.mark.skipif(not TRACE.exists(), reason="no encoder trace in this goldens folder")
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_encoder_gives_the_official_moments_chunk_by_chunk(kind: str) -> None:
    archive, tokenizer = np.load(TRACE), VideoTokenizer(TOKENIZER).eval()
    state = {key: torch.from_numpy(archive[key]).float() for key in archive.files if key.startswith("encoder.")}
    missing, unexpected = tokenizer.load_state_dict(state, strict=False)
    assert not unexpected and not any(key.startswith("encoder.") for key in missing)
    with torch.inference_mode():
        ours = tokenizer.moments(torch.from_numpy(archive[f"{kind}/frames"]).float())
    np.testing.assert_allclose(ours, archive[f"{kind}/moments"], rtol=0, atol=1e-4)


def test_features_are_drawn_from_the_posterior_by_seed_and_sample() -> None:
    tokenizer, frames = star().tokenizer, torch.rand(2, 3, 5, 32, 48) * 2 - 1
    with torch.inference_mode():
        first, again, other = (tokenizer.encode(frames, seed=seed) for seed in (1, 1, 2))
        mean, logarithm = tokenizer.moments(frames).chunk(2, dim=1)
        alone = tokenizer.encode(frames[:1], seed=1)
    assert first.shape == (2, 16, 2, 2, 3) and torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(first[:1], alone)
    assert logarithm.isfinite().all() and mean.isfinite().all()


def test_an_image_conditions_a_video_by_the_bits_of_its_own_clip() -> None:
    backbone = star()
    schedule = backbone.scale_schedule()
    with torch.inference_mode():
        features = backbone.tokenizer.encode(torch.rand(1, 3, 1, 64, 112) * 2 - 1, seed=0)
        image = schedule[:5]
        course = backbone.model.course(image)
        given = backbone.tokenizer.quantise(features, image, course)
        latent = list(backbone.tokenizer.quantisation_steps(features, image, course))[-1].latent
    sampled = backbone.sampled(given=given)
    seen = []

    class Watch(Observer):
        def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
            seen.append(latent)

    generate(sampled, ["a"], seed=3, observer=Watch())
    torch.testing.assert_close(seen[-1][:, :, :1], latent)
    assert len(given) == sum((2, 1, 2, 1, 1)) == len(course.by_step(5))


@pytest.mark.parametrize(("frames", "count"), [(1, 1), (3, 9), (4, 13), (5, 17), (6, 21)])
def test_latents_of_every_length_but_two_become_four_frames_each(frames: int, count: int) -> None:
    tokenizer = star().tokenizer
    with torch.inference_mode():
        video = tokenizer.decode(torch.randn(1, 16, frames, 2, 3))
    assert video.shape == ((1, 3, 32, 48) if frames == 1 else (1, 3, count, 32, 48))
    assert frames == 1 or torch.equal(video[:, :, 0], video[:, :, 1])


def test_what_cannot_be_coded_is_refused() -> None:
    tokenizer = star().tokenizer
    with pytest.raises(UserError, match="2 latent frames cannot be decoded"):
        tokenizer.decode(torch.randn(1, 16, 2, 2, 3))
    with pytest.raises(UserError, match="4k \\+ 1 frames .* got 4 of 32 x 48"):
        tokenizer.encode(torch.randn(1, 3, 4, 32, 48))
    with pytest.raises(UserError, match="divisible by 16, got 5 of 30 x 48"):
        tokenizer.encode(torch.randn(1, 3, 5, 30, 48))


def test_a_frame_depends_on_no_later_one() -> None:
    tokenizer, latent = star().tokenizer, torch.randn(1, 16, 5, 2, 3)
    changed = latent.clone()
    changed[:, :, 3:] += 1
    with torch.inference_mode():
        one, other = tokenizer.frames(latent), tokenizer.frames(changed)
    assert torch.equal(one[:, :, :9], other[:, :, :9]) and not torch.equal(one[:, :, 9:], other[:, :, 9:])
