"""What a study calls quality: which prompts, and how an image is scored against its prompt."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from autoprune.errors import unknown_name
from autoprune.measure.device import one_blas_thread
from autoprune.search.settings import QualitySettings
from autoprune.testbed.captions import Prompt, prompt_set
from autoprune.testbed.score import score_images


class Quality(Protocol):
    """Prompts of the two disjoint splits, and a score in [0, 1] per image (1 is right)."""

    def prompts(self, split: str, count: int) -> Sequence[object]: ...

    def texts(self, prompts: Sequence[object]) -> list[str]: ...

    def score(self, images: Tensor, prompts: Sequence[object]) -> np.ndarray: ...


class SceneQuality:
    """Scene score of the embedded world: right or wrong per image, seven tasks in turn (GenEval's six and texture)."""

    def __init__(self, settings: QualitySettings) -> None:
        self._threshold = settings.threshold

    def prompts(self, split: str, count: int) -> list[Prompt]:
        """Returns `count` prompts of "search" or "held_out", balanced over tasks, the same at every call."""
        return prompt_set(split, count)

    def texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Returns what the text encoder reads."""
        return [prompt.text for prompt in prompts]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
        """Returns 1.0 for a right and 0.0 for a wrong image, [B]."""
        with one_blas_thread():
            return score_images(images, prompts, threshold=self._threshold).correct.astype(float)


QUALITIES = {"scenes": SceneQuality}


def make_quality(settings: QualitySettings) -> Quality:
    """Returns the quality object of the settings. Raises UserError for an unknown name."""
    if settings.name not in QUALITIES:
        raise unknown_name("quality", settings.name, QUALITIES)
    return QUALITIES[settings.name](settings)
