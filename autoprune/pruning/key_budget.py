"""Which keys of a layer stay for later scales: those that a few queries attend to most.

ScaleKV's selection (NeurIPS 2025), simplified: one budget for all layers instead of drafters and refiners, and queries as
attention sees them (the official code takes them before normalisation, bias and rotation).
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int, int]
POOL = 5  # kernel of the official max-pooling along the keys


def window_positions(grid: Grid, window: int, *, device: torch.device | None = None) -> Tensor:
    """Returns the centres of an about square partition of the grid (16: 4 x 4), ascending raster positions [W], W <= window.

    Of several frames the middle one is looked at.
    """
    frames, height, width = grid
    columns = min(width, window // min(height, isqrt(window)))
    rows = min(height, window // columns)
    y = (2 * torch.arange(rows, device=device) + 1) * height // (2 * rows)
    x = (2 * torch.arange(columns, device=device) + 1) * width // (2 * columns)
    return (frames // 2 * height * width + y[:, None] * width + x).flatten()


def importance(q_window: Tensor, keys: Tensor, *, scale: float) -> Tensor:
    """Returns sum_w softmax_k(scale * q_w . k), then the maximum over 5 neighbouring keys.

    q_window [R, H, W, D], keys [R, H, K, D] -> float32 [R, H, K], higher is kept.
    """
    attention = ((q_window @ keys.transpose(-1, -2)).float() * scale).softmax(dim=-1).sum(dim=2)
    return functional.max_pool1d(attention, POOL, stride=1, padding=POOL // 2)


def select_keys(importance: Tensor, count: int, *, always: Tensor | None = None) -> Tensor:
    """Returns the `count` most important keys of each head, ascending; of equals the older ones.

    importance [R, H, K], always [A] (keys that stay in any case, at most `count`) -> [R, H, count].
    """
    if always is not None:
        importance = importance.index_fill(-1, always, float("inf"))
    best = importance.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return best.sort(dim=-1).values
