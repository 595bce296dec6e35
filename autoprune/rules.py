"""The parts of a policy: how one scale is pruned, which guidance branches run, when to stop, what later scales may see.

Frozen data with the rules every valid schedule obeys; standard library only. Vocabulary: FastVAR (arXiv 2503.23367),
StepVAR (2603.01757), FasterVAR/StageVAR (2512.16483), SparseVAR (2507.20454), SkipVAR (2506.08908), ToMe and LazyVAR.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoprune.errors import UserError, unknown_name

LATENT_SCORERS = ("latent_cos", "latent_l2", "latent_relative")
OF_LATENTS = (*LATENT_SCORERS, "spatiotemporal")
SCORERS = ("dc", "structure", "texture", *OF_LATENTS, "delta", "norm", "cond_uncond", "random")
NORMALISATIONS = ("none", "zscore", "minmax", "rank")
SELECTIONS = ("top", "threshold", "draw")
THRESHOLDS = ("maximum", "absolute")
GRANULARITIES = ("sublayer", "chunk", "scale")
SUBLAYERS = ("sa", "ca", "ffn")
ROWS = ("per_branch", "shared")
REDUCERS = ("gather", "merge", "project")
POSITIONS = ("first", "kept")
RESTORERS = ("cached", "cached_state", "nearest", "anchor", "merged", "zero_residual", "identity")
CACHED_RESTORERS = ("cached", "cached_state")
ZEROING_RESTORERS = ("zero_residual", "anchor")
RECOVER_AT = ("head", "codes")
INTERPOLATIONS = ("area", "nearest", "bilinear", "bicubic")
BRANCHES = ("both", "cond", "uncond", "adaptive")
REPLACEMENTS = ("cond", "extrapolate")
DISCREPANCIES = ("mse_hidden", "cos_hidden", "mse_logits", "kl_bits")


@dataclass(frozen=True)
class ScalePruning:
    """How the tokens of one scale are pruned. Fields that the others make inactive are ignored.

    `keep` is the share of tokens kept, with `select` threshold the largest share. `cache_scale` is the earlier dense scale
    whose outputs fill the removed tokens of cached restorers. `scorer` weights scorers by name (one name alone is
    allowed); `normalise` makes several comparable. A threshold is a share of the largest score or an absolute value, and
    never keeps less than `floor`. `anchors` is the stride of positions that are always kept, 0 for none. `layers` is the
    inclusive range of pruned blocks, None for all, and `sublayers` the pruned ones, at sublayer granularity. `ranks` are keep
    shares a chunk. `positions` says which rotary positions projected tokens take, `cell` how wide merging cells are.
    `similarity` is the least cosine at which a token copies its anchor, `chunk` the one whose change `delta` scores, `region`
    the side over which latent scores are averaged. The last `dense_repetitions` of a scale, never all, run all tokens.
    """

    keep: float
    cache_scale: int | None = None
    scorer: Mapping[str, float] | str = "dc"
    granularity: str = "sublayer"
    layers: tuple[int, int] | None = None
    rows: str = "per_branch"
    restorer: str = "cached"
    interpolation: str = "area"
    normalise: str = "none"
    select: str = "top"
    threshold: float = 0.0
    threshold_of: str = "maximum"
    floor: float = 0.0
    anchors: int = 0
    sublayers: tuple[str, ...] = SUBLAYERS
    reducer: str = "gather"
    ranks: tuple[float, ...] = ()
    positions: str = "first"
    cell: int = 2
    recover_at: str = "head"
    similarity: float = 0.8
    chunk: int = 3
    region: int = 1
    dense_repetitions: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.scorer, str):
            object.__setattr__(self, "scorer", {self.scorer: 1.0})
        _check_choices(self)
        _check_ranges(self)
        _check_combination(self)

    @property
    def cached(self) -> bool:
        """Returns whether removed tokens are filled from the cache scale."""
        return self.restorer in CACHED_RESTORERS

    def canonical(self, *, keep: float, depth: int) -> "ScalePruning":
        """Returns the same decisions with `keep` snapped to whole tokens and every inactive field at its default."""
        default, changes = ScalePruning(1.0, 0), {"keep": keep}
        merged = ("scorer", "select", "anchors", "normalise")
        changes |= _defaults(default, *(merged if self.reducer == "merge" else ("cell",)))
        if self.reducer != "project":
            changes |= _defaults(default, "positions")
        if not self.cached:
            changes |= {"cache_scale": None, "interpolation": default.interpolation}
        if self.granularity != "sublayer" or self.layers == (0, depth - 1):
            changes |= {"layers": None}
        if self.granularity != "sublayer":
            changes |= _defaults(default, "sublayers")
        if self.granularity != "chunk":
            changes |= _defaults(default, "ranks")
        if self.select != "threshold" or self.reducer == "merge":
            changes |= _defaults(default, "threshold", "threshold_of", "floor")
        if self.restorer != "nearest" or self.granularity != "scale":
            changes |= _defaults(default, "recover_at")
        if self.restorer in ZEROING_RESTORERS:
            changes |= _defaults(default, "rows")
        if self.restorer != "anchor":
            changes |= _defaults(default, "similarity")
        used = {name: weight for name, weight in self.scorer.items() if weight}
        if len(used) == 1:
            changes = {"scorer": dict.fromkeys(used, 1.0), "normalise": default.normalise} | changes
        if "delta" not in used:
            changes |= _defaults(default, "chunk")
        if not set(used) & set(OF_LATENTS):
            changes |= _defaults(default, "region")
        return replace(self, **changes)


def _defaults(default: ScalePruning, *names: str) -> dict[str, object]:
    return {name: getattr(default, name) for name in names}


def _check_choices(rule: ScalePruning) -> None:
    for kind, value, choices in (
        ("granularity", rule.granularity, GRANULARITIES),
        ("row rule", rule.rows, ROWS),
        ("restorer", rule.restorer, RESTORERS),
        ("interpolation", rule.interpolation, INTERPOLATIONS),
        ("normalisation", rule.normalise, NORMALISATIONS),
        ("selection", rule.select, SELECTIONS),
        ("threshold rule", rule.threshold_of, THRESHOLDS),
        ("reducer", rule.reducer, REDUCERS),
        ("position rule", rule.positions, POSITIONS),
        ("recovery point", rule.recover_at, RECOVER_AT),
        *(("scorer", name, SCORERS) for name in rule.scorer),
        *(("sublayer", name, SUBLAYERS) for name in rule.sublayers),
    ):
        if value not in choices:
            raise unknown_name(kind, value, choices)


def _check_ranges(rule: ScalePruning) -> None:
    if not (isinstance(rule.keep, int | float) and 0 < rule.keep <= 1):
        raise UserError(
            f"keep ratio must be above 0 and at most 1, got {rule.keep}; to keep nothing of the last scales use skip_last."
        )
    if not any(rule.scorer.values()) or any(weight < 0 for weight in rule.scorer.values()):
        raise UserError(f"scorer weights must not be negative and not all 0, got {dict(rule.scorer)}; weight one above 0.")
    for name, least, most in (("floor", 0, 1), ("similarity", -1, 1), ("threshold", 0, float("inf"))):
        if not least <= getattr(rule, name) <= most:
            raise UserError(f"{name} must be between {least} and {most}, got {getattr(rule, name)}.")
    for name, least in (("anchors", 0), ("cell", 2), ("chunk", 0), ("region", 1), ("dense_repetitions", 0)):
        if getattr(rule, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(rule, name)}.")
    if any(not 0 < rank <= 1 for rank in rule.ranks):
        raise UserError(f"ranks must be above 0 and at most 1, got {list(rule.ranks)}; they are shares of the tokens.")
    if not rule.sublayers:
        raise UserError("sublayers must name at least one of sa, ca, ffn.")


def _check_combination(rule: ScalePruning) -> None:
    """Raises UserError, naming the rule, for pieces that cannot work together."""
    whole = rule.granularity in ("chunk", "scale")
    for broken, sentence in (
        ((rule.reducer == "merge") != (rule.restorer == "merged"), "merging goes with the restorer merged, and only with it"),
        (rule.reducer == "merge" and whole, "merging works around sublayers; set granularity to sublayer"),
        (rule.reducer == "project" and not whole, "projection replaces tokens of a chunk or scale; set granularity to chunk"),
        (
            rule.reducer == "project" and rule.restorer != "cached_state",
            "projected tokens have no place of their own; set restorer to cached_state",
        ),
        (
            rule.restorer == "cached_state" and not whole,
            "cached_state restores hidden states; set granularity to chunk or scale",
        ),
        (
            rule.restorer in ZEROING_RESTORERS and rule.granularity != "scale",
            f"{rule.restorer} zeroes the codes of a scale; set granularity to scale",
        ),
        (
            rule.restorer == "anchor" and not rule.anchors,
            "the anchor restorer needs anchors; set anchors to a stride such as 4",
        ),
        (
            rule.select == "threshold" and rule.granularity != "scale",
            "a threshold is applied once a scale; set granularity to scale",
        ),
        (rule.select == "threshold" and rule.reducer != "gather", "a threshold picks tokens; set reducer to gather"),
        (rule.select == "draw" and rule.anchors > 0, "a draw keeps no position for sure; set anchors to 0 or select to top"),
        (rule.cached and rule.cache_scale is None, f"restorer {rule.restorer} needs a cache scale; set cache_scale"),
    ):
        if broken:
            raise UserError(f"{sentence}.")


@dataclass(frozen=True)
class BranchRule:
    """Which guidance branches run: from `from_scale` on `cond` or `uncond` alone; `both` never drops one.

    `adaptive` drops the unconditional branch after the first scale from `from_scale` on at which `metric` between the
    branches falls below `threshold`. `replacement` says what its logits become: the conditional ones (cond), or
    cond + (w - 1) * (last difference of the branches, resized) (extrapolate).
    """

    branch: str = "both"
    from_scale: int = 0
    replacement: str = "cond"
    metric: str = "mse_hidden"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for kind, value, choices in (
            ("branch", self.branch, BRANCHES),
            ("replacement", self.replacement, REPLACEMENTS),
            ("discrepancy", self.metric, DISCREPANCIES),
        ):
            if value not in choices:
                raise unknown_name(kind, value, choices)
        if self.replacement == "extrapolate" and self.branch == "uncond":
            raise UserError("extrapolation replaces the unconditional branch; set branch to cond or adaptive.")

    def canonical(self, run: int) -> "BranchRule":
        """Returns the rule with inactive fields at their defaults, for a schedule of which `run` scales run."""
        if self.branch == "both" or self.from_scale >= run - (self.branch == "adaptive"):
            return BranchRule()
        if self.branch == "adaptive":
            return self
        return BranchRule(self.branch, self.from_scale, self.replacement)


@dataclass(frozen=True)
class StopRule:
    """Ends the scales when the latent has settled: before a scale from `from_scale` on, when the share of positions whose
    last change (`metric`) is above `threshold` is below `share`."""

    from_scale: int
    threshold: float
    share: float
    metric: str = "latent_relative"

    def __post_init__(self) -> None:
        if self.metric not in LATENT_SCORERS:
            raise unknown_name("stop metric", self.metric, LATENT_SCORERS)
        if self.from_scale < 2:
            raise UserError(f"a change needs two scales before it: stop from scale 2 on, got {self.from_scale}.")
        if not 0 <= self.share <= 1 or self.threshold < 0:
            raise UserError(f"stop share must be in [0, 1] and threshold at least 0, got {self.share}, {self.threshold}.")


@dataclass(frozen=True)
class ProbeRule:
    """SkipVAR's decision after `scale`: two features of small decoded images, standardised and weighted to one number.

    Images are decoded at the size of `probe_scale` from the latents before and after `scale`; features are the mean
    change of edges and the share of amplitudes outside `radius` of the spectrum. With z = weights . (features - mean) /
    deviation, as many last scales are skipped as `skip_cuts` (ascending) lie at or below z; when none, as many run the
    conditional branch alone as `drop_cuts` lie at or below it. Of a batch that decides together the least counts.
    """

    scale: int
    probe_scale: int
    mean: tuple[float, float]
    deviation: tuple[float, float]
    weights: tuple[float, float]
    skip_cuts: tuple[float, ...] = ()
    drop_cuts: tuple[float, ...] = ()
    radius: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.probe_scale <= self.scale or self.scale < 1:
            raise UserError(f"the probe scale must not be after the decision scale {self.scale}, got {self.probe_scale}.")
        for cuts in (self.skip_cuts, self.drop_cuts):
            if list(cuts) != sorted(cuts):
                raise UserError(f"cuts of a probe must ascend, got {list(cuts)}.")
        if min(self.deviation) <= 0 or not 0 < self.radius < 1:
            raise UserError(f"probe deviations must be above 0 and its radius in (0, 1), got {self.deviation}, {self.radius}.")


@dataclass(frozen=True)
class KeyRule:
    """Which keys and values later scales see: those of the `first` and the `last` scales before them (None: all), or of
    each layer the share `budget` that the attention of `window` queries chooses (labelled simplification of ScaleKV)."""

    first: int | None = None
    last: int | None = None
    budget: float = 1.0
    window: int = 16

    def __post_init__(self) -> None:
        if (self.first is None) != (self.last is None):
            raise UserError("a key rule names both the first and the last scales that stay, or neither.")
        if self.first is not None and (self.first < 0 or self.last < 1):
            raise UserError(f"at least the last scale's keys must stay, got first {self.first} and last {self.last}.")
        if self.first is not None and self.budget < 1:
            raise UserError("a key rule keeps either whole scales or a budget; leave first and last out, or budget at 1.")
        if not 0 < self.budget <= 1 or self.window < 1:
            raise UserError(f"key budget must be in (0, 1] and window at least 1, got {self.budget}, {self.window}.")

    def canonical(self) -> "KeyRule":
        """Returns the rule with inactive fields at their defaults."""
        return self if self.budget < 1 else KeyRule(self.first, self.last)
