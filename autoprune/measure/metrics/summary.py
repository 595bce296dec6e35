"""What a metric says of one policy over its prompts: a mean or a distance, with a 95 % interval from resampled prompts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from autoprune.measure.metrics.contract import MetricInfo, SetMetric
from autoprune.measure.statistics import bootstrap_interval, paired_interval

_HALVES = 200


@dataclass(frozen=True)
class MetricValue:
    """`value` of a policy over `n` prompts; `parts` are means of parts of it (of tokens: a scale each;
    of videos compared frame by frame: the worst frame).

    Where the dense images have a value of their own, it is `dense`, and `interval` is of `change` = value - dense; else
    `interval` is of `value`.
    """

    value: float
    interval: tuple[float, float]
    n: int
    dense: float | None = None
    change: float | None = None
    parts: tuple[float, ...] = ()

    def to_plain(self) -> dict[str, object]:
        """Returns the fields as JSON values."""
        return asdict(self) | {"interval": list(self.interval), "parts": list(self.parts)}

    @staticmethod
    def from_plain(plain: Mapping[str, object]) -> "MetricValue":
        """Reads what `to_plain` wrote."""
        return MetricValue(**(dict(plain) | {"interval": tuple(plain["interval"]), "parts": tuple(plain["parts"])}))


def of_images(info: MetricInfo, values: np.ndarray, dense: np.ndarray | None) -> MetricValue | None:
    """Returns the summary of numbers [n] or [n, 1 + K] of images; `dense` are the dense images', None of pairs.

    Images that a metric gave no number (NaN) are left out, with their dense ones; None where nothing is left.
    """
    values = values.reshape(len(values), -1)
    dense = None if dense is None else without_parts(dense)
    known = np.isfinite(values[:, 0]) & (True if dense is None else np.isfinite(dense))
    if not known.any():
        return None
    own, parts = values[known, 0], tuple(values[known, 1:].mean(axis=0).tolist())
    parts = parts if np.isfinite(parts).all() else ()
    if dense is None:
        return MetricValue(float(own.mean()), bootstrap_interval(own), len(own), parts=parts)
    beside = dense[known]
    interval = paired_interval(own, beside) if info.passes else bootstrap_interval(own - beside)
    change = float((own - beside).mean())
    return MetricValue(float(own.mean()), interval, len(own), dense=float(beside.mean()), change=change, parts=parts)


def without_parts(values: np.ndarray) -> np.ndarray:
    """Returns the numbers [n] of images out of [n] or [n, 1 + K]."""
    return values.reshape(len(values), -1)[:, 0]


def of_sets(metric: SetMetric, features: np.ndarray, dense: np.ndarray) -> MetricValue | None:
    """Returns the summary of features [n, (F,) D] and those of the dense images; None for fewer than four prompts.

    The interval comes from random halves of the prompts: their distances spread as much as whole sets of new prompts would,
    and unlike a bootstrap's no image meets itself, which distances take for structure.
    """
    count, rng = len(features), np.random.default_rng(0)
    if count < 4:
        return None
    halves = [rng.permutation(count)[: count // 2] for _ in range(_HALVES)]
    found = metric.distances(features, dense, [np.arange(count), *halves])
    whole = MetricValue(float(found[0]), (0.0, 0.0), count)
    if metric.reference is not None:
        beside = metric.distances(dense, dense, [np.arange(count), *halves])
        whole, found = replace(whole, dense=float(beside[0]), change=float(found[0] - beside[0])), found - beside
    low, high = np.quantile(found[1:] - found[1:].mean(), (0.025, 0.975)) + found[0]
    return replace(whole, interval=(float(low), float(high)))
