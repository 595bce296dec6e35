"""FID, KID and CMMD: distances of whole sets of images, in a local network's features, to the dense images or a reference."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.discrepancy import Discrepancy, cubic, gaussian
from autoprune.measure.metrics.feature_network import REFERENCE, features_of, load_network, reference_features
from autoprune.measure.metrics.frames import frames_of, seen_frames
from autoprune.measure.metrics.frechet import deviations, frechet_distance

NETWORK = WeightNeed(
    "feature_network",
    "FID's Inception as TorchScript, or a folder of a vision transformer",
    "nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt or facebook/dinov2-large",
)
CLIP = WeightNeed("cmmd_clip", "a CLIP folder", "openai/clip-vit-large-patch14-336")
CMMD_SCALE = 1000.0
_CUBIC, _GAUSSIAN = Discrepancy(cubic, unbiased=True), Discrepancy(gaussian, unbiased=False)


class SetDistance:
    """Features of a network. The metrics that need weights.reference_images compare with those, the others with dense."""

    info: MetricInfo

    def __init__(self, context: MetricContext) -> None:
        name = self.info.name
        self._network = load_network(context.path(name, self.info.needs[0]), context.device)
        given = REFERENCE in self.info.needs
        self.reference = self._scaled(reference_features(name, self._network, context)) if given else None

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns features [B, D], of videos [B, F, D] of the frames that are seen."""
        frames = seen_frames(batch.images)
        features = self._scaled(features_of(frames_of(frames), self._network))
        return features if frames.dim() == 4 else features.reshape(len(frames), -1, features.shape[1])

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return features


class Fid(SetDistance):
    """Frechet distance; biased upwards by small sets, thousands of images are meant."""

    info = MetricInfo("fid", "set", lower=True, source="arXiv 1706.08500", needs=(NETWORK,))

    def distances(self, features: np.ndarray, dense: np.ndarray, subsets: Sequence[np.ndarray]) -> np.ndarray:
        given = None if self.reference is None else self._reference
        return np.array([frechet_distance(_fitted(features[rows]), given or _fitted(dense[rows])) for rows in subsets])

    @cached_property
    def _reference(self) -> tuple[np.ndarray, np.ndarray]:
        return deviations(self.reference)


class Kid(SetDistance):
    """Kernel distance without bias, of all images at once. It can be negative where sets hardly differ."""

    info = MetricInfo("kid", "set", lower=True, source="arXiv 1801.01401", needs=(NETWORK,))
    discrepancy, scale = _CUBIC, 1.0

    def distances(self, features: np.ndarray, dense: np.ndarray, subsets: Sequence[np.ndarray]) -> np.ndarray:
        if self.reference is None:
            return self.scale * self.discrepancy.of_pairs(features, dense, subsets)
        return self.scale * self.discrepancy.to_reference(features, self.reference, self._within, subsets)

    @cached_property
    def _within(self) -> float:
        return self.discrepancy.within(self.reference)


class Cmmd(Kid):
    """Kernel distance of CLIP embeddings of length 1: published kernel, factor and estimator, which small sets bias upwards."""

    info = MetricInfo("cmmd", "set", lower=True, source="arXiv 2401.09603", needs=(CLIP,))
    discrepancy, scale = _GAUSSIAN, CMMD_SCALE

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return features / np.linalg.norm(features, axis=-1, keepdims=True)


class FidToReference(Fid):
    """The same against a folder of images."""

    info = replace(Fid.info, name="fid_reference", needs=(NETWORK, REFERENCE))


class KidToReference(Kid):
    """The same against a folder of images."""

    info = replace(Kid.info, name="kid_reference", needs=(NETWORK, REFERENCE))


class CmmdToReference(Cmmd):
    """The same against a folder of images."""

    info = replace(Cmmd.info, name="cmmd_reference", needs=(CLIP, REFERENCE))


def _fitted(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `deviations` of features [n, D], or of all frames of [n, F, D]."""
    return deviations(features.reshape(-1, features.shape[-1]))
