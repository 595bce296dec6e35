"""The metrics of a study, chosen by name: checked before any work, asked batch by batch, summed up per policy."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from autoprune.errors import unknown_name
from autoprune.measure.metrics import METRICS
from autoprune.measure.metrics.contract import ImageBatch, MetricContext
from autoprune.measure.metrics.external import External
from autoprune.measure.metrics.summary import MetricValue, of_images, of_sets

Found = Mapping[str, np.ndarray]


def check_metrics(names: Iterable[str], weights: Mapping[str, Path]) -> None:
    """Raises UserError for a metric that does not exist, and for weights it needs that are not given or not there."""
    context = MetricContext(torch.device("cpu"), weights)
    for name in names:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
        for need in METRICS[name].info.needs:
            if not need.optional or need.key in weights:
                context.path(name, need)
        if METRICS[name] is External:
            External(context)  # what else it needs, only its recipe says


def check_shape(names: Iterable[str], shape: Sequence[int], weights: Mapping[str, Path]) -> None:
    """Raises UserError where a metric does not take images of a shape [B, 3, H, W], or videos of [B, 3, F, H, W]."""
    for metric in (METRICS[name] for name in names):
        known = External(MetricContext(torch.device("cpu"), weights)) if metric is External else metric
        known.info.check(shape)


class MetricSuite:
    """Loaded metrics by name."""

    def __init__(self, names: Iterable[str], context: MetricContext) -> None:
        """Raises UserError for weights that cannot be loaded."""
        self._metrics = {name: METRICS[name](context) for name in dict.fromkeys(names)}

    def measure(self, batch: ImageBatch) -> dict[str, np.ndarray]:
        """Returns what every metric makes of a policy's images. Raises UserError where one does not take them."""
        for metric in self._metrics.values():
            metric.info.check(batch.images.shape)
        return {name: metric.measure(batch) for name, metric in self._metrics.items()}

    def measure_dense(self, batch: ImageBatch) -> dict[str, np.ndarray]:
        """Returns what the metrics that are not of pairs make of dense images."""
        return {name: metric.measure(batch) for name, metric in self._metrics.items() if metric.info.kind != "paired"}

    def summed(self, names: Iterable[str], found: Sequence[Found], dense: Sequence[Found]) -> dict[str, MetricValue]:
        """Returns metrics over all batches; one that has no number of any image is missing."""
        values = {name: self._summary(name, found, dense) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _summary(self, name: str, found: Sequence[Found], dense: Sequence[Found]) -> MetricValue | None:
        metric = self._metrics[name]
        own = np.concatenate([batch[name] for batch in found])
        if metric.info.kind == "paired":
            return of_images(metric.info, own, None)
        beside = np.concatenate([batch[name] for batch in dense])
        if isinstance(metric, External):
            own, beside = np.split(metric.resolved(np.concatenate([own, beside])), [len(own)])
        return of_sets(metric, own, beside) if metric.info.kind == "set" else of_images(metric.info, own, beside)
