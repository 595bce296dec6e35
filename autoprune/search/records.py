"""What a study produces: measurements, trials, front members. Plain frozen data that reports, plots and trackers read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from autoprune.measure.metrics.summary import MetricValue
from autoprune.measure.statistics import Interval
from autoprune.policy import Policy

STATES = ("complete", "discarded", "failed")
TIERS = ("lossless", "high", "balanced", "fast")


@dataclass(frozen=True)
class Measurement:
    """One policy against dense on the same prompts and seeds.

    Latencies are seconds per batch: `latency` the median, `latency_spread` half the interquartile range. `loss` (0 is dense)
    is what the study minimises, by default 1 - SSIM against the dense images, `psnr` is in dB. `score_drop` is the paired mean
    of dense minus pruned scene score (positive is worse) with its 95 % interval. `latency_source` is `measured` for real
    interleaved runs and `table` for an estimate summed from per-scale times. `peak_memory_mb` is None where nothing limits it
    in trials, the score fields are None for prompts that nothing scores.

    Intervals are 95 %: `loss_interval` of the mean loss over prompts, `speed_up_interval` of the speed-up over interleaved
    rounds (None for estimates). `score_flips` counts prompts lost and gained where scores are right or wrong. All three are
    None in records of studies from before they were measured. `metrics` holds those of quality.metrics, from held-out prompts.

    `drift` is how far dense strayed from its median while it was timed, relative, and `repeats` how often it was therefore
    timed again (measure/drift.py); None for estimates and in older records.
    """

    latency: float
    latency_spread: float
    dense_latency: float
    speed_up: float
    loss: float
    ssim: float
    psnr: float
    score_dense: float | None
    score: float | None
    score_drop: float | None
    score_drop_interval: tuple[float, float] | None
    peak_memory_mb: float | None
    prompts: int
    seed: int
    batch: int
    latency_source: str
    loss_interval: Interval | None = None
    speed_up_interval: Interval | None = None
    score_flips: tuple[int, int] | None = None
    metrics: Mapping[str, MetricValue] = field(default_factory=dict)
    drift: float | None = None
    repeats: int | None = None

    @property
    def scored(self) -> bool:
        """Returns whether the images were scored against their prompts."""
        return self.score_drop is not None

    @property
    def drop(self) -> float:
        """Returns what a study's quality budget limits (0 is dense): the score drop, the loss where nothing scores."""
        return self.score_drop if self.scored else self.loss

    def to_plain(self) -> dict[str, object]:
        """Returns the fields as JSON values."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return plain | {"metrics": {name: value.to_plain() for name, value in self.metrics.items()}}

    @staticmethod
    def from_plain(plain: Mapping[str, object]) -> "Measurement":
        """Reads what `to_plain` wrote."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        metrics = {name: MetricValue.from_plain(value) for name, value in plain.get("metrics", {}).items()}
        return Measurement(**(values | {"metrics": metrics}))


def preset_of(source: str) -> str:
    """Returns the name of the preset or control that a trial of this source is, empty for searched trials."""
    kind, _, name = source.partition(":")
    return name if kind in ("preset", "control") else ""


@dataclass(frozen=True)
class TrialRecord:
    """One evaluated policy of a study.

    `source` is `preset:NAME` (a published setting; `preset:dense` is the reference), `control:NAME` (shown for
    comparison, never exported), `sampler`, `repeat` (a known policy asked again, told without a run) or `random` (a
    fresh point after repeats). `feasible` says whether every constraint holds. A `discarded` trial was stopped early:
    its measurement covers only the first prompts. A `failed` one has none, its `note` says why: an error, or a fault
    (faults.py). `seconds` pass from asking the sampler on, `sampler_seconds` in asking it and in telling it of what came
    before. `worker` is the name of the process that evaluated it.
    """

    number: int
    source: str
    policy: Policy
    measurement: Measurement | None
    feasible: bool
    state: str
    seconds: float
    note: str = ""
    sampler_seconds: float = 0.0
    worker: str = ""

    @staticmethod
    def begun(number: int, source: str, policy: Policy, *, worker: str = "") -> "TrialRecord":
        """Returns the record of a trial before anything was measured: what it is if it fails."""
        return TrialRecord(number, source, policy, None, False, "failed", 0.0, worker=worker)

    @property
    def preset(self) -> str:
        """Returns the name of the preset or control, empty for searched trials."""
        return preset_of(self.source)


@dataclass(frozen=True)
class FrontMember:
    """A trial of the front, measured again on held-out prompts and seeds.

    `tier` is one of TIERS, or empty for a member no tier selected; a member that several tiers selected appears once
    per tier. `policy_path` is the exported file, None without a tier.

    Holm-adjusted p-values over all members looked at: `drop_p` of no score drop at all (two-sided; None without scores),
    `promise_p` of a loss or drop beyond what the tier allows (one-sided; None without a tier).
    """

    trial: TrialRecord
    held_out: Measurement
    tier: str
    policy_path: Path | None
    drop_p: float | None = None
    promise_p: float | None = None


@dataclass(frozen=True)
class DimensionRow:
    """One dimension of a search space over the trials of a study.

    `used` counts trials whose policy has it off its neutral value. `latency` and `loss` are its shares of importance
    (fANOVA, Hutter et al., ICML 2014: of the variance that a forest fitted to the trials explains), each summing to 1.
    `owed` is the share of the search front's hypervolume that is gone without the trials that use it: 0 never helped.
    """

    name: str
    used: int
    latency: float
    loss: float
    owed: float


@dataclass(frozen=True)
class Rivalry:
    """The validated front against the presets timed beside it.

    Hypervolumes of what keeps the quality budget, from one corner (front.reference_of). `ratios`: by preset that no other
    preset beats, speed-up of the fastest front member of at most its loss / its own. `best`: the preset of largest hypervolume.
    """

    front: float
    presets: float
    ratios: Mapping[str, float]
    best: str


@dataclass(frozen=True)
class StudyResult:
    """A finished (or stopped) study.

    `trials` holds every record by number, dense first. `front` holds the validated members, slowest first,
    `rejected` those that broke the budget or were beaten on held-out prompts.
    `presets` holds the held-out measurement of every preset that was timed together with the front, by name.
    `directory` is the study folder. `table_error` is the largest relative error of the latency table over the exported
    policies, None when latencies were measured. `loss_text` says what `Measurement.loss` is.
    """

    backbone: str
    space: str
    device: Mapping[str, object]
    dense: Measurement
    trials: tuple[TrialRecord, ...]
    front: tuple[FrontMember, ...]
    directory: Path
    presets: Mapping[str, Measurement]
    table_error: float | None = None
    rejected: tuple[FrontMember, ...] = ()
    interrupted: bool = False
    rivalry: Rivalry | None = None
    loss_text: str = "1 - SSIM"
    dimensions: tuple[DimensionRow, ...] = ()

    @property
    def sampler_share(self) -> float | None:
        """Returns sampler seconds / seconds of searched trials, the median, None without such trials."""
        searched = [trial for trial in self.trials if trial.source == "sampler" and trial.sampler_seconds > 0]
        return median(trial.sampler_seconds / trial.seconds for trial in searched) if searched else None
