"""The causal 3-D encoder and decoder of InfinityStar's video tokenizer, with the names of its official state dict.

Source: official `infinity/models/videovae/` (WAN-based, "absorb patchify"). Frames come in chunks: every convolution sees
the last two frames of the chunk before, which one call keeps in its `Past`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Past = dict[nn.Module, Tensor]
SPACE = 2  # every resampling halves or doubles height and width


class CausalConv(nn.Module):
    """A 3-D convolution: zeros around a frame, before the first frame twice that frame."""

    def __init__(self, inputs: int, outputs: int, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, size, padding=(0, size // 2, size // 2))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """x [B, C, T, H, W] -> [B, outputs, T, H, W]; replaces what `past` holds for it."""
        context = self.conv.kernel_size[0] - 1
        if context:
            before = past[self] if self in past else x[:, :, :1].expand(-1, -1, context, -1, -1)
            x = torch.cat((before, x), dim=2)
            past[self] = x[:, :, -context:].clone()
        return self.conv(x)


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        return functional.normalize(x, dim=1) * len(self.gamma) ** 0.5 * self.gamma


class LatentNorm(nn.Module):
    """A ChannelNorm scaled and shifted by the latent that is being decoded."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.norm_layer = ChannelNorm(channels)
        self.conv_y, self.conv_b = CausalConv(latent, channels, 1), CausalConv(latent, channels, 1)

    def forward(self, x: Tensor, latent: Tensor, past: Past) -> Tensor:
        """x [B, C, T, H, W], latent [B, c, t, h, w] -> [B, C, T, H, W]."""
        first = int(x.shape[2] > 1 and x.shape[2] % 2)  # the first frame of a video stands for itself
        parts = [(x[:, :, :first], latent[:, :, :first])] * first + [(x[:, :, first:], latent[:, :, first:])]
        latent = torch.cat([functional.interpolate(own, part.shape[2:]) for part, own in parts], dim=2)
        return self.norm_layer(x) * self.conv_y(latent, past) + self.conv_b(latent, past)


class ResidualBlock(nn.Module):
    """Two convolutions behind norms and SiLU, added to their input."""

    def __init__(self, channels: int, latent: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = (_norm(channels, latent) for _ in range(2))
        self.conv1, self.conv2 = (CausalConv(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, latent: Tensor | None, past: Past) -> Tensor:
        """x [B, C, T, H, W] -> the same shape."""
        hidden = x
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            hidden = norm(hidden) if latent is None else norm(hidden, latent, past)
            hidden = conv(functional.silu(hidden), past)
        return x + hidden


class Downsample(nn.Module):
    """Folds 2 x 2 places into channels, of the convolved frames and of the input averaged, and averages pairs of frames."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.time = time
        self.norm = ChannelNorm(inputs)
        self.conv = CausalConv(inputs, outputs // SPACE**2)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """x [B, C, T, H, W] -> [B, outputs, T', H / 2, W / 2]; of an odd number of frames the first stays alone."""
        folded = self._folded(self.conv(functional.silu(self.norm(x)), past))
        return folded + self._folded(x).unflatten(1, (-1, folded.shape[1])).mean(dim=1)

    def _folded(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        x = x.view(batch, channels, frames, height // SPACE, SPACE, width // SPACE, SPACE)
        x = x.permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)
        first = frames % 2
        rest = x[:, :, first:]
        if self.time > 1 and rest.shape[2]:
            rest = rest.unflatten(2, (-1, self.time)).mean(dim=3)
        return torch.cat((x[:, :, :first], rest), dim=2)


class Upsample(nn.Module):
    """Unfolds channels into 2 x 2 places and `time` frames, of the convolved frames and of the input repeated."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.time = time
        self.norm = ChannelNorm(inputs)
        self.conv = CausalConv(inputs, outputs * SPACE**2 * time)

    def forward(self, x: Tensor, past: Past, *, first: bool) -> Tensor:
        """x [B, C, T, H, W] -> [B, outputs, T', 2H, 2W]; where a video begins, its first frames become one."""
        y = self.conv(functional.silu(self.norm(x)), past)
        out = self._unfolded(y) + self._unfolded(x.repeat(1, y.shape[1] // x.shape[1], 1, 1, 1))
        if self.time > 1 and (first or x.shape[2] % 2):
            out = torch.cat((out[:, :, : self.time].mean(dim=2, keepdim=True), out[:, :, self.time :]), dim=2)
        return out

    def _unfolded(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.time, SPACE, SPACE, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Level(nn.Module):
    """Residual blocks and then, in a wrapper that keys show, what changes the size."""

    def __init__(self, channels: int, blocks: int, latent: int = 0) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, latent) for _ in range(blocks))

    def resized_by(self, name: str, layer: nn.Module) -> "Level":
        """Adds `layer` under the list `name`."""
        wrapper = nn.Module()
        wrapper.conv = layer
        setattr(self, name, nn.ModuleList([wrapper]))
        return self


class VideoEncoder(nn.Module):
    """Frames [B, 3, T, H, W] in chunks -> moments [B, 2c, t, H / 8, W / 8]; `widths` finest first, one more than levels."""

    def __init__(self, widths: Sequence[int], latent: int, *, blocks: int) -> None:
        super().__init__()
        self.conv_in = CausalConv(3, widths[0])
        levels = [Level(width, blocks) for width in widths[:-1]]
        for level, (width, after) in enumerate(zip(widths[:-2], widths[1:-1], strict=True)):
            levels[level].resized_by("downsamplers", Downsample(width, after, 2 if level < 2 else 1))
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = Level(widths[-1], 2)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * latent)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """One chunk; `past` is empty before the first one."""
        x = self.conv_in(x, past)
        for level in (*self.down_blocks, self.mid_block):
            for block in level.resnets:
                x = block(x, None, past)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0].conv(x, past)
        return self.conv_out(functional.silu(self.norm_out(x)), past)


class VideoDecoder(nn.Module):
    """Latents [B, c, t, h, w] in chunks -> frames [B, 3, T, 8h, 8w], not clamped; `widths` finest first."""

    def __init__(self, widths: Sequence[int], latent: int, *, blocks: int) -> None:
        super().__init__()
        widths = tuple(reversed(widths))
        self.conv_in = CausalConv(latent, widths[0])
        self.mid_block = Level(widths[0], 2, latent)
        levels = [Level(width, blocks, latent) for width in widths[:-1]]
        for level in range(1, len(levels)):
            layer = Upsample(widths[level], widths[level + 1], 2 if level >= len(levels) - 2 else 1)
            levels[level].resized_by("upsamplers", layer)
        self.up_blocks = nn.ModuleList(levels)
        self.norm_out = LatentNorm(widths[-1], latent)
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, latent: Tensor, past: Past, *, first: bool) -> Tensor:
        """One chunk; `past` is empty before the first one, which `first` says."""
        x = self.conv_in(latent, past)
        for level in (self.mid_block, *self.up_blocks):
            for block in level.resnets:
                x = block(x, latent, past)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0].conv(x, past, first=first)
        return self.conv_out(functional.silu(self.norm_out(x, latent, past)), past)


def _norm(channels: int, latent: int) -> nn.Module:
    return LatentNorm(channels, latent) if latent else ChannelNorm(channels)
