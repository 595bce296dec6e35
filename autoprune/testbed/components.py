"""Connected components of a batch of masks in numpy: the base install has no scipy."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Components:
    """Components of a batch: `labels` [B, H, W] (-1 is background), and per component its image, area in px and box.

    A box is (top, left, bottom, right), the last two exclusive; components are ordered by image, then by first row.
    """

    labels: np.ndarray
    images: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class _Runs:
    """Maximal horizontal runs of set pixels, in raster order; `last` is inclusive."""

    image: np.ndarray
    row: np.ndarray
    first: np.ndarray
    last: np.ndarray


def connected_components(mask: np.ndarray, *, min_area: int = 1) -> Components:
    """The 8-connected components of `mask` bool [B, H, W] with at least `min_area` pixels."""
    runs = _runs(mask)
    roots = _joined(len(runs.row), *_touching(runs, mask.shape))
    _, component = np.unique(roots, return_inverse=True)
    number = int(component.max(initial=-1)) + 1
    widths = runs.last - runs.first + 1
    areas = np.bincount(component, weights=widths, minlength=number).astype(np.int64)
    large = areas >= min_area
    new_label = np.where(large, np.cumsum(large) - 1, -1)
    labels = np.full(mask.shape, -1, dtype=np.int32)
    labels[mask] = np.repeat(new_label[component], widths)
    boxes = np.empty((number, 4), dtype=np.int64)
    boxes[:, :2], boxes[:, 2:] = max(mask.shape), 0
    images = np.zeros(number, dtype=np.int64)
    images[component] = runs.image
    np.minimum.at(boxes[:, 0], component, runs.row)
    np.minimum.at(boxes[:, 1], component, runs.first)
    np.maximum.at(boxes[:, 2], component, runs.row + 1)
    np.maximum.at(boxes[:, 3], component, runs.last + 1)
    return Components(labels, images[large], areas[large], boxes[large])


def _runs(mask: np.ndarray) -> _Runs:
    padded = np.pad(mask, ((0, 0), (0, 0), (1, 1))).astype(np.int8)
    steps = np.diff(padded, axis=2)
    image, row, first = np.nonzero(steps == 1)
    return _Runs(image, row, first, np.nonzero(steps == -1)[2] - 1)


def _touching(runs: _Runs, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of runs in neighbouring rows that touch, corners included."""
    stride = shape[2] + 4
    line = (runs.image * (shape[1] + 1) + runs.row) * stride
    low = np.searchsorted(line + runs.last, line + stride + runs.first - 1, side="left")
    high = np.searchsorted(line + runs.first, line + stride + runs.last + 1, side="right")
    count = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(len(line)), count)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return upper, np.repeat(low, count) + offset


def _joined(number: int, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Smallest member of each node's group: labels sink along edges and pointers until nothing moves."""
    labels = np.arange(number)
    while True:
        least = np.minimum(labels[ours], labels[theirs])
        moved = labels.copy()
        for ends in (ours, theirs):
            np.minimum.at(moved, ends, least)
            np.minimum.at(moved, labels[ends], least)
        moved = moved[moved]
        if np.array_equal(moved, labels):
            return labels
        labels = moved
