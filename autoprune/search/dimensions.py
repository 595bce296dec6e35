"""The vocabulary of a search space: every decision a policy knows, declared once.

What a value means, and which dimensions are read when, is in interpretation.py.
"""

from collections.abc import Callable, Mapping

from autoprune import rules
from autoprune.clips import clip_ranges
from autoprune.search.knobs import Choice, Count, Dimension, Keeps, Knob, Number, Steps, Target, Value

CHUNKS = 8  # groups of blocks that chunks are counted in, the default of policies
MIX = "mix"  # StepVAR's weighted sum: structure_weight * structure + texture
_KEYED = ("probe", "group")  # endings that need keys of other scales
ALL_SUBLAYERS = "+".join(rules.SUBLAYERS)


def _scales(target: Target) -> int:
    return len(target.clip)


def _after_first_clip(target: Target) -> int:
    return target.count - len(clip_ranges(target.scale_schedule)[0])


def _unless_repeated(*choices: int) -> Callable[[Target], tuple[Value, ...]]:
    return lambda target: () if target.course.repetitions else choices


KNOBS: dict[str, Knob] = {
    knob.key: knob
    for knob in (
        Keeps(),
        Count("skip_last", _scales, most=lambda target: len(target.clip) - 1 if target.skippable else 0),
        Count("single_branch_scales", _scales, more=_after_first_clip),
        Choice("adaptive", ("never", "allowed")),
        Choice("branch", ("cond", "uncond", "adaptive")),
        Choice("replacement", rules.REPLACEMENTS),
        Choice("drop_metric", rules.DISCREPANCIES),
        Number("drop_threshold", 1e-6, 1e6, 1.0, log=True),
        Choice("granularity", rules.GRANULARITIES),
        Count(
            "exempt_layers",
            lambda target: target.depth,
            most=lambda target: (target.depth - 1) // 2,
            names=("exempt_first", "exempt_last"),
        ),
        Choice("sublayers", (ALL_SUBLAYERS, "sa", "sa+ca", "sa+ffn", "ca+ffn", "ca", "ffn")),
        Choice("rows", rules.ROWS),
        Choice("scorer", (*rules.SCORERS, MIX), lambda target: () if target.moves else ("spatiotemporal",)),
        Number("structure_weight", 1e-3, 1e3, 1.0, log=True),
        Choice("normalise", rules.NORMALISATIONS),
        Choice("delta_chunk", (3, 0, 1, 2, 4, 5, 6, 7)),
        Choice("region", (1, 2, 4, 8)),
        Choice("select", rules.SELECTIONS),
        Choice("threshold_of", rules.THRESHOLDS),
        Number("threshold", 1e-6, 1e3, 0.1, log=True),
        Number("floor", 0.0, 1.0, 0.0),
        Choice("anchors", (0, 2, 3, 4, 6, 8)),
        Choice("reducer", rules.REDUCERS),
        Choice("cell", (2, 3, 4)),
        Choice("positions", rules.POSITIONS),
        Choice("ranks", ("keep", "table")),
        Choice("restorer", tuple(name for name in rules.RESTORERS if name != "merged")),
        Steps("cache_before", 1),
        Choice("interpolation", rules.INTERPOLATIONS),
        Choice("recover_at", rules.RECOVER_AT),
        Number("similarity", -1.0, 1.0, 0.8),
        Choice("ending", ("fixed", "stop", "probe", "group"), lambda target: _KEYED if target.course.by_clip else ()),
        Choice("stop_metric", ("latent_relative", "latent_cos", "latent_l2")),
        Count("stop_scales", _scales, low=1, mild="high"),
        Number("stop_threshold", 1e-6, 1e6, 1.0, log=True),
        Number("stop_share", 1e-4, 1.0, 0.05, log=True),
        Count("group_scales", _scales, low=2),
        Choice("keys", ("all", "ends", "budget"), lambda target: ("ends", "budget") if target.course.by_clip else ()),
        Count("keys_first", _scales, mild="high"),
        Count("keys_last", _scales, low=1, mild="high"),
        Number("keys_budget", 0.01, 1.0, 0.5),
        Choice("batch", ("all", "split")),
        Choice("dense_repetitions", (1, 0, 2), _unless_repeated(0, 2)),
        Choice("fewer_repetitions", (0, 1, 2), _unless_repeated(1, 2)),
        Count("short_scales", _scales, low=1, most=lambda target: len(target.clip) if target.course.repetitions else 1),
    )
}


def declared(free: Mapping[str, object], target: Target) -> dict[str, Dimension]:
    """Returns every dimension of the vocabulary on a target, given the checked settings of a file."""
    return {dimension.name: dimension for key, knob in KNOBS.items() for dimension in knob.dimensions(free.get(key), target)}
