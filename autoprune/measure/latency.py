"""Seconds per batch: real runs interleaved with dense, and a table of per-scale times for estimates between them.

Other work on the machine slows neighbouring runs alike, so candidates alternate with dense, and every time entered in
the table is divided by how slow the machine was: known scales of the same run say it, or a dense run beside it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.generation import Observer
from autoprune.measure.device import synchronise
from autoprune.measure.statistics import median_and_spread
from autoprune.pruning.plan import Plan, ScalePlan

REST = "rest"
Runs = Sequence[tuple[str, float]]
STALE = 0.2  # share of a dense run; sets of six runs differ by 0.09 on a busy machine (embedded, batch 4, two cores, load 7)
KNOWN_SAMPLES = 5  # of a scale: what it was known to take corrects its later times, so one slow start must not decide it
KNOWN_SHARE = 0.3  # of a run's seconds, below which known scales say too little about how slow the machine is


@dataclass(frozen=True)
class Timing:
    """Seconds per run: median, half the interquartile range, and every sample in order."""

    median: float
    spread: float
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: list[float] | tuple[float, ...]) -> "Timing":
        """Summarises samples."""
        return Timing(*median_and_spread(samples), tuple(samples))


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """Returns what `run` returns and its seconds, the device idle at both ends."""
    synchronise(device)
    started = time.perf_counter()
    result = run()
    synchronise(device)
    return result, time.perf_counter() - started


def interleaved(
    runs: Mapping[str, Callable[[], Tensor]], *, rounds: int, warm_up: int, device: torch.device
) -> dict[str, Timing]:
    """Times every run once a round, each round beginning with another run, after `warm_up` untimed rounds."""
    names, samples = list(runs), defaultdict(list)
    for turn in range(-warm_up, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _, seconds = timed(runs[name], device)
            if turn >= 0:
                samples[name].append(seconds)
    return {name: Timing.of(samples[name]) for name in names}


class ScaleClock(Observer):
    """Stamps the seconds of every scale of one generation of `batch` prompts, in `runs` by what really ran.

    What is left of the whole is text, decoding and, where policies have them, decisions between scales.
    """

    def __init__(self, device: torch.device, batch: int) -> None:
        self._device, self._batch, self._started = device, batch, 0.0
        self._rows = self._tokens = 0
        self.runs: list[tuple[str, float]] = []

    def scale_started(self, scale: ScalePlan) -> None:
        synchronise(self._device)
        self._started = time.perf_counter()

    def forward_done(self, scale: ScalePlan, rows: int, tokens: int) -> None:
        self._rows, self._tokens = rows, tokens

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        synchronise(self._device)
        now = time.perf_counter()
        key = scale_key(
            scale,
            both=self._rows > len(logits),
            kept=self._tokens if scale.whole and not scale.group else scale.kept,
            alone=len(logits) < self._batch,
        )
        self.runs.append((key, now - self._started))
        self._started = now  # scales of a group follow without a start of their own

    @property
    def keys(self) -> list[str]:
        """Returns what ran, in order."""
        return [key for key, _ in self.runs]

    @property
    def seconds(self) -> float:
        """Returns the seconds of all scales together."""
        return sum(seconds for _, seconds in self.runs)


def scale_key(scale: ScalePlan, *, both: bool | None = None, kept: int | None = None, alone: bool = False) -> str:
    """Returns what decides a scale's time: its index, kept tokens, rows, and how it is pruned.

    `both`, `kept` and `alone` (one sample of a split batch) are what ran where data decided; by default what the plan says.
    The number of keys that earlier scales left is not part of it; its effect is within the table's reported error.
    """
    both = scale.branch == "both" if both is None else both
    parts = [f"scale{scale.index}", f"kept{scale.kept if kept is None else kept}", "both" if both else "single"]
    if alone:
        parts.append("alone")
    if scale.group:
        parts.append("group" + "+".join(map(str, scale.group)))
    if scale.pruning is not None:
        rule = scale.pruning
        chunked = f"chunks{'-'.join(map(str, scale.kept_chunks))}" if scale.kept_chunks else f"sites{len(scale.pruned_sites)}"
        scorer = "+".join(sorted(rule.scorer))
        parts += [scorer, rule.granularity, chunked, rule.rows, rule.reducer, rule.restorer, rule.interpolation]
    return "/".join(parts)


def rest_key(plan: Plan) -> str:
    """Returns the key of what a generation does outside its scales."""
    policy = plan.policy
    return REST + "/probe" * bool(policy.probe) + "/alone" * (policy.adaptive and policy.batch == "split")


def plan_keys(plan: Plan) -> list[str]:
    """Returns the keys of everything a plan runs, where nothing depends on the data."""
    return [*map(scale_key, plan.scales), rest_key(plan)]


class LatencyTable:
    """Per-scale seconds collected from real runs, each corrected by how slow the machine was then.

    `reference` is dense seconds per batch as first measured: all entries are in seconds of that moment.
    """

    def __init__(self, reference: float) -> None:
        self.reference = reference
        self._samples: dict[str, list[float]] = defaultdict(list)

    def slowness(self, runs: Runs) -> float | None:
        """Returns how slow the machine was in runs (key, seconds), 1 being the table's moment, from the keys it knows.

        None where known keys are less than KNOWN_SHARE of the seconds.
        """
        known = [(seconds, self._median(key)) for key, seconds in runs if len(self._samples.get(key, ())) >= KNOWN_SAMPLES]
        share = sum(seconds for seconds, _ in known)
        enough = share > KNOWN_SHARE * sum(seconds for _, seconds in runs)
        return share / sum(median for _, median in known) if enough else None

    def add(self, runs: Runs, *, slowness: float) -> None:
        """Enters runs (key, seconds) of one generation."""
        for key, seconds in runs:
            self._samples[key].append(seconds / slowness)

    def total(self, keys: Iterable[str]) -> tuple[float, float] | None:
        """Returns the summed median and the spread in seconds per batch, None while one of the keys was never run."""
        parts = self.parts(keys)
        return parts and (sum(median for median, _ in parts), sum(spread**2 for _, spread in parts) ** 0.5)

    def parts(self, keys: Iterable[str]) -> list[tuple[float, float]] | None:
        """Returns the median and spread of each key, None while one of them was never run."""
        keys = list(keys)
        if any(key not in self._samples for key in keys):
            return None
        return [median_and_spread(self._samples[key]) for key in keys]

    def _median(self, key: str) -> float:
        return median_and_spread(self._samples[key])[0]

    def to_plain(self) -> dict[str, object]:
        """Returns the table as JSON values."""
        return {"reference": self.reference, "samples": dict(self._samples)}

    @staticmethod
    def begun(dense: Sequence[Runs], *, saved: "LatencyTable | None" = None) -> "LatencyTable":
        """Returns a table that knows these dense runs: the saved one, or a new one where that is stale.

        How slow the machine is as a whole is divided out; a saved table is stale when scales take other shares of a dense
        run than they took, more than STALE of it in all: its times of pruned scales then say nothing about this machine.
        """
        totals = [sum(seconds for _, seconds in runs) for runs in dense]
        fresh = LatencyTable(median_and_spread(totals)[0])
        fresh._add_dense(dense, totals)
        if saved is None or saved._differs(fresh) > STALE:
            return fresh
        saved._add_dense(dense, totals)
        return saved

    def _add_dense(self, dense: Sequence[Runs], totals: Sequence[float]) -> None:
        for runs, seconds in zip(dense, totals, strict=True):
            self.add(runs, slowness=seconds / self.reference)

    def _differs(self, other: "LatencyTable") -> float:
        """Returns which share of the time of the other table's keys this one gives to other keys than it, 0 to 1."""
        ours = [self._median(key) if key in self._samples else 0.0 for key in other._samples]
        theirs = [other._median(key) for key in other._samples]
        return sum(abs(a / (sum(ours) or 1) - b / sum(theirs)) for a, b in zip(ours, theirs, strict=True)) / 2

    @staticmethod
    def from_plain(plain: Mapping[str, object]) -> "LatencyTable":
        """Reads what `to_plain` wrote."""
        table = LatencyTable(float(plain["reference"]))
        table._samples.update({key: list(values) for key, values in plain["samples"].items()})
        return table
