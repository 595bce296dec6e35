"""Pictures of what a policy costs: dense | policy | difference, one row a prompt."""

import textwrap
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from autoprune.moving_pictures import LOSSLESS_SIDE, picture, save_sheets, shown_frames

GAIN = 3.0
_SIDE, _GAP, _TEXT, _HEAD, _FONT = 256, 10, 210, 66, 15


def save_picture_grid(
    path: Path, *, dense: torch.Tensor, pruned: torch.Tensor, prompts: list[str], title: str, rate: float = 1.0
) -> Path:
    """Writes the grid of `dense` and `pruned` images [B, 3, H, W] in [0, 1], same prompts and seeds, as a PNG, of videos
    [B, 3, F, H, W] of `rate` frames a second as an animated WebP, all of it in step; returns the path of what was written.

    The third column is their `difference`.
    """
    height, width = dense.shape[-2:]
    side = (_SIDE, round(_SIDE * height / width))
    empty = _empty_sheet(side, prompts, title)
    (dense, shown_rate), (pruned, _) = shown_frames(dense, rate), shown_frames(pruned, rate)
    sheets = []
    for columns in zip(dense, pruned, map(difference, dense, pruned), strict=True):
        sheets.append(empty.copy())
        for row, column in product(range(len(prompts)), range(3)):
            corner = (_left(column, side), _HEAD + row * (side[1] + _GAP))
            sheets[-1].paste(picture(columns[column][row]).resize(side, Image.Resampling.NEAREST), corner)
    return save_sheets(path, sheets, rate=shown_rate, lossless=max(height, width) <= LOSSLESS_SIDE)


def difference(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Returns the absolute difference of images [B, 3, H, W], its mean over colours, times GAIN: black is identical."""
    return (GAIN * (dense - pruned).abs().mean(1, keepdim=True)).clamp(0, 1).expand_as(dense)


def _empty_sheet(side: tuple[int, int], prompts: list[str], title: str) -> Image.Image:
    columns = ("dense", "policy", f"difference x {GAIN:.0f}")
    sheet = Image.new("RGB", (_left(3, side), _HEAD + len(prompts) * (side[1] + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 12), title, fill="black", font=ImageFont.load_default(_FONT + 2))
    for column, name in enumerate(columns):
        draw.text((_left(column, side), 42), name, fill="#374151", font=ImageFont.load_default(_FONT))
    for row, prompt in enumerate(prompts):
        top = _HEAD + row * (side[1] + _GAP)
        wrapped = "\n".join(textwrap.wrap(prompt, 24, max_lines=max(1, side[1] // (_FONT + 8)), placeholder=" ..."))
        draw.multiline_text((_GAP, top + 4), wrapped, fill="#374151", font=ImageFont.load_default(_FONT), spacing=5)
    return sheet


def _left(column: int, side: tuple[int, int]) -> int:
    return _TEXT + _GAP + column * (side[0] + _GAP)
