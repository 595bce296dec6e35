"""How the exported tiers are chosen from the validated members: each is the fastest that keeps its promise."""

from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.search.records import Measurement

FAITHFUL_LOSS = 0.16  # an SSIM of 0.84, what SkipVAR (arXiv 2506.08908) calls faithful by default


@dataclass(frozen=True)
class TierRule:
    """What a member must keep on held-out prompts, `max_drop` being the study's quality budget (QualitySettings).

    With scores: a loss of at most `max_loss`, and, when `no_drop`, a 95 % interval of the scene-score drop that
    reaches zero; otherwise a drop within the budget. Without scores: a loss within the budget and at most `loss_alone`.
    """

    tier: str
    max_loss: float
    no_drop: bool
    loss_alone: float

    def keeps(self, measured: Measurement, max_drop: float) -> bool:
        """Returns whether a held-out measurement keeps the promise."""
        if measured.scored:
            within = measured.score_drop_interval[0] <= 0 if self.no_drop else measured.score_drop <= max_drop
            kept = within and measured.loss <= self.max_loss
        else:
            kept = measured.loss <= min(self.loss_alone, max_drop)
        return kept and measured.speed_up > 1

    def text(self, max_drop: float, *, scored: bool = True, loss: str = "1 - SSIM") -> str:
        """Returns the rule as one sentence, which every exported policy carries."""
        max_loss = self.max_loss if scored else min(self.loss_alone, max_drop)
        drop = "a scene-score drop whose 95 % interval includes zero"
        if not self.no_drop:
            drop = f"a scene-score drop of at most {max_drop:g}"
        loss = f"a loss ({loss} to dense) of at most {max_loss:g}"
        promises = [drop] * scored + [loss] * (max_loss < 1 or not scored)
        return f"the fastest validated policy with {' and '.join(promises)}, on held-out prompts and seeds"


TIER_RULES = (
    TierRule("lossless", 0.05, no_drop=True, loss_alone=0.05),
    TierRule("high", 0.10, no_drop=True, loss_alone=0.10),
    TierRule("balanced", 1.0, no_drop=True, loss_alone=FAITHFUL_LOSS),
    TierRule("fast", 1.0, no_drop=False, loss_alone=1.0),
)


def choose_tiers(members: Sequence[Measurement], max_drop: float) -> dict[str, int]:
    """Returns for each tier the index of its member; a tier that no member can keep is missing."""
    chosen = {}
    for rule in TIER_RULES:
        keeping = [index for index, measured in enumerate(members) if rule.keeps(measured, max_drop)]
        if keeping:
            chosen[rule.tier] = min(keeping, key=lambda index: members[index].latency / members[index].dense_latency)
    return chosen
