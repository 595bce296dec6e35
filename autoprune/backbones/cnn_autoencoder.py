"""Convolutional encoder and decoder of the image tokenizers: Infinity's (arXiv 2412.04431), FLUX-like and without
attention, and VAR's (arXiv 2404.02905), with attention in the deepest level and in the middle.

Submodule names follow Infinity's official state dict; `.conv` and `.norm` are the wrappers its keys show.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-6
Network = Callable[[nn.Module, Tensor], Tensor]  # applies a decoder to what it takes
FALLBACK_NORM_GROUPS = 24  # official rule for channel counts that the usual number of groups does not divide


class Encoder(nn.Module):
    """Image [B, 3, h, w] -> features [B, bits, h/stride, w/stride], stride = pixel_patch * 2^(levels - 1).

    `widths` are the channels of each level, finest first; the finest level sees patches of `pixel_patch`^2 pixels.
    """

    def __init__(
        self,
        bits: int,
        widths: Sequence[int],
        *,
        blocks: int,
        norm_groups: int,
        pixel_patch: int = 1,
        attention: bool = False,
    ) -> None:
        super().__init__()
        inputs = (widths[0], *widths[:-1])
        self.pixel_patch = pixel_patch
        self.conv_in = Conv(3 * pixel_patch**2, widths[0])
        self.down = nn.ModuleList(
            Level(
                [ResidualBlock(before if block == 0 else width, width, norm_groups=norm_groups) for block in range(blocks)],
                attention=_attention(width, norm_groups, blocks if attention and level == len(widths) - 1 else 0),
                downsample=Downsample(width) if level < len(widths) - 1 else None,
            )
            for level, (before, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid = Middle(widths[-1], norm_groups, attention=attention)
        self.norm_out = Norm(widths[-1], norm_groups)
        self.conv_out = Conv(widths[-1], bits)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.conv_in(F.pixel_unshuffle(image, self.pixel_patch))
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(_silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Latent [B, bits, H, W] -> image [B, 3, H * stride, W * stride], not clamped."""

    def __init__(
        self,
        bits: int,
        widths: Sequence[int],
        *,
        blocks: int,
        norm_groups: int,
        pixel_patch: int = 1,
        attention: bool = False,
    ) -> None:
        super().__init__()
        inputs = (*widths[1:], widths[-1])
        self.pixel_patch = pixel_patch
        self.conv_in = Conv(bits, widths[-1])
        self.mid = Middle(widths[-1], norm_groups, attention=attention)
        self.up = nn.ModuleList(
            Level(
                [ResidualBlock(before if block == 0 else width, width, norm_groups=norm_groups) for block in range(blocks)],
                attention=_attention(width, norm_groups, blocks if attention and level == len(widths) - 1 else 0),
                upsample=Upsample(width) if level > 0 else None,
            )
            for level, (before, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = Norm(widths[0], norm_groups)
        self.conv_out = Conv(widths[0], 3 * pixel_patch**2)

    def forward(self, latent: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            for layer in level.layers():  # not level(hidden), which would hold the level's input to its end
                hidden = layer(hidden)
        return F.pixel_shuffle(self.conv_out(_silu(self.norm_out(hidden))), self.pixel_patch)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Norm(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        fitting = groups if channels % groups == 0 else FALLBACK_NORM_GROUPS
        self.norm = nn.GroupNorm(fitting, channels, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs, norm_groups)
        self.conv1 = Conv(inputs, outputs)
        self.norm2 = Norm(outputs, norm_groups)
        self.conv2 = Conv(outputs, outputs)
        self.nin_shortcut = Conv(inputs, outputs, kernel=1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (through the shortcut) plus the branch. Unnamed steps and sums in place hold no map longer than needed."""
        return self.conv2(_silu(self.norm2(self.conv1(_silu(self.norm1(x)))))).add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Every cell attends to every cell, with one head, and adds the outcome to itself."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm = Norm(channels, norm_groups)
        self.qkv = Conv(channels, 3 * channels, kernel=1)
        self.proj_out = Conv(channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(mixed.reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, channels: int, norm_groups: int, *, attention: bool = False) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm_groups=norm_groups)
        self.attn_1 = AttentionBlock(channels, norm_groups=norm_groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, norm_groups=norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each if any, and the change to the next one, where there is one."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        attention: Iterable[nn.Module] = (),
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def layers(self) -> Iterator[nn.Module]:
        """Yields what the level applies, in order."""
        for block, attention in zip_longest(self.block, self.attn):
            yield from (block,) if attention is None else (block, attention)
        yield from (self.downsample, self.upsample)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels)
        self.conv.conv.stride, self.conv.conv.padding = (2, 2), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else reads, in its place but where gradients are wanted."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _attention(channels: int, norm_groups: int, count: int) -> list[AttentionBlock]:
    return [AttentionBlock(channels, norm_groups=norm_groups) for _ in range(count)]
