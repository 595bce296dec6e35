"""Videos are read back by another reader: what is in them, how long each frame is shown; and what cannot be written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from autoprune.errors import UserError
from autoprune.video_files import write_video


def clip(frames: int = 6, height: int = 48, width: int = 64) -> torch.Tensor:
    """Returns a video [3, F, H, W] in [0, 1] of a square that moves over a slope of colours."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    ground = torch.stack([rows.expand(height, width), columns.expand(height, width), rows * columns])
    video = ground[:, None].repeat(1, frames, 1, 1)
    for frame in range(frames):
        video[:, frame, 8:24, 4 + 6 * frame : 20 + 6 * frame] = torch.tensor([1.0, 0.2, 0.1])[:, None, None]
    return video


def bytes_of(video: torch.Tensor) -> np.ndarray:
    return (video * 255).round().byte().permute(1, 2, 3, 0).numpy()


def animation(path: Path) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as image:
        shown = [(np.array(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    return np.stack([pixels for pixels, _ in shown]), [duration for _, duration in shown]


@pytest.mark.parametrize("given", [clip(), bytes_of(clip()), torch.from_numpy(bytes_of(clip()))])
def test_webp_keeps_every_pixel(tmp_path: Path, given: torch.Tensor | np.ndarray) -> None:
    path = write_video(tmp_path / "deep" / "a.webp", given, 8)
    pixels, durations = animation(path)
    np.testing.assert_array_equal(pixels, bytes_of(clip()))
    assert durations == [125] * 6 and [file.name for file in path.parent.iterdir()] == ["a.webp"]


def test_gif_has_all_frames_in_few_colours(tmp_path: Path) -> None:
    pixels, durations = animation(write_video(tmp_path / "a.GIF", clip(), 10))
    assert durations == [100] * 6 and np.abs(pixels.astype(int) - bytes_of(clip())).mean() < 6


@pytest.mark.parametrize(("fps", "full", "layout", "levels"), [(16, False, "yuv420p", 3), (29.97, True, "yuv444p", 1.5)])
def test_mp4_is_close_in_every_frame(tmp_path: Path, fps: float, full: bool, layout: str, levels: float) -> None:
    av = pytest.importorskip("av")
    with av.open(write_video(tmp_path / "a.mp4", clip(), fps, full_colour=full)) as container:
        stream = container.streams.video[0]
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert float(stream.average_rate) == pytest.approx(fps) and stream.codec_context.pix_fmt == layout
    assert pixels.shape == (6, 48, 64, 3) and np.abs(pixels.astype(int) - bytes_of(clip())).mean() < levels
    assert np.abs(pixels[0].astype(int) - bytes_of(clip())[5]).mean() > 6, "the order of frames is kept"


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^a video must end in \.webp, \.gif, \.mp4, got '.*a\.avi'; choose another name\.$"):
        write_video(tmp_path / "a.avi", clip(), 8)
    for package, name in (("PIL", "a.webp"), ("av", "a.mp4")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=r"is not installed; pip install 'autoprune\[video\]'\.$"):
            write_video(tmp_path / name, clip(), 8)
    assert not list(tmp_path.iterdir())


def test_odd_sides_are_refused_for_mp4_only(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(UserError, match=r"^the sides of an \.mp4 must be even, got 47 x 64; write a\.webp\.$"):
        write_video(tmp_path / "a.mp4", clip(height=47), 8)
    assert animation(write_video(tmp_path / "a.webp", clip(height=47), 8))[0].shape == (6, 47, 64, 3)
