"""How bits are drawn from logits: our addressed noise, the authors' generator stream, or the likelier bit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.noise import uniform

Draw = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class GridNoise:
    """Bit = [u < sigmoid(l1 - l0)]; u is drawn on the full grid from (seed, sample, scale), whatever is pruned."""

    seed: int
    samples: tuple[int, ...]

    def __call__(self, logits: Tensor, scale: int) -> Tensor:
        """logits [B, N, d, 2] -> bits [B, N, d] int64."""
        shape = logits.shape[1:3]
        rows = [uniform((self.seed, sample, scale), shape.numel(), stream="bits") for sample in self.samples]
        noise = torch.stack(rows).view(-1, *shape).to(logits.device)
        return (noise < (logits[..., 1] - logits[..., 0]).sigmoid()).long()


@dataclass(frozen=True)
class GeneratorStream:
    """The official sampler: top-p on two classes, one multinomial call a scale from one generator.

    Its stream depends on the batch; use it to repeat the authors' images.
    """

    generator: torch.Generator
    top_p: float = 0.97

    def __call__(self, logits: Tensor, scale: int) -> Tensor:
        """logits [B, N, d, 2] -> bits [B, N, d] int64."""
        probabilities = logits.softmax(dim=-1)
        if self.top_p > 0:
            rare = (probabilities <= 1 - self.top_p) & (probabilities < probabilities.flip(-1))
            probabilities = logits.masked_fill(rare, float("-inf")).softmax(dim=-1)
        drawn = torch.multinomial(probabilities.view(-1, 2), 1, replacement=True, generator=self.generator)
        return drawn.view(logits.shape[:3])


def likelier_bit(logits: Tensor, scale: int) -> Tensor:
    """Greedy choice (the official top_k = 1). logits [B, N, d, 2] -> bits [B, N, d] int64."""
    return logits.argmax(dim=-1)
