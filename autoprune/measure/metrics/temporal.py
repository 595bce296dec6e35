"""What single frames do not show: whether a pruned video changes over time as the dense one does, and whether it flickers."""

import numpy as np
import torch
from torch import Tensor

from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo
from autoprune.measure.metrics.frames import with_worst

LEVELS = 255  # of a channel


def temporal_error(videos: Tensor, dense: Tensor) -> Tensor:
    """Returns mean |(x[t+1] - x[t]) - (y[t+1] - y[t])| over pixels and channels in levels, x in `videos` and y in `dense`,
    [B, 3, F, H, W] in [0, 1], for each of the steps between frames, float32 [B, F - 1]. Still errors cost nothing.
    """
    return _levels((videos.float() - dense.float()).diff(dim=2))


def flicker(videos: Tensor) -> Tensor:
    """Returns mean |x[t] - (x[t-1] + x[t+1]) / 2| over pixels and channels in levels, of videos [B, 3, F, H, W] in [0, 1], for
    each frame between two others, float32 [B, F - 2]: 0 for stills and steady changes, 2 a for one that is a brighter and a
    darker in turn.
    """
    return _levels(videos.float().diff(n=2, dim=2) / 2)


class TemporalError:
    """Difference of the changes from frame to frame; the part is the worst step. dtSSD's, of pixels and not squared."""

    info = MetricInfo(
        "temporal_error",
        "paired",
        lower=True,
        source="after dtSSD of Erofeev et al., BMVC 2015",
        unit="levels of 255",
        least_frames=2,
    )

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        return with_worst(temporal_error(batch.images, batch.dense), lower=True)


class Flicker:
    """How much more a video flickers than the dense one, below 0: less; the part is the worst frame.

    VBench's temporal_flickering (arXiv 2311.17982) is 1 - mean |x[t+1] - x[t]| / 255 of videos that show nothing that moves;
    these do, so steady changes are left out and what dense does besides is subtracted.
    """

    info = MetricInfo(
        "flicker",
        "paired",
        lower=True,
        source="after VBench's temporal_flickering, arXiv 2311.17982",
        unit="levels of 255",
        least_frames=3,
    )

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        return with_worst(flicker(batch.images) - flicker(batch.dense), lower=True)


def _levels(changes: Tensor) -> Tensor:
    """Returns the mean size of changes [B, 3, T, H, W] in levels, [B, T]."""
    return LEVELS * torch.mean(changes.abs(), dim=(1, 3, 4))
