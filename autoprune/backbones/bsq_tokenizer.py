"""Multi-scale binary spherical quantisation: images to bits per scale and back (Infinity, arXiv 2412.04431).

The state-dict keys are the official ones (`infinity/models/bsq_vae/`); a deviation may only add a key.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.backbones.cnn_autoencoder import Decoder, Encoder, Network
from autoprune.policy import Grid

MAX_SCALES = 15  # rows of the official level embedding: no schedule is longer


@dataclass(frozen=True)
class TokenizerConfig:
    """The defaults are official. `bits` is the VAE's d: with `patchify` the transformer sees 4 * bits.

    Deviations (official value): `norm_groups` (32) groups of each GroupNorm; `pixel_patch` (1) edge of the pixel
    squares that the finest level takes as channels; `scale_magnitudes` (False) a learnt code magnitude per scale,
    buffer `magnitudes` [15], in place of the constant 1/sqrt(bits).
    """

    bits: int
    base: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    patchify: bool = False
    norm_groups: int = 32
    pixel_patch: int = 1
    scale_magnitudes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))

    @property
    def stride(self) -> int:
        """Pixels per VAE cell; a patchified token covers 2x2 cells."""
        return self.pixel_patch * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base * multiplier for multiplier in self.channel_multipliers)


# Four-pixel patches: 0.23 s per training step of 8 on one thread, 0.38 s without (4.0 and 5.7 ms per decoded image).
TINY = TokenizerConfig(
    bits=16,
    base=16,
    channel_multipliers=(4, 6),
    encoder_blocks=2,
    decoder_blocks=2,
    norm_groups=8,
    pixel_patch=4,
    scale_magnitudes=True,
)


@dataclass(frozen=True)
class QuantisationStep:
    """One scale of the residual quantiser: `residual` [B, bits, h, w] before the sign, `latent` the sum after it."""

    residual: Tensor
    latent: Tensor


class BSQTokenizer(nn.Module):
    """Encoder, residual binary quantiser, decoder. Latents are float32 [B, bits, H, W] on the last scale's VAE grid."""

    streams = False

    def __init__(self, config: TokenizerConfig, *, with_encoder: bool = True) -> None:
        super().__init__()
        self.config = config
        layout = {"norm_groups": config.norm_groups, "pixel_patch": config.pixel_patch}
        if with_encoder:
            self.encoder = Encoder(config.bits, config.widths, blocks=config.encoder_blocks, **layout)
        self.decoder = Decoder(config.bits, config.widths, blocks=config.decoder_blocks, **layout)
        self.quantizer = _QuantizerState(config.bits)
        self.quantize = self.quantizer
        if config.scale_magnitudes:
            self.register_buffer("magnitudes", torch.full((MAX_SCALES,), config.bits**-0.5))

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return self.config.bits

    @property
    def token_bits(self) -> int:
        """Bits per token as the transformer sees them."""
        return self.config.bits * self._cell**2

    @property
    def _cell(self) -> int:
        return 2 if self.config.patchify else 1

    def latent_size(self, schedule: Sequence[Grid]) -> tuple[int, int]:
        """VAE grid (H, W) of the last scale."""
        return self._vae_grid(schedule[-1])

    def codes(self, bits: Tensor, scale: int) -> Tensor:
        """Bits [B, h, w, token_bits] in {0, 1} -> codes [B, bits, h', w'] of +-magnitude; h' = 2h with patchify."""
        planes = F.pixel_shuffle(bits.permute(0, 3, 1, 2).float(), self._cell)
        return (2 * planes - 1) * self.magnitude(scale)

    def magnitude(self, scale: int) -> float | Tensor:
        """Absolute value of every code of a scale."""
        return self.magnitudes[scale] if self.config.scale_magnitudes else self.config.bits**-0.5

    def accumulate(self, latent: Tensor, codes: Tensor, scale: int, count: int) -> Tensor:
        """Latent plus the codes brought to its size, which those of the last scale have (official trilinear rule; T = 1)."""
        return latent + _bilinear(codes, latent.shape[-2:])

    def next_tokens(self, latent: Tensor, grid: Grid) -> Tensor:
        """Latent [B, bits, H, W] -> transformer input of the scale [B, h * w, token_bits], bilinear also downwards."""
        resized = _bilinear(latent, self._vae_grid(grid))
        return F.pixel_unshuffle(resized, self._cell).flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, h, w] in [-1, 1] -> features [B, bits, h/stride, w/stride] before quantisation."""
        return self.encoder(images.to(self._dtype)).float()

    def quantise(self, features: Tensor, schedule: Sequence[Grid]) -> tuple[list[Tensor], Tensor]:
        """Features [B, bits, H, W] -> (bits [B, h, w, token_bits] uint8 per scale, summed latent)."""
        steps = list(self.quantisation_steps(features, schedule))
        return [self._bits(step.residual) for step in steps], steps[-1].latent

    def quantisation_steps(
        self, features: Tensor, schedule: Sequence[Grid], *, flip_rates: Tensor | None = None
    ) -> Iterator[QuantisationStep]:
        """Official residual rule: area average down, sign, trilinear up, subtract; one step per scale.

        `flip_rates` [B] is the share of bits turned over in `codes` of each sample; the later residuals then
        correct them (bitwise self-correction, arXiv 2412.04431 section 3.4), and the sign of `residual` stays true.
        """
        features = features.float()
        latent = torch.zeros_like(features)
        for scale, grid in enumerate(schedule):
            residual = _area(features - latent, self._vae_grid(grid))
            codes = torch.where(residual > 0, 1.0, -1.0) * self.magnitude(scale)
            if flip_rates is not None:
                codes = torch.where(torch.rand_like(codes) < flip_rates.view(-1, 1, 1, 1), -codes, codes)
            latent = latent + _bilinear(codes, features.shape[-2:])
            yield QuantisationStep(residual, latent)

    def decode(self, latent: Tensor, run: Network = nn.Module.__call__) -> Tensor:
        """Latent [B, bits, H, W] -> images [B, 3, H * stride, W * stride] float32, clamped to [-1, 1]."""
        return run(self.decoder, latent.to(self._dtype)).float().clamp(-1, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.conv_in.conv.weight.dtype

    def _vae_grid(self, grid: Grid) -> tuple[int, int]:
        return grid[1] * self._cell, grid[2] * self._cell

    def _bits(self, residual: Tensor) -> Tensor:
        return F.pixel_unshuffle((residual > 0).to(torch.uint8), self._cell).permute(0, 2, 3, 1)


def load_tokenizer(path: str | Path, *, with_encoder: bool = True) -> BSQTokenizer:
    """Read a file of `autoprune.testbed.train_tokenizer` (its metadata holds the configuration)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["config"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    tokenizer = BSQTokenizer(TokenizerConfig(**fields), with_encoder=with_encoder)
    tokenizer.load_state_dict({key: state[key] for key in tokenizer.state_dict()})
    return tokenizer.eval()


def wrapped_keys(state: Mapping[str, Tensor], expected: Container[str]) -> dict[str, Tensor]:
    """Add the `.conv` and `.norm` wrappers that some official VAE files omit: `x.weight` -> `x.conv.weight`.

    `expected` holds the keys of the model; a key that fits neither way stays as it is.
    """
    return {_wrapped(key, expected): value for key, value in state.items()}


def _wrapped(key: str, expected: Container[str]) -> str:
    stem, _, leaf = key.rpartition(".")
    candidates = (key, f"{stem}.conv.{leaf}", f"{stem}.norm.{leaf}")
    return next((candidate for candidate in candidates if candidate in expected), key)


class _QuantizerState(nn.Module):
    """Holds the official `lfq.mask` [bits] int64 = 2^(bits-1) .. 1, which only the index form of the codes needs."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.lfq = nn.Module()
        self.lfq.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))


def _area(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="area")


def _bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
