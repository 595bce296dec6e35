"""What a study calls quality: which prompts, and how an image is scored against its prompt."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from autoprune.backbones import Backbone
from autoprune.measure.device import one_blas_thread
from autoprune.measure.metrics.geneval import GenEval
from autoprune.measure.metrics.geneval_rules import read_tasks
from autoprune.search.prompt_files import PromptFile, TextPrompt
from autoprune.search.settings import QualitySettings, StudySettings
from autoprune.testbed.captions import Prompt, prompt_set
from autoprune.testbed.motion_captions import MotionPrompt, motion_prompts
from autoprune.testbed.motion_score import score_videos
from autoprune.testbed.score import score_images

WORLDS = {"scenes": (prompt_set, score_images), "motion": (motion_prompts, score_videos)}


class Quality(Protocol):
    """Prompts of the two disjoint splits, and a score in [0, 1] per image (1 is right), None where nothing scores."""

    def prompts(self, split: str, count: int, *, seed: int = 0) -> Sequence[object]: ...

    def texts(self, prompts: Sequence[object]) -> list[str]: ...

    def details(self, prompts: Sequence[object]) -> list[Mapping[str, object]]: ...

    def score(self, images: Tensor, prompts: Sequence[object]) -> np.ndarray | None: ...


class SceneQuality:
    """Score of an embedded world: right or wrong per image or video, the tasks of its prompts in turn."""

    def __init__(self, settings: QualitySettings) -> None:
        self._threshold = settings.threshold
        self._prompts, self._score = WORLDS[settings.name]

    def prompts(self, split: str, count: int, *, seed: int = 0) -> list[Prompt] | list[MotionPrompt]:
        """Returns `count` prompts of "search" or "held_out", balanced over tasks, the same at every call."""
        return self._prompts(split, count, seed=seed)

    def texts(self, prompts: Sequence[Prompt | MotionPrompt]) -> list[str]:
        """Returns what the text encoder reads."""
        return [prompt.text for prompt in prompts]

    def details(self, prompts: Sequence[Prompt | MotionPrompt]) -> list[Mapping[str, object]]:
        """Returns nothing for any prompt."""
        return [{} for _ in prompts]

    def score(self, images: Tensor, prompts: Sequence[Prompt | MotionPrompt]) -> np.ndarray:
        """Returns 1.0 for a right and 0.0 for a wrong image, [B]."""
        with one_blas_thread():
            return self._score(images, prompts, threshold=self._threshold).correct.astype(float)


class FidelityQuality:
    """The user's own prompts; what counts is the distance to the dense images, nothing scores an image by itself."""

    def __init__(self, prompts: PromptFile) -> None:
        self._prompts = prompts

    def prompts(self, split: str, count: int, *, seed: int = 0) -> list[TextPrompt]:
        """Returns `count` prompts of "search" or "held_out", the same at every call. Raises UserError for too few."""
        return self._prompts.take(split, count, seed=seed)

    def texts(self, prompts: Sequence[TextPrompt]) -> list[str]:
        """Returns what the text encoder reads."""
        return [prompt.text for prompt in prompts]

    def details(self, prompts: Sequence[TextPrompt]) -> list[Mapping[str, object]]:
        """Returns what the file said of each prompt."""
        return [prompt.details for prompt in prompts]

    def score(self, images: Tensor, prompts: Sequence[TextPrompt]) -> None:
        """Returns None."""


def make_quality(settings: QualitySettings, prompts: PromptFile | None) -> Quality:
    """Returns the quality object: `fidelity` of the user's own prompts, without any that of the settings."""
    return SceneQuality(settings) if prompts is None else FidelityQuality(prompts)


def held_out_texts(settings: StudySettings) -> list[str]:
    """Returns the texts of a study's held-out prompts, in the order they are measured in."""
    quality = make_quality(settings.quality, settings.prompts)
    return quality.texts(quality.prompts("held_out", settings.quality.held_out_prompts))


def check_prompts(settings: StudySettings, backbone: Backbone) -> None:
    """Encodes every prompt of a study, so that the UserError for one the backbone cannot read, or that GenEval cannot judge
    where its metric is asked for, comes before any work.
    """
    quality = make_quality(settings.quality, settings.prompts)
    for split, count in settings.quality.counts.items():
        prompts = quality.prompts(split, count)
        check_texts(quality.texts(prompts), backbone, batch=settings.latency.batch)
        if split == "held_out" and GenEval.info.name in settings.quality.metrics:
            read_tasks(quality.details(prompts), quality.texts(prompts))


@torch.inference_mode()
def check_texts(texts: Sequence[str], backbone: Backbone, *, batch: int) -> None:
    """Encodes texts, `batch` at a time. Raises the backbone's UserError for one that it cannot read."""
    for first in range(0, len(texts), batch):
        backbone.encode_text(texts[first : first + batch])
