"""Whether two independent measurements of one quantity agree: a published number against one taken again.

Each comes with its 95 % interval. The interval of their difference follows from both (MOVER: Zou and Donner, Statistics in
Medicine 27 (2008); Newcombe, Statistics in Medicine 17 (1998)), which keeps skewed intervals skewed. That both intervals
overlap would ask less: of equal numbers it accepts all but 0.6 %.
"""

from dataclasses import dataclass
from math import hypot
from statistics import NormalDist

from autoprune.measure.statistics import Z95


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """`difference` is here - there, `margin` the most that chance and the tolerance explain in its direction."""

    difference: float
    margin: float

    @property
    def inside(self) -> bool:
        """Returns whether the difference is explained."""
        return abs(self.difference) <= self.margin


def agreement(there: Estimate, here: Estimate, *, tolerance: float = 0.0, looks: int = 1) -> Agreement:
    """Compares two independent estimates of truths that may differ by `tolerance`.

    Of `looks` quantities that all agree in truth, one or more fall outside in 5 % of cases at most (Bonferroni).
    """
    difference = here.value - there.value
    if difference >= 0:
        reach = hypot(here.value - here.low, there.high - there.value)
    else:
        reach = hypot(here.high - here.value, there.value - there.low)
    wider = NormalDist().inv_cdf(1 - 0.025 / looks) / Z95
    return Agreement(difference, tolerance + wider * reach)
