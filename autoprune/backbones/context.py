"""Language-model features as HART takes them: a fixed number of tokens in front of the image, padding included."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.noise import standard_normal


@dataclass(frozen=True)
class ContextFeatures:
    """Hidden states of B prompts: `values [B, L, width]` float32 and `positions [B, L]` int64, the rotary position of each.

    There is no mask: in official inference the padded rows take part in attention and in pooling.
    """

    values: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @staticmethod
    def from_mask(values: Tensor, mask: Tensor) -> "ContextFeatures":
        """Numbers the tokens where `mask` [B, L] is true from 0 on; the others repeat the number before them, at first -1."""
        return ContextFeatures(values.float(), mask.long().cumsum(dim=1) - 1)

    def unconditional(self) -> "ContextFeatures":
        """Returns what an empty prompt is in HART: zeros at position 0."""
        return ContextFeatures(torch.zeros_like(self.values), torch.zeros_like(self.positions))

    def concatenate(self, other: "ContextFeatures") -> "ContextFeatures":
        """Stacks the prompts of two blocks."""
        return ContextFeatures(torch.cat((self.values, other.values)), torch.cat((self.positions, other.positions)))


class RandomContext:
    """Seeded random features of plausible length for weights=random: speed and memory without a language model."""

    def __init__(self, tokens: int, width: int, *, device: torch.device) -> None:
        self._shape, self._device = (tokens, width), device

    def __call__(self, prompts: Sequence[str]) -> ContextFeatures:
        """Returns the same features for the same prompt; longer prompts have more tokens of their own."""
        tokens, width = self._shape
        rows = [standard_normal((0, 0, 0), tokens * width, stream=f"context:{prompt}") for prompt in prompts]
        lengths = torch.tensor([1 + len(prompt) % tokens for prompt in prompts], device="cpu")
        values = torch.stack(rows).view(-1, tokens, width).to(self._device)
        return ContextFeatures.from_mask(values, (torch.arange(tokens, device="cpu") < lengths[:, None]).to(self._device))
