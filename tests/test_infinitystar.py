"""InfinityStar beyond the traces: files, text of different lengths, schedules, and what a generation keeps."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_star import CPU, SPEC, TOKENIZER, TRANSFORMER, star

from autoprune.backbones import BACKBONES, load_backbone
from autoprune.backbones.decoding import decode_need
from autoprune.backbones.infinitystar import InfinityStar
from autoprune.backbones.official import RELEASED
from autoprune.backbones.released import Target, TextOptions, random_backbone, released_backbone
from autoprune.backbones.star_schedules import video_schedule
from autoprune.backbones.text import TextFeatures
from autoprune.backbones.video_tokenizer import VideoTokenizer
from autoprune.errors import UserError
from autoprune.generation import Observer, generate, generate_latent, resolve
from autoprune.policy import Policy

CONF = Path(__file__).parent.parent / "conf" / "backbone"
NAMES = ("infinitystar_480p", "infinitystar_720p")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_registered_and_configured_like_the_others(name: str) -> None:
    assert name in BACKBONES
    conf = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert conf["name"] == name and conf["sampling"]["frames"] == RELEASED[name].sampling.frames == 81
    with pytest.raises(UserError, match="8b_.*_weights, infinitystar_videovae.pth, flan-t5-xl from FoundationVision"):
        load_backbone(name)


def write(folder: Path, *, shards: int) -> tuple[dict, dict]:
    """Writes random files in the form of the release: sharded transformer, the tokenizer under `vae`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        states = InfinityStar(TRANSFORMER).state_dict(), VideoTokenizer(TOKENIZER).state_dict()
    place = folder / SPEC.files.transformer[0]
    place.mkdir()
    keys, names = list(states[0]), [f"model-{part}.safetensors" for part in range(shards)]
    split = {key: names[place * shards // len(keys)] for place, key in enumerate(keys)}
    for name in names:
        save_file({key: states[0][key].clone() for key in keys if split[key] == name}, place / name)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": split}))
    torch.save({"vae": states[1], "ema": {}}, folder / SPEC.files.tokenizer[0])
    return states


def test_released_files_read_back_exactly_shard_by_shard(tmp_path: Path) -> None:
    states = write(tmp_path, shards=3)
    backbone = released_backbone("infinitystar_480p", SPEC, tmp_path, CPU, TextOptions())
    for module, state in zip((backbone.model, backbone.tokenizer), states, strict=True):
        ours = module.state_dict()
        assert list(ours) == list(state) and all(torch.equal(ours[key], value) for key, value in state.items())
    assert backbone.revision


def test_files_of_another_size_or_family_are_refused(tmp_path: Path) -> None:
    write(tmp_path, shards=1)
    deeper = replace(SPEC, transformer=replace(TRANSFORMER, depth=6))
    with pytest.raises(UserError, match="20 keys are missing|keys are missing, first block_chunks"):
        released_backbone("infinitystar_480p", deeper, tmp_path, CPU, TextOptions())
    swapped = replace(SPEC, files=replace(SPEC.files, transformer=SPEC.files.tokenizer))
    with pytest.raises(UserError, match="it looks like an InfinityStar tokenizer"):
        released_backbone("infinitystar_480p", swapped, tmp_path, CPU, TextOptions())


def test_both_released_sizes_are_the_official_ones() -> None:
    for name, scales, semantic, tail in (("infinitystar_480p", 14, 11, (2, 1)), ("infinitystar_720p", 15, 12, (2, 1, 1))):
        spec = RELEASED[name]
        with torch.device("meta"):
            model = InfinityStar(spec.transformer)
        schedule = spec.schedule_for(spec.sampling.h_div_w, spec.sampling.frames)
        course = model.course(schedule)
        assert len(schedule) == 2 * scales and spec.transformer.semantic_scales == semantic
        assert course.repetitions == (3,) * (scales + 12) + tail and course.by_clip
        assert sum(value.numel() for value in model.parameters()) == 8_768_382_112
        assert len(spec.sampling.temperature_for(len(schedule))) == 2 * scales


@pytest.mark.parametrize(("frames", "clips"), [(1, [1]), (17, [1, 4]), (81, [1, 20]), (97, [1, 20, 4]), (161, [1, 20, 20])])
def test_frames_become_clips_of_at_most_twenty_latent_frames(frames: int, clips: list[int]) -> None:
    schedule = video_schedule(0.571, frames, scales=14)
    assert [schedule[start][0] for start in range(0, len(schedule), 14)] == clips
    assert schedule[13][1:] == (30, 53) and video_schedule(0.571, frames, scales=15)[-1][1:] == (45, 80)


def test_lengths_and_ratios_that_no_schedule_has_are_refused() -> None:
    with pytest.raises(UserError, match="frames must be 1 and 16 for every second .* got 80"):
        video_schedule(1.0, 80, scales=14)
    with pytest.raises(UserError, match="h_div_w .* above 0, got 0"):
        video_schedule(0, 81, scales=14)
    with pytest.raises(UserError, match="tiny makes images only, got frames=81"):
        load_backbone("tiny", weights="random", device="cpu").sampled(frames=81)


def test_prompts_get_the_form_of_the_released_scripts() -> None:
    caption, sampling = SPEC.caption, SPEC.sampling
    assert caption("a cat", sampling) == "<<<t=5s>>>a cat, Close-up on big objects, emphasize scale and detail"
    assert caption("a cat", replace(sampling, frames=1)) == "a cat, Close-up on big objects, emphasize scale and detail"


def test_text_and_image_become_videos_and_images_of_the_asked_size() -> None:
    video, image = generate(star(), ["a"], seed=1), generate(star(1), ["a"], seed=1)
    assert video.shape == (1, 3, 17, 64, 112) and image.shape == (1, 3, 64, 112)
    for pixels in (video, image):
        assert pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1


def request(backbone, lengths: tuple[int, ...], samples: tuple[int, ...]):  # noqa: ANN001, ANN201
    rows = [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in lengths]
    asked = resolve(backbone, ["a"] * len(lengths), backbone.plan(None), seed=5, sampling=backbone.sampling)
    asked = replace(asked, text=TextFeatures.from_rows(rows), samples=samples)
    return replace(asked, draw=replace(asked.draw, samples=samples))


def test_prompts_of_different_lengths_are_what_each_is_alone() -> None:
    backbone = star()
    with torch.inference_mode():
        together = generate_latent(backbone, request(backbone, (5, 9), (0, 1)))
        for place, length in enumerate((5, 9)):
            alone = generate_latent(backbone, request(backbone, (length,), (place,)))
            torch.testing.assert_close(together[place : place + 1], alone, rtol=0, atol=1e-5)


def test_a_negative_prompt_longer_than_the_prompt_is_refused() -> None:
    model = star().model
    short, long = (TextFeatures.from_rows([torch.randn(length, 32)]) for length in (3, 4))
    with pytest.raises(UserError, match="as short as the prompt, got 4 tokens for 3"):
        model.with_unconditional(short, long)
    assert model.with_unconditional(long, short).lengths == (4, 4)


def test_repetitions_draw_their_own_noise() -> None:
    drawn = {}

    class Watch(Observer):
        def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
            drawn[scale.step] = (bits, logits)

    backbone = star()
    generate(backbone, ["a"], seed=1, observer=Watch())
    course = backbone.model.course(backbone.scale_schedule())
    assert list(drawn) == list(range(len(course.by_step(10))))
    asked = resolve(backbone, ["a"], backbone.plan(None), seed=1, sampling=backbone.sampling)
    for step, (bits, logits) in drawn.items():
        assert torch.equal(asked.draw(logits, step), bits)
    logits = torch.zeros(1, 200, 8, 2)
    assert not torch.equal(asked.draw(logits, 0), asked.draw(logits, 1))


def test_keys_are_kept_of_the_text_and_of_the_last_scale_of_a_clip_alone() -> None:
    backbone, held = star(33), []  # one image and two video clips

    class Watch(Observer):
        def group_done(self, state, latent) -> None:  # noqa: ANN001
            held.append([tuple(buffer.sizes) for buffer in state.buffers][0])
            assert all(buffer.keys.shape[2] == text + contexts for buffer in state.buffers)

    schedule = tuple((frames, h, w) for frames in (1, 4, 4) for h, w in ((1, 1), (2, 3), (2, 4), (3, 5), (4, 7)))
    backbone = replace(backbone, schedule_for=lambda ratio, frames: schedule)
    text, contexts = 40, 28 + 112
    generate(backbone, ["a"], seed=1, observer=Watch())
    plan = backbone.plan(None)
    expected = []
    for scale in plan.scales:
        clip = scale.index // 5
        before = [28, 112][clip - 1 : clip] if clip else []
        expected.append((text, *before, *([scale.tokens] if scale.context else [])))
    assert held == expected and plan.key_capacity(0) == contexts


def test_a_policy_for_another_schedule_is_refused() -> None:
    backbone = star()
    policy = Policy(backbone.name, backbone.depth, star(1).scale_schedule())
    with pytest.raises(UserError, match="use the aspect ratio and pixel budget it was searched for"):
        generate(backbone, ["a"], policy=policy)


def test_a_video_is_written_frame_by_frame(tmp_path: Path, command: ModuleType) -> None:
    video = torch.rand(3, 3, 4, 5)
    first = command.write_pictures(tmp_path / "clip.png", video, 16)
    assert first.name == "clip-000.png"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["clip-000.png", "clip-001.png", "clip-002.png"]
    assert (tmp_path / "clip-002.png").read_bytes() == command.png(video[:, 2])
    assert command.write_pictures(tmp_path / "still.png", video[:, 0], 16).read_bytes() == command.png(video[:, 0])


def test_decoding_at_full_size_takes_as_much_memory_for_five_seconds_as_for_one() -> None:
    spec = RELEASED["infinitystar_720p"]
    with torch.device("meta"):
        tokenizer = spec.family.tokenizer(spec.tokenizer, with_encoder=False).eval()
    needs = []
    for frames in (17, 81):
        size = (64, *tokenizer.latent_size(spec.schedule_for(0.571, frames)))
        output = 2 * 4 * 3 * frames * 720 * 1280  # chunks and then all of them as one, float32
        needs.append(decode_need(tokenizer, size) - output)
    assert needs[1] < 1.05 * needs[0] and needs[0] < 20 * 2**30


def test_blocks_in_bfloat16_give_finite_videos_and_keep_the_rest_in_float32() -> None:
    backbone = random_backbone("infinitystar_480p", SPEC, Target(torch.device("cpu"), torch.bfloat16)).sampled(frames=17)
    lowered = {key for key, value in backbone.model.state_dict().items() if value.dtype is torch.bfloat16}
    assert lowered == {key for key in backbone.model.state_dict() if key.startswith("block_chunks.")}
    assert generate(backbone, ["a"], seed=1).isfinite().all()


def test_what_images_depend_on_names_frames_and_guidance_of_videos_alone() -> None:
    assert {"frames", "projected"} <= set(star().sampling.identity())
    assert {"frames", "projected"}.isdisjoint(RELEASED["infinity2b"].sampling.identity())
