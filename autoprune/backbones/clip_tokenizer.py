"""The embedded video backbone's tokenizer: InfinityStar's two-stage bits around a network that is cheap on CPUs.

Quantisation is that of video_tokenizer.py but for one learnt magnitude a scale, as the embedded image tokenizer has, and for
pairs of channels: semantic codes go to both of a pair, so that its difference is free for motion. The network is the image
tokenizer's: the four frames of a latent frame lie as 2 x 2 phases in one image of twice the sides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones.bsq_tokenizer import QuantisationStep
from autoprune.backbones.clip_latents import ClipLatents
from autoprune.backbones.cnn_autoencoder import Decoder, Encoder, Network
from autoprune.errors import UserError
from autoprune.policy import Grid

PHASES = 2  # frames along each side of a folded image
MOVES = 0.02  # of values in [-1, 1]: a smaller change is none
TIME = PHASES**2  # frames of a latent frame; the first latent frame is one frame only


@dataclass(frozen=True)
class ClipTokenizerConfig:
    """`sides` are the square grids of every clip; those below the last draw `semantic_bits` a token, the last `bits`.

    `pixel_patch` is the edge of the squares of a folded image that the network takes as channels.
    """

    bits: int = 48
    semantic_bits: int = 24
    sides: tuple[int, ...] = (1, 2, 4, 8)
    widths: tuple[int, ...] = (56, 88)
    blocks: int = 1
    norm_groups: int = 8
    pixel_patch: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(self.sides))
        object.__setattr__(self, "widths", tuple(self.widths))


class FoldedEncoder(nn.Module):
    """Frames [B, 3, F, h, w] -> features [B, bits, T, H, W], in pairs of channels: their mean is of the mean of a latent
    frame's frames, their difference of what the frames differ by from it, and 0 where nothing moves.

    One encoder of both never came to code motion. Differences are twice `gain` in spread, to rule the signs where they are.
    """

    def __init__(self, bits: int, widths: Sequence[int], *, pixel_patch: int, **layout: int) -> None:
        super().__init__()
        self.still = Encoder(bits // 2, widths, pixel_patch=pixel_patch // PHASES, **layout)
        self.moving = Encoder(bits // 2, widths, pixel_patch=pixel_patch, **layout)

    def forward(self, frames: Tensor, gain: Tensor) -> Tensor:
        groups = _groups(frames)
        mean = groups.mean(dim=2, keepdim=True)
        changes = groups - mean
        still, moving = self.still(mean[:, :, 0]), self.moving(functional.pixel_shuffle(changes.flatten(1, 2), PHASES))
        largest = functional.adaptive_max_pool2d(changes.abs().amax(dim=(1, 2))[:, None], moving.shape[2:])
        moving = 2 * gain * functional.instance_norm(moving) * (largest > MOVES)
        features = torch.stack((still + moving, still - moving), dim=2).flatten(1, 2)
        return features.unflatten(0, (len(frames), -1)).transpose(1, 2)


class FoldedDecoder(Decoder):
    """Latents [B, bits, T, H, W] -> frames [B, 3, 4 (T - 1) + 1, h, w], not clamped."""

    def forward(self, latent: Tensor) -> Tensor:
        images = super().forward(latent.transpose(1, 2).flatten(0, 1))
        phases = functional.pixel_unshuffle(images, PHASES).unflatten(1, (3, TIME))
        phases = phases.unflatten(0, (len(latent), -1)).transpose(1, 2)  # [B, 3, T, 4, h, w]
        return torch.cat((phases[:, :, 0].mean(dim=2, keepdim=True), phases[:, :, 1:].flatten(2, 3)), dim=2)


class ClipTokenizer(ClipLatents, nn.Module):
    """Latents are float32 [B, bits, T, H, W]; a scale works on the frames of its clip. Every frame is decoded by itself."""

    streams = False

    def __init__(self, config: ClipTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        layout = {"blocks": config.blocks, "norm_groups": config.norm_groups, "pixel_patch": config.pixel_patch}
        self.encoder = FoldedEncoder(config.bits, config.widths, **layout)
        self.decoder = FoldedDecoder(config.bits, config.widths, **layout)
        self.register_buffer("magnitudes", torch.full((len(config.sides),), config.bits**-0.5))

    def codes(self, drawn: Tensor, scale: int) -> Tensor:
        """Bits [B, t, h, w, bits of the stage] in {0, 1} -> codes [B, bits of the stage, t, h, w] of +-magnitude."""
        return (2 * drawn.movedim(-1, 1).float().contiguous() - 1) * self.magnitudes[scale % len(self.config.sides)]

    def accumulate(self, latent: Tensor, codes: Tensor, scale: int, count: int) -> Tensor:
        """As InfinityStar, but for semantic codes, which go to both channels of a pair and to no other."""
        return super().accumulate(latent, codes.repeat_interleave(latent.shape[1] // codes.shape[1], dim=1), scale, count)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, F, h, w] in [-1, 1], F = 4k + 1 -> features [B, bits, k + 1, H, W]. Raises UserError for other F."""
        if frames.shape[2] % TIME != 1:
            raise UserError(f"a video must have 4k + 1 frames, got {frames.shape[2]}; leave some out.")
        return self.encoder(frames.to(self._dtype), self.magnitudes[-1]).float()

    def quantisation_steps(
        self, features: Tensor, runs: Sequence[Grid], *, flip_rates: Tensor | None = None
    ) -> Iterator[QuantisationStep]:
        """Official residual rule for all frames at once, one step a run of a scale; `runs` are the grids of a clip's runs.

        `flip_rates` [B] is the share of bits turned over in each sample, which later residuals then correct.
        """
        features = features.float()
        latent = torch.zeros_like(features)
        for grid in runs:
            residual = self.residual(features - latent, grid)
            bits = residual > 0
            if flip_rates is not None:
                bits = bits ^ (torch.rand(bits.shape, device=bits.device) < flip_rates.view(-1, 1, 1, 1, 1))
            codes = self.codes(bits.movedim(1, -1), self.config.sides.index(grid[1]))
            latent = self.accumulate(latent, codes, 0, 0)
            yield QuantisationStep(residual, latent)

    def residual(self, rest: Tensor, grid: Grid) -> Tensor:
        """What is missing [B, bits, t, H, W], averaged over areas of a grid and, where it is semantic, over channels."""
        bits = self.config.bits if grid[1] == self.config.sides[-1] else self.config.semantic_bits
        return functional.interpolate(rest.transpose(1, 2), (bits, *grid[1:]), mode="area").transpose(1, 2)

    def decode(self, latent: Tensor, run: Network = nn.Module.__call__) -> Tensor:
        """Latents [B, bits, T, H, W] -> float32 videos [B, 3, 4 (T - 1) + 1, h, w] in [-1, 1]."""
        return run(self.decoder, latent.to(self._dtype)).float().clamp(-1, 1)


def _groups(frames: Tensor) -> Tensor:
    """Frames [B, 3, 4k + 1, h, w] -> those of each latent frame [B * (k + 1), 3, 4, h, w]; the first one fills its own."""
    first, rest = frames[:, :, :1].expand(-1, -1, TIME, -1, -1), frames[:, :, 1:]
    return torch.cat((first, rest), dim=2).unflatten(2, (-1, TIME)).transpose(1, 2).flatten(0, 1)
