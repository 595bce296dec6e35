"""What measuring accumulates: per-image comparisons with dense, and seconds by policy over interleaved rounds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoprune.measure.drift import MOST_REPEATS, Drift, drift_of
from autoprune.measure.latency import Timing
from autoprune.measure.metrics import METRICS
from autoprune.measure.metrics.suite import Found
from autoprune.measure.metrics.summary import without_parts
from autoprune.measure.statistics import bootstrap_interval, paired_interval, ratio_interval, score_flips
from autoprune.search.records import Measurement
from autoprune.search.settings import StudySettings

DENSE = ""


@dataclass(frozen=True)
class Pairs:
    """Per image [n]: the candidate's score and the dense score, both None without scores, and by name what metrics found."""

    score: np.ndarray | None
    dense: np.ndarray | None
    found: Found

    @staticmethod
    def joined(parts: list["Pairs"]) -> "Pairs":
        """Concatenates batches."""
        found = {name: np.concatenate([part.found[name] for part in parts]) for name in parts[0].found}
        return Pairs(*(concatenated([getattr(part, name) for part in parts]) for name in ("score", "dense")), found)


def concatenated(parts: list[np.ndarray | None]) -> np.ndarray | None:
    """Joins the batches of one number per image; None when nothing measured it."""
    return None if parts[0] is None else np.concatenate(parts)


def measurement_of(pairs: Pairs, timing: Timing, dense_latency: float, settings: StudySettings) -> Measurement:
    """Returns what comparisons and seconds amount to; memory is not known here."""
    chosen = settings.quality.loss
    found = {name: without_parts(values) for name, values in pairs.found.items() if name in ("ssim", "psnr", chosen)}
    losses = np.abs(METRICS[chosen].info.perfect - found[chosen])
    return Measurement(
        latency=timing.median,
        latency_spread=timing.spread,
        dense_latency=dense_latency,
        speed_up=dense_latency / timing.median,
        loss=float(losses.mean()),
        ssim=float(found["ssim"].mean()),
        psnr=float(found["psnr"].mean()),
        **score_fields(pairs.dense, pairs.score),
        peak_memory_mb=None,
        prompts=len(losses),
        seed=settings.seed,
        batch=min(settings.latency.batch, settings.quality.prompts),
        latency_source="measured",
        loss_interval=bootstrap_interval(losses),
    )


def score_fields(dense: np.ndarray | None, score: np.ndarray | None) -> dict[str, object]:
    """Returns the score fields of a Measurement from paired scores [n]; each is None without scores."""
    if dense is None or score is None:
        return dict.fromkeys(("score_dense", "score", "score_drop", "score_drop_interval", "score_flips"))
    return {
        "score_dense": float(dense.mean()),
        "score": float(score.mean()),
        "score_drop": float((dense - score).mean()),
        "score_drop_interval": paired_interval(dense, score),
        "score_flips": score_flips(dense, score),
    }


def speed_up_fields(dense: Sequence[float], pruned: Sequence[float], drift: Drift) -> dict[str, object]:
    """Returns the fields of a Measurement that interleaved seconds give beside their medians."""
    return {"speed_up_interval": ratio_interval(dense, pruned), **drift.fields}


class Tally:
    """What accumulates over the rounds of a validation, by policy name; dense seconds under DENSE, its metrics in `dense`.

    Rounds are timed again while dense drifts, and those of the steadiest time count.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._times: list[dict[str, list[float]]] = []
        self._whole = 0
        self.parts: dict[str, list[Pairs]] = {name: [] for name in names}
        self.dense: list[Found] = []
        self.peaks = dict.fromkeys(names, 0.0)

    def turns(self, count: int) -> Iterator[int]:
        """Yields the numbers of `count` rounds, and of as many again while dense drifts, at most MOST_REPEATS times."""
        for repeat in range(MOST_REPEATS + 1):
            self._times.append({name: [] for name in (DENSE, *self.names)})
            yield from range(repeat * count, (repeat + 1) * count)
            self._whole += 1
            if drift_of(self._times[-1][DENSE]).steady:
                return

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Returns seconds by name of the steadiest rounds; those of a repeat that time cut short do not count."""
        return min(self._times[: max(1, self._whole)], key=lambda times: drift_of(times[DENSE]).worst)

    @property
    def drift(self) -> Drift:
        """Returns how dense strayed in them."""
        return replace(drift_of(self.seconds[DENSE]), repeats=max(1, self._whole) - 1)

    def order(self, turn: int) -> list[str]:
        """Returns the names, beginning with another one each round."""
        shift = turn % max(1, len(self.names))
        return self.names[shift:] + self.names[:shift]

    def add(self, times: Mapping[str, float]) -> None:
        """Adds one round of seconds."""
        for name, seconds in times.items():
            if name in self._times[-1]:
                self._times[-1][name].append(seconds)

    def leave_out(self, name: str) -> None:
        """Forgets a policy."""
        self.names.remove(name)
        for known in (self.parts, self.peaks, *self._times):
            del known[name]
