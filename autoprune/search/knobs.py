"""The kinds of decisions a search space is made of: choices, counts, numbers and keep ratios.

A knob is what a file of search_spaces/ frees or fixes by name; on a target it becomes dimensions of a flat vector, each
with a distribution (or one fixed value) and a neutral value: the one it has where it changes nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autoprune.clips import ONCE_EACH, Course, clip_ranges
from autoprune.errors import UserError, unknown_name
from autoprune.policy import Grid

Value = float | int | str
Vector = Mapping[str, Value]
LOG_DECIMALS = 4  # of the exponent: enough for every threshold of three digits


@dataclass(frozen=True)
class Target:
    """What a policy must fit: a backbone's name, its number of blocks and the schedule of an aspect ratio.

    One that is not `skippable` needs its last scale, so nothing may end a generation early. Of a video only the last clip is
    searched, but for the guidance branches, which go on from clip to clip: shares and positions are those of its scales.
    `chunks` are the groups of blocks that are pruned together.
    """

    backbone: str
    depth: int
    scale_schedule: tuple[Grid, ...]
    skippable: bool = True
    course: Course = ONCE_EACH
    chunks: int = 8

    @property
    def count(self) -> int:
        """Returns the number of scales."""
        return len(self.scale_schedule)

    @property
    def clip(self) -> range:
        """Returns the scales of the last clip, all of an image."""
        return clip_ranges(self.scale_schedule)[-1]

    @property
    def moves(self) -> bool:
        """Returns whether there are several frames."""
        return self.scale_schedule[-1][0] > 1


@dataclass(frozen=True)
class Dimension:
    """One entry of a vector on a target. Without a distribution it is fixed at its neutral value."""

    name: str
    neutral: Value
    distribution: BaseDistribution | None = None


class Knob(Protocol):
    """A decision by the name it has in files."""

    key: str

    def setting(self, given: object) -> object:
        """Returns a file's entry, checked. Raises UserError."""

    def dimensions(self, setting: object | None, target: Target) -> tuple[Dimension, ...]:
        """Returns its dimensions on a target; None is a file that does not name it."""

    def placed(self, value: Value) -> dict[str, Value]:
        """Returns a preset's value as entries of a vector. Raises UserError for one that is not allowed."""


@dataclass(frozen=True)
class Choice:
    """One of a list, the first of which is the default. A file frees it by listing choices; a single one is fixed.

    `beyond(target)` are choices that mean nothing on a target and are not offered there.
    """

    key: str
    allowed: tuple[Value, ...]
    beyond: Callable[[Target], tuple[Value, ...]] = lambda target: ()

    def setting(self, given: object) -> tuple[Value, ...]:
        choices = tuple(given) if isinstance(given, list | tuple) else (given,)
        for choice in choices:
            self.placed(choice)
        if not choices:
            raise UserError(f"{self.key} must list at least one of {', '.join(map(str, self.allowed))}.")
        return choices

    def dimensions(self, setting: tuple[Value, ...] | None, target: Target) -> tuple[Dimension, ...]:
        beyond = self.beyond(target)
        choices = tuple(choice for choice in setting or self.allowed[:1] if choice not in beyond) or self.allowed[:1]
        return (Dimension(self.key, choices[0], CategoricalDistribution(choices) if len(choices) > 1 else None),)

    def placed(self, value: Value) -> dict[str, Value]:
        if value not in self.allowed:
            raise unknown_name(self.key, value, self.allowed)
        return {self.key: value}


@dataclass(frozen=True)
class Count:
    """A number of scales or layers, from `low` on. A file frees it by a share of the whole, rounded up; `most` bounds it.

    Where it is free, it may be `more(target)` higher. `mild` is the neutral value: low, or the highest one where that is
    what changes least.
    """

    key: str
    whole: Callable[[Target], int]
    low: int = 0
    most: Callable[[Target], int] | None = None
    names: tuple[str, ...] = ()
    mild: str = "low"
    more: Callable[[Target], int] = lambda target: 0

    def setting(self, given: object) -> float:
        return share(self.key, given)

    def dimensions(self, setting: float | None, target: Target) -> tuple[Dimension, ...]:
        high = min(share_of(setting or 0.0, self.whole(target)), (self.most or self.whole)(target))
        high += self.more(target) if high else 0
        neutral = max(high, self.low) if self.mild == "high" else self.low
        distribution = IntDistribution(self.low, high) if high > self.low else None
        return tuple(Dimension(name, neutral, distribution) for name in self.names or (self.key,))

    def placed(self, value: Value) -> dict[str, Value]:
        if not isinstance(value, int) or value < self.low:
            raise UserError(f"{self.key} must be a whole number of at least {self.low}, got {value}.")
        return dict.fromkeys(self.names or (self.key,), value)


@dataclass(frozen=True)
class Steps:
    """A whole number from `low` on. A file frees it by naming the highest."""

    key: str
    low: int

    def setting(self, given: object) -> int:
        return int(self.placed(given)[self.key])

    def dimensions(self, setting: int | None, target: Target) -> tuple[Dimension, ...]:
        high = setting or self.low
        return (Dimension(self.key, self.low, IntDistribution(self.low, high) if high > self.low else None),)

    def placed(self, value: Value) -> dict[str, Value]:
        if not isinstance(value, int) or value < self.low:
            raise UserError(f"{self.key} must be a whole number of at least {self.low}, got {value}.")
        return {self.key: value}


@dataclass(frozen=True)
class NumberRange:
    """Numbers from low to high, in steps unless logarithmic."""

    low: float
    high: float
    step: float | None = None


@dataclass(frozen=True)
class Number:
    """A number between `least` and `most`. A file frees it by a range, or fixes it by a number.

    A logarithmic one enters vectors as its decimal exponent, log10_KEY, so that every sampler sees an even range.
    """

    key: str
    least: float
    most: float
    default: float
    log: bool = False

    def setting(self, given: object) -> NumberRange | float:
        if isinstance(given, int | float):
            return self._checked(given)
        if not isinstance(given, Mapping) or not {"low", "high"} <= set(given) <= {"low", "high", "step"}:
            raise UserError(f"{self.key} must be a number or low, high and step, got {given!r}.")
        free = NumberRange(**given)
        if not self._checked(free.low) < self._checked(free.high) or (free.step is None) != self.log:
            raise UserError(f"{self.key} needs low < high and {'no' if self.log else 'a'} step, got {dict(given)}.")
        return free

    def dimensions(self, setting: NumberRange | float | None, target: Target) -> tuple[Dimension, ...]:
        if not isinstance(setting, NumberRange):
            return (Dimension(self.name, self._entry(self.default if setting is None else setting)),)
        low, high = self._entry(setting.low), self._entry(setting.high)
        step = 10.0**-LOG_DECIMALS if self.log else setting.step
        neutral = min(max(self._entry(self.default), low), high)
        return (Dimension(self.name, neutral, FloatDistribution(low, high, step=step)),)

    def placed(self, value: Value) -> dict[str, Value]:
        return {self.name: self._entry(self._checked(value))}

    def natural(self, entry: Value) -> float:
        """Returns the number that an entry of a vector stands for, to three digits when logarithmic."""
        return float(f"{10.0**entry:.3g}") if self.log else float(entry)

    @property
    def name(self) -> str:
        """Returns its name in vectors."""
        return f"log10_{self.key}" if self.log else self.key

    def _entry(self, value: float) -> float:
        return round(math.log10(value), LOG_DECIMALS) if self.log else float(value)

    def _checked(self, value: object) -> float:
        if not isinstance(value, int | float) or not self.least <= value <= self.most:
            raise UserError(f"{self.key} must be a number between {self.least} and {self.most}, got {value}.")
        return value


@dataclass(frozen=True)
class KeepRange:
    """Keep ratios of the last `last_scales` (a share of all scales, rounded up): low to high in steps."""

    last_scales: float
    low: float
    step: float
    high: float = 1.0

    def __post_init__(self) -> None:
        share("keep.last_scales", self.last_scales)
        if not 0 < self.low < self.high <= 1 or self.step <= 0:
            raise UserError(
                f"keep ratios need 0 < low < high <= 1 and a step above 0, got {self.low}, {self.high}, {self.step}."
            )


@dataclass(frozen=True)
class Keeps:
    """The keep ratio of every prunable scale, keep_INDEX, and how many of the last that run are pruned.

    The number is a dimension of its own: a sampler hardly ever draws a keep ratio of exactly 1, and so never a
    single pruned scale.
    """

    key: str = "keep"

    def setting(self, given: object) -> KeepRange:
        try:
            return KeepRange(**given)
        except TypeError as error:
            raise UserError(
                f"keep ratios of the search space are not valid ({error}); see search_spaces/unified.yaml."
            ) from None

    def dimensions(self, setting: KeepRange | None, target: Target) -> tuple[Dimension, ...]:
        if setting is None:
            return (Dimension("pruned_scales", 0),)
        scales = prunable(setting, target)
        number = Dimension("pruned_scales", 0, IntDistribution(0, len(scales)) if scales else None)
        ratios = FloatDistribution(setting.low, setting.high, step=setting.step)
        return (*(Dimension(f"keep_{scale}", ratios.high, ratios) for scale in scales), number)

    def placed(self, value: Value) -> dict[str, Value]:
        raise UserError("keep lists the ratios of a preset's last scales.")


def prunable(free: KeepRange | None, target: Target) -> tuple[int, ...]:
    """Returns the indices of the scales whose keep ratio is free."""
    last = min(share_of(free.last_scales, len(target.clip)), len(target.clip) - 1) if free else 0
    return tuple(range(target.count - last, target.count))


def share(name: str, value: object) -> float:
    """Returns a share below 1. Raises UserError for anything else."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{name} is a share and must be in [0, 1), got {value}.")
    return value


def share_of(part: float, whole: int) -> int:
    """Returns a share of a whole, rounded up."""
    return math.ceil(part * whole - 1e-9)
