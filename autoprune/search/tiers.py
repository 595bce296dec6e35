"""How the exported tiers are chosen from the validated members: each is the fastest that is shown to keep its promise.

A promise counts as kept when the member's own 95 % interval on held-out prompts lies within the limits: 200 simulated
studies export two policies that break theirs (tests/test_winners_curse.py). Holm's correction over all members would cost
speed; its p-values are reported beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.measure.statistics import holm, interval_p, mcnemar_p, tango_p
from autoprune.search.records import Measurement

FAITHFUL_LOSS = 0.16  # an SSIM of 0.84, what SkipVAR (arXiv 2506.08908) calls faithful by default
ALPHA = 0.05  # of a 95 % interval, half of it above


@dataclass(frozen=True)
class TierRule:
    """What a member must keep on held-out prompts, `max_drop` being the study's quality budget (QualitySettings).

    With scores: a loss within `max_loss` and a scene-score drop within the budget, and, when `no_drop`,
    a 95 % interval of that drop that reaches zero. Without scores: a loss within the budget and `loss_alone`.
    """

    tier: str
    max_loss: float
    no_drop: bool
    loss_alone: float

    def promise_p(self, members: Sequence[Measurement], max_drop: float) -> list[float]:
        """Returns for each member the Holm-adjusted p-value of a loss or drop beyond the limits."""
        return holm([self._broken_p(measured, max_drop) for measured in members])

    def chosen(self, members: Sequence[Measurement], max_drop: float) -> int | None:
        """Returns the index of the fastest member that keeps the promise, None without one."""
        keeping = [
            index
            for index, measured in enumerate(members)
            if self._broken_p(measured, max_drop) <= ALPHA / 2 and self._may_keep(measured)
        ]
        return min(keeping, key=lambda index: members[index].latency / members[index].dense_latency, default=None)

    def text(self, max_drop: float, *, scored: bool = True, loss: str = "1 - SSIM") -> str:
        """Returns the rule as one sentence, which every exported policy carries."""
        max_loss = self._loss_limit(max_drop, scored=scored)
        drop = f"a scene-score drop of at most {max_drop:g}" + " whose 95 % interval includes zero" * self.no_drop
        loss = f"a loss ({loss} to dense) of at most {max_loss:g}"
        promises = [drop] * scored + [loss] * (max_loss < 1 or not scored)
        return f"the fastest validated policy with {' and '.join(promises)}, by its 95 % interval on held-out prompts and seeds"

    def _broken_p(self, measured: Measurement, max_drop: float) -> float:
        """Returns the one-sided p-value of breaking either limit: both must be kept, so the larger one counts."""
        max_loss = self._loss_limit(max_drop, scored=measured.scored)
        found = [_drop_beyond_p(measured, max_drop)] if measured.scored else []
        if max_loss < 1:
            unknown = measured.loss_interval is None
            found.append(1.0 if unknown else interval_p(measured.loss, measured.loss_interval, limit=max_loss))
        return max(found, default=0.0)

    def _may_keep(self, measured: Measurement) -> bool:
        drops = measured.scored and self.no_drop and measured.score_drop_interval[0] > 0
        return measured.speed_up > 1 and not drops

    def _loss_limit(self, max_drop: float, *, scored: bool) -> float:
        return self.max_loss if scored else min(self.loss_alone, max_drop)


TIER_RULES = (
    TierRule("lossless", 0.05, no_drop=True, loss_alone=0.05),
    TierRule("high", 0.10, no_drop=True, loss_alone=0.10),
    TierRule("balanced", 1.0, no_drop=True, loss_alone=FAITHFUL_LOSS),
    TierRule("fast", 1.0, no_drop=False, loss_alone=1.0),
)


def choose_tiers(members: Sequence[Measurement], max_drop: float) -> dict[str, int]:
    """Returns for each tier the index of its member; a tier whose promise no member is shown to keep is missing."""
    chosen = {rule.tier: rule.chosen(members, max_drop) for rule in TIER_RULES}
    return {tier: index for tier, index in chosen.items() if index is not None}


def drop_p(members: Sequence[Measurement]) -> list[float | None]:
    """Returns for each member the Holm-adjusted two-sided p-value of no score drop at all; None for all without scores."""
    if not all(measured.scored for measured in members):
        return [None] * len(members)
    return holm([_no_drop_p(measured) for measured in members])


def _drop_beyond_p(measured: Measurement, limit: float) -> float:
    if measured.score_flips is None:
        return interval_p(measured.score_drop, measured.score_drop_interval, limit=limit)
    return tango_p(*measured.score_flips, pairs=measured.prompts, limit=limit)


def _no_drop_p(measured: Measurement) -> float:
    if measured.score_flips is not None:
        return mcnemar_p(*measured.score_flips)
    low, high = measured.score_drop_interval
    mirrored = interval_p(-measured.score_drop, (-high, -low), limit=0)
    return min(1.0, 2 * min(interval_p(measured.score_drop, (low, high), limit=0), mirrored))
