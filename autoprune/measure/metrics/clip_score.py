"""CLIPScore (arXiv 2104.08718) on torchmetrics' scale: 100 max(cos, 0). The paper multiplies by 2.5."""

import numpy as np

from autoprune.measure.metrics.clip import Clip
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.pretrained import PretrainedFolder

CLIP = WeightNeed("clip", "a CLIPModel folder with its tokenizer", "huggingface.co/openai/clip-vit-large-patch14")


class ClipScore:
    """How well an image and its prompt agree for CLIP."""

    info = MetricInfo("clip_score", "absolute", lower=False, source="arXiv 2104.08718", needs=(CLIP,))

    def __init__(self, context: MetricContext) -> None:
        self._clip = Clip(PretrainedFolder(self.info.name, CLIP, context))

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns 100 max(cos, 0), float64 [B] in [0, 100]."""
        return self._clip.cosines(batch.images, batch.prompts).clamp(min=0).mul(100).double().cpu().numpy()
