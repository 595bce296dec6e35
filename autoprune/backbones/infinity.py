"""Infinity (arXiv 2412.04431): bitwise next-scale prediction, one class for every size, official state-dict keys."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.backbones.attention import attend
from autoprune.backbones.family import OneClip
from autoprune.backbones.kv_buffer import BufferKind, KeyValueBuffer
from autoprune.backbones.layers import CrossAttention, FeedForward, RMSNorm, SelfAttention, TextPool, modulate, without_autocast
from autoprune.backbones.nested_blocks import NestedBlocks
from autoprune.backbones.rope import gather_rotation, rotation
from autoprune.backbones.schedules import position_frame
from autoprune.backbones.text import TextFeatures
from autoprune.policy import Grid, token_count
from autoprune.pruning.plan import site

Addition = Callable[..., Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; `token_bits` is what it sees per token (4 * 14 for the patchified 8B)."""

    width: int
    heads: int
    depth: int
    chunks: int
    token_bits: int
    text_width: int = 2048
    text_max_length: int = 512
    levels: int = 15

    @property
    def mlp_width(self) -> int:
        """Hidden width of the feed-forward part: 4C to the nearest multiple of 256, as the official model rounds it."""
        return round(4 * self.width / 256) * 256


@dataclass(frozen=True)
class Conditioning:
    """What the text of one generation becomes, computed once. Rows are [cond x B] or [cond x B, uncond x B].

    pooled [R, C]; text [depth][2, R, H, T, D]; modulation [depth][6][R, 1, C]; head_modulation 2 x [R, 1, C];
    mask [R, 1, 1, T] or None.
    """

    pooled: Tensor
    text: tuple[Tensor, ...]
    modulation: tuple[tuple[Tensor, ...], ...]
    head_modulation: tuple[Tensor, Tensor]
    mask: Tensor | None

    def keep_rows(self, rows: slice) -> "Conditioning":
        """Returns the conditioning of some rows only."""
        return replace(
            self,
            pooled=self.pooled[rows],
            text=tuple(layer[:, rows] for layer in self.text),
            modulation=tuple(tuple(part[rows] for part in layer) for layer in self.modulation),
            head_modulation=(self.head_modulation[0][rows], self.head_modulation[1][rows]),
            mask=None if self.mask is None else self.mask[rows],
        )


@dataclass(frozen=True)
class Step:
    """What the blocks need at one scale: positions, how a sublayer's output is added, how queries meet earlier keys.

    `attention(layer)` takes q, k, v, a mask over what stands before all scales (None: no padding) and the scale of products.
    """

    rotation: Tensor | None
    add: Addition
    attention: Callable[[int], Callable[..., Tensor]]

    def rotation_of(self, kept: Tensor | None) -> Tensor | None:
        """Returns the positions of kept tokens [R, M], of all for None; None where there are none."""
        return self.rotation if kept is None or self.rotation is None else gather_rotation(self.rotation, kept)


class Block(nn.Module):
    """Self-attention, attention to the text and feed-forward, the outer two gated and shifted by the pooled text."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)
        self.sa = SelfAttention(config.width, config.heads)
        self.ca = CrossAttention(config.width, config.heads)
        self.ffn = FeedForward(config.width, config.mlp_width)
        self.ca_norm = nn.LayerNorm(config.width, eps=1e-6)

    def modulation(self, shared: Tensor) -> tuple[Tensor, ...]:
        """Returns gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2 from the shared part [R, 1, 6, C]."""
        parts = (self.ada_gss.float() + shared).unbind(2)
        parts = (*parts[:2], parts[2] + 1, parts[3] + 1, *parts[4:])
        return tuple(part.to(self.ada_gss.dtype) for part in parts)

    def forward(self, x: Tensor, layer: int, step: Step, conditioning: Conditioning) -> Tensor:
        """x [R, L, C] -> [R, L, C]."""
        gate1, gate2, gain1, gain2, shift1, shift2 = conditioning.modulation[layer]
        text, mask, attention = conditioning.text[layer], conditioning.mask, step.attention(layer)

        def attend_self(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.sa(modulate(y, gain1, shift1), step.rotation_of(kept), attention) * gate1

        def attend_text(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.ca(self.ca_norm(y), text, mask)

        def feed_forward(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.ffn(modulate(y, gain2, shift2)) * gate2

        x = step.add(x, attend_self, site=site(layer, "sa"))
        x = step.add(x, attend_text, site=site(layer, "ca"))
        return step.add(x, feed_forward, site=site(layer, "ffn"))


class Infinity(OneClip, NestedBlocks, nn.Module):
    """The transformer. Blocks may be in a lower precision; text, embeddings and head stay in float32 (as released)."""

    prefix_tokens = 0
    refines = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.cfg_uncond = nn.Parameter(torch.randn(config.text_max_length, config.text_width) / config.text_width**0.5)
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.text_norm = RMSNorm(config.text_width)
        self.text_proj_for_sos = TextPool(config.text_width, width)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.lvl_embed = nn.Embedding(config.levels, width)
        self.word_embed = nn.Linear(config.token_bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.head_nm = nn.Module()
        self.head_nm.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, 2 * config.token_bits)
        self.nest([Block(config) for _ in range(config.depth)])

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the blocks."""
        return self.layers()[0].ada_gss.dtype

    def with_unconditional(self, text: TextFeatures, negative: TextFeatures | None) -> TextFeatures:
        """Appends the unconditional rows: the learned ones, as long as each prompt, or a negative prompt's features."""
        if negative is None:
            rows = [self.cfg_uncond[:length] for length in text.lengths]
            negative = TextFeatures.from_rows(rows)
        return text.concatenate(negative)

    def condition(self, text: TextFeatures) -> Conditioning:
        """Computes everything that depends on the text only, for the rows of `text`."""
        mask = text.padding_mask()
        normed = self.text_norm(text.values)
        pooled = self.text_proj_for_sos(normed, mask)
        shared = self.shared_ada_lin(pooled).unflatten(-1, (1, 6, -1))
        head_gain, head_shift = self.head_nm.ada_lin(pooled)[:, None].chunk(2, dim=-1)
        projected = self.text_proj_for_ca(normed).to(self.compute_dtype)
        layers = self.layers()
        return Conditioning(
            pooled=pooled,
            text=tuple(block.ca.text_keys_values(projected) for block in layers),
            modulation=tuple(block.modulation(shared) for block in layers),
            head_modulation=(head_gain + 1, head_shift),
            mask=mask,
        )

    def buffers_for(self, rows: int, capacities: list[int], make: BufferKind = KeyValueBuffer) -> list[KeyValueBuffer]:
        """Makes one K/V buffer a layer."""
        config, device = self.config, self.pos_start.device
        shapes = [(rows, config.heads, capacity, config.width // config.heads) for capacity in capacities]
        return [make(shape, dtype=self.compute_dtype, device=device) for shape in shapes]

    def first_tokens(self, conditioning: Conditioning) -> Tensor:
        """Returns the single token of scale 0, [R, 1, C], with its level embedding."""
        x = conditioning.pooled[:, None] + self.pos_start + self.lvl_embed.weight[0]
        return x.to(self.compute_dtype)

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        """Embeds latents [B, N, token bits] of a scale >= 1 -> [B, N, C]."""
        return (self.word_embed(tokens) + self.lvl_embed.weight[scale]).to(self.compute_dtype)

    def rotation(self, scale: int, schedule: tuple[Grid, ...], conditioning: Conditioning | None = None) -> Tensor:
        """Returns the rotary factors of a scale [2, N, D], which depend on the schedule only."""
        head_width = self.config.width // self.config.heads
        return rotation(schedule[scale], position_frame(schedule), head_width, self.pos_start.device, self.compute_dtype)

    def logits(self, x: Tensor, conditioning: Conditioning, scale: int = 0) -> Tensor:
        """x [R, N, C] -> float32 logits [R, N, token bits, 2]; outputs 2j and 2j + 1 score bit j being 0 and 1."""
        with without_autocast(x.device):
            gain, shift = (part.float() for part in conditioning.head_modulation)
            return self.head(modulate(x.float(), gain, shift)).unflatten(-1, (-1, 2))

    def forward_training(
        self, text: TextFeatures, tokens: list[Tensor], schedule: tuple[Grid, ...], *, dropped: Tensor | None = None
    ) -> list[Tensor]:
        """Teacher forcing: every scale of `schedule` at once, each attending to itself and earlier ones.

        `tokens` are the inputs [B, N_s, token bits] of scales 1, 2, ...; samples where `dropped` [B] is true see the
        unconditional text. Returns logits [B, N_s, token bits, 2] for each scale.
        """
        if dropped is not None:
            learned = self.cfg_uncond[: text.values.shape[1]].expand_as(text.values)
            text = TextFeatures(torch.where(dropped[:, None, None], learned, text.values), text.lengths)
        conditioning = self.condition(text)
        parts = [self.first_tokens(conditioning)] + [self.embed(entry, scale) for scale, entry in enumerate(tokens, start=1)]
        x = torch.cat(parts, dim=1)
        sizes = [token_count(grid) for grid in schedule]
        step = Step(
            rotation=torch.cat([self.rotation(scale, schedule) for scale in range(len(schedule))], dim=1),
            add=lambda x, change, site: x + change(x, None),
            attention=lambda layer: lambda q, k, v: _attend_by_scale(q, k, v, sizes),
        )
        for layer, block in enumerate(self.layers()):
            x = block(x, layer, step, conditioning)
        return list(self.logits(x, conditioning).split(sizes, dim=1))


def _attend_by_scale(q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> Tensor:
    outputs, start = [], 0
    for size in sizes:
        end = start + size
        outputs.append(attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale=1.0))
        start = end
    return torch.cat(outputs, dim=2)
