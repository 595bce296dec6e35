"""CLIPScore (arXiv 2104.08718) on torchmetrics' scale: 100 max(cos, 0). The paper multiplies by 2.5."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from autoprune.measure.metrics.clip import Clip
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.frames import mean_score
from autoprune.measure.metrics.pretrained import PretrainedFolder

CLIP = WeightNeed("clip", "a CLIPModel folder with its tokenizer", "huggingface.co/openai/clip-vit-large-patch14")


class ClipScore:
    """How well an image and its prompt agree for CLIP."""

    info = MetricInfo("clip_score", "absolute", lower=False, source="arXiv 2104.08718", needs=(CLIP,))

    def __init__(self, context: MetricContext) -> None:
        self._clip = Clip(PretrainedFolder(self.info.name, CLIP, context))

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns 100 max(cos, 0), float64 [B] in [0, 100]."""
        return mean_score(self._scores, batch.images, batch.prompts)

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._clip.cosines(images, prompts).clamp(min=0).mul(100)
