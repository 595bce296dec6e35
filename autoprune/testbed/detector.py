"""Finds the objects of an image of the embedded world exactly: every decision has a fixed rule and no learnt part.

Objects are coloured and backgrounds are not, so chroma (largest minus smallest channel) is the mask. Its threshold is
relative to the local peak, because a decoder lowers contrast: an absolute one gave half the score on reconstructions.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.testbed.captions import COLOURS, SHAPES, TEXTURES
from autoprune.testbed.components import Components, connected_components
from autoprune.testbed.scenes import CORNER, signed_distance, turned
from autoprune.testbed.texture_classifier import PATCH, classify_texture

MIN_CHROMA = 0.2
PEAK_SHARE = 0.42
MIN_AREA = 90  # px
MIN_PURITY = 0.8  # share of an object's chroma in its hue's bin
MIN_ASPECT = 0.7  # short side / long side of the box
_GRID = 32
_DILATIONS = (-0.04, 0.0, 0.04)  # of the radius: about a pixel
# Half of the angle after which a shape looks the same: no turn shows more.
HALF_TURNS = {"circle": 0.0, "square": np.pi / 4, "triangle": np.pi / 3, "cross": np.pi / 4, "ring": 0.0}
_CHUNK = 64  # images at a time, for memory


@dataclass(frozen=True)
class Finding:
    """One object: centre and area in px, and the IoU with the template of each of SHAPES.

    `clean` says that it has one hue and a square enough box; `texture` is None where it was not asked for.
    `turned_ious` are those with the shapes by half a turn (HALF_TURNS).
    """

    colour: str
    ious: tuple[float, ...]
    x: float
    y: float
    area: int
    clean: bool
    texture: str | None = None
    turned_ious: tuple[float, ...] = ()

    @property
    def shape(self) -> str:
        """The best matching shape."""
        return SHAPES[int(np.argmax(self.ious))]


def detect(images: Tensor, *, textured: Collection[int] = ()) -> list[list[Finding]]:
    """The objects in each of `images` [B, 3, H, W] in [0, 1], with textures in the images that `textured` lists."""
    images = images.detach().float().cpu()
    found: list[list[Finding]] = [[] for _ in range(len(images))]
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        asked = {index - start for index in textured if 0 <= index - start < len(chunk)}
        for image, finding in _findings(chunk, asked):
            found[start + image].append(finding)
    return found


def object_mask(images: Tensor) -> Tensor:
    """The coloured pixels of `images` [B, 3, H, W], after a 2x2 opening: bool [B, H, W]."""
    chroma = _chroma(images)
    peak = F.avg_pool2d(F.pad(chroma, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    mask = (chroma > MIN_CHROMA) & (chroma > PEAK_SHARE * _window_max(peak, 15, before=7))
    eroded = ~_window_max(~mask, 2, before=1)
    return _window_max(eroded, 2, before=0)[:, 0]


def _window_max(values: Tensor, width: int, *, before: int) -> Tensor:
    """Returns the largest of the `width` x `width` values around each [..., H, W], `before` of them before it; none is below 0.

    By doubling: every pass takes the maximum of two windows. max_pool2d computes the same and takes 28 times as long (64 images
    of 128 x 128, width 15, one core of an AMD EPYC).
    """
    after = width - 1 - before
    values = F.pad(values, (before, after, before, after))
    for dim in (-2, -1):
        covered = 1
        while covered < width:
            step = min(covered, width - covered)
            rest = values.shape[dim] - step
            values = torch.maximum(values.narrow(dim, 0, rest), values.narrow(dim, step, rest))
            covered += step
    return values


def _chroma(images: Tensor) -> Tensor:
    return images.amax(1, keepdim=True) - images.amin(1, keepdim=True)


def _findings(images: Tensor, textured: Collection[int]) -> list[tuple[int, Finding]]:
    parts = connected_components(object_mask(images).numpy(), min_area=MIN_AREA)
    if not len(parts.areas):
        return []
    hues = _hue_shares(images, parts)
    colours, purities = hues.argmax(1), hues.max(1)
    masks = _normalised(parts)
    ious, turned_ious = _ious(masks, _templates()), _ious(masks, _templates(by_half=True))
    sides = parts.boxes[:, 2:] - parts.boxes[:, :2]
    clean = (purities >= MIN_PURITY) & (sides.min(1) > MIN_ASPECT * sides.max(1))
    centres = (parts.boxes[:, 2:] + parts.boxes[:, :2] - 1) / 2
    textures = _textures(images, parts, textured)
    return [
        (
            int(image),
            Finding(
                colour=COLOURS[colours[index]],
                ious=tuple(ious[index].tolist()),
                x=float(centres[index, 1]),
                y=float(centres[index, 0]),
                area=int(parts.areas[index]),
                clean=bool(clean[index]),
                texture=textures.get(index),
                turned_ious=tuple(turned_ious[index].tolist()),
            ),
        )
        for index, image in enumerate(parts.images)
    ]


def _hue_shares(images: Tensor, parts: Components) -> np.ndarray:
    """Share of each object's chroma in each of the six 60-degree bins: [K, 6]."""
    at = parts.labels >= 0
    labels = parts.labels[at]
    red, green, blue = images.numpy().transpose(1, 0, 2, 3)[:, at]
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    bins = np.round(hue / (np.pi / 3)).astype(np.int64) % 6
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    votes = np.bincount(labels * 6 + bins, weights=chroma, minlength=6 * len(parts.areas)).reshape(-1, 6)
    return votes / np.maximum(votes.sum(1, keepdims=True), 1e-9)


def _normalised(parts: Components) -> np.ndarray:
    """Each object's mask, its box stretched to the grid: bool [K, 32 * 32]."""
    steps = (np.arange(_GRID) + 0.5) / _GRID
    top, left, bottom, right = parts.boxes.T[..., None]
    rows = (top + (bottom - top) * steps).astype(np.int64)
    columns = (left + (right - left) * steps).astype(np.int64)
    labels = parts.labels[parts.images[:, None, None], rows[:, :, None], columns[:, None, :]]
    return (labels == np.arange(len(labels))[:, None, None]).reshape(len(labels), -1)


def _ious(masks: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Best IoU over the dilations of each shape's template: [K, 5]."""
    ours = masks.astype(np.float32)
    both = ours @ templates.T
    either = ours.sum(1, keepdims=True) + templates.sum(1) - both
    return (both / either).reshape(len(masks), len(SHAPES), len(_DILATIONS)).max(2)


@cache
def _templates(*, by_half: bool = False) -> np.ndarray:
    """Box-normalised masks, shape by shape, dilation by dilation: float32 [5 * 3, 32 * 32]; `by_half` turned by HALF_TURNS."""
    reach = 1.2 * CORNER if by_half else 1.2
    axis = np.linspace(-reach, reach, 961, dtype=np.float32)
    templates = []
    for shape in SHAPES:
        x, y = turned(axis[None], axis[:, None], HALF_TURNS[shape]) if by_half else (axis[None], axis[:, None])
        for dilation in _DILATIONS:
            mask = signed_distance(shape, x, y, 1.0) <= dilation
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            steps = (np.arange(_GRID) + 0.5) / _GRID
            inside = [(ends[0] + (ends[-1] - ends[0]) * steps).round().astype(int) for ends in (rows, columns)]
            templates.append(mask[np.ix_(*inside)].ravel())
    return np.stack(templates).astype(np.float32)


def _textures(images: Tensor, parts: Components, textured: Collection[int]) -> dict[int, str]:
    """Texture of each object in the images `textured`, by its index."""
    chosen = [index for index, image in enumerate(parts.images) if int(image) in textured]
    if not chosen:
        return {}
    values, weights = zip(*(_patch(images, parts, index) for index in chosen), strict=True)
    names = classify_texture(np.stack(values), np.stack(weights))
    return {index: TEXTURES[name] for index, name in zip(chosen, names, strict=True)}


def _patch(images: Tensor, parts: Components, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Value channel and weights of an object in cells of 2x2 px, its rim of 2 px left out: two [PATCH, PATCH]."""
    top, left, *_ = parts.boxes[index]
    here = slice(top, top + 2 * PATCH), slice(left, left + 2 * PATCH)
    inside = np.pad(parts.labels[parts.images[index]][here] == index, 2)
    height, width = inside.shape[0] - 4, inside.shape[1] - 4
    core = np.ones((height, width), dtype=bool)
    for down, across in ((0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (1, 3), (3, 1), (3, 3), (2, 2)):
        core &= inside[down : down + height, across : across + width]
    value = images[int(parts.images[index])].amax(0).numpy()[here]
    room = ((0, 2 * PATCH - height), (0, 2 * PATCH - width))
    weight, total = (
        np.pad(channel, room).reshape(PATCH, 2, PATCH, 2).sum((1, 3)) for channel in (core.astype(float), core * value)
    )
    return total / np.maximum(weight, 1), weight / 4
