"""Ends a trial after its first batch when even an optimistic reading of that batch cannot reach the front.

Optuna cannot stop trials of several objectives; what was measured so far is told instead, so the model still learns.
"""

from collections.abc import Collection

from autoprune.search.records import Measurement
from autoprune.search.settings import QualitySettings

LATENCY_MARGIN = 0.05
LOSS_MARGIN = 0.10
SCORE_DROP = "score_drop"


def discard_reason(first: Measurement, rivals: Collection[Measurement], quality: QualitySettings) -> str:
    """Returns why a trial cannot reach the front, or an empty text.

    `first` covers the first batch; `rivals` are the first batches of feasible trials, on the same prompts and seeds.
    Optimistic means: no net drop on all prompts still to come, one prompt won back; 5 % less latency, 10 % less loss.
    """
    beyond = _beyond_budget(first, quality)
    if beyond:
        return beyond
    if any(rival.loss == first.loss and _relative(rival) * (1 - LATENCY_MARGIN) < _relative(first) for rival in rivals):
        return "the same images as a known policy's on the first prompts, and no faster"
    latency, loss = _relative(first) * (1 - LATENCY_MARGIN), first.loss * (1 - LOSS_MARGIN)
    if any(_relative(rival) < latency and rival.loss < loss for rival in rivals):
        return "slower and further from dense than a known policy on the first prompts"
    return ""


def constraint_values(measurement: Measurement, quality: QualitySettings) -> dict[str, float]:
    """Returns the constraints of a study, each at most 0 where it holds."""
    values = {SCORE_DROP if measurement.scored else "loss": measurement.drop - quality.max_drop}
    if quality.max_memory_mb is not None:
        values["memory_mb"] = measurement.peak_memory_mb - quality.max_memory_mb
    return values


def _beyond_budget(first: Measurement, quality: QualitySettings) -> str:
    if not first.scored:
        hopeless = first.loss * (1 - LOSS_MARGIN) > quality.max_loss
        return f"a loss of {first.loss:.3f} on the first prompts cannot stay within {quality.max_loss:g}" if hopeless else ""
    lost = first.score_drop * first.prompts
    if (lost - 1) / quality.prompts > quality.max_score_drop:
        return f"{lost:.0f} of {first.prompts} prompts lost; the score drop cannot stay within {quality.max_score_drop:g}"
    return ""


def _relative(measurement: Measurement) -> float:
    """Returns latency relative to dense of the same worker: devices of one kind differ by a few per cent."""
    return measurement.latency / measurement.dense_latency
