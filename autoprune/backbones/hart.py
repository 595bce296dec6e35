"""HART (arXiv 2410.10812): next-scale prediction of codes behind a text context, the last scale refined by diffusion.

State-dict keys are the official ones of `hart_transformer_t2i.py` in the form that was released: llama layers, no
adaptive norms inside the blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.backbones.backbone import Sampling
from autoprune.backbones.context import ContextFeatures
from autoprune.backbones.family import OneClip, ResidualDraw, Schedule
from autoprune.backbones.hart_layers import (
    LlamaAttention,
    LlamaFeedForward,
    context_angles,
    grid_angles,
    rotary_factors,
)
from autoprune.backbones.infinity import Step
from autoprune.backbones.kv_buffer import BufferKind, KeyValueBuffer
from autoprune.backbones.layers import RMSNorm, without_autocast
from autoprune.backbones.residual_diffusion import NumberEmbedding, ResidualDiffusion
from autoprune.backbones.schedules import square_schedule
from autoprune.errors import UserError
from autoprune.pruning.plan import site

_FORM = {"attn_type": "llama", "mlp_type": "llama", "disable_aln": True, "shared_aln": False, "use_cross_attn": False}
_FORM |= {"norm_eps": 1e-6}
_OFFICIAL_DEFAULTS = {"attn_type": "gpt2", "mlp_type": "gpt2", "disable_aln": False}


@dataclass(frozen=True)
class HartConfig:
    """Sizes of a transformer and its diffusion head; the defaults are those of the official configuration class.

    `sides` are the widths of the square scales. `normed_attention`, `normed_context` and `numbered_levels` are the official
    attn_l2_norm, use_context_norm and use_timestep_embed. `vocabulary` and `channels` are the tokenizer's.
    """

    width: int
    heads: int
    depth: int
    sides: tuple[int, ...]
    context_tokens: int = 300
    context_width: int = 1536
    vocabulary: int = 4096
    channels: int = 32
    mlp_ratio: float = 4.0
    normed_attention: bool = False
    normed_context: bool = False
    numbered_levels: bool = False
    diffusion_width: int = 1024
    diffusion_depth: int = 6
    diffusion_steps: int = 8

    @property
    def schedule(self) -> Schedule:
        """Grids (t, h, w) of the scales."""
        return square_schedule(self.sides)

    def schedule_for(self, h_div_w: float = 1.0) -> Schedule:
        """Returns the schedule; raises UserError for an aspect ratio other than 1."""
        return square_schedule(self.sides, h_div_w)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the feed-forward part: two thirds of mlp_ratio * C, up to a multiple of 256 (official llama rule)."""
        return int(self.width * self.mlp_ratio * 2 / 3 + 255) // 256 * 256

    @staticmethod
    def from_fields(fields: Mapping[str, object]) -> "HartConfig":
        """Reads the fields of an official config.json. Raises UserError for a form of the model that was never released."""
        try:
            for name, wanted in _FORM.items():
                if (found := fields.get(name, _OFFICIAL_DEFAULTS.get(name, wanted))) != wanted:
                    raise UserError(
                        f"{name} of a HART config must be {wanted}, got {found}; give the released text-to-image one."
                    )
            return HartConfig(
                width=fields["embed_dim"],
                heads=fields["num_heads"],
                depth=fields["depth"],
                sides=tuple(fields["patch_nums"]),
                context_tokens=fields["context_token"],
                context_width=fields["context_dim"],
                mlp_ratio=fields.get("mlp_ratio", 4.0),
                normed_attention=fields.get("attn_l2_norm", False),
                normed_context=fields.get("use_context_norm", False),
                numbered_levels=fields.get("use_timestep_embed", False),
                diffusion_width=fields.get("diff_width", 1024),
                diffusion_depth=fields.get("diff_depth", 6),
                diffusion_steps=int(fields.get("num_sampling_steps", 8)),
            )
        except KeyError as error:
            raise UserError(f"a HART config must have {error.args[0]}; give the config.json beside the weights.") from None


HART_0_7B = HartConfig(
    width=1536,
    heads=24,
    depth=24,
    sides=(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    normed_context=True,
    numbered_levels=True,
)
"""mit-han-lab/hart-0.7b-1024px as far as it can be told without its files, for random weights. Published: scales, 24 blocks,
300 context tokens (FastVAR's code for HART), diffusion head (official defaults). Inferred from 0.7 billion parameters: width
and heads. Guessed: the three flags. Released weights come with a config.json; read that with HartConfig.from_fields."""
HART_SAMPLING = Sampling(guidance=4.5, ramp=True, held_end=True, top_k=(600,) * 7 + (300,) * 7)
"""Official sample.py without more_smooth, its default there, which mixes codes by Gumbel noise in place of drawing one."""


@dataclass(frozen=True)
class Conditioning:
    """What the text of one generation becomes. Rows are [cond x B] or [cond x B, uncond x B].

    context [R, L, C]; positions [R, L]; head_modulation (gain, shift) [R, 1, C].
    """

    context: Tensor
    positions: Tensor
    head_modulation: tuple[Tensor, Tensor]

    def keep_rows(self, rows: slice) -> "Conditioning":
        """Returns the conditioning of some rows only."""
        gain, shift = self.head_modulation
        return Conditioning(self.context[rows], self.positions[rows], (gain[rows], shift[rows]))


class Block(nn.Module):
    """Self-attention and feed-forward behind one shared norm, which has a weight whatever the official name says."""

    def __init__(self, config: HartConfig) -> None:
        super().__init__()
        self.attn = LlamaAttention(config.width, config.heads, normed=config.normed_attention)
        self.ffn = LlamaFeedForward(config.width, config.mlp_width)
        self.ln_wo_grad = RMSNorm(config.width)

    def forward(self, x: Tensor, layer: int, step: Step, conditioning: Conditioning) -> Tensor:
        """x [R, L, C] -> [R, L, C]."""
        attention = step.attention(layer)

        def attend_self(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.attn(self.ln_wo_grad(y).to(y.dtype), step.rotation_of(kept), attention)

        def feed_forward(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.ffn(self.ln_wo_grad(y).to(y.dtype))

        x = step.add(x, attend_self, site=site(layer, "sa"))
        return step.add(x, feed_forward, site=site(layer, "ffn"))


class Hart(OneClip, nn.Module):
    """The transformer. Blocks may be in a lower precision; text, embeddings and both heads stay in float32."""

    refines = True

    def __init__(self, config: HartConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.prefix_tokens = config.context_tokens - 1
        self.word_embed = nn.Linear(config.channels, width)
        self.context_embed = nn.Linear(config.context_width, width)
        self.context_norm = RMSNorm(config.context_width) if config.normed_context else nn.Identity()
        self.lvl_embed = NumberEmbedding(width) if config.numbered_levels else nn.Embedding(len(config.sides), width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = nn.Module()
        self.head_nm.ln_wo_grad = RMSNorm(width)
        self.head_nm.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, config.vocabulary)
        self.decoder_norm = RMSNorm(width)
        self.diffloss = ResidualDiffusion(
            channels=config.channels,
            features=width,
            width=config.diffusion_width,
            depth=config.diffusion_depth,
            steps=config.diffusion_steps,
        )

    def layers(self) -> nn.ModuleList:
        """Returns the blocks in order."""
        return self.blocks

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.config.depth

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the blocks."""
        return self.blocks[0].attn.qkv_proj.weight.dtype

    def with_unconditional(self, features: ContextFeatures, negative: ContextFeatures | None) -> ContextFeatures:
        """Appends the unconditional rows: zeros, or a negative prompt's features."""
        return features.concatenate(negative or features.unconditional())

    def condition(self, features: ContextFeatures) -> Conditioning:
        """Computes everything that depends on the text only. Raises UserError for another number of context tokens."""
        count, wanted = features.values.shape[1], self.config.context_tokens
        if count != wanted:
            raise UserError(f"a HART context must have {wanted} tokens, got {count}; pad or cut the prompt to {wanted}.")
        context = self.context_embed(self.context_norm(features.values))
        gain, shift = self.head_nm.ada_lin(context.amax(dim=1, keepdim=True)).chunk(2, dim=-1)
        return Conditioning(context, features.positions, (gain + 1, shift))

    def buffers_for(self, rows: int, capacities: list[int], make: BufferKind = KeyValueBuffer) -> list[KeyValueBuffer]:
        """Makes one K/V buffer a layer."""
        config, device = self.config, self.head.weight.device
        shapes = [(rows, config.heads, capacity, config.width // config.heads) for capacity in capacities]
        return [make(shape, dtype=self.compute_dtype, device=device) for shape in shapes]

    def first_tokens(self, conditioning: Conditioning) -> Tensor:
        """Returns the context tokens [R, L, C]; the output of the last one is scale 0."""
        return (conditioning.context + self._level(0)).to(self.compute_dtype)

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        """Embeds the latents [B, N, d] of a scale >= 1 -> [B, N, C]."""
        return (self.word_embed(tokens) + self._level(scale)).to(self.compute_dtype)

    def rotation(self, scale: int, schedule: Schedule, conditioning: Conditioning) -> Tensor:
        """Returns the rotary factors by row [2, R, 1, N, D]: images begin where the row's text ends."""
        head_width, positions = self.config.width // self.config.heads, conditioning.positions
        if scale == 0:
            angles = context_angles(positions, head_width)
        else:
            angles = grid_angles(schedule[scale], schedule[-1], positions[:, -1], head_width)
        return rotary_factors(angles, self.compute_dtype)

    def logits(self, x: Tensor, conditioning: Conditioning, scale: int = 0) -> Tensor:
        """x [R, N, C] -> float32 logits [R, N, vocabulary]."""
        with without_autocast(x.device):
            gain, shift = conditioning.head_modulation
            return self.head(self.head_nm.ln_wo_grad(x) * gain + shift)

    def refined(self, codes: Tensor, x: Tensor, draw: ResidualDraw, *, weight: float) -> Tensor:
        """Returns the codes [B, d, h, w] of the last scale plus their residual, given hidden states x [R, N, C].

        With both branches the noise estimate is guided by `weight`; with one left it is that branch's own.
        """
        tokens = codes.flatten(2).transpose(1, 2)
        branches = len(x) // len(codes)
        if weight == 1:
            x, branches = x[: len(codes)], 1
        with without_autocast(x.device):
            features = self.decoder_norm(x.float() + self.word_embed(tokens).repeat(branches, 1, 1))
            residual = self.diffloss.sample(features, draw, branches=branches, weight=weight)
        return codes + residual.transpose(1, 2).unflatten(2, codes.shape[-2:])

    def _level(self, scale: int) -> Tensor:
        return self.lvl_embed(scale) if self.config.numbered_levels else self.lvl_embed.weight[scale]


def transformer_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an official state dict without what follows from the schedule (95 million mask entries at full size)."""
    return {key: value for key, value in state.items() if key not in ("lvl_1L", "attn_bias_for_masking")}


def tokenizer_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the VQTokenizer's part of the official tokenizer file, which holds a discriminator beside `vae`."""
    return {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
