"""Videos as one file each, by suffix: .webp (lossless) and .gif (256 colours) through Pillow, .mp4 (H.264) through PyAV.

PyAV, as its wheel brings FFmpeg along and needs no program. Both are imported where they are used: production needs neither.
"""

import os
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import UserError
from autoprune.files import whole_file

SUFFIXES = (".webp", ".gif", ".mp4")
_CRF = "10"  # of 0 to 51, less is better
_TICKS = 1_000_000  # a second


def write_video(
    path: str | os.PathLike, frames: Tensor | np.ndarray, fps: float, *, full_colour: bool = False, lossless: bool = True
) -> Path:
    """Writes frames, uint8 [F, H, W, 3] or float [3, F, H, W] in [0, 1], shown `fps` a second, and returns the path.

    An .mp4 has colours at half the resolution (yuv420p), as all players want it; `full_colour` keeps them (yuv444p), for
    programs that build on FFmpeg: of rendered scenes of 64 x 64 pixels 47 dB remain in place of 33.
    A .webp that need not be `lossless` is several times smaller.
    .webp and .gif show equal neighbours as one longer frame, and know time in steps of 1 and 10 ms. Raises UserError for
    another suffix, for sides that .mp4 cannot hold (odd ones), and where Pillow or PyAV is not installed.
    """
    path, pixels = Path(path), _pixels(frames)
    check_video_name(path)
    if path.suffix.lower() == ".mp4":
        _write_mp4(path, pixels, fps, "yuv444p" if full_colour else "yuv420p")
    else:
        _write_animation(path, pixels, fps, lossless=lossless)
    return path


def check_video_name(path: str | os.PathLike) -> None:
    """Raises UserError for a name of another suffix, and where what writes it is not installed."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"a video must end in {', '.join(SUFFIXES)}, got {os.fspath(path)!r}; choose another name.")
    package, module = ("PyAV", "av") if suffix == ".mp4" else ("Pillow", "PIL")
    if find_spec(module) is None:
        raise UserError(f"a video as {suffix} needs {package}, which is not installed; pip install 'autoprune[video]'.")


def _pixels(frames: Tensor | np.ndarray) -> np.ndarray:
    """Returns frames as uint8 [F, H, W, 3]."""
    frames = torch.as_tensor(frames)
    if frames.is_floating_point():
        frames = frames.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0)
    return np.ascontiguousarray(frames.cpu().numpy())


def _write_animation(path: Path, pixels: np.ndarray, fps: float, *, lossless: bool) -> None:
    from PIL import Image

    first, *rest = map(Image.fromarray, pixels)
    options = {"lossless": lossless} if path.suffix.lower() == ".webp" else {}
    with whole_file(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **options)


def _write_mp4(path: Path, pixels: np.ndarray, fps: float, layout: str) -> None:
    import av

    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"the sides of an .mp4 must be even, got {height} x {width}; write {path.stem}.webp.")
    with whole_file(path) as temporary, av.open(temporary, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(_TICKS), options={"crf": _CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
