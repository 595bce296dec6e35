"""A loaded backbone: weights and defaults, no state of any generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.backbones.family import Features, Schedule, Tokenizer, Transformer
from autoprune.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a generation samples. `guidance` and `temperature` are one number, or one a scale.

    With `ramp` the guidance weight grows from 1 at the first scale to 1 + guidance at the last, as VAR and HART define it.
    `top_k` most probable values (0: all), then the most probable ones that together reach `top_p` (0: all), can be drawn.
    `h_div_w` is height / width; `first_sample` numbers the batch, so that a split batch draws the same noise.
    """

    guidance: float | tuple[float, ...] = 3.0
    temperature: float | tuple[float, ...] = 1.0
    ramp: bool = False
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 0.0
    h_div_w: float = 1.0
    first_sample: int = 0

    def guidance_for(self, scales: int) -> tuple[float, ...]:
        """Returns one guidance weight a scale."""
        weights = _per_scale("guidance", self.guidance, scales)
        if not self.ramp:
            return weights
        return tuple(1 + weight * scale / max(1, scales - 1) for scale, weight in enumerate(weights))

    def temperature_for(self, scales: int) -> tuple[float, ...]:
        """Returns one temperature a scale, each above 0."""
        values = _per_scale("temperature", self.temperature, scales)
        if min(values) <= 0:
            raise UserError(f"temperature must be above 0, got {min(values)}.")
        return values

    def limits_for(self, scales: int) -> tuple[tuple[int, float], ...]:
        """Returns (top_k, top_p) of every scale."""
        ks, ps = _per_scale("top_k", self.top_k, scales), _per_scale("top_p", self.top_p, scales)
        if min(ks) < 0 or not 0 <= min(ps) <= max(ps) <= 1:
            raise UserError(f"top_k must be at least 0 and top_p in [0, 1], got {min(ks)} and {min(ps)} to {max(ps)}.")
        return tuple((int(k), p) for k, p in zip(ks, ps, strict=True))


def _per_scale(name: str, value: float | tuple[float, ...], scales: int) -> tuple[float, ...]:
    if isinstance(value, int | float):
        return (float(value),) * scales
    if len(value) < scales:
        raise UserError(f"{name} must be one number or {scales} numbers, one a scale, got {len(value)}.")
    return tuple(value[:scales])


@dataclass(frozen=True)
class Backbone:
    """Everything a generation reads. `revision` is the sha256 of the weights, empty for random ones."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    text_encoder: Callable[[Sequence[str]], Features]
    sampling: Sampling
    schedule_for: Callable[[float], Schedule]
    revision: str = ""

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return self.model.depth

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the blocks."""
        return self.model.compute_dtype

    def scale_schedule(self, h_div_w: float = 1.0) -> Schedule:
        """Returns the grids (t, h, w) for an aspect ratio."""
        return self.schedule_for(h_div_w)

    def encode_text(self, prompts: Sequence[str]) -> Features:
        """Encodes prompts for the transformer."""
        return self.text_encoder(prompts)

    def decode(self, latent: Tensor) -> Tensor:
        """Decodes latents [B, d, H, W] to float32 images [B, 3, h, w] in [0, 1]."""
        return (self.tokenizer.decode(latent) + 1) / 2
