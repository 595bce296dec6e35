"""What the configuration becomes below the entry: plain frozen data, one class per group of conf/."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from autoprune.backbones.official import RELEASED
from autoprune.errors import UserError, unknown_name
from autoprune.measure.metrics import METRICS
from autoprune.measure.metrics.suite import check_metrics
from autoprune.search.prompt_files import PromptFile
from autoprune.search.space_file import SpaceDefinition
from autoprune.testbed import motion_score, score

QUALITIES = ("scenes", "motion", "fidelity")
EMBEDDED = {"tiny": "scenes", "tiny_video": "motion"}  # backbones with prompts of their own world, and their quality
_METRICS = ("psnr", "ssim", "tokens")  # measured on held-out prompts where nothing else is asked for
METRICS_OF = {"scenes": _METRICS, "motion": (*_METRICS, "temporal_error", "flicker"), "fidelity": _METRICS}
THRESHOLDS = {"scenes": score.MAIN_THRESHOLD, "motion": motion_score.MAIN_THRESHOLD}
AUTO = "auto"
SAMPLERS = ("gp", "tpe", "nsga2", "random")
PENDING = ("believer", "liar", "none")
LATENCIES = ("table", "measured")
STORAGES = {"journal": "", "postgresql": "postgresql", "grpc": "grpc://"}  # and how their addresses begin


@dataclass(frozen=True)
class SamplerSettings:
    """`startup` trials, presets included, are drawn before the model of `gp` or `tpe` is used.

    `pending` is what their models take the trials of other workers for that still run: told with what the model believes of
    them (`believer`), told with bad values (`liar`), or nothing (`none`). To tpe both are bad values.
    """

    name: str = "gp"
    startup: int = 28
    pending: str = "believer"

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise unknown_name("sampler", self.name, SAMPLERS)
        if self.pending not in PENDING:
            raise unknown_name("sampler.pending", self.pending, PENDING)
        _at_least("sampler.startup", self.startup, 1)


@dataclass(frozen=True)
class LatencySettings:
    """`measured` times every trial in `rounds` rounds interleaved with dense; `table` sums per-scale times.

    `batch` is the number of prompts per generation, of quality runs too; auto becomes a number before a study begins
    (fitting.py). Front members are always timed for real.
    """

    name: str = "table"
    batch: int | Literal["auto"] = 16
    rounds: int = 5
    warm_up: int = 1

    def __post_init__(self) -> None:
        if self.name not in LATENCIES:
            raise unknown_name("latency", self.name, LATENCIES)
        if self.batch != AUTO:
            _at_least("latency.batch", self.batch, 1)
        _at_least("latency.rounds", self.rounds, 1)
        _at_least("latency.warm_up", self.warm_up, 0)


@dataclass(frozen=True)
class QualitySettings:
    """Prompts, thresholds and budgets of quality: `scenes` and `motion` score images and videos of prompts of their
    own, `fidelity` has no score.

    `prompts` and `held_out_prompts` count images of a trial and of the final measurement. A trial is feasible when its
    paired mean scene-score drop is at most `max_score_drop`, without scores its mean loss at most `max_loss` (and its peak
    memory at most `max_memory_mb`, if set). The default of `max_loss` is twice FAITHFUL_LOSS. The loss is how far the paired
    metric `loss` is from what dense images get (ssim: 1 - SSIM); `metrics` are measured on held-out prompts only. `threshold`
    is the least IoU at which a shape counts. Where these two are None they become what METRICS_OF and THRESHOLDS have for the
    name. The final measurement uses fewer prompts when the budget's minutes run out; `held_out_seed` is added to its seed.
    """

    name: str = "scenes"
    prompts: int = 96
    held_out_prompts: int = 160
    threshold: float | None = None
    max_score_drop: float = 0.12
    max_loss: float = 0.32
    max_memory_mb: float | None = None
    held_out_seed: int = 1_000_003
    loss: str = "ssim"
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "held_out_prompts"):
            _at_least(f"quality.{name}", getattr(self, name), 1)
        for name in ("max_score_drop", "max_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"quality.{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.held_out_seed == 0:
            raise UserError("quality.held_out_seed must not be 0: held-out noise would equal the search's.")
        if self.threshold is None:
            object.__setattr__(self, "threshold", THRESHOLDS.get(self.name))
        if self.metrics is None:
            object.__setattr__(self, "metrics", METRICS_OF.get(self.name))
        losses = [name for name, metric in METRICS.items() if metric.info.perfect is not None]
        if self.loss not in losses:
            raise unknown_name("quality.loss", self.loss, losses)

    @property
    def counts(self) -> dict[str, int]:
        """Returns the number of prompts by split."""
        return {"search": self.prompts, "held_out": self.held_out_prompts}

    @property
    def loss_text(self) -> str:
        """Returns in words what the loss is."""
        return METRICS[self.loss].info.loss_text

    @property
    def max_drop(self) -> float:
        """Returns the quality budget, which limits `Measurement.drop`."""
        return self.max_loss if self.name == "fidelity" else self.max_score_drop

    @property
    def margin(self) -> float:
        """Returns how much of the quality budget a careful search leaves: half that of a score, as few prompts flatter some
        policies, and one that uses all of it on them may be beyond it on others. Losses hardly differ between prompts."""
        return 0.0 if self.name == "fidelity" else self.max_score_drop / 2

    @property
    def careful_drop(self) -> float:
        """Returns the quality budget of a careful search."""
        return self.max_drop - self.margin


@dataclass(frozen=True)
class BudgetSettings:
    """`trials` counts evaluated policies, dense and presets included. The search phase stops early enough for the
    whole study to end within `minutes` of wall clock (None: no limit). `front` trials at most are validated beside presets."""

    trials: int = 240
    minutes: float | None = 5.5
    front: int = 10

    def __post_init__(self) -> None:
        _at_least("budget.trials", self.trials, 1)
        _at_least("budget.front", self.front, 1)
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"budget.minutes must be above 0, got {self.minutes}.")


@dataclass(frozen=True)
class StorageSettings:
    """Where the trials of a study live: a `journal` file in its folder, a `postgresql` server at `url`, or at `url` Optuna's
    `grpc` proxy in front of one. A server that goes away is waited for, `patience` minutes at most.
    """

    name: str = "journal"
    url: str | None = None
    patience: float = 10.0

    def __post_init__(self) -> None:
        if self.name not in STORAGES:
            raise unknown_name("storage", self.name, STORAGES)
        start = STORAGES[self.name]
        if bool(start) != (self.url is not None and self.url.startswith(start)):
            rule = f"a storage.url that starts with {start}" if start else "no storage.url"
            given = self.url and self.url.partition(":")[0]  # the rest may hold a password
            raise UserError(f"storage {self.name} takes {rule}, got {given}; see README, Many GPUs.")
        if self.patience < 0:
            raise UserError(f"storage.patience must be at least 0 minutes, got {self.patience}.")


@dataclass(frozen=True)
class StudySettings:
    """Everything a study needs besides the backbone. `directory`/`name` is the study folder.

    `prompts` are the user's own, which the quality `fidelity` needs and no other one takes. Trials start where earlier runs
    of their prompts had got to; that takes at most `shared_prefix_mb`, 0 for none, and with CUDA `shared_prefix_host_mb` of
    pinned memory beside them. `weights` are the files and folders that metrics read, by key. A worker on another machine
    counts as gone when it gave no sign for `lease` seconds.
    """

    directory: Path
    name: str
    space: SpaceDefinition
    seed: int = 0
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    latency: LatencySettings = field(default_factory=LatencySettings)
    quality: QualitySettings = field(default_factory=QualitySettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    prompts: PromptFile | None = None
    discard: bool = True
    shared_prefix_mb: int = 2048
    shared_prefix_host_mb: int = 4096
    weights: Mapping[str, Path] = field(default_factory=dict)
    storage: StorageSettings = field(default_factory=StorageSettings)
    lease: float = 120.0

    def __post_init__(self) -> None:
        self._check_prompts()
        check_metrics((self.quality.loss, *self.quality.metrics), self.weights)
        for name in ("shared_prefix_mb", "shared_prefix_host_mb"):
            _at_least(f"study.{name}", getattr(self, name), 0)
        _at_least("study.lease", self.lease, 1)

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
        unused = ("metrics", *(("max_loss",) if self.prompts is None else ("max_score_drop", "threshold")))
        quality = {name: value for name, value in asdict(self.quality).items() if name not in unused}
        identity = {"seed": self.seed, "latency": asdict(self.latency), "quality": quality}
        return identity if self.prompts is None else {"prompts": self.prompts.sha256(), **identity}

    def _check_prompts(self) -> None:
        name = self.quality.name
        if name not in QUALITIES:
            raise unknown_name("quality", name, QUALITIES)
        if self.prompts is None:
            if name == "fidelity":
                raise UserError("quality fidelity needs prompts, got none; give prompts=FILE.")
            return
        if name != "fidelity":
            raise UserError(f"quality {name} makes its own prompts, got {self.prompts.source!r}; set quality=fidelity.")
        for split, count in self.quality.counts.items():
            self.prompts.take(split, count)


def world_of(backbone: str) -> str:
    """Returns the quality whose prompts a backbone is asked for where there are none of the user's.

    Raises UserError for one that makes videos and has learnt no embedded world: scenes are scored as images.
    """
    spec = RELEASED.get(backbone)
    if spec is not None and spec.sampling.frames is not None:
        raise UserError(
            f"backbone {backbone} makes videos, which scenes do not ask for; give prompts of your own (prompts=FILE of a "
            "search, prompts_file=FILE of other commands)."
        )
    return EMBEDDED.get(backbone, "scenes")


def default_quality(backbone: str, prompts: PromptFile | None) -> QualitySettings:
    """Returns what commands beside the search judge by: the backbone's own world, or the user's prompts. Raises as world_of."""
    return QualitySettings() if prompts else QualitySettings(name=world_of(backbone))


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}.")
