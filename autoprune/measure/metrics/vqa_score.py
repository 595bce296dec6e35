"""VQAScore (arXiv 2404.01291): how sure a vision-language model is of "Yes" when asked whether the image shows the prompt."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.frames import mean_score
from autoprune.measure.metrics.picture_input import eight_bits
from autoprune.measure.metrics.pretrained import PretrainedFolder

MODEL = WeightNeed("vqa", "an image-text-to-text model folder with a chat template", "huggingface.co/llava-hf/llava-1.5-7b-hf")
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
ANSWER = "Yes"


class VqaScore:
    """P("Yes") at the first token of the answer, out of the whole vocabulary, as published; of "Yes" its first token counts.

    Any model that transformers' AutoModelForImageTextToText reads; numbers of different models are not comparable. Processors
    of models that read videos too (Qwen2-VL, SmolVLM, InternVL) need torchvision, of LLaVA, Idefics3 and Gemma 3 do not.
    """

    info = MetricInfo("vqa_score", "absolute", lower=False, source="arXiv 2404.01291", needs=(MODEL,))

    def __init__(self, context: MetricContext) -> None:
        folder = PretrainedFolder(self.info.name, MODEL, context)
        self._processor = folder.processor("AutoProcessor")
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._yes = tokenizer.encode(ANSWER, add_special_tokens=False)[0]
        if self._yes == tokenizer.unk_token_id or not self._processor.chat_template:
            raise folder.broken(f"its processor must have a chat template, and a token for {ANSWER!r}")
        self._dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
        self._model = folder.model("AutoModelForImageTextToText", self._dtype)
        self._device = context.device

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns P("Yes"), float64 [B] in [0, 1], one image at a time: no padding comes near the answer."""
        return mean_score(self._all_sure, batch.images, batch.prompts)

    def _all_sure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = [self._sure(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    @torch.inference_mode()
    def _sure(self, image: Tensor, prompt: str) -> float:
        from PIL import Image

        pixels = eight_bits(image).mul(255).byte().permute(1, 2, 0).cpu().numpy()
        asked = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": QUESTION.format(prompt=prompt)}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": asked}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device, self._dtype)
        return float(self._model(**inputs).logits[0, -1].double().softmax(-1)[self._yes])
