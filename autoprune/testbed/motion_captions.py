"""What can be said about a moving scene, and the prompts of the motion score: one or two objects, a motion each."""

from dataclasses import dataclass

import numpy as np

from autoprune.errors import UserError, unknown_name
from autoprune.testbed.captions import COLOURS, RELATIONS, SHAPES, SPLITS, TONES, pick, split_of

DIRECTIONS = ("left", "right", "up", "down")
MOTIONS = ("still", *DIRECTIONS, "growing", "shrinking", "rotating", "becoming")
TURNING_SHAPES = ("square", "triangle", "cross")  # circles and rings look the same however they turn
TASKS = ("moving", "changing", "two")  # place, look, both of two objects; a still one is a case of the first and the last

_PATIENCE = 3000  # draws without a new prompt after which a task is exhausted
_TONE_SHARE = 0.4


@dataclass(frozen=True)
class Mover:
    """One object and what it does: `motion` of MOTIONS; one that is "becoming" ends in colour `becomes`."""

    shape: str
    colour: str
    motion: str
    becomes: str | None = None

    def text(self) -> str:
        """The object with its motion, such as "a red circle moving left"."""
        name = f"{self.colour} {self.shape}"
        if self.motion == "still":
            return f"a still {name}"
        verb = f"moving {self.motion}" if self.motion in DIRECTIONS else self.motion
        return f"a {name} {verb}" + (f" {self.becomes}" if self.becomes else "")


@dataclass(frozen=True)
class MotionDescription:
    """One mover (`relation` "one"), or two, the first `relation` of RELATIONS to the second all the time."""

    movers: tuple[Mover, ...]
    relation: str = "one"
    tone: str | None = None

    def text(self) -> str:
        """The sentence, of the encoder's MOTION_VOCABULARY."""
        subject = f" {self.relation} ".join(mover.text() for mover in self.movers)
        return subject + (f" on a {self.tone} background" if self.tone else "")


@dataclass(frozen=True)
class MotionPrompt:
    """A prompt of the motion score; `description` is what the detector must find."""

    text: str
    task: str
    description: MotionDescription


def motion_prompts(split: str, count: int, *, seed: int = 0) -> list[MotionPrompt]:
    """`count` distinct prompts, task after task in turn. The splits "search" and "held_out" share no text at any seed.

    Raises UserError for an unknown split, and when a task has fewer distinct prompts.
    """
    if split not in SPLITS:
        raise unknown_name("prompt split", split, SPLITS)
    each = -(-count // len(TASKS))
    columns = [_task_prompts(task, each, seed=seed, split=split) for task in TASKS]
    return [prompt for row in zip(*columns, strict=True) for prompt in row][:count]


def sample_motion(rng: np.random.Generator, task: str | None = None) -> MotionDescription:
    """A description of the training mix, 55 % of one object, or of one task."""
    tone = pick(rng, TONES) if rng.random() < _TONE_SHARE else None
    if task == "two" or (task is None and rng.random() >= 0.55):
        first = _mover(rng, MOTIONS)
        second = _mover(rng, MOTIONS)
        while second.shape == first.shape and second.colour == first.colour:
            second = _mover(rng, MOTIONS)
        return MotionDescription((first, second), pick(rng, RELATIONS), tone)
    motions = {"moving": MOTIONS[:5], "changing": MOTIONS[5:]}.get(task, MOTIONS)
    return MotionDescription((_mover(rng, motions),), "one", tone)


def _mover(rng: np.random.Generator, motions: tuple[str, ...]) -> Mover:
    motion, colour = pick(rng, motions), pick(rng, COLOURS)
    becomes = pick(rng, [name for name in COLOURS if name != colour]) if motion == "becoming" else None
    return Mover(pick(rng, TURNING_SHAPES if motion == "rotating" else SHAPES), colour, motion, becomes)


def _task_prompts(task: str, count: int, *, seed: int, split: str) -> list[MotionPrompt]:
    rng = np.random.default_rng([seed, TASKS.index(task)])
    found: dict[str, MotionPrompt] = {}
    idle = 0
    while len(found) < count:
        description = sample_motion(rng, task)
        text = description.text()
        idle += 1
        if text not in found and split_of(text) == split:
            found[text] = MotionPrompt(text, task, description)
            idle = 0
        if idle > _PATIENCE:
            raise UserError(f"task {task!r} has some {len(found)} distinct prompts, got {count}; ask for fewer.")
    return list(found.values())
