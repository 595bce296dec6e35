"""The diffusion head that adds a continuous residual to HART's last codes (arXiv 2410.10812, section 3.3; MAR's head).

State-dict keys are the official ones of `hart/modules/diffusion/diffloss.py`, the sampler is DDPM with a learned variance
range on a few of 1000 steps (arXiv 2102.09672).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones.family import ResidualDraw

TRAINED_STEPS = 1000
LARGEST_BETA = 0.999  # official cap of the cosine schedule
CODE_SCALE = 0.6  # official vae_scale: what a sample is multiplied by to be a residual of codes
FREQUENCIES = 128  # half the width of official time embeddings


@dataclass(frozen=True)
class DenoisingStep:
    """One step of the shortened process: the trained step number that the network sees, and what enters its formulas.

    x_0 = `of_noisy` x_t - `of_noise` eps; the posterior mean is `from_start` x_0 + `from_noisy` x_t; its log variance lies
    between `least` and `most`.
    """

    number: int
    of_noisy: float
    of_noise: float
    from_start: float
    from_noisy: float
    least: float
    most: float


@lru_cache(maxsize=8)
def denoising_steps(count: int) -> tuple[DenoisingStep, ...]:
    """Returns `count` (2 or more) evenly spaced steps of the cosine schedule, the first one to run first (most noise).

    Source: official `respace.py` and `gaussian_diffusion.py`; the first step's posterior variance, 0, is that of the second.
    """
    kept_signal = _kept_signal()
    numbers = [round(place * (TRAINED_STEPS - 1) / (count - 1)) for place in range(count)]
    now = [kept_signal[number] for number in numbers]
    before = [1.0, *now[:-1]]
    betas = [1 - after / earlier for after, earlier in zip(now, before, strict=True)]
    variances = [beta * (1 - earlier) / (1 - after) for beta, earlier, after in zip(betas, before, now, strict=True)]
    variances[0] = variances[1]
    steps = [
        DenoisingStep(
            number=number,
            of_noisy=math.sqrt(1 / after),
            of_noise=math.sqrt(1 / after - 1),
            from_start=beta * math.sqrt(earlier) / (1 - after),
            from_noisy=(1 - earlier) * math.sqrt(1 - beta) / (1 - after),
            least=math.log(variance),
            most=math.log(beta),
        )
        for number, after, earlier, beta, variance in zip(numbers, now, before, betas, variances, strict=True)
    ]
    return tuple(reversed(steps))


def _kept_signal() -> list[float]:
    """Returns the cumulated product of 1 - beta of the trained cosine schedule."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    products, product = [], 1.0
    for step in range(TRAINED_STEPS):
        start, end = step / TRAINED_STEPS, (step + 1) / TRAINED_STEPS
        product *= 1 - min(1 - signal(end) / signal(start), LARGEST_BETA)
        products.append(product)
    return products


class ResidualDiffusion(nn.Module):
    """Samples the residual of every token on its own, given the transformer's features of it."""

    def __init__(self, *, channels: int, features: int, width: int, depth: int, steps: int) -> None:
        """`channels` of the codes, `features` of the transformer; `width` and `depth` of the network, `steps` to sample."""
        super().__init__()
        self.steps = steps
        self.net = DenoisingNetwork(channels=channels, features=features, width=width, depth=depth)

    def sample(self, features: Tensor, draw: ResidualDraw, *, branches: int, weight: float) -> Tensor:
        """Features [branches * B, N, C] -> residuals [B, N, d]; with two, guided by weight * cond + (1 - weight) * uncond.

        `draw(step, (N, d))` is normal noise [B, N, d]: the start at 0, then that of every step but the last.
        The official code leaves guidance out when the weight is exactly 2, which is not repeated here.
        """
        schedule = denoising_steps(self.steps)
        condition = self.net.cond_embed(features)
        x = draw(0, (features.shape[1], self.net.input_proj.in_features))
        for turn, step in enumerate(schedule, start=1):
            noise, fraction = self.net(x, step.number, condition).chunk(2, dim=-1)
            if branches == 2:
                noise = weight * noise[: len(x)] + (1 - weight) * noise[len(x) :]
                fraction = fraction[: len(x)]
            start = (step.of_noisy * x - step.of_noise * noise).clamp(-1, 1)
            x = step.from_start * start + step.from_noisy * x
            if turn < len(schedule):
                share = (fraction + 1) / 2
                deviation = (0.5 * (share * step.most + (1 - share) * step.least)).exp()
                x = x + deviation * draw(turn, x.shape[1:])
        return x * CODE_SCALE


class NumberEmbedding(nn.Module):
    """A number as sinusoids through two linear layers: diffusion steps here, scales in the transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, number: int) -> Tensor:
        """A number -> [C]."""
        weight = self.mlp[0].weight
        numbers = torch.arange(FREQUENCIES, dtype=torch.float32, device=weight.device)
        frequencies = torch.exp(-math.log(10000) * numbers / FREQUENCIES)
        angles = number * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin())).to(weight.dtype))


class DenoisingNetwork(nn.Module):
    """Residual blocks over tokens one by one, shifted, scaled and gated by step and features."""

    def __init__(self, *, channels: int, features: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = NumberEmbedding(width)
        self.cond_embed = nn.Linear(features, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(DenoisingBlock(width) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, 2 * channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, number: int, condition: Tensor) -> Tensor:
        """x [B, N, d], `condition` from cond_embed [R, N, width], R a multiple of B -> noise and variance share [R, N, 2d]."""
        condition = condition + self.time_embed(number)
        hidden = self.input_proj(x).repeat(len(condition) // len(x), 1, 1)
        for block in self.res_blocks:
            hidden = block(hidden, condition)
        shift, scale = self.final_layer.adaLN_modulation(condition).chunk(2, dim=-1)
        normed = functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return self.final_layer.linear(normed * (1 + scale) + shift)


class DenoisingBlock(nn.Module):
    """One residual block of the network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition [R, N, width] -> [R, N, width]."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)
