"""How the exported tiers are chosen from the validated members: each is the fastest that keeps its promise."""

from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.search.records import Measurement


@dataclass(frozen=True)
class TierRule:
    """What a member must keep on held-out prompts: at most `max_loss` (1 - SSIM to dense), and, when `no_drop`, a 95 %
    interval of the scene-score drop that reaches zero; otherwise a drop within the study's budget."""

    tier: str
    max_loss: float
    no_drop: bool

    def keeps(self, measured: Measurement, max_score_drop: float) -> bool:
        """Returns whether a held-out measurement keeps the promise."""
        within = measured.score_drop_interval[0] <= 0 if self.no_drop else measured.score_drop <= max_score_drop
        return within and measured.loss <= self.max_loss and measured.speed_up > 1

    def text(self, max_score_drop: float) -> str:
        """Returns the rule as one sentence, which every exported policy carries."""
        drop = f"a scene-score drop of at most {max_score_drop:g}"
        if self.no_drop:
            drop = "a scene-score drop whose 95 % interval includes zero"
        loss = "" if self.max_loss >= 1 else f" and a loss (1 - SSIM to dense) of at most {self.max_loss:g}"
        return f"the fastest validated policy with {drop}{loss}, on held-out prompts and seeds"


TIER_RULES = (
    TierRule("lossless", 0.05, no_drop=True),
    TierRule("high", 0.10, no_drop=True),
    TierRule("balanced", 1.0, no_drop=True),
    TierRule("fast", 1.0, no_drop=False),
)

TIERS_TEXT = (
    "Every front member is measured again on held-out prompts and other seeds, its speed interleaved with dense. "
    "`lossless` is the fastest whose scene-score drop has a 95 % interval that includes zero and whose loss is at most 0.05; "
    "`high` allows a loss of 0.10; `balanced` asks for the interval alone; `fast` is the fastest whose mean drop stays within "
    "the study's budget. A looser tier that finds nothing faster holds the same policy as the stricter one."
)


def choose_tiers(members: Sequence[Measurement], max_score_drop: float) -> dict[str, int]:
    """Returns for each tier the index of its member; a tier that no member can keep is missing."""
    chosen = {}
    for rule in TIER_RULES:
        keeping = [index for index, measured in enumerate(members) if rule.keeps(measured, max_score_drop)]
        if keeping:
            chosen[rule.tier] = min(keeping, key=lambda index: members[index].latency / members[index].dense_latency)
    return chosen
