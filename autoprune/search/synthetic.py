"""What a policy costs and loses by formulas, for benchmarks of the search that no model could run often enough.

Made up, but of the shape that measurements have: costs and losses of scales add up, single pieces multiply what pruning loses,
thresholds act in expectation, and what is measured is noisy.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from autoprune.backbones.schedules import scale_schedule
from autoprune.policy import Policy, token_count
from autoprune.rules import ScalePruning
from autoprune.search.folders import shipped_folder
from autoprune.search.front import Point
from autoprune.search.space import SearchSpace, Target
from autoprune.search.space_file import read_space

MAX_DROP = 0.12
_OVERHEAD = 6.0  # of a scale, in tokens of one branch
_SHARES = {"sa": 0.45, "ca": 0.2, "ffn": 0.35}
_SCORERS = {"dc": 1.0, "structure": 0.9, "texture": 1.05, "latent_cos": 0.95, "latent_l2": 1.0, "latent_relative": 0.85}
_SCORERS |= {"delta": 0.9, "norm": 1.15, "cond_uncond": 1.1, "random": 2.0}
_RESTORERS = {
    "cached": 0.8,
    "cached_state": 1.0,
    "nearest": 1.3,
    "anchor": 1.1,
    "merged": 1.2,
    "zero_residual": 1.4,
    "identity": 1.8,
}
_INTERPOLATIONS = {"area": 1.0, "nearest": 1.1, "bilinear": 0.95, "bicubic": 0.97}
_SELECTIONS = {"top": 1.0, "threshold": 0.95, "draw": 1.3}


@dataclass(frozen=True)
class Outcome:
    """(log latency relative to dense, loss) and how far the score drop lies above MAX_DROP."""

    point: Point
    constraint: float


def synthetic_space(name: str) -> SearchSpace:
    """Returns a shipped space on the embedded backbone's schedule, without loading a backbone."""
    definition = read_space(shipped_folder("search_spaces") / f"{name}.yaml")
    return SearchSpace(definition, Target("tiny", 6, scale_schedule()))


def outcome(policy: Policy) -> Outcome:
    """Returns what a policy truly does.

    Scales run in sequence; one costs a fixed overhead, its kept tokens times branches, and attention to the keys so far.
    """
    full = cost = loss = 0.0
    seen, runs = 0, 1.0
    for scale, grid in enumerate(policy.scale_schedule):
        tokens = token_count(grid)
        seen += tokens
        weight = 0.05 + 0.3 * tokens / token_count(policy.scale_schedule[-1])
        full += _OVERHEAD + 2 * tokens * (1 + seen / 1000)
        if policy.stop is not None and scale == policy.stop.from_scale:
            runs = 1 / (1 + policy.stop.threshold)
        if scale >= policy.run:
            loss += weight
            continue
        kept, spoiled = _pruned(policy.scales.get(scale), policy.depth, tokens, scale)
        branches, unguided = _guided(policy, scale)
        visible = _keys(policy)
        grouped = policy.group_from is not None and scale > policy.group_from
        cost += runs * (_OVERHEAD * (0.2 if grouped else 1) + branches * tokens * kept * (1 + visible * seen / 1000))
        lost = spoiled + 0.25 * unguided + 0.15 * (1 - visible) ** 2 + 0.1 * grouped
        loss += weight * (runs * min(1.0, lost) + (1 - runs))
    drop = 0.9 * max(0.0, loss - 0.1)
    return Outcome((math.log(cost / full), loss), drop - MAX_DROP)


def measured(policy: Policy, seed: int) -> Outcome:
    """Returns what a measurement says: latency within 2 %, loss within 5 %, the drop within 0.015 (standard deviations)."""
    true = outcome(policy)
    if policy.is_dense():
        return true
    digest = hashlib.sha256(f"{seed} {policy.key()}".encode()).digest()
    latency, loss, drop = np.random.default_rng(list(digest[:8])).normal(0, (0.02, 0.05, 0.015)).tolist()
    return Outcome((true.point[0] + latency, true.point[1] * math.exp(loss)), true.constraint + drop)


def _pruned(rule: ScalePruning | None, depth: int, tokens: int, scale: int) -> tuple[float, float]:
    """Returns the share of a scale's work that is left and the share of its content that is lost."""
    if rule is None:
        return 1.0, 0.0
    kept = max(rule.floor, rule.keep / (1 + rule.threshold)) if rule.select == "threshold" else rule.keep
    kept = min(1.0, kept + (1 / rule.anchors**2 if rule.anchors else 0.0))
    first, last = rule.layers or (0, depth - 1)
    reach = (last - first + 1) / depth
    reach *= sum(_SHARES[name] for name in rule.sublayers) if rule.granularity == "sublayer" else 1.0
    factor = sum(_SCORERS[name] * weight for name, weight in rule.scorer.items()) / sum(rule.scorer.values())
    factor *= _RESTORERS[rule.restorer] * _SELECTIONS[rule.select] * (0.9 if rule.anchors else 1.0)
    factor *= {"sublayer": 1.0, "chunk": 1.15, "scale": 1.3}[rule.granularity] * (1.05 if rule.rows == "shared" else 1.0)
    if rule.cached:
        factor *= _INTERPOLATIONS[rule.interpolation] * (1 + 0.1 * (scale - rule.cache_scale))
    overhead = {"sublayer": 0.12, "chunk": 0.04, "scale": 0.02}[rule.granularity] * (0.5 if rule.rows == "shared" else 1.0)
    return 1 - reach * (1 - kept) + reach * overhead, factor * reach**1.5 * (1 - kept) ** 1.5


def _guided(policy: Policy, scale: int) -> tuple[float, float]:
    """Returns how many branches run on average, and how much the lack of one matters."""
    rule = policy.guidance
    if rule.branch == "both" or scale < rule.from_scale:
        return 2.0, 0.0
    if rule.branch == "uncond":
        return 1.0, 1.6
    dropped = rule.threshold / (1 + rule.threshold) if rule.branch == "adaptive" else 1.0
    return 2 - dropped, dropped**1.5 * (0.3 if rule.replacement == "extrapolate" else 0.4)


def _keys(policy: Policy) -> float:
    """Returns the share of the keys so far that attention sees."""
    rule = policy.keys
    return rule.budget if rule.first is None else min(1.0, (rule.first + rule.last) / len(policy.scale_schedule))
