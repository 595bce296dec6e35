"""InfinityStar's video tokenizer: bits of two stages to a latent, and latents to frames and back, in chunks of few frames.

Source: official `infinity/models/videovae/models/wan_bsq_vae.py` and `infinity/schedules/infinity_elegant.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones.clip_latents import ClipLatents
from autoprune.backbones.cnn_autoencoder import Network
from autoprune.backbones.video_autoencoder import Past, VideoDecoder, VideoEncoder
from autoprune.clips import Course, clip_frames, clip_ranges
from autoprune.errors import UserError
from autoprune.noise import placed, standard_normal
from autoprune.policy import Grid

FOLD = 2  # the latent has 2 x 2 places of the autoencoder in its channels
STRIDE = 16  # pixels of a place of the latent
CHUNK, FRAMES = 2, 8  # latent frames decoded at a time after the first ones, and the frames they are of
LEAST, MOST = -30.0, 20.0  # of the logarithm of a variance


@dataclass(frozen=True)
class VideoTokenizerConfig:
    """`bits` are the latent's channels, `semantic_bits` those of grids with fewer than `detail_places` places a frame; `widths`
    the autoencoder's channels, finest first, `blocks` the residual blocks of an encoder's level; a decoder's has one more."""

    bits: int = 64
    semantic_bits: int = 16
    detail_places: int = 350
    widths: tuple[int, ...] = (96, 192, 384, 384, 384)
    blocks: int = 2


@dataclass(frozen=True)
class QuantisationStep:
    """One run of a scale: `residual` [B, bits, t, h, w] before the sign, `latent` [B, bits, t, H, W] of the clip after it."""

    residual: Tensor
    latent: Tensor


class VideoTokenizer(ClipLatents, nn.Module):
    """Latents are float32 [B, bits, T, H, W]; a scale works on the frames of its clip."""

    def __init__(self, config: VideoTokenizerConfig, *, with_encoder: bool = True) -> None:
        super().__init__()
        self.config = config
        latent = config.bits // FOLD**2
        if with_encoder:
            self.encoder = VideoEncoder(config.widths, latent, blocks=config.blocks)
        self.decoder = VideoDecoder(config.widths, latent, blocks=config.blocks + 1)
        self.quantizer = _Masks(config)
        self.quantize = self.quantizer
        for name in ("proj_down", "proj_down_two", "proj_up", "proj_up_two"):  # the latter of each are never used
            setattr(self, name, nn.Linear(config.bits, config.bits))
        self.scale_learnable_parameters = nn.Parameter(torch.ones(4))

    def codes(self, drawn: Tensor, scale: int) -> Tensor:
        """Bits [B, t, h, w, bits of the stage] in {0, 1} -> codes [B, bits of the stage, t, h, w] of +-1/sqrt(bits)."""
        bits = drawn.movedim(-1, 1).float().contiguous()
        return (2 * bits - 1) * drawn.shape[-1] ** -0.5

    def encode(self, frames: Tensor, *, seed: int = 0) -> Tensor:
        """Frames [B, 3, F, h, w] in [-1, 1], F = 1 or 4k + 1 -> features [B, bits, k + 1, h / 16, w / 16], drawn from the
        posterior by `seed` and sample. Raises UserError for other sizes."""
        mean, logarithm = self.moments(frames).chunk(2, dim=1)
        drawn = [standard_normal((seed, sample, 0), mean[0].numel(), stream="posterior") for sample in range(len(mean))]
        noise = placed(torch.stack(drawn).view(mean.shape), mean.device)
        features = mean + (logarithm.clamp(LEAST, MOST) / 2).exp() * noise
        return _by_channel(self.proj_down, features) * self.scale_learnable_parameters[0]

    def moments(self, frames: Tensor) -> Tensor:
        """Frames as in `encode` -> the posterior's means, then logarithms of variances [B, 2 * bits, k + 1, h / 16, w / 16]."""
        count, *sides = frames.shape[2:]
        if count % 4 != 1 or any(side % STRIDE for side in sides):
            raise UserError(
                f"a video must have 4k + 1 frames with sides divisible by {STRIDE}, got {count} of {sides[0]} x {sides[1]}; "
                "crop it."
            )
        past: Past = {}
        first = count if count < FRAMES else FRAMES + count % FRAMES
        chunks = [frames[:, :, :first], *frames[:, :, first:].split(FRAMES, dim=2)]
        moments = [self.encoder(chunk.to(self._dtype), past).float() for chunk in chunks if chunk.shape[2]]
        return functional.pixel_unshuffle(torch.cat(moments, dim=2).transpose(1, 2), FOLD).transpose(1, 2)

    def quantise(self, features: Tensor, schedule: Sequence[Grid], course: Course) -> tuple[Tensor, ...]:
        """Features [B, bits, T, H, W] -> the bits [B, N, bits of the stage] of every run of a scale, for Sampling.given."""
        steps = self.quantisation_steps(features, tuple(schedule), course)
        return tuple((step.residual > 0).long().flatten(2).transpose(1, 2) for step in steps)

    def quantisation_steps(self, features: Tensor, schedule: tuple[Grid, ...], course: Course) -> Iterator[QuantisationStep]:
        """Official residual rule by clip: area average down, channels too in early scales, sign, trilinear up, subtract."""
        for clip, frames in zip(clip_ranges(schedule), clip_frames(schedule), strict=True):
            target = features[:, :, frames.start : frames.stop].float()
            latent = torch.zeros_like(target)
            for scale in (each for each in clip for _ in range(course.times(each))):
                grid = schedule[scale]
                semantic = grid[1] * grid[2] < self.config.detail_places
                bits = self.config.semantic_bits if semantic else self.config.bits
                rest = (target - latent).transpose(1, 2)
                residual = functional.interpolate(rest, (bits, *grid[1:]), mode="area").transpose(1, 2)
                codes = torch.where(residual > 0, 1.0, -1.0) * bits**-0.5
                latent = self.accumulate(latent, codes, scale, len(schedule))
                yield QuantisationStep(residual, latent)

    def decode(self, latent: Tensor, run: Network = nn.Module.__call__) -> Tensor:
        """Latents [B, bits, T, H, W] -> float32 videos [B, 3, 4 (T - 1) + 1, 16H, 16W] in [-1, 1], of one frame [B, 3, 16H,
        16W].

        A video's first frame becomes a copy of its second (official)."""
        video = self.frames(latent).clamp(-1, 1)
        if video.shape[2] == 1:
            return video[:, :, 0]
        video[:, :, 0] = video[:, :, 1]
        return video

    def frames(self, latent: Tensor) -> Tensor:
        """Latents [B, bits, T, H, W] -> the decoder's float32 output [B, 3, 4 (T - 1) + 1, 16H, 16W]. T = 2 is refused."""
        count = latent.shape[2]
        if count == 2:
            raise UserError("a video of 2 latent frames cannot be decoded in chunks; make it 1 or 3 and more.")
        z = _by_channel(self.proj_up, latent / self.scale_learnable_parameters[0])
        z = functional.pixel_shuffle(z.transpose(1, 2), FOLD).transpose(1, 2).to(self._dtype)
        first = count if count < 3 else 3 + (count + 1) % 2
        past: Past = {}
        parts = [z[:, :, :first], *z[:, :, first:].split(CHUNK, dim=2)] if first < count else [z]
        return torch.cat([self.decoder(part, past, first=place == 0).float() for place, part in enumerate(parts)], dim=2)


class _Masks(nn.Module):
    """Holds the official powers of two, 2^(bits-1) .. 1, which only the index form of the codes needs."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        for name, bits in (("lfq_semantic", config.semantic_bits), ("lfq_detail", config.bits)):
            part = nn.Module()
            part.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))
            setattr(self, name, part)


def _by_channel(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x.movedim(1, -1)).movedim(-1, 1)
