"""Whether the machine kept its speed while something was timed: dense, run in every round, says so. If not, again.

Heat and other work slow a machine for minutes. Speed-ups survive that only as far as dense and candidate slow down alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from autoprune.measure.latency import Timing
from autoprune.measure.statistics import median_and_spread

UNSTEADY = 0.05  # of dense seconds; half the interquartile range of both published runs is 2 %, of 5 and of 10 rounds
SHIFTED = 0.15  # the published study's held-out dense runs took 1.13 times its first ones, with nothing else on the machine
MOST_REPEATS = 2


@dataclass(frozen=True)
class Drift:
    """How dense strayed in one measurement, relative to its median: `trend` from the first to the last round, `spread` half
    the interquartile range, `shift` away from what was expected. `repeats`: how many measurements came after the first one."""

    trend: float = 0.0
    spread: float = 0.0
    shift: float = 0.0
    repeats: int = 0

    @property
    def worst(self) -> float:
        """Returns the largest part in units of its limit."""
        return max(abs(self.trend) / UNSTEADY, self.spread / UNSTEADY, abs(self.shift) / SHIFTED)

    @property
    def steady(self) -> bool:
        """Returns whether every part is within its limit."""
        return self.worst <= 1

    @property
    def fields(self) -> dict[str, float | int]:
        """Returns what a record keeps: `drift`, the larger of trend and spread, and `repeats`."""
        return {"drift": max(abs(self.trend), self.spread), "repeats": self.repeats}


def drift_of(seconds: Sequence[float], *, expected: float | None = None) -> Drift:
    """Returns how dense seconds, in the order they were measured, strayed. The trend is the median slope over all pairs of
    rounds (Theil, 1950; Sen, JASA 63, 1968), which one slow round does not move."""
    median, spread = median_and_spread(tuple(seconds))
    slopes = [
        (seconds[later] - seconds[earlier]) / (later - earlier) for earlier, later in combinations(range(len(seconds)), 2)
    ]
    trend = float(np.median(slopes)) * (len(seconds) - 1) if slopes else 0.0
    return Drift(trend / median, spread / median, median / expected - 1 if expected else 0.0)


def steadiest(
    measure: Callable[[], Mapping[str, Timing]], *, dense: str, expected: float | None = None
) -> tuple[Mapping[str, Timing], Drift]:
    """Returns the timings of `measure()` and how `dense` strayed in them: measured again while it is not steady, at most
    MOST_REPEATS times, and of all the steadiest. `expected` is the study's dense seconds."""
    taken: list[tuple[Mapping[str, Timing], Drift]] = []
    while len(taken) <= MOST_REPEATS and not (taken and taken[-1][1].steady):
        timings = measure()
        taken.append((timings, drift_of(timings[dense].samples, expected=expected)))
    timings, drift = min(taken, key=lambda pair: pair[1].worst)
    return timings, replace(drift, repeats=len(taken) - 1)
