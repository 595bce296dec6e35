"""PickScore (arXiv 2305.01569): CLIP-H tuned on half a million choices of users between two images of a prompt."""

import numpy as np

from autoprune.measure.metrics.clip import Clip
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.frames import mean_score
from autoprune.measure.metrics.pretrained import PretrainedFolder

MODEL = WeightNeed("pickscore", "the PickScore_v1 folder", "huggingface.co/yuvalkirstain/PickScore_v1")
PROCESSOR = WeightNeed(
    "pickscore_processor",
    "the tokenizer and preprocessor of CLIP-H, where the model's folder has none",
    "huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    optional=True,
)


class PickScore:
    """Which image people would pick: a difference of d is odds of exp(d)."""

    info = MetricInfo("pick_score", "absolute", lower=False, source="arXiv 2305.01569", needs=(MODEL, PROCESSOR))

    def __init__(self, context: MetricContext) -> None:
        model, processor = (PretrainedFolder(self.info.name, need, context) for need in (MODEL, PROCESSOR))
        self._clip = Clip(model, processor if PROCESSOR.key in context.weights else None)

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns exp(logit scale) * cos, float64 [B], about 15 to 25 for the published weights."""
        return self._clip.scale * mean_score(self._clip.cosines, batch.images, batch.prompts)
