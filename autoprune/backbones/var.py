"""VAR (arXiv 2404.02905): class-conditional next-scale prediction, one class for every size, official state-dict keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.backbones.backbone import Sampling
from autoprune.backbones.family import OneClip
from autoprune.backbones.infinity import Step
from autoprune.backbones.kv_buffer import BufferKind, KeyValueBuffer
from autoprune.backbones.layers import FeedForward, SelfAttention, modulate, without_autocast
from autoprune.backbones.schedules import square_schedule
from autoprune.errors import UserError
from autoprune.policy import Grid
from autoprune.pruning.plan import site

DERIVED_KEYS = ("lvl_1L", "attn_bias_for_masking")  # the level of every position, and a dense mask only training needs
SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True)
class VARConfig:
    """Sizes of a transformer. `sides` are the edges of its square scales; positions are learned for them alone.

    `shared_aln`: one modulation for all blocks plus a learned part a block, in place of one network a block.
    """

    width: int
    heads: int
    depth: int
    sides: tuple[int, ...] = SIDES_256
    shared_aln: bool = False
    classes: int = 1000
    channels: int = 32
    vocabulary: int = 4096

    @property
    def schedule(self) -> tuple[Grid, ...]:
        """Grids (1, side, side) of all scales."""
        return square_schedule(self.sides)

    def schedule_for(self, h_div_w: float = 1.0) -> tuple[Grid, ...]:
        """Returns the schedule; raises UserError for an aspect ratio other than 1."""
        return square_schedule(self.sides, h_div_w)

    def positions_of(self, scale: int) -> slice:
        """Returns where a scale's positions lie among those of all scales."""
        start = sum(side**2 for side in self.sides[:scale])
        return slice(start, start + self.sides[scale] ** 2)


VAR_D16 = VARConfig(width=1024, heads=16, depth=16)
VAR_D20 = VARConfig(width=1280, heads=20, depth=20)
VAR_D24 = VARConfig(width=1536, heads=24, depth=24)
VAR_D30 = VARConfig(width=1920, heads=30, depth=30)
VAR_D36 = VARConfig(width=2304, heads=36, depth=36, sides=SIDES_512, shared_aln=True)
VAR_SAMPLING = Sampling(guidance=4.0, ramp=True, top_k=900, top_p=0.95)  # official demo_sample.ipynb


@dataclass(frozen=True)
class ClassLabels:
    """Classes of B samples: `labels` int64 [B]."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_labels(prompts: Sequence[str], *, classes: int = 1000) -> ClassLabels:
    """Reads prompts that name classes by number, e.g. "207". Raises UserError for anything else."""
    numbers = []
    for prompt in prompts:
        text = prompt.strip()
        if not (text.isascii() and text.isdecimal() and int(text) < classes):
            raise UserError(f"a prompt must be a class number from 0 to {classes - 1}, got {prompt!r}; write one such as '7'.")
        numbers.append(int(text))
    return ClassLabels(torch.tensor(numbers, device="cpu"))


def state_without_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what official checkpoints store although the scales define it: `lvl_1L` [1, L] and
    `attn_bias_for_masking` [1, 1, L, L], 20 MB at 512 pixels. What is left fits the model strictly."""
    return {key: value for key, value in state.items() if key not in DERIVED_KEYS}


@dataclass(frozen=True)
class Conditioning:
    """What the labels of one generation become, computed once. Rows are [cond x B] or [cond x B, uncond x B].

    pooled [R, C]; modulation [depth][6][R, 1, C]; head_modulation 2 x [R, 1, C].
    """

    pooled: Tensor
    modulation: tuple[tuple[Tensor, ...], ...]
    head_modulation: tuple[Tensor, Tensor]

    def keep_rows(self, rows: slice) -> "Conditioning":
        """Returns the conditioning of some rows only."""
        return replace(
            self,
            pooled=self.pooled[rows],
            modulation=tuple(tuple(part[rows] for part in layer) for layer in self.modulation),
            head_modulation=(self.head_modulation[0][rows], self.head_modulation[1][rows]),
        )


class Block(nn.Module):
    """Self-attention and feed-forward, both gated and shifted by the class."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.heads)
        self.ffn = FeedForward(width, 4 * width)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = _modulation_network(width, parts=6)

    def modulation(self, pooled: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        """Returns gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2 from pooled [R, C] or the shared part [R, 1, 6, C]."""
        dtype = self.attn.q_bias.dtype
        if shared is None:
            parts = self.ada_lin(pooled.to(dtype)).float().unflatten(-1, (1, 6, -1)).unbind(2)
        else:
            parts = (self.ada_gss.float() + shared).unbind(2)
        return tuple(part.to(dtype) for part in (*parts[:2], parts[2] + 1, parts[3] + 1, *parts[4:]))

    def forward(self, x: Tensor, layer: int, step: Step, conditioning: Conditioning) -> Tensor:
        """x [R, L, C] -> [R, L, C]."""
        gate1, gate2, gain1, gain2, shift1, shift2 = conditioning.modulation[layer]
        attention = step.attention(layer)

        def attend_self(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.attn(modulate(y, gain1, shift1), step.rotation_of(kept), attention) * gate1

        def feed_forward(y: Tensor, kept: Tensor | None) -> Tensor:
            return self.ffn(modulate(y, gain2, shift2)) * gate2

        x = step.add(x, attend_self, site=site(layer, "sa"))
        return step.add(x, feed_forward, site=site(layer, "ffn"))


class VAR(OneClip, nn.Module):
    """The transformer. Blocks may be in a lower precision; embeddings and head stay in float32."""

    prefix_tokens = 0
    refines = False

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        self.pos_1LC = nn.Parameter(torch.randn(1, sum(side**2 for side in config.sides), width) / width**0.5)
        self.word_embed = nn.Linear(config.channels, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.lvl_embed = nn.Embedding(len(config.sides), width)
        if config.shared_aln:
            self.shared_ada_lin = _modulation_network(width, parts=6)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = nn.Module()
        self.head_nm.ada_lin = _modulation_network(width, parts=2)
        self.head = nn.Linear(width, config.vocabulary)

    def layers(self) -> list[Block]:
        """Returns the blocks in order."""
        return list(self.blocks)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.config.depth

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the blocks."""
        return self.blocks[0].attn.q_bias.dtype

    def with_unconditional(self, features: ClassLabels, negative: ClassLabels | None) -> ClassLabels:
        """Appends the unconditional rows: the class after the last one, or a negative prompt's."""
        labels = features.labels
        other = torch.full_like(labels, self.config.classes) if negative is None else negative.labels
        return ClassLabels(torch.cat((labels, other)))

    def condition(self, features: ClassLabels) -> Conditioning:
        """Computes everything that depends on the labels only."""
        pooled = self.class_emb(features.labels.to(self.pos_start.device))
        shared = self.shared_ada_lin(pooled).unflatten(-1, (1, 6, -1)) if self.config.shared_aln else None
        head_gain, head_shift = self.head_nm.ada_lin(pooled)[:, None].chunk(2, dim=-1)
        return Conditioning(
            pooled=pooled,
            modulation=tuple(block.modulation(pooled, shared) for block in self.blocks),
            head_modulation=(head_gain + 1, head_shift),
        )

    def buffers_for(self, rows: int, capacities: list[int], make: BufferKind = KeyValueBuffer) -> list[KeyValueBuffer]:
        """Makes one K/V buffer a layer."""
        config, device = self.config, self.pos_start.device
        shapes = [(rows, config.heads, capacity, config.width // config.heads) for capacity in capacities]
        return [make(shape, dtype=self.compute_dtype, device=device) for shape in shapes]

    def first_tokens(self, conditioning: Conditioning) -> Tensor:
        """Returns the single token of scale 0, [R, 1, C]: class, start, level and position."""
        return (conditioning.pooled[:, None] + self.pos_start + self._places(0)).to(self.compute_dtype)

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        """Embeds latents [B, N, channels] of a scale >= 1 -> [B, N, C]."""
        return (self.word_embed(tokens) + self._places(scale)).to(self.compute_dtype)

    def rotation(self, scale: int, schedule: tuple[Grid, ...], conditioning: Conditioning | None = None) -> None:
        """Returns None: positions are embedded."""

    def logits(self, x: Tensor, conditioning: Conditioning, scale: int = 0) -> Tensor:
        """x [R, N, C] -> float32 logits [R, N, vocabulary]."""
        with without_autocast(x.device):
            return self.head(modulate(x.float(), *conditioning.head_modulation))

    def _places(self, scale: int) -> Tensor:
        """Level and position embeddings of a scale, [1, N, C]."""
        return self.lvl_embed.weight[scale] + self.pos_1LC[:, self.config.positions_of(scale)]


def _modulation_network(width: int, *, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))
