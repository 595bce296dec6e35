"""How a backbone runs through its schedule: the clips of a video, and scales that run several times.

Source: InfinityStar's official schedules (an image clip, then clips of 20 latent frames, each from the smallest grid up
again; most scales run three times). Standard library only.
"""

from dataclasses import dataclass

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Course:
    """`repetitions` says how often each scale runs, empty for once each. With `by_clip` no scale sees the keys of earlier ones
    but of the last scale of the clip before, so that nothing else is kept."""

    repetitions: tuple[int, ...] = ()
    by_clip: bool = False

    def times(self, scale: int) -> int:
        """Returns how often a scale runs, unless a policy says less."""
        return self.repetitions[scale] if self.repetitions else 1

    def first_step(self, scale: int) -> int:
        """Returns how many runs come before a scale, whatever a policy leaves out: runs have fixed numbers."""
        return sum(self.repetitions[:scale]) if self.repetitions else scale

    def by_step(self, scales: int) -> tuple[int, ...]:
        """Returns the scale of every run of a schedule of so many scales."""
        return tuple(scale for scale in range(scales) for _ in range(self.times(scale)))


ONCE_EACH = Course()


def clip_ranges(schedule: tuple[Grid, ...]) -> tuple[range, ...]:
    """Returns the scales of each clip; a new one begins where the grid of a frame gets smaller. An image is one clip."""
    sizes = [height * width for _, height, width in schedule]
    starts = [scale for scale in range(len(schedule)) if scale == 0 or sizes[scale] < sizes[scale - 1]]
    return tuple(range(start, end) for start, end in zip(starts, [*starts[1:], len(schedule)], strict=True))


def clip_frames(schedule: tuple[Grid, ...]) -> tuple[range, ...]:
    """Returns the frames that each clip adds, numbered over the whole video."""
    frames, start = [], 0
    for scales in clip_ranges(schedule):
        frames.append(range(start, start + schedule[scales[-1]][0]))
        start = frames[-1].stop
    return tuple(frames)
