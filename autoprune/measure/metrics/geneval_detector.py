"""What GenEval sees: Mask2Former (arXiv 2112.01527) through transformers, with sizes and scores as mmdetection 2 has them."""

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.measure.metrics.geneval_rules import CLASSES, CONFIDENCE, Found
from autoprune.measure.metrics.picture_input import eight_bits
from autoprune.measure.metrics.pretrained import PretrainedFolder

SIDES = (800, 1333)  # pixels that the shorter side gets, unless the longer one exceeds its own
MULTIPLE = 32  # of pixels, to which images are padded
MOST = 100  # detections of an image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Mask2FormerDetector:
    """Finds instances of COCO's classes. Raises UserError for a folder without them."""

    def __init__(self, folder: PretrainedFolder, *, sides: tuple[int, int] = SIDES) -> None:
        self._model = folder.model("Mask2FormerForUniversalSegmentation")
        if self._model.config.num_labels != len(CLASSES):
            labels = self._model.config.num_labels
            raise folder.broken(f"it must detect the {len(CLASSES)} classes of COCO instances, got {labels} labels")
        self._device, self._sides = folder.context.device, sides

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> dict[str, list[Found]]:
        """Returns by class what is seen above CONFIDENCE in an image [3, H, W] in [0, 1]."""
        pixels, inner = self._resized(image)
        seen = self._model(pixel_values=pixels)
        scores, places = seen.class_queries_logits[0].softmax(-1)[:, :-1].flatten().topk(MOST)
        found: dict[str, list[Found]] = {}
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            if score <= CONFIDENCE:  # the mask's own confidence, at most 1, can only lower it
                continue
            query, label = divmod(place, len(CLASSES))
            logits = functional.interpolate(seen.masks_queries_logits[:, [query]], pixels.shape[-2:], mode="bilinear")
            logits = functional.interpolate(logits[..., : inner[0], : inner[1]], image.shape[-2:], mode="bilinear")
            one = _found(score, logits[0, 0])
            if one.confidence > CONFIDENCE:
                found.setdefault(CLASSES[label], []).append(one)
        return found

    def _resized(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns the image as the model reads it, [1, 3, H', W'] with padding below and right, and its size without that."""
        height, width = image.shape[-2:]
        scale = min(self._sides[0] / min(height, width), self._sides[1] / max(height, width))
        inner = int(height * scale + 0.5), int(width * scale + 0.5)
        pixels = functional.interpolate(eight_bits(image.to(self._device))[None], inner, mode="bilinear")
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
        down, right = (-side % MULTIPLE for side in inner)
        return functional.pad((pixels - mean) / std, (0, right, 0, down)), inner


def _found(score: float, logits: Tensor) -> Found:
    """Returns the object of mask logits [H, W]: class score times the mean probability in the mask, and the box around it."""
    mask = logits > 0
    inside = float(logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6))
    rows, columns = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else (0, 0, 0, 0)
    return Found(box, score * inside, mask)
