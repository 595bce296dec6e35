"""How important each token is. A scorer maps hidden tokens to one number a token; the highest are kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.noise import uniform


@dataclass(frozen=True)
class ScoreContext:
    """What a scorer may need beside the tokens: where they are, and whose random stream to use."""

    scale: int
    grid: tuple[int, int, int]
    site: int
    seed: int
    samples: tuple[int, ...]


def dc(x: Tensor, context: ScoreContext) -> Tensor:
    """Squared distance of each token from the mean token, s_i = sum_c (x_ic - mean_c)^2 (FastVAR, arXiv 2503.23367).

    x [R, N, C] -> [R, N] float32.
    """
    x = x.float()
    return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=-1)


def random(x: Tensor, context: ScoreContext) -> Tensor:
    """Uniform random scores, the control every scorer has to beat; the same for both branches of a sample.

    x [R, N, C] -> [R, N] float32.
    """
    stream = f"score:{context.site}"
    rows = [uniform((context.seed, sample, context.scale), x.shape[1], stream=stream) for sample in context.samples]
    scores = torch.stack(rows).to(x.device)
    return scores.repeat(x.shape[0] // len(rows), 1)
