"""Text features as every backbone takes them: one padded block and the true lengths."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextFeatures:
    """Encoder outputs of B prompts: `values [B, T, width]` float32, zero beyond `lengths` (B integers, each at least 1)."""

    values: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def from_rows(rows: list[Tensor]) -> "TextFeatures":
        """Pads rows [length_i, width] to one block."""
        values = torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True)
        return TextFeatures(values, tuple(len(row) for row in rows))

    def padding_mask(self) -> Tensor | None:
        """Returns an additive mask [B, 1, 1, T] that is -inf on padding, or None when nothing is padded."""
        if min(self.lengths) == self.values.shape[1]:
            return None
        lengths = torch.tensor(self.lengths, device=self.values.device)
        padded = torch.arange(self.values.shape[1], device=self.values.device) >= lengths[:, None]
        mask = torch.zeros(padded.shape, dtype=torch.float32, device=padded.device)
        return mask.masked_fill(padded, float("-inf"))[:, None, None]

    def concatenate(self, other: "TextFeatures") -> "TextFeatures":
        """Stacks the prompts of two blocks, padding to the longer one."""
        width = max(self.values.shape[1], other.values.shape[1])
        blocks = [torch.nn.functional.pad(block.values, (0, 0, 0, width - block.values.shape[1])) for block in (self, other)]
        return TextFeatures(torch.cat(blocks), self.lengths + other.lengths)
