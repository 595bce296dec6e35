"""The decoder in strips of rows: the same mathematics with less memory, for an image that does not fit whole.

GroupNorm needs the statistics of the whole image, so each one costs a pass of its own over the strips; a convolution takes a
row more on either side. Of a level its input and one map of its output are held whole, everything else strip by strip.
In bfloat16 images differ from those decoded whole by rounding, 55 dB and more.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones.cnn_autoencoder import Decoder, Level, ResidualBlock, Upsample

ROWS = 16  # bfloat16, 1024 x 1024, Infinity's tokenizer: 827 MB, 879 with 32, 983 with 64; 1280 whole


def decode_in_strips(decoder: Decoder, latent: Tensor, *, rows: int = ROWS) -> Tensor:
    """Returns what decoder(latent) does, equal but for rounding. The middle and the deepest level, small and the only ones with
    attention, run whole."""
    hidden = decoder.up[-1](decoder.mid(decoder.conv_in(latent)))
    for level in reversed(decoder.up[:-1]):
        for layer in _layers(level):
            hidden = _residual(layer, hidden, rows) if isinstance(layer, ResidualBlock) else _upsampled(layer, hidden, rows)
    image = _convolved(decoder.conv_out, hidden, _activation(decoder.norm_out, hidden, rows), rows)
    return functional.pixel_shuffle(image, decoder.pixel_patch)


def _layers(level: Level) -> list[nn.Module]:
    return [layer for layer in level.layers() if not isinstance(layer, nn.Identity)]


def _residual(block: ResidualBlock, x: Tensor, rows: int) -> Tensor:
    hidden = _convolved(block.conv1, x, _activation(block.norm1, x, rows), rows)
    hidden = _convolved(block.conv2, hidden, _activation(block.norm2, hidden, rows), rows, into=hidden)
    for own, other in zip(hidden.split(rows, dim=2), x.split(rows, dim=2), strict=True):
        own.add_(block.nin_shortcut(other))
    return hidden


def _upsampled(layer: Upsample, x: Tensor, rows: int) -> Tensor:
    """Convolves each strip of the enlarged map, which never exists whole."""
    enlarge = partial(functional.interpolate, scale_factor=2.0, mode="nearest")
    return _convolved(layer.conv, x, enlarge, max(1, rows // 2), factor=2)


def _activation(norm: nn.Module, x: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Returns SiLU after the GroupNorm of all of x [B, C, H, W], to be applied to strips of it."""
    norm = getattr(norm, "norm", norm)
    groups, count = norm.num_groups, x[0].numel() // norm.num_groups
    total = sum(_moments(strip, groups) for strip in x.split(rows, dim=2))
    mean, square = total / count
    deviation = (square - mean.square() + norm.eps).sqrt()
    mean, deviation = (value.repeat_interleave(x.shape[1] // groups, dim=1) for value in (mean, deviation))
    scale = norm.weight.double() / deviation
    shift = norm.bias.double() - mean * scale
    scale, shift = (value.float()[:, :, None, None] for value in (scale, shift))
    return lambda strip: functional.silu(torch.addcmul(shift, strip.float(), scale).to(x.dtype), inplace=True)


def _moments(strip: Tensor, groups: int) -> Tensor:
    """Strip [B, C, h, W] -> sums of its values and of their squares, float64 [2, B, groups]."""
    values = strip.float().unflatten(1, (groups, -1))
    return torch.stack([part.sum(dim=(2, 3, 4), dtype=torch.float64) for part in (values, values.square())])


def _convolved(
    conv: nn.Module, x: Tensor, before: Callable[[Tensor], Tensor], rows: int, *, factor: int = 1, into: Tensor | None = None
) -> Tensor:
    """Returns the 3 x 3 convolution of before(x), which is `factor` times as high as x; `into` may be x itself."""
    conv, height, above = getattr(conv, "conv", conv), x.shape[2], x[:, :, :0]
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        part = before(torch.cat([above, x[:, :, start : stop + 1]], dim=2))
        first = factor * above.shape[2]
        above = x[:, :, stop - 1 : stop].clone()
        edges = (int(start == 0), int(stop == height))
        part = part[:, :, max(0, first - 1) : first + factor * (stop - start) + 1]
        value = functional.conv2d(functional.pad(part, (1, 1, *edges)), conv.weight, conv.bias)
        if into is None:
            size = (len(x), value.shape[1], factor * height, value.shape[3])
            into = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        into[:, :, factor * start : factor * stop] = value
    return into
