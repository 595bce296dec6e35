"""Quality metrics by name. Adding one: one file, one line here."""

from autoprune.measure.metrics.contract import ImageBatch, Metric, MetricContext, MetricInfo, SetMetric, WeightNeed

METRICS: dict[str, type[Metric]] = {}

__all__ = ["METRICS", "ImageBatch", "Metric", "MetricContext", "MetricInfo", "SetMetric", "WeightNeed"]
