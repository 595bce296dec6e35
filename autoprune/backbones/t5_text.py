"""Flan-T5 text features for Infinity, through transformers, from a local folder. Official file: tools/run_infinity.py."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoprune.backbones.released import Target, TextOptions
from autoprune.backbones.text import TextFeatures
from autoprune.backbones.text_models import PromptMemory, TextModelSource
from autoprune.noise import standard_normal

MAX_LENGTH = 512
ENCODER, KIND = "google/flan-t5-xl", "T5EncoderModel"
REMEMBERED = 4096  # prompts whose features stay in host memory, at most 4 MB each for Flan-T5-XL
PEOPLE = (  # the official list without words that contain another one, such as woman, human and grandfather
    ("man", "men", "boy", "girl", "child", "person", "adult", "teenager", "employee", "employer", "worker")
    + ("mother", "father", "sister", "brother", "son", "daughter")
)
POSITIVE = ". very smooth faces, good looking faces, face to the camera, perfect facial features"


class T5TextEncoder:
    """Prompts -> TextFeatures [B, T, 2048], padding removed, features of every prompt computed once.

    The encoder is loaded on the first prompt. `positive` adds the official sentence to prompts about people.
    """

    def __init__(self, source: TextModelSource, *, device: torch.device, dtype: torch.dtype, positive: bool = False) -> None:
        self._source, self._device, self._dtype, self._positive = source, device, dtype, positive
        self._parts: tuple[object, torch.nn.Module] | None = None
        self._known = PromptMemory[Tensor](REMEMBERED)

    @staticmethod
    def around(tokenizer: object, encoder: torch.nn.Module) -> "T5TextEncoder":
        """Returns an encoder that uses a tokenizer and a T5 encoder which are loaded already."""
        parameter = next(encoder.parameters())
        ours = T5TextEncoder(TextModelSource("", ENCODER, KIND), device=parameter.device, dtype=parameter.dtype)
        ours._parts = (tokenizer, encoder)
        return ours

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Encodes prompts. Raises UserError when the encoder cannot be loaded."""
        texts = [with_positive(prompt) if self._positive else prompt for prompt in prompts]
        return TextFeatures.from_rows([row.to(self._device) for row in self._known.of(texts, self._encoded)])

    @torch.inference_mode()
    def _encoded(self, text: str) -> Tensor:
        tokenizer, encoder = self._loaded()
        tokens = tokenizer([text], max_length=MAX_LENGTH, truncation=True, return_tensors="pt").to(self._device)
        return encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0].float().cpu()

    def _loaded(self) -> tuple[object, torch.nn.Module]:
        if self._parts is None:
            self._parts = self._source.load(self._device, self._dtype)
        return self._parts


class RandomTextEncoder:
    """Seeded random features of plausible length for weights=random: speed and memory without a text encoder."""

    def __init__(self, width: int, *, device: torch.device, length: int = 40) -> None:
        self._width, self._device, self._length = width, device, length

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Returns the same features for the same prompt."""
        rows = []
        for prompt in prompts:
            address = (int.from_bytes(prompt.encode()[:6], "big"), len(prompt), 0)
            rows.append(standard_normal(address, self._length * self._width, stream=f"text:{prompt}"))
        return TextFeatures.from_rows([row.view(self._length, self._width).to(self._device) for row in rows])


def t5_encoder(folder: Path | None, target: Target, options: TextOptions) -> T5TextEncoder:
    """Returns the encoder of Infinity; what it lacks it says at the first prompt."""
    source = TextModelSource.found(folder, ENCODER, KIND, allow_download=options.allow_download)
    return T5TextEncoder(source, device=target.device, dtype=target.dtype, positive=options.positive_prompt)


def with_positive(prompt: str) -> str:
    """Returns a prompt with the official sentence appended when it mentions people (a word is found inside others too)."""
    return prompt + POSITIVE if any(word in prompt for word in PEOPLE) else prompt
