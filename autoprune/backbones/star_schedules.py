"""InfinityStar's scale schedules: an image clip, then clips of at most 20 latent frames, all with the same spatial grids.

Source: the official `infinity_elegant_clip20frames_v2` tables; 480p are the first 14 of 15 grids, 720p all of them.
"""

from collections.abc import Callable
from functools import partial

from autoprune.errors import UserError
from autoprune.policy import Grid

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 40, 60)
RATIOS = (1.0, 100 / 116, 3 / 4, 2 / 3, 9 / 16, 1 / 2, 2 / 5, 1 / 3)  # height / width
CLIP = 20  # latent frames of a video clip
TIME = 4  # pixel frames of a latent one, after the first
FRAMES_PER_SECOND = 16


def _templates() -> dict[float, tuple[tuple[int, int], ...]]:
    table = {}
    for ratio in RATIOS:
        widths = [(side * side / ratio) ** 0.5 for side in SIDES]
        grids = tuple((round(width * ratio), round(width)) for width in widths)
        height, width = grids[-1]
        table[int(1000 * width / height) / 1000] = tuple((w, h) for h, w in grids)
        table[int(1000 * height / width) / 1000] = grids
    return table


TEMPLATES = _templates()
"""Grids (h, w) by height / width of the last one, cut to three digits."""


def video_schedule(h_div_w: float, frames: int = 1, *, scales: int) -> tuple[Grid, ...]:
    """Returns the grids (t, h, w) of a video of so many pixel frames, of the template nearest to height / width.

    Raises UserError for a ratio that is not positive, and frames other than 1 and 16 for every second.
    """
    if not h_div_w > 0:
        raise UserError(f"h_div_w (height / width) must be above 0, got {h_div_w}.")
    if frames < 1 or (frames - 1) % FRAMES_PER_SECOND:
        raise UserError(
            f"frames must be 1 and {FRAMES_PER_SECOND} for every second of a video, such as 1 for an image and 81 for five "
            f"seconds, got {frames}."
        )
    nearest = min(TEMPLATES, key=lambda ratio: abs(ratio - h_div_w))
    rest = (frames - 1) // TIME
    clips = [1] + [min(CLIP, rest - start) for start in range(0, rest, CLIP)]
    return tuple((clip, h, w) for clip in clips for h, w in TEMPLATES[nearest][:scales])


def video_schedules(scales: int) -> Callable[..., tuple[Grid, ...]]:
    """Returns the function from an aspect ratio and a number of frames to a schedule with the first grids of each template."""
    return partial(video_schedule, scales=scales)
