"""Infinity's scale schedules: eight base aspect ratios, seven transposed ones, four pixel budgets.

Source: the official Infinity repository (dynamic resolution table); images always use t = 1.
"""

from collections.abc import Callable
from functools import lru_cache, partial

from autoprune.errors import UserError, unknown_name
from autoprune.policy import Grid

PIXEL_BUDGETS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

_BASE = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _templates() -> dict[float, tuple[Grid, ...]]:
    table = {}
    for ratio, text in _BASE.items():
        grids = [tuple(int(side) for side in grid.split("x")) for grid in text.split()]
        table[ratio] = tuple((1, h, w) for h, w in grids)
        table[int(1000 / ratio) / 1000] = tuple((1, w, h) for h, w in grids)
    return dict(sorted(table.items()))


TEMPLATES = _templates()
ASPECT_RATIOS = tuple(TEMPLATES)


def scale_schedule(h_div_w: float = 1.0, pixel_budget: str = "0.06M") -> tuple[Grid, ...]:
    """Returns the grids (t, h, w) of the template nearest to height / width, cut to a pixel budget.

    Raises UserError for an unknown budget or a ratio that is not positive.
    """
    if pixel_budget not in PIXEL_BUDGETS:
        raise unknown_name("pixel budget", pixel_budget, PIXEL_BUDGETS)
    if not h_div_w > 0:
        raise UserError(f"h_div_w (height / width) must be above 0, got {h_div_w}.")
    nearest = min(ASPECT_RATIOS, key=lambda ratio: abs(ratio - h_div_w))
    return TEMPLATES[nearest][: PIXEL_BUDGETS[pixel_budget]]


def pixel_budget_schedules(pixel_budget: str) -> Callable[[float], tuple[Grid, ...]]:
    """Returns the function from an aspect ratio to its schedule."""
    return partial(scale_schedule, pixel_budget=pixel_budget)


def square_schedule(sides: tuple[int, ...], h_div_w: float = 1.0) -> tuple[Grid, ...]:
    """Returns square grids of these sides. Raises UserError for an aspect ratio other than 1."""
    if h_div_w != 1:
        raise UserError(f"h_div_w must be 1 for a backbone that makes square images only, got {h_div_w}.")
    return tuple((1, side, side) for side in sides)


@lru_cache(maxsize=64)
def position_frame(schedule: tuple[Grid, ...]) -> Grid:
    """Returns the grid in which token positions are counted: the last one of the full template of the same aspect ratio."""
    for template in TEMPLATES.values():
        if template[: len(schedule)] == schedule:
            return template[-1]
    ratio = schedule[-1][1] / schedule[-1][2]
    return scale_schedule(ratio, "1M")[-1]
