"""From a flat vector of numbers, which every sampler can model, to one canonical policy, and from presets to vectors.

Every dimension is always suggested; a pure function ignores the inactive ones and repairs what would break a rule,
so no vector is invalid. Positions are relative, so one file serves every schedule and depth. How many scales are pruned
is a dimension of its own: a sampler hardly ever draws a keep ratio of exactly 1, and so never a single pruned scale.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autoprune.errors import UserError
from autoprune.policy import BranchRule, Grid, Policy, ScalePruning
from autoprune.search.space_file import PresetSetting, SpaceDefinition

Vector = Mapping[str, float | int | str]
DENSE = "dense"
_LISTS = ("branch", "granularity", "scorer", "rows", "interpolation")


@dataclass(frozen=True)
class Target:
    """What a policy must fit: a backbone's name, its number of blocks and the schedule of an aspect ratio."""

    backbone: str
    depth: int
    scale_schedule: tuple[Grid, ...]


@dataclass(frozen=True)
class Preset:
    """A preset on a concrete target. `vector` is None for a control, which lies outside the searched dimensions."""

    name: str
    source: str
    policy: Policy
    vector: Vector | None


@dataclass(frozen=True)
class SearchSpace:
    """A space definition on a concrete target."""

    definition: SpaceDefinition
    target: Target

    @cached_property
    def prunable(self) -> tuple[int, ...]:
        """Returns the indices of the scales whose keep ratio is free."""
        count = len(self.target.scale_schedule)
        free = min(_share_of(self.definition.dimensions.keep.last_scales, count), count - 1)
        return tuple(range(count - free, count))

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Returns the flat space: every dimension with more than one value."""
        free, target = self.definition.dimensions, self.target
        count = len(target.scale_schedule)
        exempt = min(_share_of(free.exempt_layers, target.depth), (target.depth - 1) // 2)
        flat: dict[str, BaseDistribution] = {
            f"keep_{scale}": FloatDistribution(free.keep.low, free.keep.high, step=free.keep.step) for scale in self.prunable
        }
        for name, low, high in (
            ("pruned_scales", 0, len(self.prunable)),
            ("skip_last", 0, min(_share_of(free.skip_last, count), count - 1)),
            ("single_branch_scales", 0, _share_of(free.single_branch_scales, count)),
            ("cache_before", 1, free.cache_before),
            ("exempt_first", 0, exempt),
            ("exempt_last", 0, exempt),
        ):
            if high > low:
                flat[name] = IntDistribution(low, high)
        for name in _LISTS:
            if len(getattr(free, name)) > 1:
                flat[name] = CategoricalDistribution(getattr(free, name))
        return flat

    def policy(self, vector: Vector) -> Policy:
        """Returns the canonical policy of a vector; missing dimensions take their neutral or only value.

        A dimension is read only where it changes the policy: what is read here is what `normal` keeps.
        """
        target = self.target
        count = len(target.scale_schedule)
        run = count - int(vector.get("skip_last", 0))
        single = int(vector.get("single_branch_scales", 0))
        from_scale = max(0, run - single)
        first = run - int(vector.get("pruned_scales", len(self.prunable)))
        kept = {scale: float(vector.get(f"keep_{scale}", 1.0)) for scale in self.prunable if first <= scale < run}
        pruned = [scale for scale, keep in kept.items() if _removes(target.scale_schedule[scale], keep)]
        scales = {}
        if pruned:
            shared = self._shared_fields(vector, pruned, both=not single or pruned[0] < from_scale)
            alone = shared | {"rows": "per_branch"}
            for scale in pruned:
                fields = alone if single and scale >= from_scale else shared
                scales[scale] = ScalePruning(keep=min(1.0, kept[scale]), **fields)
        policy = Policy(
            backbone=target.backbone,
            depth=target.depth,
            scale_schedule=target.scale_schedule,
            scales=scales,
            guidance=BranchRule(self._choice(vector, "branch"), from_scale) if single else BranchRule(),
            skip_last=count - run,
        )
        return policy.canonical()

    def _shared_fields(self, vector: Vector, pruned: Sequence[int], *, both: bool) -> dict[str, object]:
        """Returns what all pruned scales have in common."""
        fields: dict[str, object] = {name: self._choice(vector, name) for name in ("granularity", "scorer", "interpolation")}
        fields["cache_scale"] = max(0, pruned[0] - int(vector.get("cache_before", 1)))
        fields["rows"] = "per_branch"
        if fields["granularity"] == "sublayer":
            first, last = (int(vector.get(f"exempt_{side}", 0)) for side in ("first", "last"))
            fields["layers"] = (first, self.target.depth - 1 - last)
            if both:
                fields["rows"] = self._choice(vector, "rows")
        return fields

    def normal(self, vector: Vector) -> Vector:
        """Returns the vector with every dimension that its policy does not use at the neutral value, in a fixed order."""
        used = _Reads(vector)
        self.policy(used)
        return {
            name: vector[name] if name in used.names and name in vector else _neutral(name, distribution)
            for name, distribution in self.distributions.items()
        }

    def presets(self) -> tuple[Preset, ...]:
        """Returns dense and then every preset on this target. Raises UserError for one outside the space."""
        dense = {name: _neutral(name, distribution) for name, distribution in self.distributions.items()}
        reference = Preset(DENSE, "the unpruned model", self.policy(dense), dense)
        return (reference, *(self._preset(setting, dense) for setting in self.definition.presets))

    def _preset(self, setting: PresetSetting, dense: Vector) -> Preset:
        vector = {**dense, **self._placed(setting)}
        control = setting.scorer not in self.definition.dimensions.scorer
        if control:
            vector["scorer"] = setting.scorer
            return Preset(setting.name, setting.source, self.policy(vector), None)
        flat = self.distributions
        for name, value in vector.items():
            if name in flat and not flat[name]._contains(flat[name].to_internal_repr(value)):
                raise UserError(
                    f"preset {setting.name} sets {name} to {value}, outside the space {flat[name]}; widen the space."
                )
            if name not in flat and value != self._fixed(name):
                raise UserError(f"preset {setting.name} sets {name} to {value}, which this space does not free; free it.")
        return Preset(setting.name, setting.source, self.policy(vector), {name: vector[name] for name in flat})

    def _placed(self, setting: PresetSetting) -> dict[str, float | int | str]:
        """Returns a preset's values on this target: scales by relative position from the end, layers by share."""
        count, depth = len(self.target.scale_schedule), self.target.depth
        keeps = [_from_end(setting.keep, offset, (setting.of_scales or count) / count) for offset in range(1, count + 1)]
        skip = next((index for index, keep in enumerate(keeps) if keep > 0), count)
        placed: dict[str, float | int | str] = {"skip_last": skip, "single_branch_scales": setting.single_branch_scales}
        pruned = {offset: keep for offset, keep in enumerate(keeps, start=1) if 0 < keep < 1}
        placed["pruned_scales"] = max(pruned, default=skip) - skip
        placed |= {f"keep_{count - offset}": keep for offset, keep in pruned.items()}
        placed["cache_before"] = setting.cache_before
        if setting.layers is not None:
            share = depth / setting.of_layers
            placed["exempt_first"] = _nearest(setting.layers[0] * share)
            placed["exempt_last"] = _nearest((setting.of_layers - 1 - setting.layers[1]) * share)
        return placed | {name: getattr(setting, name) for name in _LISTS}

    def _choice(self, vector: Vector, name: str) -> str:
        return str(vector.get(name, self._fixed(name)))

    def _fixed(self, name: str) -> float | int | str:
        """Returns the value of a dimension the space does not free."""
        if name in _LISTS:
            return getattr(self.definition.dimensions, name)[0]
        return 1 if name == "cache_before" or name.startswith("keep_") else 0


class _Reads(dict):
    """A vector that remembers which dimensions were read."""

    def __init__(self, vector: Vector) -> None:
        super().__init__(vector)
        self.names: set[str] = set()

    def get(self, name: str, default: object = None) -> object:
        self.names.add(name)
        return super().get(name, default)


def _from_end(keep: tuple[float, ...], offset: int, stretch: float) -> float:
    """Returns the ratio for the scale `offset` from the end: that of the nearest relative position in the source."""
    source = max(1, _nearest(offset * stretch))
    return keep[-source] if source <= len(keep) else 1.0


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _share_of(share: float, count: int) -> int:
    return math.ceil(share * count - 1e-9)


def _removes(grid: Grid, keep: float) -> bool:
    return int((1.0 - keep) * math.prod(grid) + 1e-9) > 0


def _neutral(name: str, distribution: BaseDistribution) -> float | int | str:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.high if name.startswith("keep_") else distribution.low
