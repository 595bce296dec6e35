"""How bits or codes are drawn from logits: our addressed noise, the authors' generator stream, or the likeliest one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.noise import placed, uniform

Draw = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class GridNoise:
    """The value at which the cumulated probability passes u, drawn on the full grid from (seed, sample, scale), whatever is
    pruned. `limits` are (top_k, top_p) of every scale, none without.

    Of bits: bit = [u < sigmoid(l1 - l0)].
    """

    seed: int
    samples: tuple[int, ...]
    limits: tuple[tuple[int, float], ...] = ()

    def __call__(self, logits: Tensor, scale: int) -> Tensor:
        """logits [B, N, d, 2] -> bits [B, N, d] int64; logits [B, N, V] -> code numbers [B, N] int64."""
        if self.limits:
            logits = limited(logits, *self.limits[scale])
        shape = logits.shape[1:-1]
        rows = [uniform((self.seed, sample, scale), shape.numel(), stream="bits") for sample in self.samples]
        noise = placed(torch.stack(rows).view(-1, *shape), logits.device)
        if logits.dim() == 4:
            return (noise < (logits[..., 1] - logits[..., 0]).sigmoid()).long()
        passed = logits.softmax(dim=-1).cumsum(dim=-1) <= noise[..., None]
        last = logits.isfinite().cumsum(dim=-1).argmax(dim=-1)  # rounding must not pass the last possible value
        return torch.minimum(passed.sum(dim=-1), last)


def limited(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Returns logits [..., V] with all values impossible but the `top_k` likeliest (0: all) and the likeliest ones that
    together reach `top_p` (0: all): the official order, both on the same logits, ties with the k-th included."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if 0 < top_p < 1:
        ascending, order = logits.sort(dim=-1)
        rare = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        rare[..., -1] = False
        logits = logits.masked_fill(rare.scatter(-1, order, rare), float("-inf"))
    return logits


@dataclass(frozen=True)
class GeneratorStream:
    """The official sampler: top-k and top-p, one multinomial call a scale from one generator.

    Its stream depends on the batch; use it to repeat the authors' images.
    """

    generator: torch.Generator
    top_p: float = 0.97
    top_k: int = 0

    def __call__(self, logits: Tensor, scale: int) -> Tensor:
        """logits [B, N, d, 2] -> bits [B, N, d] int64; logits [B, N, V] -> code numbers [B, N] int64."""
        probabilities = limited(logits, self.top_k, self.top_p).softmax(dim=-1)
        rows = probabilities.view(-1, logits.shape[-1])
        drawn = torch.multinomial(rows, 1, replacement=True, generator=self.generator)
        return drawn.view(logits.shape[:-1])


def likeliest(logits: Tensor, scale: int) -> Tensor:
    """Greedy choice (the official top_k = 1). logits [B, N, d, 2] -> bits [B, N, d] int64; [B, N, V] -> code numbers [B, N]."""
    return logits.argmax(dim=-1)
