"""How far two plans run alike, and whether one leaves behind what the other goes on from: what decides on shared prefixes."""

from dataclasses import replace

from autoprune.policy import Policy
from autoprune.pruning.plan import WHOLE_SCALE, Plan, ScalePlan
from autoprune.pruning.signals import DELTA
from autoprune.rules import KeyRule


def agreed_scales(recorded: Plan, wanted: Plan) -> int:
    """Returns how many runs of scales from the first a generation of `wanted` may take over from one of `recorded`.

    At least one run of `wanted` is left. What data decided in the recorded generation alone is not known here: a
    branch that it dropped early (autoprune/prefix.py looks at that).
    """
    rules = recorded.policy, wanted.policy
    if any(policy.adaptive and policy.batch == "split" for policy in rules):
        return 0  # samples run one after the other
    most, alike = len(wanted.scales) - 1, 0
    for ours, theirs in zip(recorded.scales, wanted.scales, strict=False):
        if not _alike(ours, theirs, same_chunks=recorded.chunks == wanted.chunks):
            break
        alike += 1
    settled = sum(scale.index < min(_until_decided(*rules), _until_replaced(*rules)) for scale in wanted.scales)
    return min(most, alike, settled, _until_keys_differ(recorded.keys, wanted.keys))


def same_decisions(recorded: Policy, wanted: Policy) -> bool:
    """Returns whether the data decides on branches by the same rules."""
    return _deciding(recorded) == _deciding(wanted)


def _alike(recorded: ScalePlan, wanted: ScalePlan, *, same_chunks: bool) -> bool:
    """Returns whether a scale runs the same computation in both plans and stores and records all that is wanted."""
    chunked = min(wanted.pruned_sites | {site for site, _ in wanted.stores}, default=WHOLE_SCALE) < WHOLE_SCALE
    if (chunked or DELTA in wanted.records) and not same_chunks:
        return False
    if DELTA in wanted.records and recorded.delta_chunk != wanted.delta_chunk:
        return False
    kept = replace(recorded, stores=wanted.stores, records=wanted.records, delta_chunk=wanted.delta_chunk)
    return kept == wanted and wanted.stores <= recorded.stores and wanted.records <= recorded.records


def _until_keys_differ(recorded: KeyRule, wanted: KeyRule) -> float:
    """Returns how many scales run before either rule takes keys away that the other leaves."""
    return float("inf") if recorded == wanted else min(map(_untouched, (recorded, wanted)))


def _untouched(rule: KeyRule) -> float:
    if rule.budget < 1:
        return 0
    return float("inf") if rule.first is None else rule.first + rule.last + 1


def _until_decided(recorded: Policy, wanted: Policy) -> float:
    """Returns the first scale at which the data decides anything that it did not decide in the recorded generation."""
    decides = [float("inf")]
    if wanted.stop and wanted.stop != recorded.stop:
        decides.append(wanted.stop.from_scale)
    if not same_decisions(recorded, wanted):
        decides += [wanted.probe.scale] if wanted.probe else []
        decides += [wanted.guidance.from_scale] if wanted.guidance.branch == "adaptive" else []
    return min(decides)


def _until_replaced(recorded: Policy, wanted: Policy) -> float:
    """Returns the first scale at which what replaces a dropped branch differs: its last effect must have been kept."""
    ours, theirs = recorded.guidance.replacement, wanted.guidance.replacement
    if ours == theirs:
        return float("inf")
    if theirs == "extrapolate":
        return 0
    return wanted.guidance.from_scale if wanted.guidance.branch != "both" else float("inf")


def _deciding(policy: Policy) -> tuple[object, ...]:
    return (policy.guidance if policy.guidance.branch == "adaptive" else None, policy.probe)
