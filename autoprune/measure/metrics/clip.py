"""CLIP (arXiv 2103.00020) from a local folder: unit features of images and texts, for every metric that compares the two."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.measure.metrics.picture_input import PictureInput
from autoprune.measure.metrics.pretrained import PretrainedFolder


class Clip:
    """A CLIPModel; `processor` is the folder of tokenizer and preprocessing where that is another one.

    Raises UserError for a folder that lacks a part.
    """

    def __init__(self, folder: PretrainedFolder, processor: PretrainedFolder | None = None) -> None:
        processor = processor or folder
        self._model = folder.model("CLIPModel")
        self._tokenizer = processor.processor("AutoTokenizer")
        self._prepared = PictureInput.read(processor.path)
        self._device = folder.context.device

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before a softmax, learnt with the model."""
        return float(self._model.logit_scale.exp())

    @torch.inference_mode()
    def images(self, images: Tensor) -> Tensor:
        """Returns features [B, D] of length 1 of images [B, 3, H, W] in [0, 1]."""
        return _unit(self._model.get_image_features(pixel_values=self._prepared(images.to(self._device))))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns features [B, D] of length 1; a text is cut at the model's number of tokens, 77 for all released ones."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        mask = tokens.attention_mask.to(self._device)
        return _unit(self._model.get_text_features(input_ids=tokens.input_ids.to(self._device), attention_mask=mask))

    def cosines(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Returns the cosine of each image with its text, [B]."""
        return (self.images(images) * self.texts(texts)).sum(-1)


def _unit(features: object) -> Tensor:
    """transformers 4 returns the features, 5 an output that holds them."""
    return functional.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
