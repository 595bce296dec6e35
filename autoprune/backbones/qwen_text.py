"""HART's text features from Qwen2-VL, through transformers, from a local folder. Official file: hart/utils/tools.py.

Written against the documented interface of transformers and run with small random models; not yet with the real weights.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autoprune.backbones.context import ContextFeatures
from autoprune.backbones.released import Target, TextOptions
from autoprune.backbones.text_models import PromptMemory, TextModelSource

ENCODER, KIND = "mit-han-lab/Qwen2-VL-1.5B-Instruct", "AutoModel"  # the language model alone, as HART's authors released it
MAX_TOKENS = 300
REMEMBERED = 2048  # prompts whose features stay in host memory, 1.8 MB each at the full size
SYSTEM_PROMPT = """Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable \
for image generation.

Examples:
- User Prompt: A cat sleeping -> A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny \
windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd \
of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.

Please generate only the enhanced description for the prompt below and DO NOT include any additional sentences. Start your \
response with "Enhanced Prompt:".

User Prompt:
"""


class QwenTextEncoder:
    """Prompts -> ContextFeatures of `tokens` tokens each, features of every prompt computed once.

    The encoder is loaded on the first prompt and never downloaded unless that is allowed.
    """

    def __init__(self, source: TextModelSource, *, device: torch.device, dtype: torch.dtype, tokens: int = MAX_TOKENS) -> None:
        self._source, self._device, self._dtype, self._tokens = source, device, dtype, tokens
        self._parts: tuple[object, torch.nn.Module] | None = None
        self._known = PromptMemory[tuple[Tensor, Tensor]](REMEMBERED)

    def __call__(self, prompts: Sequence[str]) -> ContextFeatures:
        """Encodes prompts. Raises UserError when the encoder cannot be loaded."""
        values, masks = zip(*self._known.of(prompts, self._encoded), strict=True)
        return ContextFeatures.from_mask(torch.stack(values).to(self._device), torch.stack(masks).to(self._device))

    @torch.inference_mode()
    def _encoded(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Returns features [L, width] and mask [L] of a prompt, on the CPU."""
        if self._parts is None:
            self._parts = self._source.load(self._device, self._dtype)
        tokenizer, model = self._parts
        options = {"max_length": self._tokens, "truncation": True, "return_tensors": "pt"}
        own = tokenizer([prompt], padding="max_length", **options).input_ids.to(self._device)
        system = tokenizer([SYSTEM_PROMPT], **options).input_ids.to(self._device)
        mask = own != tokenizer.pad_token_id
        tokens, seen = behind_system(own, mask, system)
        states = model(input_ids=tokens, attention_mask=seen.long(), output_hidden_states=True).hidden_states[-1]
        return without_system(states, system.shape[1])[0].cpu(), mask[0].cpu()


def qwen_encoder(folder: Path | None, target: Target, options: TextOptions, *, tokens: int) -> QwenTextEncoder:
    """Returns the encoder of HART; what it lacks it says at the first prompt."""
    source = TextModelSource.found(folder, ENCODER, KIND, allow_download=options.allow_download)
    return QwenTextEncoder(source, device=target.device, dtype=target.dtype, tokens=tokens)


def behind_system(tokens: Tensor, mask: Tensor, system: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the system prompt [1, S] in front of prompts [B, L] -> tokens and mask [B, S + L]."""
    system = system.expand(len(tokens), -1)
    return torch.cat((system, tokens), dim=1), torch.cat((torch.ones_like(system, dtype=torch.bool), mask), dim=1)


def without_system(states: Tensor, length: int) -> Tensor:
    """Cuts the system prompt's rows off hidden states [B, S + L, width] -> float32 [B, L, width]."""
    return states[:, length:].float()
