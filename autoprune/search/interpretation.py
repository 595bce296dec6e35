"""What a vector means: from one value for every dimension to one canonical policy.

No vector is invalid. Where a rule of rules.py or validity.py forbids a combination, the nearest allowed meaning is taken,
and a dimension is read only where it changes the policy, so that the reads say which dimensions a policy uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoprune.policy import BranchRule, Grid, Policy, ScalePruning, kept_count, token_count
from autoprune.rules import CACHED_RESTORERS, OF_LATENTS, ZEROING_RESTORERS, KeyRule, ProbeRule, StopRule
from autoprune.search.calibration import Calibration
from autoprune.search.dimensions import CHUNKS, KNOBS, MIX
from autoprune.search.knobs import Target, Value, Vector
from autoprune.search.rank_table import rank_table

_LOOK_BACK = {"delta": 1, "cond_uncond": 1} | dict.fromkeys(OF_LATENTS, 2)
_WITHIN_GROUP = ("delta", "cond_uncond")  # what looks at the scale just before, which a group's members do not have
_OF_ROWS = ("dc", "structure", "texture", "norm")  # scorers of hidden tokens: inside the blocks branches differ
_BELOW_SCALE = {"anchor": "nearest", "zero_residual": "identity"}  # what comes nearest where scales are not pruned whole
_ENDING_EARLY = ("stop", "probe")
_ANCHORS = 4  # SparseVAR's stride, for its restorer where no anchors are asked for


class Reading:
    """A vector completed by neutral values, which remembers what was read."""

    def __init__(self, vector: Vector, neutral: Mapping[str, Value]) -> None:
        self._vector, self._neutral = vector, neutral
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Value:
        """Returns the value of a dimension; a keep ratio that is no dimension here is 1."""
        self.names.add(name)
        return self._vector[name] if name in self._vector else self._neutral.get(name, 1.0)

    def number(self, key: str) -> float:
        """Returns a number as policies state it; in a vector it may be an exponent."""
        knob = KNOBS[key]
        return knob.natural(self[knob.name])


@dataclass(frozen=True)
class _Shape:
    """What is done to the tokens of pruned scales: the decisions that all others depend on."""

    granularity: str
    reducer: str
    restorer: str

    @property
    def groupable(self) -> bool:
        return (self.granularity, self.restorer) == ("scale", "zero_residual")


@dataclass(frozen=True)
class _Ending:
    """How the last scales end, where that is not fixed."""

    stop: StopRule | None = None
    probe: ProbeRule | None = None
    group_from: int | None = None


@dataclass(frozen=True)
class _Decisions:
    """Everything a vector says: the scales that run, keep ratios and the fields of ScalePruning that they share, the rest."""

    run: int
    kept: Mapping[int, float]
    fields: Mapping[str, object]
    guidance: BranchRule
    ending: _Ending
    keys: KeyRule
    batch: str
    fewer: Mapping[int, int]


@dataclass(frozen=True)
class Interpreter:
    """One vector on one target. `calibration` provides rank tables and the probe."""

    read: Reading
    target: Target
    calibration: Calibration | None = None

    def policy(self) -> Policy:
        """Returns the canonical policy."""
        said, target = self._decisions(), self.target
        return Policy(
            backbone=target.backbone,
            depth=target.depth,
            scale_schedule=target.scale_schedule,
            scales={scale: _at(scale, said, target) for scale in said.kept},
            guidance=said.guidance,
            skip_last=target.count - said.run,
            chunks=target.chunks,
            stop=said.ending.stop,
            probe=said.ending.probe,
            group_from=said.ending.group_from,
            keys=said.keys,
            batch=said.batch,
            fewer_repetitions=said.fewer,
        ).canonical()

    def used(self) -> set[str]:
        """Returns the names of the dimensions that the policy uses, without the cost of building it."""
        self._decisions()
        return self.read.names

    def _decisions(self) -> _Decisions:
        run = self.target.count - (int(self.read["skip_last"]) if self.target.skippable else 0)
        guidance, kept = self._guidance(run), self._kept(run)
        shape = self._shape() if kept else None
        ending = self._ending(run, shape, guidance)
        if ending.group_from is not None and guidance.from_scale in range(ending.group_from, run):
            guidance = replace(guidance, from_scale=ending.group_from)
        fields = self._fields(shape, min(kept), guidance, grouped=ending.group_from is not None) if kept else {}
        adaptive = fields.get("select") == "threshold" or guidance.branch == "adaptive" or ending.stop or ending.probe
        batch = str(self.read["batch"]) if adaptive else "all"
        return _Decisions(run, kept, fields, guidance, ending, self._keys(run), batch, self._fewer_repetitions(run))

    def _fewer_repetitions(self, run: int) -> dict[int, int]:
        """Returns how many repetitions less the last scales run that run several times, each at least once."""
        course = self.target.course
        fewer = int(self.read["fewer_repetitions"]) if course.repetitions else 0
        if not fewer:
            return {}
        repeated = [scale for scale in range(self.target.clip.start, run) if course.times(scale) > 1]
        return {scale: min(fewer, course.times(scale) - 1) for scale in repeated[-int(self.read["short_scales"]) :]}

    def _guidance(self, run: int) -> BranchRule:
        """Returns which branches run. An adaptive drop is decided one scale before the first one it may change."""
        single = int(self.read["single_branch_scales"])
        if not single:
            return BranchRule()
        branch = str(self.read["branch"])
        if branch == "adaptive" and not self._may_adapt():
            branch = "cond"
        rule = BranchRule(branch, max(0, run - single - (branch == "adaptive"))).canonical(run)
        if rule.branch == "adaptive":
            metric = str(self.read["drop_metric"])
            unit = self.calibration and self.calibration.discrepancy(metric, rule.from_scale)
            rule = replace(rule, metric=metric, threshold=self._threshold("drop_threshold", unit))
        if rule.branch == "adaptive" or (rule.branch == "cond" and rule.from_scale):
            rule = replace(rule, replacement=str(self.read["replacement"]))
        return rule

    def _kept(self, run: int) -> dict[int, float]:
        """Returns the keep ratio of every scale of which a token is removed; a clip's first scale is never one."""
        first = max(self.target.clip.start + 1, run - int(self.read["pruned_scales"]))
        kept = {scale: min(1.0, float(self.read[f"keep_{scale}"])) for scale in range(first, run)}
        return {scale: keep for scale, keep in kept.items() if _removes(self.target.scale_schedule[scale], keep)}

    def _shape(self) -> _Shape:
        granularity, reducer = str(self.read["granularity"]), str(self.read["reducer"])
        if reducer == "merge" and granularity == "sublayer":
            return _Shape(granularity, reducer, "merged")
        if reducer == "project" and granularity != "sublayer":
            return _Shape(granularity, reducer, "cached_state")
        restorer = str(self.read["restorer"])
        if granularity != "scale":
            restorer = _BELOW_SCALE.get(restorer, restorer)
        if granularity == "sublayer" and restorer == "cached_state":
            restorer = "cached"
        return _Shape(granularity, "gather", restorer)

    def _ending(self, run: int, shape: _Shape | None, guidance: BranchRule) -> _Ending:
        kind, read = self.read["ending"], self.read
        alone = self.target.course.by_clip or guidance.branch == "adaptive" or not (shape is None or shape.groupable)
        if kind == "group" and not alone:
            first = max(1, run - int(read["group_scales"]))
            return _Ending(group_from=first if first < run - 1 else None)
        if kind not in _ENDING_EARLY or not self.target.skippable or not self._may_adapt():
            return _Ending()
        if kind == "probe" and guidance.branch != "uncond" and self.calibration and self.calibration.probe:
            return _Ending(probe=self.calibration.probe if self.calibration.probe.scale + 1 < run else None)
        first = max(self.target.clip.start + 2, self.target.count - int(read["stop_scales"])) if kind == "stop" else run
        if first < run:
            metric, share = str(read["stop_metric"]), read.number("stop_share")
            threshold = self._threshold("stop_threshold", self.calibration and self.calibration.change(metric, first))
            return _Ending(stop=StopRule(first, threshold=threshold, share=share, metric=metric))
        return _Ending()

    def _fields(self, shape: _Shape, first: int, guidance: BranchRule, *, grouped: bool) -> dict[str, object]:
        """Returns what all pruned scales have in common, `first` being the first of them."""
        fields: dict[str, object] = vars(shape) | self._restoration(shape, first)
        if shape.granularity == "sublayer":
            fields["layers"] = (int(self.read["exempt_first"]), self.target.depth - 1 - int(self.read["exempt_last"]))
            fields["sublayers"] = tuple(str(self.read["sublayers"]).split("+"))
        if shape.reducer == "merge":
            return fields | {"cell": int(self.read["cell"])}
        fields |= self._scorer()
        fields |= self._selection(shape, first, grouped=grouped)
        fields |= {"dense_repetitions": int(self.read["dense_repetitions"])} if self.target.course.repetitions else {}
        if _branches_differ(fields) and not _single(guidance, first):
            fields["rows"] = str(self.read["rows"])
        return fields

    def _restoration(self, shape: _Shape, first: int) -> dict[str, object]:
        """Returns the fields of the reducer and the restorer."""
        fields: dict[str, object] = {}
        if shape.restorer in CACHED_RESTORERS:
            fields["cache_scale"] = max(self.target.clip.start, first - int(self.read["cache_before"]))
            fields["interpolation"] = str(self.read["interpolation"])
        if shape.restorer == "nearest" and shape.granularity == "scale":
            fields["recover_at"] = str(self.read["recover_at"])
        if shape.restorer == "anchor":
            fields["similarity"] = self.read.number("similarity")
        if shape.reducer == "project":
            fields["positions"] = str(self.read["positions"])
            if shape.granularity == "chunk" and self.read["ranks"] == "table":
                fields["ranks"] = rank_table(self.calibration, min(self.target.chunks, self.target.depth))
        return fields

    def _scorer(self) -> dict[str, object]:
        name = str(self.read["scorer"])
        if name == MIX:
            weights = {"structure": self.read.number("structure_weight"), "texture": 1.0}
            return {"scorer": weights, "normalise": str(self.read["normalise"])}
        fields: dict[str, object] = {"scorer": {name: 1.0}}
        if name == "delta":
            fields["chunk"] = int(self.read["delta_chunk"]) * min(self.target.chunks, self.target.depth) // CHUNKS
        if name in OF_LATENTS:
            fields["region"] = int(self.read["region"])
        return fields

    def _selection(self, shape: _Shape, first: int, *, grouped: bool) -> dict[str, object]:
        """Returns which tokens stay. A threshold needs a whole scale gathered alone, anchors a choice that is not drawn."""
        select = str(self.read["select"])
        alone = shape.granularity == "scale" and shape.reducer == "gather" and not grouped
        if select == "threshold" and not (alone and self._may_adapt()):
            select = "top"
        if select == "draw" and shape.restorer == "anchor":
            select = "top"
        fields: dict[str, object] = {"select": select}
        if select == "threshold":
            scorer, of = str(self.read["scorer"]), str(self.read["threshold_of"])
            unit = self.calibration and of == "absolute" and self.calibration.change(scorer, first)
            fields |= {"threshold_of": of, "threshold": self._threshold("threshold", unit), "floor": self.read.number("floor")}
        if shape.reducer == "gather" and select != "draw":
            fields["anchors"] = int(self.read["anchors"]) or (_ANCHORS if shape.restorer == "anchor" else 0)
        return fields

    def _may_adapt(self) -> bool:
        """Returns whether decisions may depend on the data."""
        return self.read["adaptive"] == "allowed"

    def _threshold(self, key: str, unit: float | bool | None) -> float:
        """Returns a threshold, a number of units: the calibrated median of what it is compared with, 1 without one."""
        return float(f"{self.read.number(key) * (unit or 1.0):.4g}")

    def _keys(self, run: int) -> KeyRule:
        kind = "all" if self.target.course.by_clip else self.read["keys"]
        if kind == "ends":
            first, last = int(self.read["keys_first"]), int(self.read["keys_last"])
            return KeyRule(first, last) if first + last < run - 1 else KeyRule()
        return KeyRule(budget=self.read.number("keys_budget")) if kind == "budget" else KeyRule()


def _at(scale: int, said: _Decisions, target: Target) -> ScalePruning:
    """Returns the rule of one scale: what the others have too, but for scorers that have nothing to look at there."""
    fields, guidance, keep = dict(said.fields), said.guidance, said.kept[scale]
    if _single(guidance, scale):
        fields.pop("rows", None)
    if "floor" in fields:
        fields["floor"] = min(fields["floor"], keep)
    runs = target.course.times(scale) - said.fewer.get(scale, 0)
    if "dense_repetitions" in fields:
        fields["dense_repetitions"] = min(fields["dense_repetitions"], runs - 1) if runs > 1 else 1
    if fields.get("ranks"):
        keep = max(fields["ranks"])
    name, group_from = next(iter(fields.get("scorer", ("dc",)))), said.ending.group_from
    if group_from is not None and scale > group_from and name in _WITHIN_GROUP:
        fields["scorer"] = "latent_cos"
    elif scale - target.clip.start < _LOOK_BACK.get(name, 0) or (name == "cond_uncond" and _may_lack_branch(said, scale)):
        fields["scorer"] = "dc"
    return ScalePruning(keep=keep, **fields)


def _may_lack_branch(said: _Decisions, scale: int) -> bool:
    """Returns whether a branch, and with it what it computed before, may be gone at a scale."""
    guidance, probe = said.guidance, said.ending.probe
    adaptive = guidance.branch == "adaptive" and scale > guidance.from_scale
    return _single(guidance, scale) or adaptive or (probe is not None and bool(probe.drop_cuts) and scale > probe.scale)


def _branches_differ(fields: dict[str, object]) -> bool:
    """Returns whether the branches of a sample may score their tokens differently."""
    scorers = set(fields["scorer"])
    if fields["restorer"] in ZEROING_RESTORERS:
        return False
    return "delta" in scorers or (fields["granularity"] != "scale" and not scorers.isdisjoint(_OF_ROWS))


def _single(guidance: BranchRule, scale: int) -> bool:
    return guidance.branch in ("cond", "uncond") and scale >= guidance.from_scale


def _removes(grid: Grid, keep: float) -> bool:
    tokens = token_count(grid)
    return kept_count(tokens, keep) < tokens
