"""Pictures of images and videos: the frames that are shown of a video, and sheets of videos as one file that moves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from autoprune.files import whole_file
from autoprune.video_files import write_video

MOST_FRAMES = 48  # of a video in a report: 41 of five seconds of InfinityStar, eight a second
WEBP_SIDE = 16_383  # pixels, the most of the format
LOSSLESS_SIDE = 128  # pixels up to which pictures are stored exactly, a few kB each


def shown_frames(images: Tensor, rate: float) -> tuple[list[Tensor], float]:
    """Returns the frames [B, 3, H, W] that are shown of videos [B, 3, F, H, W], every n-th so that there are at most
    MOST_FRAMES, and how many a second are; images [B, 3, H, W] are one frame."""
    if images.dim() == 4:
        return [images], rate
    step = -(-images.shape[2] // MOST_FRAMES)
    return list(images[:, :, ::step].unbind(2)), rate / step


def picture(image: Tensor) -> Image.Image:
    """Returns an image [3, H, W] in [0, 1] as a picture of 8 bits a colour."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def save_sheets(path: Path, sheets: Sequence[Image.Image], *, rate: float, lossless: bool) -> Path:
    """Writes a sheet as `path`, a PNG, or the sheets of a video's frames as an animated WebP beside it that plays `rate` of
    them a second for ever, made smaller where that holds no such sides; returns the path of what was written."""
    if len(sheets) > 1:
        if max(sheets[0].size) > WEBP_SIDE:
            sheets = [ImageOps.contain(sheet, (WEBP_SIDE, WEBP_SIDE)) for sheet in sheets]
        return write_video(
            path.with_suffix(".webp"), np.stack([np.asarray(sheet) for sheet in sheets]), rate, lossless=lossless
        )
    with whole_file(path) as temporary:
        sheets[0].save(temporary)
    return path
