"""Pictures of what a policy costs: dense | policy | difference, one row a prompt."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from autoprune.files import whole_file

GAIN = 3.0
_SIDE, _GAP, _TEXT, _HEAD, _FONT = 256, 10, 210, 66, 15


def save_picture_grid(path: Path, *, dense: torch.Tensor, pruned: torch.Tensor, prompts: list[str], title: str) -> Path:
    """Writes the grid of `dense` and `pruned` images [B, 3, (F,) H, W] in [0, 1], same prompts and seeds,
    as a PNG.

    The third column is their `difference`.
    """
    columns = ("dense", "policy", f"difference x {GAIN:.0f}")
    height, width = dense.shape[-2:]
    side = (_SIDE, round(_SIDE * height / width))
    sheet = Image.new("RGB", (_TEXT + 3 * (side[0] + _GAP) + _GAP, _HEAD + len(prompts) * (side[1] + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 12), title, fill="black", font=ImageFont.load_default(_FONT + 2))
    lefts = [_TEXT + _GAP + column * (side[0] + _GAP) for column in range(3)]
    for left, name in zip(lefts, columns, strict=True):
        draw.text((left, 42), name, fill="#374151", font=ImageFont.load_default(_FONT))
    shown = (dense, pruned, difference(dense, pruned))
    for row, prompt in enumerate(prompts):
        top = _HEAD + row * (side[1] + _GAP)
        wrapped = "\n".join(textwrap.wrap(prompt, 24, max_lines=max(1, side[1] // (_FONT + 8)), placeholder=" ..."))
        draw.multiline_text((_GAP, top + 4), wrapped, fill="#374151", font=ImageFont.load_default(_FONT), spacing=5)
        for left, images in zip(lefts, shown, strict=True):
            sheet.paste(picture(images[row]).resize(side, Image.Resampling.NEAREST), (left, top))
    with whole_file(path) as temporary:
        sheet.save(temporary)
    return path


def difference(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Returns the absolute difference [B, 3, H, W], its mean over colours, times GAIN: black is identical."""
    return (GAIN * (dense - pruned).abs().mean(1, keepdim=True)).clamp(0, 1).expand_as(dense)


def picture(image: torch.Tensor) -> Image.Image:
    """Returns an image [3, H, W] in [0, 1], or the middle frame of a video [3, F, H, W], as a picture of 8 bits a colour."""
    image = image if image.dim() == 3 else image[:, image.shape[1] // 2]
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
