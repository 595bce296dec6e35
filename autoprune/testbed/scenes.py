"""The embedded world's renderer: seeded, versioned scenes of coloured, textured shapes on near-grey backgrounds.

An object is drawn as soft coverage from its signed distance, in its own box only; that is what makes it fast.
"""

from dataclasses import dataclass

import numpy as np

from autoprune.testbed.captions import (
    COLOURS,
    GROUNDS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    TONES,
    Description,
    corrupted,
    pick,
    sample_description,
)
from autoprune.testbed.textures import EDGE, noise, pattern

DATA_VERSION = "scenes/1"
IMAGE_SIZE = 128
CORRUPTED_SHARE = 0.17

# One centre, two in a row, two in a column, three, and four: (x, y) in px, in the order in which a caption names them.
SLOTS = (
    (64, 64),
    (34, 64), (94, 64),
    (64, 34), (64, 94),
    (34, 34), (94, 34), (64, 94),
    (34, 34), (94, 34), (34, 94), (94, 94),
)  # fmt: skip
_ONE, _ROW, _COLUMN = (0,), (1, 2), (3, 4)
_MANY = {3: (5, 6, 7), 4: (8, 9, 10, 11)}
_RADII = {1: (20, 34), 2: (19, 26), 3: (17, 23), 4: (17, 23)}
CORNER = 1.27  # a triangle's corners in radii; the square's are nearer
_GAP = 5  # px between two objects at least
_TONE_LEVELS = {"dark": (0.12, 0.26), "gray": (0.42, 0.56), "light": (0.78, 0.9)}
_DEPTH = 0.45  # share of its value that an object loses in a texture's marks
_PIXELS = np.arange(IMAGE_SIZE, dtype=np.float32)


@dataclass(frozen=True)
class Thing:
    """One object: centre (x, y) and radius in px (half its largest extent), its index in SLOTS, its turn in radians."""

    shape: str
    colour: str
    texture: str
    slot: int
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A description made definite: every object, in the order of the text, and the background."""

    description: Description
    things: tuple[Thing, ...]
    tone: str
    ground: str


def training_pair(seed: int, index: int, *, corrupt: float = CORRUPTED_SHARE) -> tuple[np.ndarray, str, Scene]:
    """Image uint8 [128, 128, 3], caption and scene number `index`; a share `corrupt` of the captions has an error.

    Deterministic by (DATA_VERSION, seed, index).
    """
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    text = caption(scene, rng, corrupt=corrupt)
    return _paint(scene, rng), text, scene


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene of the training mix."""
    return realise(sample_description(rng), rng)


def caption(scene: Scene, rng: np.random.Generator, *, corrupt: float = 0.0) -> str:
    """The scene's caption, with one attribute wrong or missing at probability `corrupt`."""
    description = scene.description
    return (corrupted(description, rng) if rng.random() < corrupt else description).text()


def realise(description: Description, rng: np.random.Generator) -> Scene:
    """Places the objects and fills in what the description leaves unsaid.

    Unsaid colours are the shape's typical one half of the time; unsaid textures and backgrounds are mostly plain.
    """
    nouns = description.nouns
    looks = []
    for noun in nouns:
        typical = COLOURS[SHAPES.index(noun.shape)] if rng.random() < 0.5 else pick(rng, COLOURS)
        texture = "plain" if rng.random() < 0.8 else pick(rng, TEXTURES)
        looks.append((noun.shape, noun.colour or typical, noun.texture or texture))
    if description.relation == "count":
        looks *= description.count
    places = _places(description, len(looks), rng)
    tone = description.tone or ("gray" if rng.random() < 0.5 else pick(rng, TONES))
    ground = description.ground or ("plain" if rng.random() < 0.6 else pick(rng, GROUNDS))
    things = tuple(Thing(*look, *place) for look, place in zip(looks, places, strict=True))
    return Scene(description, things, tone, ground)


def render(scene: Scene, seed: int) -> np.ndarray:
    """The scene as uint8 [128, 128, 3]; `seed` draws light, hue jitter, texture periods and phases."""
    return _paint(scene, np.random.default_rng(seed))


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline, negative inside, for coordinates x [1, w], y [h, 1] from the centre, y downwards."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.75 * radius) - 0.25 * radius
    x = np.abs(x)
    if shape == "triangle":
        slope = np.float32(1.75 / np.hypot(0.98, 1.75)), np.float32(0.98 / np.hypot(0.98, 1.75))
        return np.maximum(y - 0.8 * radius, x * slope[0] - (y + 0.95 * radius) * slope[1])
    y = np.abs(y)
    if shape == "square":
        return np.maximum(x, y) - 0.88 * radius
    return np.maximum(np.minimum(x, y) - 0.33 * radius, np.maximum(x, y) - radius)


def turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the frame of an object that is turned clockwise (y downwards) by `angle` radians."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def draw(canvas: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    """Blends one object into `canvas` [3, 128, 128]; equal generators give it the same look."""
    reach = thing.radius * (CORNER if thing.angle else 1) + EDGE
    left, top = max(0, int(thing.x - reach)), max(0, int(thing.y - reach))
    right, bottom = int(thing.x + reach) + 2, int(thing.y + reach) + 2
    x = _PIXELS[None, left:right] - np.float32(thing.x)
    y = _PIXELS[top:bottom, None] - np.float32(thing.y)
    if thing.angle:
        x, y = turned(x, y, thing.angle)
    coverage = np.clip(0.5 - signed_distance(thing.shape, x, y, thing.radius) / np.float32(EDGE), 0, 1)
    hue, saturation, value, period = rng.random(4)
    light = np.float32(0.86 + 0.1 * value) * (1 - np.float32(0.08 / thing.radius) * (x + y) / 2)
    if thing.texture != "plain":
        marks = pattern(thing.texture, x, y, period=9 + 5 * period, rng=rng)
        light = light * (np.float32(1 - _DEPTH / 2) - np.float32(_DEPTH / 2) * marks)
    rgb = _hue_to_rgb(60 * COLOURS.index(thing.colour) + 18 * hue - 9, 0.85 + 0.15 * saturation)
    box = canvas[:, top:bottom, left:right]
    box += coverage * (light * rgb[:, None, None] - box)


def _places(description: Description, number: int, rng: np.random.Generator) -> list[tuple[int, float, float, float]]:
    """(slot, x, y, radius) per object, jittered as far as objects neither touch nor leave the frame."""
    relation = description.relation
    slots = _ONE if number == 1 else _COLUMN if relation in RELATIONS[2:] else _MANY.get(number, _ROW)
    if relation in ("right of", "below"):
        slots = slots[::-1]
    low, high = _RADII[number]
    radii = low + (high - low) * rng.random(number)
    jitter_x = jitter_y = 12.0
    if number > 1:
        pair = np.sort(radii)[-2:].sum()
        jitter_x = jitter_y = (60 - _GAP - pair) / 2
        if slots[0] in _ROW:
            jitter_y = 12.0
        elif slots[0] in _COLUMN:
            jitter_x = 12.0
    return [
        (slot, SLOTS[slot][0] + jitter_x * dx, SLOTS[slot][1] + jitter_y * dy, radius)
        for slot, radius, (dx, dy) in zip(slots, radii.tolist(), rng.uniform(-1, 1, (number, 2)).tolist(), strict=True)
    ]


def backdrop(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The background of a scene, float32 [3, 128, 128] in [0, 1]."""
    level = _background(scene, rng)
    tint = 1 + rng.uniform(-0.025, 0.025, 3).astype(np.float32)
    return level * tint[:, None, None]


def _paint(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    canvas = backdrop(scene, rng)
    for thing in scene.things:
        draw(canvas, thing, rng)
    return np.ascontiguousarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    low, high = _TONE_LEVELS[scene.tone]
    base, right, down, fine, coarse = rng.random(5)
    slope = 0.28 if scene.ground == "gradient" else 0.06
    x, y = _PIXELS[None], _PIXELS[:, None]
    ramp = slope * ((right - 0.5) * 2 * (x / 127 - 0.5) + (down - 0.5) * 2 * (y / 127 - 0.5))
    level = (low + (high - low) * base + ramp).astype(np.float32)
    if scene.ground == "noisy":
        return level + np.float32(0.06) * noise(IMAGE_SIZE, rng)
    if scene.ground in ("plain", "gradient"):
        return level
    period = (11 + 4 * fine) * (1.6 if coarse < 0.5 else 1)
    return level + np.float32(0.09) * pattern(scene.ground, x, y, period=period, rng=rng)


def _hue_to_rgb(degrees: float, saturation: float) -> np.ndarray:
    wheel = (degrees / 60 + np.array([0, 4, 2])) % 6
    return (1 - saturation * (1 - np.clip(np.abs(wheel - 3) - 1, 0, 1))).astype(np.float32)
