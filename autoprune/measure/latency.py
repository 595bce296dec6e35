"""Seconds per batch: real runs interleaved with dense, and a table of per-scale times for estimates between them.

Other work on the machine slows neighbouring runs alike, so candidates alternate with dense, and every time entered in
the table is divided by how slow the machine was: known scales of the same run say it, or a dense run beside it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.generation import Observer
from autoprune.measure.device import synchronise
from autoprune.measure.statistics import median_and_spread
from autoprune.pruning.plan import Plan, ScalePlan

REST = "rest"
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
    """Stamps the seconds of every scale of one generation; what is left of the whole is text and decoding."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._started = device, 0.0
        self.seconds: dict[str, float] = {}

    def scale_started(self, scale: ScalePlan) -> None:
        synchronise(self._device)
        self._started = time.perf_counter()

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        synchronise(self._device)
        now = time.perf_counter()
        self.seconds[scale_key(scale)] = now - self._started
        self._started = now  # scales of a group follow without a start of their own


def scale_key(scale: ScalePlan) -> str:
    """Returns what decides a scale's time: its index, kept tokens, rows, and how it is pruned.

    The number of keys that earlier scales left is not part of it; its effect is within the table's reported error.
    """
    parts = [f"scale{scale.index}", f"kept{scale.kept}", "both" if scale.branch == "both" else "single"]
    if scale.group:
        parts.append("group" + "+".join(map(str, scale.group)))
    if scale.pruning is not None:
        rule = scale.pruning
        kept = f"chunks{'-'.join(map(str, scale.kept_chunks))}" if scale.kept_chunks else f"sites{len(scale.pruned_sites)}"
        scorer = "+".join(sorted(rule.scorer))
        parts += [scorer, rule.granularity, kept, rule.rows, rule.reducer, rule.restorer, rule.interpolation]
    return "/".join(parts)


class LatencyTable:
    """Per-scale seconds collected from real runs, each corrected by how slow the machine was then.

    `reference` is dense seconds per batch as first measured: all entries are in seconds of that moment.
    """

    def __init__(self, reference: float) -> None:
        self.reference = reference
        self._samples: dict[str, list[float]] = defaultdict(list)

    def slowness(self, clock: ScaleClock, *, total: float | None = None) -> float | None:
        """Returns how slow the machine was in a run, 1 being the table's moment, from the scales the table knows.

        `total` is the seconds of a whole run, None for one that began at a later scale. None is returned where known scales
        are less than KNOWN_SHARE of the run.
        """
        seconds = self._all_seconds(clock, total)
        known = {key: median_and_spread(self._samples[key])[0] for key in seconds if len(self._samples.get(key, ())) > 1}
        share = sum(seconds[key] for key in known)
        return share / sum(known.values()) if share > KNOWN_SHARE * sum(seconds.values()) else None

    def add(self, clock: ScaleClock, *, total: float | None = None, slowness: float) -> None:
        """Enters one generation, of `total` seconds unless it began at a later scale."""
        for key, seconds in self._all_seconds(clock, total).items():
            self._samples[key].append(seconds / slowness)

    @staticmethod
    def _all_seconds(clock: ScaleClock, total: float | None) -> dict[str, float]:
        rest = {} if total is None else {REST: total - sum(clock.seconds.values())}
        return clock.seconds | rest

    def estimate(self, plan: Plan) -> tuple[float, float] | None:
        """Returns the summed median and the spread in seconds per batch, None while a scale was never run."""
        keys = [scale_key(scale) for scale in plan.scales] + [REST]
        if any(key not in self._samples for key in keys):
            return None
        parts = [median_and_spread(self._samples[key]) for key in keys]
        return sum(median for median, _ in parts), sum(spread**2 for _, spread in parts) ** 0.5

    def to_plain(self) -> dict[str, object]:
        """Returns the table as JSON values."""
        return {"reference": self.reference, "samples": dict(self._samples)}

    @staticmethod
    def from_plain(plain: Mapping[str, object]) -> "LatencyTable":
        """Reads what `to_plain` wrote."""
        table = LatencyTable(float(plain["reference"]))
        table._samples.update({key: list(values) for key, values in plain["samples"].items()})
        return table
