"""What a removed token receives in place of the computation it skipped."""

from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int, int]


def cached(cache: Tensor, grid: Grid, *, target: Grid, interpolation: str) -> Tensor:
    """Resizes the same function's output at the cache scale to the current grid (FastVAR: area).

    cache [R, N0, C] on `grid` -> [R, N, C] on `target`. Equal grids return the cache itself.
    """
    if grid == target:
        return cache
    rows, _, channels = cache.shape
    image = cache.reshape(rows, grid[1], grid[2], channels).permute(0, 3, 1, 2)
    options = {"align_corners": False} if interpolation in ("bilinear", "bicubic") else {}
    resized = functional.interpolate(image, size=target[1:], mode=interpolation, **options)
    return resized.permute(0, 2, 3, 1).reshape(rows, target[1] * target[2], channels)
