"""A loaded backbone: weights and defaults, no state of any generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.infinity import Infinity
from autoprune.backbones.schedules import scale_schedule
from autoprune.backbones.text import TextFeatures
from autoprune.errors import UserError
from autoprune.policy import Grid


@dataclass(frozen=True)
class Sampling:
    """How a generation samples. `guidance` and `temperature` are one number, or one a scale.

    `h_div_w` is height / width; `first_sample` numbers the batch, so that a split batch draws the same noise.
    """

    guidance: float | tuple[float, ...] = 3.0
    temperature: float | tuple[float, ...] = 1.0
    h_div_w: float = 1.0
    first_sample: int = 0

    def guidance_for(self, scales: int) -> tuple[float, ...]:
        """Returns one guidance weight a scale."""
        return _per_scale("guidance", self.guidance, scales)

    def temperature_for(self, scales: int) -> tuple[float, ...]:
        """Returns one temperature a scale, each above 0."""
        values = _per_scale("temperature", self.temperature, scales)
        if min(values) <= 0:
            raise UserError(f"temperature must be above 0, got {min(values)}.")
        return values


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
    model: Infinity
    tokenizer: BSQTokenizer
    text_encoder: Callable[[Sequence[str]], TextFeatures]
    sampling: Sampling
    pixel_budget: str
    revision: str = ""

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return self.model.config.depth

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.pos_start.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the blocks."""
        return self.model.compute_dtype

    def scale_schedule(self, h_div_w: float = 1.0) -> tuple[Grid, ...]:
        """Returns the grids (t, h, w) for an aspect ratio."""
        return scale_schedule(h_div_w, self.pixel_budget)

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Encodes prompts for the transformer."""
        return self.text_encoder(prompts)

    def decode(self, latent: Tensor) -> Tensor:
        """Decodes latents [B, bits, H, W] to float32 images [B, 3, h, w] in [0, 1]."""
        decoder_dtype = next(self.tokenizer.decoder.parameters()).dtype
        return (self.tokenizer.decode(latent.to(decoder_dtype)).float() + 1) / 2
