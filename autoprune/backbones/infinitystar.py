"""InfinityStar (arXiv 2511.04675): next-scale prediction of videos clip by clip, the text a prefix of every attention.

State-dict keys are the official ones (`infinity/models/infinity.py`, model infinity_qwen8b).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.backbones.attention import attend
from autoprune.backbones.family import Schedule
from autoprune.backbones.hart_layers import LlamaFeedForward
from autoprune.backbones.infinity import Step
from autoprune.backbones.kv_buffer import BufferKind, KeyValueBuffer
from autoprune.backbones.layers import RMSNorm, without_autocast
from autoprune.backbones.linear import linear
from autoprune.backbones.nested_blocks import NestedBlocks
from autoprune.backbones.rope import rotate
from autoprune.backbones.sizes import nested_key, resized_text
from autoprune.backbones.star_rope import step_rotation, text_rotation
from autoprune.backbones.text import TextFeatures
from autoprune.clips import Course, clip_ranges
from autoprune.errors import UserError
from autoprune.pruning.plan import site

TEXT_ROWS = 512  # of cfg_uncond


@dataclass(frozen=True)
class StarConfig:
    """Sizes of a transformer. The first `semantic_scales` of a clip draw `semantic_bits` a token, the others `token_bits`.

    Every scale of the image clip runs `image_repetitions` times, of later clips `video_repetitions`. Scales are counted from
    `text_max_length` on in rotary positions, however long the text is.
    """

    width: int
    heads: int
    key_heads: int
    depth: int
    chunks: int
    image_repetitions: tuple[int, ...]
    video_repetitions: tuple[int, ...]
    semantic_scales: int
    token_bits: int = 64
    semantic_bits: int = 16
    text_width: int = 2048
    text_max_length: int = 512

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of the feed-forward part: 4C to the nearest multiple of 256."""
        return round(4 * self.width / 256) * 256


@dataclass(frozen=True)
class PrefixText:
    """Text features of cond rows, then of uncond rows; `lengths` [2B] are the tokens of each row that take part.

    Official rule: an unconditional row is as long as its prompt, a shorter negative prompt continued by zero tokens.
    """

    text: TextFeatures
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Conditioning:
    """What the text of one generation becomes. Rows are [cond x B] or [cond x B, uncond x B].

    keys [depth][2, R, G, T, D]: keys and values of the text in every block; mask [R, 1, 1, T] hides padding, or None.
    """

    keys: tuple[Tensor, ...]
    mask: Tensor | None

    def keep_rows(self, rows: slice) -> "Conditioning":
        """Returns the conditioning of some rows only."""
        mask = None if self.mask is None else self.mask[rows]
        return Conditioning(tuple(layer[:, rows] for layer in self.keys), mask)


class Attention(nn.Module):
    """Grouped-query attention, queries and keys normalised by head before they are rotated; no biases."""

    def __init__(self, config: StarConfig) -> None:
        super().__init__()
        self.head_width, keys = config.head_width, config.key_heads * config.head_width
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, keys, bias=False)
        self.v_proj = nn.Linear(config.width, keys, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(config.head_width), RMSNorm(config.head_width)

    def forward(self, x: Tensor, step: Step, kept: Tensor | None, layer: int, mask: Tensor | None) -> Tensor:
        """x [R, L, C] of the tokens at `kept` [R, L] (None: all) -> [R, L, C]; `mask` hides padding of the text."""
        parts = [linear(x, projection) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in parts)
        rotation = step.rotation_of(kept)
        q, k = (rotate(norm(part), rotation).to(x.dtype) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        out = step.attention(layer)(q, k, v, mask, scale=self.head_width**-0.5)
        return linear(out.transpose(1, 2).flatten(2), self.o_proj)


class Block(nn.Module):
    """Self-attention over text, context and the scale itself, then feed-forward, each behind a norm of its own."""

    def __init__(self, config: StarConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = LlamaFeedForward(config.width, config.mlp_width)
        self.input_layernorm = RMSNorm(config.width)
        self.post_attention_layernorm = RMSNorm(config.width)

    def forward(self, x: Tensor, layer: int, step: Step, conditioning: Conditioning) -> Tensor:
        """x [R, L, C] -> [R, L, C]."""

        def attend_self(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.attn(self.input_layernorm(y).to(y.dtype), step, kept, layer, conditioning.mask)

        def feed_forward(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.mlp(self.post_attention_layernorm(y).to(y.dtype))

        x = step.add(x, attend_self, site=site(layer, "sa"))
        return step.add(x, feed_forward, site=site(layer, "ffn"))


class InfinityStar(NestedBlocks, nn.Module):
    """The transformer. Blocks may be in a lower precision; text, embedding and heads stay in float32 (as released)."""

    prefix_tokens = 0
    refines = False

    def __init__(self, config: StarConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.cfg_uncond = nn.Parameter(torch.randn(TEXT_ROWS, config.text_width) / config.text_width**0.5)
        self.sos_token = nn.Parameter(torch.zeros(1, 1, width))  # in released files, never used
        self.text_proj = nn.Linear(config.text_width, width)
        self.word_embed = nn.Linear(config.token_bits, width)
        self.norm_hidden_sates = RMSNorm(width)
        self.head = nn.Linear(width, 2 * config.token_bits)
        self.semantic_head2 = nn.Linear(width, 2 * config.semantic_bits)
        self.nest([Block(config) for _ in range(config.depth)])

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the blocks."""
        return self.layers()[0].attn.q_proj.weight.dtype

    def course(self, schedule: Schedule) -> Course:
        """Returns how often each scale runs; none sees the keys of others but of the last one of the clip before."""
        first, *later = clip_ranges(schedule)
        times = self.config.image_repetitions[: len(first)]
        for clip in later:
            times += self.config.video_repetitions[: len(clip)]
        return Course(times, by_clip=True)

    def with_unconditional(self, text: TextFeatures, negative: TextFeatures | None) -> PrefixText:
        """Appends the unconditional rows: the learned ones, as long as each prompt, or a negative prompt's features.

        Raises UserError for a negative prompt that is longer than a prompt.
        """
        if negative is None:
            negative = TextFeatures.from_rows([self.cfg_uncond[:length] for length in text.lengths])
        for own, other in zip(text.lengths, negative.lengths, strict=True):
            if other > own:
                raise UserError(f"a negative prompt must be as short as the prompt, got {other} tokens for {own}; shorten it.")
        return PrefixText(text.concatenate(negative), text.lengths * 2)

    def condition(self, text: TextFeatures | PrefixText) -> Conditioning:
        """Runs the text through the blocks by itself and keeps its keys and values."""
        features, lengths = (text.text, text.lengths) if isinstance(text, PrefixText) else (text, text.lengths)
        places = torch.arange(features.values.shape[1], device=features.values.device)
        own = places < torch.tensor(features.lengths, device=places.device)[:, None]
        x = (self.text_proj(features.values) * own[..., None]).to(self.compute_dtype)
        mask, keys = TextFeatures(features.values, lengths).padding_mask(), []

        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
            keys.append(torch.stack((k, v)))
            return attend(q, k, v, scale=scale, mask=mask)

        rotation = text_rotation(len(places), self.config.head_width).to(places.device)
        step = Step(rotation, add=lambda x, change, site: x + change(x, None), attention=lambda layer: attention)
        for layer, block in enumerate(self.layers()):
            x = block(x, layer, step, Conditioning((), mask))
        return Conditioning(tuple(keys), mask)

    def prefix_keys(self, conditioning: Conditioning) -> tuple[Tensor, ...]:
        """Returns the keys and values of the text."""
        return conditioning.keys

    def buffers_for(self, rows: int, capacities: list[int], make: BufferKind = KeyValueBuffer) -> list[KeyValueBuffer]:
        """Makes one K/V buffer a layer."""
        config, device = self.config, self.head.weight.device
        shapes = [(rows, config.key_heads, capacity, config.head_width) for capacity in capacities]
        return [make(shape, dtype=self.compute_dtype, device=device) for shape in shapes]

    def first_tokens(self, conditioning: Conditioning) -> Tensor:
        """Returns the single token of scale 0, [R, 1, C]: a latent of zeros, as in the first scale of every clip."""
        rows = conditioning.keys[0].shape[1]
        return self.word_embed.bias.to(self.compute_dtype).expand(rows, 1, -1)

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        """Embeds latents [B, N, token bits] -> [B, N, C]."""
        return self.word_embed(tokens).to(self.compute_dtype)

    def rotation(self, step: int, schedule: Schedule, conditioning: Conditioning | None = None) -> Tensor:
        """Returns the rotary factors of a run of a scale [2, N, D], float32: positions go to 600, too far for bfloat16."""
        config, scale = self.config, self.course(schedule).by_step(len(schedule))[step]
        position = config.text_max_length + step
        factors = step_rotation(schedule, scale, position=position, head_width=config.head_width)
        return factors.to(self.head.weight.device)

    def logits(self, x: Tensor, conditioning: Conditioning, scale: int = 0) -> Tensor:
        """x [R, N, C] -> float32 logits [R, N, bits, 2], semantic bits in the first scales of a clip."""
        place = scale % len(self.config.image_repetitions)
        head = self.semantic_head2 if place < self.config.semantic_scales else self.head
        with without_autocast(x.device):
            return head(self.norm_hidden_sates(x)).unflatten(-1, (-1, 2))


def transformer_state(state: Mapping[str, Tensor], *, config: StarConfig) -> dict[str, Tensor]:
    """Returns a state dict (or a shard) in the nesting of `config`; the unconditional text is cut or continued to 512 rows."""
    nested = {nested_key(key, config): value for key, value in state.items()}
    if "cfg_uncond" in nested:
        nested["cfg_uncond"] = resized_text(nested["cfg_uncond"], TEXT_ROWS)
    return nested


_IMAGE = (3,) * 15
STAR_8B_480P = StarConfig(
    width=4096,
    heads=32,
    key_heads=8,
    depth=36,
    chunks=6,
    image_repetitions=_IMAGE[:14],
    video_repetitions=(3,) * 12 + (2, 1),
    semantic_scales=11,
)
STAR_8B_720P = replace(STAR_8B_480P, image_repetitions=_IMAGE, video_repetitions=(3,) * 12 + (2, 1, 1), semantic_scales=12)
