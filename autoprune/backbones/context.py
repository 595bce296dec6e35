"""Language-model features as HART takes them: a fixed number of tokens in front of the image, padding included."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
