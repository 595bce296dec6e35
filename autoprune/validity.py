"""What every schedule of a policy must obey as a whole; the rules of one scale alone are in rules.py.

Source: the constraints published methods keep silently (skips at the end, caches before what they fill, one-way
branches). Standard library only.
"""

from typing import TYPE_CHECKING

from autoprune.clips import Course, clip_ranges
from autoprune.errors import UserError, unknown_name
from autoprune.rules import OF_LATENTS, KeyRule, ScalePruning

if TYPE_CHECKING:
    from autoprune.policy import Policy

BATCH_RULES = ("all", "split")
MOST_LAYERS, MOST_SIDE = 1000, 2**16  # far beyond any backbone: a plan lists the layers and counts the tokens


def check_schedule(policy: "Policy") -> None:
    """Raises UserError naming the rule, the value and the remedy."""
    count = len(policy.scale_schedule)
    if not 1 <= policy.depth <= MOST_LAYERS:
        raise UserError(f"a backbone has 1 to {MOST_LAYERS} layers, got {policy.depth}.")
    if any(not 1 <= side <= MOST_SIDE for grid in policy.scale_schedule for side in grid):
        raise UserError(f"sides of a scale must be between 1 and {MOST_SIDE}, got {policy.scale_schedule}.")
    if not 0 <= policy.skip_last < count:
        raise UserError(f"skip_last must be between 0 and {count - 1} for {count} scales, got {policy.skip_last}.")
    if not 0 <= policy.guidance.from_scale <= count:
        raise UserError(f"a branch is dropped from a scale between 0 and {count}, got {policy.guidance.from_scale}.")
    if policy.chunks < 1:
        raise UserError(f"chunks must be at least 1, got {policy.chunks}.")
    if policy.batch not in BATCH_RULES:
        raise unknown_name("batch rule", policy.batch, BATCH_RULES)
    for index, rule in policy.scales.items():
        _check_scale(policy, index, rule)
    _check_group(policy)
    _check_probe(policy)
    _check_clips(policy)


def check_course(policy: "Policy", course: Course) -> None:
    """Raises UserError for repetitions that a backbone does not have, and for what needs keys that it does not keep."""
    for scale, fewer in policy.fewer_repetitions.items():
        if fewer >= course.times(scale):
            raise UserError(
                f"scale {scale} of {policy.backbone} runs {course.times(scale)} times and must run at least once, got {fewer} "
                "repetitions fewer; leave out fewer, or use skip_last."
            )
    keyed = policy.group_from is not None or policy.keys.canonical() != KeyRule() or policy.probe is not None
    if course.by_clip and keyed:
        raise UserError(
            f"scales of {policy.backbone} see no other scale of their clip, so none are decoded together, probed or short of "
            "keys; leave group_from, probe and keys out."
        )


def _check_scale(policy: "Policy", index: int, rule: ScalePruning) -> None:
    count, first = len(policy.scale_schedule), min(policy.scales)
    if not 0 <= index < count:
        raise UserError(f"scale {index} does not exist; this schedule has scales 0 to {count - 1}.")
    if rule.cached and not 0 <= rule.cache_scale < first:
        raise UserError(
            f"cache scale must be a dense scale before the first pruned scale ({first}), "
            f"got {rule.cache_scale} at scale {index}."
        )
    if rule.layers is not None and not 0 <= rule.layers[0] <= rule.layers[1] < policy.depth:
        found = f"{list(rule.layers)} at scale {index}"
        raise UserError(f"layers must be first <= last within 0 to {policy.depth - 1}, got {found}.")
    chunks = len(policy.chunk_ranges())
    if rule.ranks and len(rule.ranks) != chunks:
        raise UserError(f"ranks must name one share for each of the {chunks} chunks, got {len(rule.ranks)} at scale {index}.")
    if "delta" in rule.scorer and rule.chunk >= chunks:
        raise UserError(f"the chunk that delta looks at must be below {chunks}, got {rule.chunk} at scale {index}.")
    start = next(scales.start for scales in clip_ranges(policy.scale_schedule) if index in scales)
    for names, least in ((OF_LATENTS, 2), (("delta", "cond_uncond"), 1)):
        wanting = [name for name in names if rule.scorer.get(name)]
        if wanting and index < start + least:
            first = f"scale {start + least} on, got scale {index}"
            raise UserError(f"scorer {wanting[0]} looks back {least} scales; use it from {first}.")
    if rule.restorer == "anchor" and index == start:
        first = f"scale {start + 1} on, got scale {start}"
        raise UserError(f"the anchor restorer compares logits of the scale before; use it from {first}.")
    _check_branches(policy, index, rule)


def _check_branches(policy: "Policy", index: int, rule: ScalePruning) -> None:
    if not rule.scorer.get("cond_uncond"):
        return
    adaptive = policy.guidance.branch == "adaptive"  # the first scale it looks at still has both branches
    if policy.guidance.branch != "both" and index >= policy.guidance.from_scale + adaptive:
        raise UserError(
            f"scorer cond_uncond needs both branches at the scale before, but one is dropped from scale "
            f"{policy.guidance.from_scale} on; use another scorer at scale {index}."
        )


def _check_group(policy: "Policy") -> None:
    if policy.group_from is None:
        return
    first, count = policy.group_from, len(policy.scale_schedule)
    if not 1 <= first < count:
        raise UserError(f"scales are decoded together from a scale between 1 and {count - 1}, got {first}.")
    members = range(first, policy.run)
    for index in members:
        rule = policy.scales.get(index)
        if rule and (rule.granularity != "scale" or rule.restorer != "zero_residual" or rule.select == "threshold"):
            raise UserError(
                f"scales decoded together keep a fixed number of tokens and zero the rest; set scale {index} to granularity "
                "scale and restorer zero_residual, without a threshold."
            )
        if rule and set(rule.scorer) & {"delta", "cond_uncond"} and index > first:
            raise UserError(f"scales decoded together know nothing of each other; score scale {index} by the latent.")
    if policy.guidance.branch == "adaptive" or policy.guidance.from_scale in range(first + 1, policy.run):
        raise UserError(f"no branch can be dropped within the scales {first} to {policy.run - 1} that are decoded together.")


def _check_clips(policy: "Policy") -> None:
    """Checks what clips ask for: the last scale of each is all that the next one sees, and only the last clip may end early."""
    *earlier, last = clip_ranges(policy.scale_schedule)
    for scale, fewer in policy.fewer_repetitions.items():
        if not 0 <= scale < last.stop or isinstance(fewer, bool) or not isinstance(fewer, int) or fewer < 0:
            raise UserError(
                f"fewer_repetitions names scales 0 to {last.stop - 1} and whole numbers of at least 0, got {scale}: {fewer}."
            )
    for scales in earlier:
        rule = policy.scales.get(scales[-1])
        if rule is not None and (rule.keep < 1 or rule.ranks):
            raise UserError(
                f"scale {scales[-1]} ends a clip and is all that the next clip sees of it, so it runs dense; prune the scales "
                "before it."
            )
    if earlier and policy.skip_last >= len(last):
        most = len(last) - 1
        raise UserError(f"a video skips scales at the end of its last clip only, at most {most}, got {policy.skip_last}.")
    if earlier and policy.stop is not None and policy.stop.from_scale < last.start + 2:
        raise UserError(
            f"a video may stop from the third scale of its last clip on, scale {last.start + 2}, got {policy.stop.from_scale}."
        )


def _check_probe(policy: "Policy") -> None:
    probe, count = policy.probe, len(policy.scale_schedule)
    if probe is None:
        return
    reach = max(len(probe.skip_cuts), len(probe.drop_cuts))
    if probe.scale > count - reach - 1:
        raise UserError(
            f"the probe must decide before the first scale it can change ({count - reach}), got scale {probe.scale}; "
            "probe earlier or give it fewer cuts."
        )
    if policy.group_from is not None and policy.group_from <= probe.scale:
        raise UserError(f"the probe at scale {probe.scale} needs that scale decoded alone; start the group later.")
