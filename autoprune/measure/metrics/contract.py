"""What a quality metric is: numbers per image or per set, with a direction, the weights it needs, and where it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import UserError

KINDS = ("paired", "absolute", "set")


@dataclass(frozen=True)
class WeightNeed:
    """One local file or folder that a metric reads: its key in the `weights` map, what it is, where it is published, and
    whether the metric can do without.
    """

    key: str
    what: str
    source: str
    optional: bool = False


@dataclass(frozen=True)
class MetricInfo:
    """`kind`: paired compares each image with the dense one of the same prompt and seed, absolute scores it against its
    prompt, set compares all images with all dense (or reference) ones. `lower` says whether less is better; `passes` whether
    each number is 0 or 1 (pass or fail), which decides the interval. `source` is the paper or published code. `perfect` is a
    paired metric's value for the dense image itself, given where the distance from it is a loss of about 0 to 1. Images must
    have `least_side` pixels a side and `least_frames` frames, which an image is one of; `videos` says whether it takes those.
    """

    name: str
    kind: str
    lower: bool
    source: str
    unit: str = ""
    passes: bool = False
    needs: tuple[WeightNeed, ...] = ()
    perfect: float | None = None
    least_side: int = 1
    least_frames: int = 1
    videos: bool = True

    @property
    def label(self) -> str:
        """Returns name, unit and direction for the head of a column."""
        return f"{self.name}{f' ({self.unit})' if self.unit else ''} {'↓' if self.lower else '↑'}"

    @property
    def loss_text(self) -> str:
        """Returns in words what the distance from `perfect` is."""
        return "1 - " * (not self.lower) + self.name.upper().replace("_", "-")

    def check(self, shape: Sequence[int]) -> None:
        """Raises UserError unless the metric takes images of a shape [B, 3, H, W] or videos of [B, 3, F, H, W]."""
        side, frames = min(shape[-2:]), shape[2] if len(shape) == 5 else 1
        given = f"videos of {frames} frames" if len(shape) == 5 else "images"
        broken = (
            (side < self.least_side, f"images must have at least {self.least_side} pixels a side for metric {self.name}", side),
            (frames < self.least_frames, f"metric {self.name} needs videos of at least {self.least_frames} frames", given),
            (len(shape) == 5 and not self.videos, f"metric {self.name} takes images only", given),
        )
        for wrong, rule, got in broken:
            if wrong:
                raise UserError(f"{rule}, got {got}; leave it out of quality.metrics and quality.loss.")


@dataclass(frozen=True)
class ImageBatch:
    """Images [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1] with what they are judged by: prompts, what a prompt file said of
    each, the dense ones of the same prompts and seeds, and the bits or codes drawn at every scale, [B, N, ...] each, -1 where
    a sample drew none.
    """

    images: Tensor
    prompts: Sequence[str]
    details: Sequence[Mapping[str, object]] = ()
    dense: Tensor | None = None
    tokens: tuple[Tensor, ...] = ()
    dense_tokens: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class MetricContext:
    """Where metrics run, and the user's `weights`: key -> local file or folder. Nothing is ever downloaded."""

    device: torch.device
    weights: Mapping[str, Path] = field(default_factory=dict)

    def path(self, metric: str, need: WeightNeed) -> Path:
        """Returns the local path of what a metric needs. Raises UserError naming key, path and source when it is not there."""
        remedy = f"give weights.{need.key}=PATH: {need.what}, from {need.source}"
        if need.key not in self.weights:
            raise UserError(f"metric {metric} needs weights.{need.key}, got nothing; {remedy}.")
        path = Path(self.weights[need.key])
        if not path.exists():
            raise UserError(f"metric {metric} needs weights.{need.key}, but {str(path)!r} does not exist; {remedy}.")
        return path


class Metric(Protocol):
    """Built once from a MetricContext (`Metric(context)`), then asked batch by batch."""

    info: MetricInfo

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns one number an image, float64 [B], or [B, 1 + K] with parts of it after it (of token agreement: by scale).

        A set metric returns what it compares, features [B, D], of videos [B, F, D].
        """


class SetMetric(Metric, Protocol):
    """A metric of whole sets. `reference` holds features [m, D] to compare with in place of the dense images'."""

    reference: np.ndarray | None

    def distances(self, features: np.ndarray, dense: np.ndarray, subsets: Sequence[np.ndarray]) -> np.ndarray:
        """Returns one distance a subset of rows: of features [n, (F,) D] to those of `dense`, or to the whole reference."""
