"""What a family of generators supplies to the one scale loop. Infinity, VAR, HART and InfinityStar differ in nothing else."""

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from autoprune.backbones.cnn_autoencoder import Network
from autoprune.backbones.kv_buffer import BufferKind, KeyValueBuffer
from autoprune.clips import ONCE_EACH, Course
from autoprune.policy import Grid

Schedule = tuple[Grid, ...]


class Features(Protocol):
    """What prompts became for a transformer: text features or class labels. Its length is the number of samples."""

    def __len__(self) -> int: ...


class Conditioning(Protocol):
    """What depends on the features only, computed once a generation. Rows are [cond x B] or [cond x B, uncond x B]."""

    def keep_rows(self, rows: slice) -> Self: ...


class Block(Protocol):
    """One transformer block: x [R, L, C] -> [R, L, C], its sublayers added through step.add (infinity.Step)."""

    def __call__(self, x: Tensor, layer: int, step: object, conditioning: Conditioning) -> Tensor: ...


class Transformer(Protocol):
    """`prefix_tokens`: tokens fed in front of the first scale, whose outputs are dropped. `refines`: whether the last scale
    gets a continuous residual (`refined`), so that it can never be skipped."""

    prefix_tokens: int
    refines: bool

    def course(self, schedule: Schedule) -> Course:
        """Returns how it runs through a schedule (clips.py)."""

    def prefix_keys(self, conditioning: Conditioning) -> Sequence[Tensor]:
        """Returns what stands before all scales, keys and values [2, R, H, T, D] of every block; nothing for most families."""

    @property
    def depth(self) -> int: ...

    @property
    def compute_dtype(self) -> torch.dtype: ...

    def layers(self) -> Sequence[Block]: ...

    def with_unconditional(self, features: Features, negative: Features | None) -> Features:
        """Appends the unconditional rows."""

    def condition(self, features: Features) -> Conditioning: ...

    def buffers_for(self, rows: int, capacities: list[int], make: BufferKind = KeyValueBuffer) -> list[KeyValueBuffer]:
        """Makes one K/V buffer a layer."""

    def first_tokens(self, conditioning: Conditioning) -> Tensor:
        """Returns what the first scale begins with, [R, prefix_tokens + 1, C]."""

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        """Embeds the latents [B, N, d] of a scale >= 1 -> [B, N, C]."""

    def rotation(self, step: int, schedule: Schedule, conditioning: Conditioning) -> Tensor | None:
        """Returns the rotary factors of a run of a scale, [2, N, D] or by row [2, R, 1, N, D]; None where there are none."""

    def logits(self, x: Tensor, conditioning: Conditioning, scale: int = 0) -> Tensor:
        """x [R, N, C] of a scale -> float32 logits [R, N, d, 2] of bits or [R, N, V] of codes."""

    def refined(self, codes: Tensor, x: Tensor, draw: "ResidualDraw", *, weight: float) -> Tensor:
        """Returns the codes [B, d, h, w] of the last scale with the residual that belongs to hidden states x [R, N, C].

        `weight` guides two branches; `draw(step, shape)` is normal noise [B, *shape] of one step.
        """


class Tokenizer(Protocol):
    """Latents are float32 [B, d, H, W] on the last scale's grid, of videos [B, d, T, H, W]; scales work on those of their clip.

    `streams`: whether it decodes a few frames at a time by itself.
    """

    streams: bool

    @property
    def channels(self) -> int:
        """d of the latent."""

    def latent_size(self, schedule: Schedule) -> tuple[int, ...]: ...

    def codes(self, drawn: Tensor, scale: int) -> Tensor:
        """Drawn bits or code numbers [B, (t,) h, w, ...] -> codes [B, d, (t,) h', w']."""

    def accumulate(self, latent: Tensor, codes: Tensor, scale: int, count: int) -> Tensor:
        """Adds the codes of a scale of `count` to the latent."""

    def next_tokens(self, latent: Tensor, grid: Grid) -> Tensor:
        """Latent -> transformer input of a scale [B, N, d]."""

    def decode(self, latent: Tensor, run: Network = nn.Module.__call__) -> Tensor:
        """Latent -> images [B, 3, h, w] or videos [B, 3, F, h, w], float32 in [-1, 1]; `run(decoder, x)` applies the network
        (backbones/decoding.py)."""


class OneClip:
    """What families of images have in common: every scale runs once, sees all earlier ones, and nothing stands before them."""

    def course(self, schedule: Schedule) -> Course:
        """Returns that every scale runs once."""
        return ONCE_EACH

    def prefix_keys(self, conditioning: Conditioning) -> Sequence[Tensor]:
        """Returns nothing."""
        return ()


ResidualDraw = Callable[[int, tuple[int, ...]], Tensor]
