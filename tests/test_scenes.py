import numpy as np
import pytest

from autoprune.testbed import scenes
from autoprune.testbed.captions import COLOURS, Description, Noun
from autoprune.testbed.textures import pattern

PINNED_CAPTIONS = [
    "a magenta cross above a plain red circle on a noisy background",
    "a photo of a red triangle and a green square and a yellow ring",
    "a checkered yellow square on a dark plain background",
    "a photo of a plain ring and a striped circle and a plain cross and a striped square on a light gradient background",
]
PINNED_MEANS = [119.87, 138.67, 58.92, 181.61]


def one(shape: str = "circle", texture: str = "plain", *, colour: str = "red", radius: float = 30) -> scenes.Scene:
    thing = scenes.Thing(shape, colour, texture, 0, 64.0, 64.0, radius)
    return scenes.Scene(Description("one", (Noun(shape, colour, texture),)), (thing,), "gray", "plain")


def coloured(image: np.ndarray) -> np.ndarray:
    return image.max(-1).astype(int) - image.min(-1) > 95


def test_a_pair_depends_on_seed_and_index_only():
    image, text, scene = scenes.training_pair(3, 5)
    scenes.training_pair(3, 6)
    again, text_again, scene_again = scenes.training_pair(3, 5)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert np.array_equal(image, again) and (text, scene) == (text_again, scene_again)
    for other in ((3, 6), (4, 5)):
        assert not np.array_equal(image, scenes.training_pair(*other)[0])


def test_the_data_version_names_these_pairs():
    """Change DATA_VERSION with these values: weights and scores name the data they were made with."""
    pairs = [scenes.training_pair(0, index) for index in range(4)]
    assert scenes.DATA_VERSION == "scenes/1"
    assert [text for _, text, _ in pairs] == PINNED_CAPTIONS
    assert [float(image.mean()) for image, *_ in pairs] == pytest.approx(PINNED_MEANS, abs=0.1)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", 1.76**2),
        ("triangle", 0.98 * 1.75),
        ("cross", 4 * 0.33 * 2 - 0.66**2),
        ("ring", np.pi * 0.75),
    ],
)
def test_shapes_cover_their_analytic_area(shape, area):
    assert coloured(scenes.render(one(shape), 1)).sum() == pytest.approx(area * 30**2, rel=0.05)


def test_objects_neither_touch_nor_leave_the_frame():
    rng = np.random.default_rng(0)
    for _ in range(500):
        things = scenes.sample_scene(rng).things
        for index, thing in enumerate(things):
            assert all(thing.radius + 1 < place < 127 - thing.radius for place in (thing.x, thing.y))
            for other in things[:index]:
                apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert apart - thing.radius - other.radius >= 4.9


@pytest.mark.parametrize(("relation", "holds"), [
    ("left of", lambda a, b: a.x < b.x), ("right of", lambda a, b: a.x > b.x),
    ("above", lambda a, b: a.y < b.y), ("below", lambda a, b: a.y > b.y),
])  # fmt: skip
def test_relations_hold(relation, holds):
    description = Description(relation, (Noun("circle"), Noun("ring")))
    assert all(holds(*scenes.realise(description, np.random.default_rng(seed)).things) for seed in range(20))


def test_what_is_said_is_drawn_and_the_rest_is_mostly_plain_and_typical():
    rng = np.random.default_rng(0)
    said = Description("count", (Noun("ring", "cyan", "dotted"),), 3, "dark", "noisy")
    scene = scenes.realise(said, rng)
    assert {(thing.shape, thing.colour, thing.texture) for thing in scene.things} == {("ring", "cyan", "dotted")}
    assert (len(scene.things), scene.tone, scene.ground) == (3, "dark", "noisy")
    unsaid = [scenes.realise(Description("one", (Noun("circle"),)), rng).things[0] for _ in range(400)]
    assert 0.75 < np.mean([thing.texture == "plain" for thing in unsaid]) < 0.95
    assert 0.5 < np.mean([thing.colour == COLOURS[0] for thing in unsaid]) < 0.68


@pytest.mark.parametrize("texture", ["striped", "dotted", "checkered"])
def test_textures_darken_an_object_visibly(texture):
    inside = slice(50, 78), slice(50, 78)
    plain = scenes.render(one("square"), 1)[inside].max(-1).astype(float)
    marked = scenes.render(one("square", texture), 1)[inside].max(-1).astype(float)
    assert plain.std() < 4 < 30 < marked.std()


def test_a_pattern_repeats_at_its_period():
    x, y = np.arange(120, dtype=np.float32)[None], np.arange(120, dtype=np.float32)[:, None]
    for name in ("dotted", "checkered"):
        marks = pattern(name, x, y, period=12, rng=np.random.default_rng(0))
        assert np.allclose(marks[:, 12:], marks[:, :-12], atol=1e-3) and marks.min() < -0.9 < 0.9 < marks.max()
        assert not np.allclose(marks[:, 6:], marks[:, :-6], atol=0.5)


def test_a_share_of_training_captions_is_corrupted():
    pairs = [scenes.training_pair(1, index) for index in range(600)]
    wrong = np.mean([text != scene.description.text() for _, text, scene in pairs])
    assert 0.12 < wrong < 0.22
    for index in range(40):
        _, text, scene = scenes.training_pair(1, index, corrupt=0)
        assert text == scene.description.text()
