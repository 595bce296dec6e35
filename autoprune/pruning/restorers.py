"""What a removed token receives in place of the computation it skipped."""

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.pruning.selection import anchor_index
from autoprune.pruning.signals import nearest_source

Grid = tuple[int, int, int]
FAR = 2**60
CANDIDATES = 4  # SparseVAR compares each token with its four nearest anchors


def cached(cache: Tensor, grid: Grid, *, target: Grid, interpolation: str) -> Tensor:
    """Resizes the same function's output at the cache scale to the current grid (FastVAR: area).

    cache [R, N0, C] on `grid` -> [R, N, C] on `target`. Equal grids return the cache itself. Videos are resized in time and
    then frame by frame, which for all but bicubic is interpolation in three dimensions (FastVAR's and FasterVAR's for them).
    """
    if grid == target:
        return cache
    rows, _, channels = cache.shape
    video = cache.reshape(rows, *grid, channels)
    if grid[0] != target[0]:
        series = video.permute(0, 2, 3, 4, 1).reshape(-1, channels, grid[0])
        mode = "linear" if interpolation in ("bilinear", "bicubic") else interpolation
        series = functional.interpolate(series, size=target[0], mode=mode)
        video = series.view(rows, *grid[1:], channels, target[0]).permute(0, 4, 1, 2, 3)
    image = video.reshape(-1, *grid[1:], channels).permute(0, 3, 1, 2)
    options = {"align_corners": False} if interpolation in ("bilinear", "bicubic") else {}
    resized = functional.interpolate(image, size=target[1:], mode=interpolation, **options)
    return resized.permute(0, 2, 3, 1).reshape(rows, -1, channels)


def nearest_kept(kept: Tensor, grid: Grid) -> Tensor:
    """Returns for each grid position the nearest kept token (StepVAR, arXiv 2603.01757), as an index into `kept`.

    kept [R, M] distinct raster positions in any order -> [R, N]. Distance is Euclidean within the frame, or over the clip for
    a frame that keeps nothing; of equals the smallest raster position wins. A kept position finds itself.
    The key squared distance * N + raster position adds up over axes, so one minimum an axis finds it exactly: about
    R N (h + w) integer operations, whatever M is, and R N max(h, w) integers at a time.
    """
    rows, tokens = len(kept), grid[0] * grid[1] * grid[2]
    key = torch.full((rows, tokens), FAR, device=kept.device).scatter(1, kept, kept).view(rows, *grid)
    key = _nearest_along(_nearest_along(key, 2), 3)
    if grid[0] > 1:
        key = torch.where(key < FAR, key, _nearest_along(key, 1))
    slots = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.zeros_like(key.flatten(1)).scatter(1, kept, slots).gather(1, key.flatten(1) % tokens)


def nearest_anchor(logits: Tensor, logits_grid: Grid, grid: Grid, stride: int) -> tuple[Tensor, Tensor]:
    """Returns for each position the most similar of its four nearest anchors (SparseVAR, arXiv 2507.20454), and the cosine.

    logits [B, N0, V] (or [B, N0, d, 2]) of the previous scale, nearest-upsampled to `grid`; anchors are those of
    `selection.anchor_index`, of the same frame. -> raster positions [B, N] and float32 cosines [B, N]. Of equally near
    or similar anchors the first in raster order, or the nearer, is taken. An anchor finds itself, with cosine 1. Cost:
    16 N integers to find the four, then 4 N V multiplications a sample.
    """
    near = _nearest_anchors(grid, stride, logits.device)
    source = nearest_source(logits_grid, grid, logits.device)
    unit = functional.normalize(logits.flatten(2).float(), dim=-1)
    cosine = (unit[:, source, None] * unit[:, source[near]]).sum(dim=-1)
    itself = near[:, 0] == torch.arange(len(near), device=near.device)
    best = cosine.argmax(dim=-1).masked_fill(itself, 0)[..., None]
    index = near.expand(len(logits), -1, -1).gather(2, best)
    return index.squeeze(2), cosine.gather(2, best).squeeze(2).masked_fill(itself, 1.0)


def _nearest_along(key: Tensor, axis: int) -> Tensor:
    """Returns min_j key_j + (i - j)^2 * N along an axis of [R, t, h, w]."""
    place = torch.arange(key.shape[axis], device=key.device)
    squares = (place[:, None] - place).square() * key[0].numel()
    return (key.movedim(axis, -1)[..., None, :] + squares).amin(dim=-1).movedim(-1, axis)


def _nearest_anchors(grid: Grid, stride: int, device: torch.device) -> Tensor:
    """Returns the raster positions [N, 4] of each position's nearest anchors in its frame, nearest first (fewer if need be).

    They are among the four nearest rows and the four nearest columns of anchors.
    """
    frames, height, width = grid
    with device:
        rows, columns = anchor_index((1, height, 1), stride), anchor_index((1, 1, width), stride)
    dy, y = (part[:, None, :, None] for part in _nearest_on_axis(rows, height))
    dx, x = (part[None, :, None, :] for part in _nearest_on_axis(columns, width))
    key = ((dy + dx) * (height * width) + y * width + x).flatten(2).flatten(0, 1)
    near = key.topk(min(CANDIDATES, key.shape[1]), dim=1, largest=False).values % (height * width)
    return (torch.arange(frames, device=device)[:, None, None] * (height * width) + near).flatten(0, 1)


def _nearest_on_axis(anchors: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns the squared distances [side, 4] and places [side, 4] of the nearest anchors on one axis."""
    key = (torch.arange(side, device=anchors.device)[:, None] - anchors).square() * side + anchors
    near = key.topk(min(CANDIDATES, len(anchors)), dim=1, largest=False).values
    return near // side, near % side
