"""What a comparison takes and returns: candidates, settings, one row a policy. Plain frozen data that tables and plots read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from autoprune.errors import UserError
from autoprune.policy import Grid, Policy, policy_files
from autoprune.search.records import Measurement

if TYPE_CHECKING:
    from autoprune.search.space import SearchSpace, Target

DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """A policy to compare; `kind` is preset, control or file, `inferred` says that the paper leaves parts of it open."""

    name: str
    policy: Policy
    source: str
    kind: str = "preset"
    inferred: bool = False


@dataclass(frozen=True)
class ComparisonSettings:
    """`rounds` is the least number of timed rounds: every batch of prompts gets one. `per_prompt` prompts are timed alone.

    `seed` chooses prompts and noise. A study's final numbers are of the prompts of seed 0.
    """

    prompts: int
    batch: int
    rounds: int
    per_prompt: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("batch", 1), ("rounds", 1), ("per_prompt", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    @property
    def total_rounds(self) -> int:
        """Returns how many rounds a whole comparison has."""
        return max(self.rounds, -(-self.prompts // self.batch))


@dataclass(frozen=True)
class ComparedPolicy:
    """One row of a comparison.

    `speed_up_spread` is half the interquartile range of dense / policy seconds of the same round. `batch_quantiles` are p50
    and p95 seconds over batches, `prompt_quantiles` over prompts generated alone (None when none was timed).
    `share_computed` is the share of tokens computed, exactly by the plan, and as counted in the first batch for a policy
    that decides while it generates.
    """

    candidate: Candidate
    measurement: Measurement
    speed_up_spread: float
    batch_quantiles: tuple[float, float]
    prompt_quantiles: tuple[float, float] | None
    share_computed: float


@dataclass(frozen=True)
class Comparison:
    """What compare() found: dense, then every policy in the order given.

    `prompts_sha256` identifies prompts of the user's own (PromptFile.sha256), empty for rendered scenes'. `pictures` holds
    images [P, 3, H, W] or videos [P, 3, F, H, W], `frame_rate` frames a second, of the first prompts by policy name, `texts`
    those prompts. `rounds` counts finished rounds; after Ctrl-C (`interrupted`) they may be fewer than asked for.
    """

    backbone: str
    revision: str
    scale_schedule: tuple[Grid, ...]
    device: Mapping[str, object]
    settings: ComparisonSettings
    prompts_sha256: str
    policies: tuple[ComparedPolicy, ...]
    pictures: Mapping[str, Tensor]
    texts: tuple[str, ...]
    frame_rate: float
    rounds: int
    interrupted: bool


def preset_candidates(space: "SearchSpace") -> list[Candidate]:
    """Returns every preset and control of a space but dense; `space.missing` says which its target does not allow."""
    return [
        Candidate(preset.name, preset.policy, preset.source, "control" if preset.control else "preset", preset.inferred)
        for preset in space.presets()
        if preset.name != DENSE
    ]


def file_candidates(source: Path, target: "Target", *, taken: Sequence[str]) -> list[Candidate]:
    """Reads a policy file or every one in a folder; a file named like another candidate keeps its suffix in its name.

    Raises UserError for a folder without policy files and for a file that is not a valid policy of this target
    or changes nothing there.
    """
    candidates = []
    for file in policy_files(source):
        policy, name = Policy.load(file), file.name if file.stem in (DENSE, *taken) else file.stem
        try:
            facts = {"skippable": target.skippable, "course": target.course}
            policy.check_fits(target.backbone, target.depth, target.scale_schedule, **facts)
            policy.check_prunes()
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        candidates.append(Candidate(name, policy, str(file), "file"))
    return candidates
