"""What the configuration becomes below the entry: plain frozen data, one class per group of conf/."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from autoprune.errors import UserError, unknown_name
from autoprune.search.space_file import SpaceDefinition

SAMPLERS = ("gp", "tpe", "nsga2", "random")
LATENCIES = ("table", "measured")


@dataclass(frozen=True)
class SamplerSettings:
    """`startup` trials, presets included, are drawn before the model of `gp` or `tpe` is used."""

    name: str = "gp"
    startup: int = 28

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise unknown_name("sampler", self.name, SAMPLERS)
        _at_least("sampler.startup", self.startup, 1)


@dataclass(frozen=True)
class LatencySettings:
    """`measured` times every trial in `rounds` rounds interleaved with dense; `table` sums per-scale times.

    `batch` is the number of prompts per generation, of quality runs too. Front members are always timed for real.
    """

    name: str = "table"
    batch: int = 16
    rounds: int = 5
    warm_up: int = 1

    def __post_init__(self) -> None:
        if self.name not in LATENCIES:
            raise unknown_name("latency", self.name, LATENCIES)
        for name in ("batch", "rounds"):
            _at_least(f"latency.{name}", getattr(self, name), 1)
        _at_least("latency.warm_up", self.warm_up, 0)


@dataclass(frozen=True)
class QualitySettings:
    """Prompts, thresholds and budgets of quality.

    `prompts` and `held_out_prompts` count images of a trial and of the final measurement. A trial is feasible when its
    paired mean scene-score drop is at most `max_score_drop` (and its peak memory at most `max_memory_mb`, if set).
    The final measurement uses fewer prompts when the budget's minutes run out; `held_out_seed` is added to its seed.
    """

    name: str = "scenes"
    prompts: int = 96
    held_out_prompts: int = 160
    threshold: float = 0.75
    max_score_drop: float = 0.12
    max_memory_mb: float | None = None
    held_out_seed: int = 1_000_003

    def __post_init__(self) -> None:
        for name in ("prompts", "held_out_prompts"):
            _at_least(f"quality.{name}", getattr(self, name), 1)
        if not 0 <= self.max_score_drop <= 1:
            raise UserError(f"quality.max_score_drop must be in [0, 1], got {self.max_score_drop}.")
        if self.held_out_seed == 0:
            raise UserError("quality.held_out_seed must not be 0: held-out noise would equal the search's.")


@dataclass(frozen=True)
class BudgetSettings:
    """`trials` counts evaluated policies, dense and presets included. The search phase stops early enough for the
    whole study to end within `minutes` of wall clock (None: no limit). `front` members at most are validated."""

    trials: int = 240
    minutes: float | None = 5.5
    front: int = 10

    def __post_init__(self) -> None:
        _at_least("budget.trials", self.trials, 1)
        _at_least("budget.front", self.front, 1)
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"budget.minutes must be above 0, got {self.minutes}.")


@dataclass(frozen=True)
class StudySettings:
    """Everything a study needs besides the backbone. `directory`/`name` is the study folder.

    Trials start where dense runs of their prompts had got to; what that takes is at most `shared_prefix_mb`, 0 for none.
    """

    directory: Path
    name: str
    space: SpaceDefinition
    seed: int = 0
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    latency: LatencySettings = field(default_factory=LatencySettings)
    quality: QualitySettings = field(default_factory=QualitySettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    discard: bool = True
    shared_prefix_mb: int = 2048

    def __post_init__(self) -> None:
        _at_least("study.shared_prefix_mb", self.shared_prefix_mb, 0)

    @property
    def folder(self) -> Path:
        """Returns the study folder."""
        return Path(self.directory) / self.name

    @property
    def shares_prefixes(self) -> bool:
        """Returns whether trials share early scales: not where their own peak memory counts."""
        return self.shared_prefix_mb > 0 and self.quality.max_memory_mb is None

    def measurement_identity(self) -> dict[str, object]:
        """Returns what must be equal for two runs' numbers to belong to one study (budget and sampler may differ)."""
        return {"seed": self.seed, "latency": asdict(self.latency), "quality": asdict(self.quality)}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}.")
