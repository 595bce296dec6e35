"""InfinityStar's rotary positions on four axes: run of a scale, frame, row and column, a quarter of each head's pairs each.

Source: official `infinity/schedules/infinity_elegant.py`. Rows and columns are stretched over the last grid of the schedule,
frames are those of the whole video, runs are counted behind the longest text.
"""

import torch
from torch import Tensor

from autoprune.clips import clip_frames, clip_ranges
from autoprune.policy import Grid

BASE = 10000.0
AXES = 4


def step_rotation(schedule: tuple[Grid, ...], scale: int, *, position: int, head_width: int) -> Tensor:
    """Returns the factors [2, N, head_width] of a scale on the CPU, for `rope.rotate`; `position` is that of the run."""
    grid, frame = schedule[scale], schedule[-1]
    clip = next(number for number, scales in enumerate(clip_ranges(schedule)) if scale in scales)
    frames = clip_frames(schedule)[clip]
    places = (
        torch.tensor([position]),
        torch.arange(frames.start, frames.start + grid[0]),
        torch.round(torch.arange(grid[1]) * (frame[1] / grid[1])),
        torch.round(torch.arange(grid[2]) * (frame[2] / grid[2])),
    )
    angles = []
    for axis, place in enumerate(places):
        shape = [1, 1, 1, 1]
        shape[axis] = len(place)
        angles.append(_angles(place, head_width).view(*shape, -1).expand(1, *grid, -1))
    return _factors(torch.cat(angles, dim=-1).flatten(0, 3))


def text_rotation(length: int, head_width: int) -> Tensor:
    """Returns the factors [2, length, head_width] of text tokens on the CPU; they move along the first axis alone."""
    first = _angles(torch.arange(length), head_width)
    others = torch.zeros(length, (AXES - 1) * first.shape[1])
    return _factors(torch.cat((first, others), dim=1))


def _angles(places: Tensor, head_width: int) -> Tensor:
    """Returns the angles [n, head_width / 8] of places on one axis."""
    count = head_width // (2 * AXES)
    return places.float()[:, None] * BASE ** (-torch.arange(count).float() / count)


def _factors(angles: Tensor) -> Tensor:
    """Angles [N, D / 2] of the pairs (2m, 2m + 1) -> cosines, and sines signed for `rope.rotate`, [2, N, D]."""
    cosines = angles.cos().repeat_interleave(2, dim=-1)
    sines = torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(-2)
    return torch.stack((cosines, sines))
