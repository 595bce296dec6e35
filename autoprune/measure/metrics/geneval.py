"""GenEval (arXiv 2310.11513) in this process: a detector and rules say whether an image is what its prompt asks for."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoprune.measure.metrics.clip import Clip
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.geneval_detector import Mask2FormerDetector
from autoprune.measure.metrics.geneval_rules import COLOURS, Found, Task, is_right, read_tasks
from autoprune.measure.metrics.picture_input import eight_bits
from autoprune.measure.metrics.pretrained import PretrainedFolder

DETECTOR = WeightNeed(
    "geneval_detector", "a Mask2Former folder of COCO instances", "huggingface.co/facebook/mask2former-swin-small-coco-instance"
)
CLIP = WeightNeed("geneval_clip", "the CLIP ViT-L/14 folder", "huggingface.co/openai/clip-vit-large-patch14")
BACKGROUND = 0x99 / 255  # of what lies around an object whose colour is asked for, "#999"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class GenEval:
    """Right or wrong by GenEval's rules. The detector has its architecture and training data, not mmdetection's weights:
    compare numbers with dense ones measured here, and published ones with those of the original (quality.external).
    """

    info = MetricInfo(
        "geneval",
        "absolute",
        lower=False,
        source="arXiv 2310.11513",
        passes=True,
        needs=(DETECTOR, CLIP),
        videos=False,
    )

    def __init__(self, context: MetricContext) -> None:
        self._detector = Mask2FormerDetector(PretrainedFolder(self.info.name, DETECTOR, context))
        self._colours = ColourReader(Clip(PretrainedFolder(self.info.name, CLIP, context)))

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns 1.0 for right and 0.0 for wrong, float64 [B]. Raises UserError for prompts without GenEval's details."""
        tasks = read_tasks(batch.details, batch.prompts)
        return np.array([self._right(image, task) for image, task in zip(batch.images, tasks, strict=True)], dtype=float)

    def _right(self, image: Tensor, task: Task) -> bool:
        def colours(name: str, objects: Sequence[Found]) -> list[str]:
            return self._colours(image, name, objects)

        return is_right(task, self._detector(image), colours)


class ColourReader:
    """Names the colour of objects by CLIP, zero-shot: the object alone on grey, cut out by its box, against three sentences."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._classes: dict[str, Tensor] = {}

    def __call__(self, image: Tensor, name: str, objects: Sequence[Found]) -> list[str]:
        """Returns a name out of COLOURS for each object of a class in an image [3, H, W] in [0, 1]."""
        if name not in self._classes:
            self._classes[name] = self._colours_of(name)
        features = torch.cat([self._clip.images(cut_out(image, found)[None]) for found in objects])
        return [COLOURS[best] for best in (features @ self._classes[name].T).argmax(1).tolist()]

    def _colours_of(self, name: str) -> Tensor:
        """Returns a unit feature a colour, [10, D]: the mean over the sentences about it."""
        texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
        return functional.normalize(self._clip.texts(texts).unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)


def cut_out(image: Tensor, found: Found) -> Tensor:
    """Returns the box of an object out of an image [3, H, W], what is not the object replaced by BACKGROUND."""
    left, top, right, bottom = map(round, found.box)
    alone = eight_bits(image)
    if found.mask is not None:
        alone = torch.where(found.mask.to(alone.device), alone, BACKGROUND)
    return alone[:, top:bottom, left:right]
