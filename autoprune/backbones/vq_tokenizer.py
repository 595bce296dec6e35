"""Multi-scale vector quantisation: images to code numbers per scale and back (VAR, arXiv 2404.02905; also HART's codes).

The state-dict keys are the official ones of `models/vqvae.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.backbones.cnn_autoencoder import Conv, Decoder, Encoder, Network, Norm
from autoprune.policy import Grid

NORM_GROUPS = 32
PHI_SHARE = 0.5  # official quant_resi: half of the codes pass their convolution
PHI_CONVOLUTIONS = 4  # official share_quant_resi


@dataclass(frozen=True)
class VQConfig:
    """The defaults are the official vae_ch160v4096z32. The decoder has one residual block a level more than `blocks`.

    `scales` are the rows of the usage statistics in the checkpoint. `phi_at_last`: whether the codes of the last scale
    pass phi as the others do; HART adds them as they are.
    """

    vocabulary: int = 4096
    channels: int = 32
    base: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    scales: int = 10
    phi_at_last: bool = True

    @property
    def stride(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the networks' levels, finest first."""
        return tuple(self.base * multiplier for multiplier in self.channel_multipliers)


class VQTokenizer(nn.Module):
    """Encoder, residual quantiser, decoder. Latents are float32 [B, C, H, W] on the last scale's grid."""

    streams = False

    def __init__(self, config: VQConfig, *, with_encoder: bool = True) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        layout = {"norm_groups": NORM_GROUPS, "attention": True}
        if with_encoder:
            self.encoder = _unwrapped(Encoder(channels, config.widths, blocks=config.blocks, **layout))
            self.quant_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.decoder = _unwrapped(Decoder(channels, config.widths, blocks=config.blocks + 1, **layout))
        self.quantize = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(channels, channels, 3, padding=1)

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return self.config.channels

    def latent_size(self, schedule: Sequence[Grid]) -> tuple[int, int]:
        """Grid (H, W) of the last scale."""
        return schedule[-1][1], schedule[-1][2]

    def codes(self, drawn: Tensor, scale: int) -> Tensor:
        """Code numbers int64 [B, h, w] or [B, h, w, 1] -> codes [B, C, h, w]."""
        numbers = drawn.squeeze(-1) if drawn.dim() == 4 else drawn
        return self.quantize.embedding(numbers).permute(0, 3, 1, 2).float()

    def accumulate(self, latent: Tensor, codes: Tensor, scale: int, count: int) -> Tensor:
        """Latent plus phi of the codes of a scale of `count`, resized by bicubic interpolation but for the last scale."""
        if scale < count - 1:
            codes = F.interpolate(codes, size=latent.shape[-2:], mode="bicubic")
        elif not self.config.phi_at_last:
            return latent + codes
        return latent + self.quantize.phi(codes, scale, count)

    def next_tokens(self, latent: Tensor, grid: Grid) -> Tensor:
        """Latent [B, C, H, W] -> transformer input of a scale [B, h * w, C], averaged over areas."""
        return _area(latent, grid[1:]).flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, h, w] in [-1, 1] -> float32 features [B, C, h/stride, w/stride] before quantisation."""
        features = self.encoder(images.to(self.encoder.conv_in.weight.dtype))
        return self.quant_conv(features.to(self.quant_conv.weight.dtype)).float()

    def quantise(self, features: Tensor, schedule: Sequence[Grid]) -> tuple[list[Tensor], Tensor]:
        """Features [B, C, H, W] -> (code numbers int64 [B, h, w] of every scale, summed latent)."""
        steps = list(self._quantisation_steps(features.float(), schedule))
        return [numbers for numbers, _ in steps], steps[-1][1]

    def decode(self, latent: Tensor, run: Network = nn.Module.__call__) -> Tensor:
        """Latent [B, C, H, W] -> images [B, 3, H * stride, W * stride] float32, clamped to [-1, 1]."""
        hidden = self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype))
        return run(self.decoder, hidden.to(self.decoder.conv_in.weight.dtype)).float().clamp(-1, 1)

    def _quantisation_steps(self, features: Tensor, schedule: Sequence[Grid]) -> Iterator[tuple[Tensor, Tensor]]:
        """Official residual rule: area average down, nearest code, what `accumulate` adds is subtracted."""
        latent = torch.zeros_like(features)
        for scale, grid in enumerate(schedule):
            numbers = self.quantize.nearest(_area(features - latent, grid[1:]))
            latent = self.accumulate(latent, self.codes(numbers, scale), scale, len(schedule))
            yield numbers, latent


class Quantizer(nn.Module):
    """The codebook and the convolutions that smooth resized codes. `ema_vocab_hit_SV` counts training use only."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = config.channels
        self.embedding = nn.Embedding(config.vocabulary, channels)
        self.quant_resi = nn.Module()
        self.quant_resi.qresi_ls = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(PHI_CONVOLUTIONS))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(config.scales, config.vocabulary))

    def phi(self, codes: Tensor, scale: int, count: int) -> Tensor:
        """Codes [B, C, H, W] of a scale of `count` -> half of them plus half of their convolution."""
        return torch.lerp(codes, self.quant_resi.qresi_ls[phi_index(scale, count)](codes), PHI_SHARE)

    def nearest(self, features: Tensor) -> Tensor:
        """Features [B, C, h, w] -> numbers int64 [B, h, w] of the codes at the least Euclidean distance."""
        vectors, codebook = features.permute(0, 2, 3, 1).flatten(0, 2), self.embedding.weight.float()
        distance = codebook.square().sum(dim=1) - 2 * vectors @ codebook.T  # |vector|^2 is the same for all codes
        return distance.argmin(dim=1).view(len(features), *features.shape[2:])


def phi_index(scale: int, count: int) -> int:
    """Returns which convolution a scale of `count` uses: its relative place's nearest tick, the first of two as near.

    Places such as 2/9 lie halfway, so the ticks are computed in the order of numpy's linspace, as the official code does.
    """
    first = 1 / 3 / PHI_CONVOLUTIONS
    last = 1 - first
    gap = (last - first) / (PHI_CONVOLUTIONS - 1)
    ticks = [*(place * gap + first for place in range(PHI_CONVOLUTIONS - 1)), last]
    position = scale / max(1, count - 1)
    return min(range(PHI_CONVOLUTIONS), key=lambda number: abs(ticks[number] - position))


def _area(latent: Tensor, size: tuple[int, int]) -> Tensor:
    return latent if tuple(latent.shape[-2:]) == size else F.interpolate(latent, size=size, mode="area")


def _unwrapped(module: nn.Module) -> nn.Module:
    """Puts what Conv and Norm wrap in their place: these checkpoints say `x.weight` for `x.conv.weight`."""
    for name, child in list(module.named_children()):
        inner = child.conv if isinstance(child, Conv) else child.norm if isinstance(child, Norm) else _unwrapped(child)
        setattr(module, name, inner)
    return module
