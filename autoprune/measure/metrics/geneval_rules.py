"""GenEval's rules (arXiv 2310.11513; official file evaluation/evaluate_images.py): is what a prompt asks for in the picture?

Pure functions of detections. The published limit of overlap, 1.0, drops no detection, so there is none here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from autoprune.errors import UserError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(_NAMES.split(","))  # COCO's 80 in COCO's order, under the names that GenEval's prompts use
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST_OBJECTS = 16  # of a class
POSITION_SLACK = 0.1  # share of both objects' sizes by which an offset counts less


@dataclass(frozen=True, eq=False)
class Found:
    """A detected object: corners (left, top, right, bottom) in pixels, confidence, and its pixels, bool [H, W]."""

    box: tuple[float, float, float, float]
    confidence: float
    mask: Tensor | None = None


@dataclass(frozen=True)
class Clause:
    """At least `count` objects of a class, of a colour, each in a relation to each of those of the clause numbered `target`."""

    name: str
    count: int
    colour: str = ""
    relation: str = ""
    target: int = 0


@dataclass(frozen=True)
class Task:
    """What a prompt of GenEval's file asks for: all of `include`, and of every class in `exclude` fewer than its count."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @staticmethod
    def read(details: Mapping[str, object], prompt: str) -> "Task":
        """Reads a line of GenEval's file. Raises UserError for one that is none of its six tasks or breaks its layout."""
        try:
            include = tuple(_clause(clause, place) for place, clause in enumerate(details["include"]))
            exclude = tuple(_clause(clause, 0) for clause in details.get("exclude", []))
            if details["tag"] not in TASKS or not include:
                raise ValueError(f"tag {details['tag']!r}, {len(include)} objects")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f'metric geneval needs what GenEval\'s evaluation_metadata.jsonl says of a prompt ("tag", "include"), '
                f"got something else of {prompt[:40]!r} ({error}); give that file as prompts."
            ) from None
        return Task(details["tag"], include, exclude)


def read_tasks(details: Sequence[Mapping[str, object]], prompts: Sequence[str]) -> list[Task]:
    """Reads what a file says of each prompt. Raises UserError, also where it says nothing of any."""
    return [Task.read(detail, prompt) for detail, prompt in zip(details or [{}] * len(prompts), prompts, strict=True)]


def sure(found: Mapping[str, Sequence[Found]], tag: str) -> dict[str, list[Found]]:
    """Returns what counts for a task, surest first: above its confidence, at most MOST_OBJECTS of a class."""
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    ordered = {name: sorted(objects, key=lambda one: -one.confidence) for name, objects in found.items()}
    return {name: [one for one in objects if one.confidence > least][:MOST_OBJECTS] for name, objects in ordered.items()}


def is_right(
    task: Task, found: Mapping[str, Sequence[Found]], colours: Callable[[str, Sequence[Found]], Sequence[str]]
) -> bool:
    """Says whether detections hold what a task asks for; `colours` names the colours of objects of a class.

    Colours and places are judged of the surest `count` objects of a class alone.
    """
    counted = sure(found, task.tag)
    groups: list[Sequence[Found]] = []
    for clause in task.include:
        group = counted.get(clause.name, [])[: clause.count]
        if len(group) < clause.count:
            return False
        if clause.colour and list(colours(clause.name, group)).count(clause.colour) < clause.count:
            return False
        others = groups[clause.target] if clause.relation else ()
        if not all(clause.relation in relations(own.box, other.box) for own in group for other in others):
            return False
        groups.append(group)
    return all(len(counted.get(clause.name, [])) < clause.count for clause in task.exclude)


def relations(own: Sequence[float], other: Sequence[float]) -> set[str]:
    """Returns how a box lies to another: up to two of RELATIONS, none for boxes whose middles are too close.

    The offset of the middles, less POSITION_SLACK of both sizes on each axis, counts on an axis from half of its length on.
    """
    offsets = [(own[axis] + own[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [abs(own[axis + 2] - own[axis]) + abs(other[axis + 2] - other[axis]) for axis in (0, 1)]
    left = [max(abs(offset) - POSITION_SLACK * size, 0.0) for offset, size in zip(offsets, sizes, strict=True)]
    if max(left) < 1e-3:
        return set()
    length = math.hypot(*offsets)
    across, down = (math.copysign(rest, offset) / length for rest, offset in zip(left, offsets, strict=True))
    held = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return {relation for relation, holds in zip(RELATIONS, held, strict=True) if holds}


def _clause(clause: Mapping[str, object], place: int) -> Clause:
    """Reads the clause numbered `place`. Raises what Python does for another layout, and ValueError for other values."""
    relation, target = clause.get("position", ("", 0))
    read = Clause(clause["class"], int(clause["count"]), clause.get("color", ""), relation, int(target))
    known = read.name in CLASSES and read.colour in ("", *COLOURS) and relation in ("", *RELATIONS)
    if not known or read.count < 1 or (relation and not 0 <= read.target < place):
        raise ValueError(f"{dict(clause)}")
    return read
