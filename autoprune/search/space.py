"""From a flat vector of numbers, which every sampler can model, to one canonical policy, and from presets to vectors.

Every dimension is always suggested; the inactive ones are ignored and what would break a rule is repaired
(interpretation.py), so no vector is invalid. Positions are relative, so one file serves every schedule and depth.
Uniform draws are mostly sane: a switch has off among at most four values, everything that depends on the data hangs on one
switch, exotic pieces need others to be active, and no way of ending early ends earlier than the most that may be skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from optuna.distributions import BaseDistribution, CategoricalDistribution

from autoprune.policy import Policy, fingerprint
from autoprune.search.calibration import Calibration, find_calibration
from autoprune.search.dimensions import declared
from autoprune.search.interpretation import Interpreter, Reading
from autoprune.search.knobs import Dimension, Target, Value, Vector, prunable
from autoprune.search.presets import LeftOut, only_skips, placed
from autoprune.search.space_file import PresetSetting, SpaceDefinition

if TYPE_CHECKING:
    from autoprune.backbones import Backbone

DENSE = "dense"
_OF_STOPPING = ("stop_metric", "stop_scales", "log10_stop_threshold", "log10_stop_share")


@dataclass(frozen=True)
class Preset:
    """A preset on a concrete target. `vector` is None where its settings lie outside the searched dimensions.

    A `control` is only compared with; `inferred` says that its source leaves decisions open.
    """

    name: str
    source: str
    policy: Policy
    vector: Vector | None
    control: bool = False
    inferred: bool = False

    @property
    def trial_source(self) -> str:
        """Returns what a trial of this preset is called: `preset:NAME` or `control:NAME`."""
        return f"{'control' if self.control else 'preset'}:{self.name}"


@dataclass(frozen=True)
class SearchSpace:
    """A space definition on a concrete target, with the calibration of its weights if there is one."""

    definition: SpaceDefinition
    target: Target
    calibration: Calibration | None = None

    @cached_property
    def prunable(self) -> tuple[int, ...]:
        """Returns the indices of the scales whose keep ratio is free."""
        return prunable(self.definition.dimensions.get("keep"), self.target)

    @cached_property
    def dimensions(self) -> dict[str, Dimension]:
        """Returns every dimension of the vocabulary on this target; those that are not free have no distribution."""
        dimensions = declared(self.definition.dimensions, self.target)
        if self.calibration is None or self.calibration.probe is None:
            dimensions["ending"] = _without("probe", dimensions["ending"])
        if not self.target.skippable:
            dimensions["ending"] = _without("probe", _without("stop", dimensions["ending"]))
            dimensions |= {name: Dimension(name, dimensions[name].neutral) for name in _OF_STOPPING}
        return dimensions

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Returns the flat space: every dimension with more than one value."""
        return {name: entry.distribution for name, entry in self.dimensions.items() if entry.distribution is not None}

    def policy(self, vector: Vector) -> Policy:
        """Returns the canonical policy of a vector; missing dimensions take their neutral or only value."""
        return self._interpreter(vector, self._neutral).policy()

    def normal(self, vector: Vector) -> Vector:
        """Returns the vector with every dimension that its policy does not use at the neutral value, in a fixed order."""
        used = self.used(vector)
        return {name: vector[name] if name in used and name in vector else self._neutral[name] for name in self.distributions}

    def used(self, vector: Vector) -> frozenset[str]:
        """Returns the names of the dimensions that change the policy of this vector."""
        return frozenset(self._interpreter(vector, self._neutral).used())

    def presets(self) -> tuple[Preset, ...]:
        """Returns dense and then every preset that this target and its calibration allow."""
        dense = {name: self._neutral[name] for name in self.distributions}
        reference = Preset(DENSE, "the unpruned model", self.policy(dense), dense)
        return (reference, *(outcome for outcome in self._outcomes if isinstance(outcome, Preset)))

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Returns a sentence for each preset that was left out: it needs a calibration, or to skip what must run."""
        return tuple(outcome for outcome in self._outcomes if isinstance(outcome, str))

    @cached_property
    def _outcomes(self) -> tuple[Preset | str, ...]:
        outcomes: list[Preset | str] = []
        for setting in self.definition.presets:
            if setting.videos and not self.target.moves:
                continue
            try:
                outcomes.append(self._preset(setting))
            except LeftOut as error:
                outcomes.append(str(error))
        return tuple(outcomes)

    def _preset(self, setting: PresetSetting) -> Preset:
        """Returns a preset with its vector, None where it uses a value that this space does not offer."""
        values = placed(setting, self.target, self.calibration)
        defaults = {name: entry.neutral for name, entry in declared({}, self.target).items()}
        interpreter = self._interpreter(values, defaults)
        wanted = {name: values.get(name, defaults.get(name, 1.0)) for name in interpreter.used()}
        vector = None
        if all(_offers(self.dimensions.get(name), value) for name, value in wanted.items()):
            vector = {name: wanted.get(name, self._neutral[name]) for name in self.distributions}
        policy, source, inferred = interpreter.policy(), setting.source, setting.inferred
        if setting.skips and not self.target.skippable:
            if policy.is_dense():
                raise only_skips(setting, self.target)
            source, inferred = f"{source}; what it skips runs in full here", True
        return Preset(setting.name, source, policy, vector, setting.control, inferred)

    @cached_property
    def _neutral(self) -> dict[str, Value]:
        return {name: entry.neutral for name, entry in self.dimensions.items()}

    def _interpreter(self, vector: Vector, neutral: Mapping[str, Value]) -> Interpreter:
        return Interpreter(Reading(vector, neutral), self.target, self.calibration)


def space_for(definition: SpaceDefinition, backbone: "Backbone") -> SearchSpace:
    """Returns the space on a loaded backbone, with its calibration if one fits."""
    schedule = backbone.scale_schedule()
    calibration = find_calibration(backbone.name, scale_schedule=fingerprint(schedule), weights=backbone.revision)
    facts = {"skippable": backbone.skippable, "course": backbone.model.course(schedule), "chunks": backbone.chunks}
    target = Target(backbone.name, backbone.depth, schedule, **facts)
    return SearchSpace(definition, target, calibration)


def _without(choice: str, dimension: Dimension) -> Dimension:
    if not isinstance(dimension.distribution, CategoricalDistribution):
        return dimension
    rest = tuple(value for value in dimension.distribution.choices if value != choice)
    return Dimension(dimension.name, rest[0], CategoricalDistribution(rest) if len(rest) > 1 else None)


def _offers(dimension: Dimension | None, value: Value) -> bool:
    """Returns whether a value can be had; a keep ratio that is no dimension is 1."""
    if dimension is None or dimension.distribution is None:
        return value == (1.0 if dimension is None else dimension.neutral)
    if isinstance(dimension.distribution, CategoricalDistribution):
        return value in dimension.distribution.choices
    return dimension.distribution._contains(dimension.distribution.to_internal_repr(value))
