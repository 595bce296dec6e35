"""Latents of videos, clip by clip, as every tokenizer of InfinityStar's kind holds them.

Source: official `infinity/schedules/infinity_elegant.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.clips import clip_frames
from autoprune.policy import Grid


class ClipLatents:
    """Latents are float32 [B, bits, T, H, W]; a scale works on the frames of its clip. `config.bits` are the channels."""

    streams = True

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return self.config.bits

    def latent_size(self, schedule: Sequence[Grid]) -> tuple[int, int, int]:
        """Returns (T, H, W): the frames of all clips, the last scale's grid."""
        return (clip_frames(tuple(schedule))[-1].stop, *schedule[-1][1:])

    def accumulate(self, latent: Tensor, codes: Tensor, scale: int, count: int) -> Tensor:
        """The latent of a clip plus codes brought to its size, channels included, by one trilinear interpolation a frame."""
        size = (latent.shape[1], *latent.shape[3:])
        frames = functional.interpolate(codes.transpose(1, 2), size, mode="trilinear", align_corners=False)
        return latent + frames.transpose(1, 2)

    def next_tokens(self, latent: Tensor, grid: Grid) -> Tensor:
        """The latent [B, bits, t, H, W] of a clip -> transformer input of a scale [B, t * h * w, bits], averaged over areas."""
        return functional.interpolate(latent, (latent.shape[2], *grid[1:]), mode="area").flatten(2).transpose(1, 2)

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.conv_in.conv.weight.dtype
