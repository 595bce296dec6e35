"""What is shown of videos: which frames, how fast, and in one file that moves or, of images, does not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from autoprune.moving_pictures import MOST_FRAMES, WEBP_SIDE, picture, save_sheets, shown_frames


@pytest.mark.parametrize(("frames", "expected", "rate"), [(9, 9, 16), (MOST_FRAMES, 48, 16), (81, 41, 8), (161, 41, 4)])
def test_long_videos_show_every_nth_frame_at_the_same_speed(frames: int, expected: int, rate: float) -> None:
    video = torch.arange(float(frames)).view(1, 1, frames, 1, 1).expand(2, 3, frames, 2, 4)
    shown, shown_rate = shown_frames(video, 16)
    assert len(shown) == expected and shown_rate == rate and shown[0].shape == (2, 3, 2, 4)
    assert [frame[0, 0, 0, 0].item() for frame in shown[:3]] == [0, 16 / rate, 32 / rate]


def test_an_image_is_one_frame_and_a_png(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 5, 7)
    (only,), _ = shown_frames(images, 16)
    assert torch.equal(only, images)
    path = save_sheets(tmp_path / "a.png", [picture(images[0])], rate=16, lossless=True)
    assert path == tmp_path / "a.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), (images[0] * 255).round().byte().permute(1, 2, 0))


def test_sheets_of_large_frames_may_be_lossy(tmp_path: Path) -> None:
    sheets = [picture(torch.rand(3, 60, 60)) for _ in range(3)]
    exact, lossy = (save_sheets(tmp_path / f"{kept}.png", sheets, rate=4, lossless=kept) for kept in (True, False))
    assert lossy.stat().st_size < exact.stat().st_size / 2


def test_several_sheets_move_for_ever(tmp_path: Path) -> None:
    sheets = [picture(torch.rand(3, 5, 7)) for _ in range(4)]
    path = save_sheets(tmp_path / "a.png", sheets, rate=4, lossless=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] == ["a.webp"]
    with Image.open(path) as moving:
        assert moving.info["loop"] == 0
        for frame, sheet in zip(ImageSequence.Iterator(moving), sheets, strict=True):
            np.testing.assert_array_equal(np.asarray(frame.convert("RGB")), np.asarray(sheet))
            assert frame.info["duration"] == 250


def test_a_sheet_longer_than_its_format_holds_is_made_smaller(tmp_path: Path) -> None:
    sheets = [Image.new("RGB", (40, 2 * WEBP_SIDE), shade) for shade in ("black", "white")]
    with Image.open(save_sheets(tmp_path / "sheet.png", sheets, rate=2.0, lossless=False)) as moving:
        assert moving.size == (20, WEBP_SIDE) and moving.n_frames == 2
