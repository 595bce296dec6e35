"""What can be said about a scene, and the prompts of the scene score: GenEval's six tasks (arXiv 2310.11513), texture.

A description comes first; a scene is drawn from it, and what it leaves unsaid is drawn with the scene.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from autoprune.errors import UserError, unknown_name

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
TEXTURES = ("plain", "striped", "dotted", "checkered")
TONES = ("dark", "gray", "light")
GROUNDS = ("plain", "gradient", "striped", "dotted", "checkered", "noisy")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single", "two", "counting", "colours", "position", "attribution", "texture")
SPLITS = ("search", "held_out")

_PATIENCE = 3000  # draws without a new prompt after which a task is exhausted
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class Noun:
    """One object as the text names it; None is left unsaid."""

    shape: str
    colour: str | None = None
    texture: str | None = None


@dataclass(frozen=True)
class Description:
    """`relation` is "one", "and", "count" (the one noun stands for `count` objects) or one of RELATIONS."""

    relation: str
    nouns: tuple[Noun, ...]
    count: int = 1
    tone: str | None = None
    ground: str | None = None
    photo: bool = False

    def text(self) -> str:
        """The sentence, at most 27 words of the closed vocabulary."""
        background = " ".join(word for word in (self.tone, self.ground) if word)
        return (
            ("a photo of " if self.photo else "") + self._subject() + (f" on a {background} background" if background else "")
        )

    def _subject(self) -> str:
        names = [" ".join(word for word in (noun.texture, noun.colour, noun.shape) if word) for noun in self.nouns]
        if self.relation == "count":
            return f"{_NUMBERS[self.count]} {names[0]}{'es' if names[0].endswith('s') else 's'}"
        joint = self.relation if self.relation in RELATIONS else "and"
        return f" {joint} ".join(f"a {name}" for name in names)


@dataclass(frozen=True)
class Prompt:
    """A prompt of the scene score; `description` is what the detector must find."""

    text: str
    task: str
    description: Description


def prompt_set(split: str, count: int, *, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> list[Prompt]:
    """`count` distinct prompts, task after task in turn. The splits "search" and "held_out" share no text at any seed.

    Raises UserError for an unknown split or task, and when a task has fewer distinct prompts.
    """
    if split not in SPLITS:
        raise unknown_name("prompt split", split, SPLITS)
    each = -(-count // len(tasks))
    columns = [task_prompts(task, each, seed=seed, split=split) for task in tasks]
    return [prompt for row in zip(*columns, strict=True) for prompt in row][:count]


def task_prompts(task: str, count: int, *, seed: int = 0, split: str | None = None) -> list[Prompt]:
    """`count` distinct prompts of one task, of one split if given."""
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    rng = np.random.default_rng([seed, TASKS.index(task)])
    found: dict[str, Prompt] = {}
    idle = 0
    while len(found) < count:
        description = _task_description(task, rng)
        text = description.text()
        if text not in found and split in (None, split_of(text)):
            found[text] = Prompt(text, task, description)
            idle = 0
        idle += 1
        if idle > _PATIENCE:
            raise UserError(f"task {task!r} has some {len(found)} distinct prompts, got {count}; ask for fewer.")
    return list(found.values())


def split_of(text: str) -> str:
    """The split a prompt belongs to, by a hash of its text."""
    return SPLITS[hashlib.sha256(f"autoprune {text}".encode()).digest()[0] % 2]


def sample_description(rng: np.random.Generator) -> Description:
    """A description of the training mix: 20 % one object, 22 % two, 23 % relation, 17 % counts, 18 % three or four."""
    draw = rng.random()
    named_colours, named_textures = rng.random() < 0.85, rng.random() < 0.68
    tone, ground = _background(rng, 0.55)
    if draw < 0.20:
        relation, count, number = "one", 1, 1
    elif draw < 0.42:
        relation, count, number = "and", 1, 2
    elif draw < 0.65:
        relation, count, number = pick(rng, RELATIONS), 1, 2
    elif draw < 0.82:
        relation, count, number = "count", 2 + int(3 * rng.random()), 1
    else:
        relation, count, number = "and", 1, 3 + int(2 * rng.random())
    nouns = _nouns(rng, number, colours=0.94 if named_colours else 0.0, textures=0.75 if named_textures else 0.0)
    return Description(relation, nouns, count, tone, ground, photo=bool(rng.random() < 0.5))


def corrupted(description: Description, rng: np.random.Generator) -> Description:
    """The description with one attribute dropped, swapped between two nouns, or replaced, as in web captions."""
    nouns, draw = description.nouns, rng.random()
    index = int(len(nouns) * rng.random())
    field = pick(rng, [name for name in ("shape", "colour", "texture") if getattr(nouns[index], name)])
    other = (index + 1) % len(nouns)
    if draw < 1 / 3 and field != "shape":
        return _with(description, {index: {field: None}})
    ours, theirs = getattr(nouns[index], field), getattr(nouns[other], field)
    if draw < 2 / 3 and theirs not in (None, ours):
        return _with(description, {index: {field: theirs}, other: {field: ours}})
    choices = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}[field]
    return _with(description, {index: {field: pick(rng, [choice for choice in choices if choice != ours])}})


def pick(rng: np.random.Generator, choices: tuple[_Choice, ...] | list[_Choice]) -> _Choice:
    """A uniform choice; some ten times faster than `rng.choice`."""
    return choices[int(len(choices) * rng.random())]


def _with(description: Description, changes: dict[int, dict[str, str | None]]) -> Description:
    nouns = [replace(noun, **changes.get(index, {})) for index, noun in enumerate(description.nouns)]
    return replace(description, nouns=tuple(nouns))


def _nouns(rng: np.random.Generator, number: int, *, colours: float, textures: float) -> tuple[Noun, ...]:
    """Nouns that the words tell apart: two of one shape must have two named colours."""
    while True:
        nouns = [
            Noun(
                pick(rng, SHAPES),
                pick(rng, COLOURS) if rng.random() < colours else None,
                pick(rng, TEXTURES) if rng.random() < textures else None,
            )
            for _ in range(number)
        ]
        keys = [(noun.shape, noun.colour) for noun in nouns]
        unnamed = {shape for shape, colour in keys if colour is None}
        shapes = [noun.shape for noun in nouns]
        if len(set(keys)) == number and all(shapes.count(shape) == 1 for shape in unnamed):
            return tuple(nouns)


def _background(rng: np.random.Generator, share: float) -> tuple[str | None, str | None]:
    if rng.random() >= share:
        return None, None
    named = rng.random()
    tone = pick(rng, TONES) if named < 0.8 else None
    return tone, pick(rng, GROUNDS) if named < 0.4 or named >= 0.8 else None


def _task_description(task: str, rng: np.random.Generator) -> Description:
    tone, ground = _background(rng, 0.5)
    first, second = (pick(rng, SHAPES) for _ in range(2))
    while second == first:
        second = pick(rng, SHAPES)
    hues = rng.permutation(len(COLOURS))
    texture = pick(rng, TEXTURES)
    relation, count = "one", 1
    nouns = (Noun(first),)
    if task == "single":
        nouns = (Noun(first, texture=texture if rng.random() < 0.3 else None),)
    elif task == "two":
        relation, nouns = "and", (Noun(first), Noun(second))
    elif task == "counting":
        relation, count = "count", 2 + int(3 * rng.random())
    elif task == "colours":
        nouns = (Noun(first, COLOURS[hues[0]]),)
    elif task == "position":
        relation, nouns = pick(rng, RELATIONS), (Noun(first), Noun(second))
    elif task == "attribution":
        relation, nouns = "and", (Noun(first, COLOURS[hues[0]]), Noun(second, COLOURS[hues[1]]))
    else:
        nouns = (Noun(first, COLOURS[hues[0]], texture),)
    return Description(relation, nouns, count, tone, ground, photo=bool(rng.random() < 0.5))
