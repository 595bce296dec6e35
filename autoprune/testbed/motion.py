"""Moving scenes: the objects of scenes.py drawn frame by frame, with the background and the look of each kept.

Everything is drawn at the size of the images and then averaged over 2 x 2 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoprune.backbones.tiny_video import FRAMES
from autoprune.testbed.captions import RELATIONS, TONES, Description, pick
from autoprune.testbed.detector import HALF_TURNS
from autoprune.testbed.motion_captions import DIRECTIONS, MotionDescription, Mover, sample_motion
from autoprune.testbed.scenes import IMAGE_SIZE, Scene, Thing, backdrop, draw

MOTION_VERSION = "motion/2"
VIDEO_SIZE = 64
REDUCTION = IMAGE_SIZE // VIDEO_SIZE
GROWTH = 1.6  # largest radius over the smallest of an object that grows or shrinks
_RADII = {1: (17.0, 26.0), 2: (16.5, 19.5)}  # px of the image, the largest a frame has
_TRAVEL = (24.0, 48.0)  # px of the image over the whole video, as far as there is room
_MARGIN = 3.0  # px to the edge of an object's region
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class MovingScene:
    """A description made definite: per object the thing in every frame, and the tone of the background."""

    description: MotionDescription
    paths: tuple[tuple[Thing, ...], ...]
    tone: str


def motion_pair(seed: int, index: int) -> tuple[np.ndarray, str, MovingScene]:
    """Video uint8 [FRAMES, 64, 64, 3], caption and scene number `index`, deterministic by (MOTION_VERSION, seed, index)."""
    rng = np.random.default_rng([seed, index])
    scene = realise_motion(sample_motion(rng), rng)
    return render_motion(scene, int(rng.integers(2**31))), scene.description.text(), scene


def realise_motion(description: MotionDescription, rng: np.random.Generator) -> MovingScene:
    """Places the objects, each in a region of its own, and draws sizes and speeds."""
    paths = tuple(_path(mover, region, rng) for mover, region in zip(description.movers, _regions(description), strict=True))
    return MovingScene(description, paths, description.tone or pick(rng, TONES))


def render_motion(scene: MovingScene, seed: int) -> np.ndarray:
    """The scene as uint8 [FRAMES, 64, 64, 3]; `seed` draws light and hue jitter."""
    ground = backdrop(Scene(Description("one", ()), (), scene.tone, "plain"), np.random.default_rng([seed, 0]))
    frames = []
    for things in zip(*scene.paths, strict=True):
        canvas = ground.copy()
        for number, thing in enumerate(things):
            draw(canvas, thing, np.random.default_rng([seed, 1 + number]))
        small = canvas.reshape(3, VIDEO_SIZE, REDUCTION, VIDEO_SIZE, REDUCTION).mean((2, 4))
        frames.append((np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    return np.stack(frames)


def _regions(description: MotionDescription) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of what each object may cover."""
    end, half = float(IMAGE_SIZE), IMAGE_SIZE / 2
    if len(description.movers) == 1:
        return [(0.0, 0.0, end, end)]
    across = description.relation in RELATIONS[:2]
    regions = [(0.0, 0.0, half, end), (half, 0.0, end, end)] if across else [(0.0, 0.0, end, half), (0.0, half, end, end)]
    return regions if description.relation in ("left of", "above") else regions[::-1]


def _path(mover: Mover, region: tuple[float, float, float, float], rng: np.random.Generator) -> tuple[Thing, ...]:
    low, high = _RADII[1 if region[2] - region[0] == region[3] - region[1] else 2]
    radius = low + (high - low) * rng.random()
    reach = radius * (1.25 if mover.motion == "rotating" else 1.0) + _MARGIN
    room = np.array([region[2] - region[0] - 2 * reach, region[3] - region[1] - 2 * reach]).clip(0)
    travel = np.zeros(2)
    if mover.motion in DIRECTIONS:
        step = np.array(_STEPS[mover.motion])
        wanted = _TRAVEL[0] + (_TRAVEL[1] - _TRAVEL[0]) * rng.random()
        travel = step * np.minimum(wanted, room)
    corner = np.array(region[:2]) + reach + np.maximum(-travel, 0)
    start = corner + rng.random(2) * (room - np.abs(travel))
    times = np.linspace(0, 1, FRAMES)
    return tuple(_at(mover, radius, start + travel * time, float(time)) for time in times)


def _at(mover: Mover, radius: float, centre: Sequence[float], time: float) -> Thing:
    """The object at `time` in [0, 1]; colours change at once, half-way."""
    thing = Thing(mover.shape, mover.colour, "plain", 0, float(centre[0]), float(centre[1]), radius)
    if mover.motion in ("growing", "shrinking"):
        share = time if mover.motion == "growing" else 1 - time
        return replace(thing, radius=radius * (1 + (GROWTH - 1) * share) / GROWTH)
    if mover.motion == "rotating":
        return replace(thing, angle=HALF_TURNS[mover.shape] * time)
    if mover.becomes and time > 0.5:
        return replace(thing, colour=mover.becomes)
    return thing
