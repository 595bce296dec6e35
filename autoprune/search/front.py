"""Non-dominated sets and hypervolume of (latency, loss), both minimised, and which members are worth validating."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from autoprune.search.records import Measurement, TrialRecord

Point = tuple[float, float]
_Item = TypeVar("_Item")


def non_dominated(items: Iterable[_Item], point: Callable[[_Item], Point]) -> list[_Item]:
    """Returns the items no other item beats in both objectives, by ascending first objective; equal points keep the first."""
    front: list[_Item] = []
    for item in sorted(items, key=point):
        if not front or point(item)[1] < point(front[-1])[1]:
            front.append(item)
    return front


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """Returns the area that points dominate below the reference point; exact sweep for two minimised objectives."""
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


def hypervolume_history(trials: Iterable[TrialRecord], reference: Point) -> list[float]:
    """Returns the hypervolume of the search front after each trial, in the order given."""
    front: list[Point] = []
    areas = []
    for trial in trials:
        if may_lead(trial):
            front = non_dominated([*front, objectives(trial.measurement)], lambda point: point)
        areas.append(hypervolume(front, reference))
    return areas


def hypervolume_curve(points: Iterable[Point | None], reference: Point, whole: float) -> list[float]:
    """Returns the hypervolume after each trial as a share of the whole; None is a trial that adds no point."""
    found: list[Point] = []
    curve = []
    for point in points:
        found += [point] if point else []
        curve.append(hypervolume(found, reference) / whole)
    return curve


def reference_of(points: Iterable[Point]) -> Point:
    """Returns the corner that areas of these points are measured from: dense latency, a tenth above the largest loss."""
    return 0.0, 1.1 * max((loss for _, loss in points), default=0.0) + 1e-6


def objectives(measurement: Measurement) -> Point:
    """Returns what the sampler minimises: log of latency relative to dense (0 is dense) and loss (0 is dense)."""
    return math.log(measurement.latency / measurement.dense_latency), measurement.loss


def search_front(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Returns the non-dominated ones of the trials that may be on a front, fastest first."""
    return non_dominated(filter(may_lead, trials), lambda trial: objectives(trial.measurement))


def may_lead(trial: TrialRecord) -> bool:
    """Returns whether a trial may be on a front: complete, feasible, faster than dense; no control, no repeat."""
    counts = trial.state == "complete" and trial.feasible and not trial.source.startswith(("control:", "repeat"))
    return counts and not trial.policy.is_dense() and trial.measurement.speed_up > 1


def most_valuable(trials: Iterable[TrialRecord], count: int, *, chosen: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Returns `count` trials, or all there are: those chosen already, and others picked greedily by hypervolume they add."""
    picked, rest = list(chosen), list(trials)
    reference = reference_of(objectives(trial.measurement) for trial in [*picked, *rest])
    while rest and len(picked) < count:
        taken = [objectives(trial.measurement) for trial in picked]
        picked.append(max(rest, key=lambda trial: hypervolume([*taken, objectives(trial.measurement)], reference)))
        rest.remove(picked[-1])
    return picked
