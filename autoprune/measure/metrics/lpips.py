"""LPIPS (Zhang et al., CVPR 2018, arXiv 1801.03924), version 0.1: distances of a classifier's features, weighted by channel.

torchmetrics ships the learned weights of the channels; the classifier's trunk is a file of torchvision's, read here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.backbones.checkpoints import WeightFiles
from autoprune.backbones.loading import Placement, load_weights
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.frames import by_frame, with_worst

Conv = tuple[int, int, int, int]  # channels out, kernel, stride, padding
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
_PUBLISHED = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Stage:
    """Convolutions each followed by a ReLU, after a max pooling of `pool` x `pool` at stride 2 (0: none)."""

    pool: int
    convolutions: tuple[Conv, ...]


ALEXNET = (
    Stage(0, ((64, 11, 4, 2),)),
    Stage(3, ((192, 5, 1, 2),)),
    Stage(3, ((384, 3, 1, 1),)),
    Stage(0, ((256, 3, 1, 1),)),
    Stage(0, ((256, 3, 1, 1),)),
)
VGG16 = tuple(
    Stage(2 * (index > 0), ((width, 3, 1, 1),) * count)
    for index, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
)


class Trunk(nn.Module):
    """The convolutional part of a classifier under torchvision's keys, `features.N.weight`."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends, channels = [], 3
        for stage in stages:
            layers += [nn.MaxPool2d(stage.pool, 2)] * (stage.pool > 0)
            for width, kernel, stride, padding in stage.convolutions:
                layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
                channels = width
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, 3, H, W] -> features [B, C, h, w] at the end of every stage."""
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                found.append(x)
        return found


def load_trunk(stages: Sequence[Stage], file: Path, device: torch.device) -> Trunk:
    """Returns a trunk with the weights of a classifier's file. Raises UserError where they do not fit exactly."""
    with torch.device("meta"):
        trunk = Trunk(stages)
    placement = Placement(device, lambda key: torch.float32)
    load_weights(trunk, WeightFiles(file), placement, what="the trunk of LPIPS", convert=_without_classifier)
    return trunk.eval().requires_grad_(False)


def load_heads(name: str, device: torch.device) -> list[Tensor]:
    """Returns the channel weights [1, C, 1, 1] of every stage, as torchmetrics ships them; `name` is alex or vgg."""
    from torchmetrics.functional.image import lpips

    state = torch.load(Path(lpips.__file__).parent / "lpips_models" / f"{name}.pth", map_location=device, weights_only=True)
    return [state[f"lin{stage}.model.1.weight"] for stage in range(len(state))]


def lpips(images: Tensor, dense: Tensor, trunk: Trunk, heads: Sequence[Tensor]) -> Tensor:
    """Returns the distance of images [B, 3, H, W] in [0, 1] to the dense ones, [B], 0 for identical ones."""
    shift, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
    pairs = zip(*(trunk((2 * each.float() - 1 - shift) / scale) for each in (images, dense)), heads, strict=True)
    stages = [(head * (_unit(own) - _unit(other)) ** 2).sum(1).mean((1, 2)) for own, other, head in pairs]
    return torch.stack(stages).sum(0)


class Lpips:
    """LPIPS on AlexNet, the authors' choice for comparing images."""

    need = WeightNeed("lpips_alexnet", "AlexNet as torchvision publishes it", f"{_PUBLISHED}alexnet-owt-7be5be79.pth")
    info = MetricInfo("lpips", "paired", lower=True, source="arXiv 1801.03924, v0.1", needs=(need,), perfect=0.0, least_side=64)
    stages, head = ALEXNET, "alex"

    def __init__(self, context: MetricContext) -> None:
        self._trunk = load_trunk(self.stages, context.path(self.info.name, self.need), context.device)
        self._heads = load_heads(self.head, context.device)

    @torch.inference_mode()
    def measure(self, batch: ImageBatch) -> np.ndarray:
        compare = partial(lpips, trunk=self._trunk, heads=self._heads)
        return with_worst(by_frame(compare, batch.images, batch.dense), lower=True)


class LpipsVgg(Lpips):
    """LPIPS on VGG-16, the authors' choice for optimising images."""

    need = WeightNeed("lpips_vgg16", "VGG-16 as torchvision publishes it", f"{_PUBLISHED}vgg16-397923af.pth")
    info = MetricInfo(
        "lpips_vgg", "paired", lower=True, source="arXiv 1801.03924, v0.1", needs=(need,), perfect=0.0, least_side=64
    )
    stages, head = VGG16, "vgg"


def _without_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("classifier.")}


def _unit(features: Tensor) -> Tensor:
    """Divides features by their length over channels."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()
