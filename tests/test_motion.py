"""Moving scenes: frames show the motion that the caption says, and the detector finds it and nothing else."""

import colorsys

import numpy as np
import pytest
import torch

from autoprune.backbones.caption_encoder import MOTION_VOCABULARY, tokenize
from autoprune.errors import UserError
from autoprune.testbed.captions import COLOURS
from autoprune.testbed.motion import FRAMES, GROWTH, VIDEO_SIZE, motion_pair, realise_motion, render_motion
from autoprune.testbed.motion_captions import MOTIONS, TASKS, MotionDescription, MotionPrompt, Mover, motion_prompts
from autoprune.testbed.motion_score import find_tracks, score_videos
from autoprune.testbed.motion_text import motion_answers
from autoprune.testbed.scenes import Thing, draw

BOTH_WAYS = {"left": "right", "up": "down", "growing": "shrinking"}
REVERSED = BOTH_WAYS | {after: before for before, after in BOTH_WAYS.items()} | {"still": "still"}


def video(description: MotionDescription, seed: int = 0) -> np.ndarray:
    return render_motion(realise_motion(description, np.random.default_rng(seed)), seed)


def one(motion: str, shape: str = "square", **fields: object) -> MotionDescription:
    return MotionDescription((Mover(shape, "red", motion, **fields),))


def as_tensor(videos: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) / 255


def coloured(frame: np.ndarray) -> np.ndarray:
    """Pixels [h, w] whose channels differ much, rows and columns of a frame uint8 [h, w, 3]."""
    return np.ptp(frame.astype(int), axis=2) > 90


def centre(frame: np.ndarray) -> np.ndarray:
    return np.argwhere(coloured(frame)).mean(0)[::-1]


@pytest.fixture(scope="module")
def prompts() -> list[MotionPrompt]:
    return motion_prompts("held_out", 90, seed=3)


@pytest.fixture(scope="module")
def truth(prompts: list[MotionPrompt]) -> torch.Tensor:
    return as_tensor([video(prompt.description, seed) for seed, prompt in enumerate(prompts)])


def test_a_pair_depends_on_seed_and_index_alone() -> None:
    first, caption, _ = motion_pair(4, 7)
    again, same, _ = motion_pair(4, 7)
    assert first.shape == (FRAMES, VIDEO_SIZE, VIDEO_SIZE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and caption == same
    assert not np.array_equal(first, motion_pair(4, 8)[0])


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_the_centre_of_the_coloured_pixels_moves_evenly_the_way_it_is_said(motion: str, axis: int, sign: int) -> None:
    for seed in range(5):
        places = np.array([centre(frame) for frame in video(one(motion), seed)])
        steps = np.diff(places, axis=0)
        even = np.linspace(places[0, axis], places[-1, axis], FRAMES)
        assert (sign * steps[:, axis] > 0.6).all() and np.abs(places[:, axis] - even).max() < 0.75
        assert np.abs(steps[:, 1 - axis]).max() < 0.5


def test_a_still_object_gives_equal_frames() -> None:
    frames = video(one("still"))
    assert all(np.array_equal(frame, frames[0]) for frame in frames)


@pytest.mark.parametrize(("motion", "ratio"), [("growing", GROWTH**2), ("shrinking", GROWTH**-2)])
def test_areas_grow_with_the_square_of_the_radius(motion: str, ratio: float) -> None:
    areas = [coloured(frame).sum() for frame in video(one(motion, "circle"))]
    assert areas[-1] / areas[0] == pytest.approx(ratio, rel=0.12)
    assert (np.sign(np.diff(areas)) == np.sign(ratio - 1)).all()


def test_the_colour_changes_half_way_and_nothing_else_does() -> None:
    frames = video(one("becoming", becomes="blue"))
    x, y = centre(frames[0]).round().astype(int)
    hues = [360 * colorsys.rgb_to_hsv(*(frame[y, x] / 255))[0] for frame in frames]
    assert all(min(hue, 360 - hue) < 12 for hue in hues[:7]) and all(abs(hue - 240) < 12 for hue in hues[7:])
    assert all(np.abs(centre(frame) - centre(frames[0])).max() < 0.2 for frame in frames)


def test_a_turned_square_is_the_polygon_with_turned_corners() -> None:
    canvas, angle = np.zeros((3, 128, 128), dtype=np.float32), 0.5
    draw(canvas, Thing("square", "red", "plain", 0, 60.0, 70.0, 25.0, angle), np.random.default_rng(0))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = [turn @ corner + (60, 70) for corner in 22 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])]
    y, x = np.mgrid[:128, :128]
    inside = np.ones((128, 128), dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0
    assert (inside == (canvas[0] > 0.4)).mean() > 0.998


def test_rotating_keeps_the_area_and_moves_the_corners() -> None:
    frames = [coloured(frame) for frame in video(one("rotating"))]
    assert frames[-1].sum() == pytest.approx(frames[0].sum(), rel=0.05)
    assert (frames[0] & frames[-1]).sum() / (frames[0] | frames[-1]).sum() < 0.9


def test_renders_score_one_and_against_another_prompt_next_to_nothing(prompts: list[MotionPrompt], truth: torch.Tensor) -> None:
    scores = score_videos(truth, prompts, threshold=0.75)
    assert scores.per_task == dict.fromkeys(TASKS, 1.0) and scores.mean_iou > 0.9
    assert score_videos(truth, prompts[3:] + prompts[:3], threshold=0.75).correct.mean() <= 0.05


def test_a_video_played_backwards_shows_the_opposite_motion(prompts: list[MotionPrompt], truth: torch.Tensor) -> None:
    chosen = [index for index, prompt in enumerate(prompts) if all(m.motion in REVERSED for m in prompt.description.movers)]
    backwards = find_tracks(truth[chosen].flip(2))
    assert len(chosen) > 20
    for index, tracks in zip(chosen, backwards, strict=True):
        expected = {(m.shape, m.colour, REVERSED[m.motion]) for m in prompts[index].description.movers}
        assert {(t.findings[0].shape, t.findings[0].colour, t.motion) for t in tracks} == expected


def test_frames_out_of_order_or_empty_are_wrong(prompts: list[MotionPrompt], truth: torch.Tensor) -> None:
    moving = [index for index, prompt in enumerate(prompts) if prompt.description.movers[0].motion in BOTH_WAYS][:20]
    jumbled = truth[moving][:, :, [0, 12, 1, 11, 2, 10, 3, 9, 4, 8, 5, 7, 6]]
    asked = [prompts[index] for index in moving]
    assert score_videos(jumbled, asked, threshold=0.75).correct.mean() <= 0.1
    assert not score_videos(torch.full_like(jumbled, 0.5), asked, threshold=0.75).correct.any()


def test_splits_share_no_text_and_every_word_is_known() -> None:
    sets = [motion_prompts(split, 150, seed=seed) for split in ("search", "held_out") for seed in (0, 1)]
    texts = [{prompt.text for prompt in prompts} for prompts in sets]
    assert all(len(found) == 150 for found in texts) and not (texts[0] | texts[1]) & (texts[2] | texts[3])
    seen = {mover.motion for prompts in sets for prompt in prompts for mover in prompt.description.movers}
    assert seen == set(MOTIONS)
    assert all(tokenize(text, MOTION_VOCABULARY) for found in texts for text in found)
    with pytest.raises(UserError, match="unknown prompt split 'test'"):
        motion_prompts("test", 3)
    with pytest.raises(UserError, match="task 'moving' has some .* ask for fewer"):
        motion_prompts("search", 3000)


def test_questions_about_captions_are_answered_as_the_words_say() -> None:
    movers = (Mover("circle", "red", "left"), Mover("square", "blue", "becoming", "cyan"))
    description = MotionDescription(movers, "below", "dark")
    words = description.text().split()
    assert " ".join(words) == "a red circle moving left below a blue square becoming cyan on a dark background"
    answers = motion_answers(description)
    assert {words[spot]: places for spot, (_, places) in answers.items()} == {"circle": (4,), "square": (3,)}
    classes = {words[spot]: by_question for spot, (by_question, _) in answers.items()}
    assert classes["circle"][1] == COLOURS.index("red") and classes["circle"][3] == 0
    assert classes["square"][3] == 1 + COLOURS.index("cyan") and classes["square"][2] == MOTIONS.index("becoming")
