"""How the embedded generator is trained: schedule of scales, loss, start values and optimisers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.backbones.caption_encoder import CaptionEncoder
from autoprune.backbones.infinity import Infinity
from autoprune.backbones.infinitystar import InfinityStar
from autoprune.testbed.muon import Muon, MuonMatrix

Curriculum = tuple[tuple[float, Mapping[int, float]], ...]
# Scales trained at once -> samples a step, all processes together: 57, 121 and 521 tokens a sample.
BATCH = {4: 96, 5: 48, 7: 16}
# Up to this share of the time, the probability of each number of scales. Full steps are dearest and the last two
# scales of the exact Infinity block learn slowest, so small scales only get a head start.
CURRICULUM = (
    (0.10, {4: 0.7, 5: 0.3}),
    (0.20, {4: 0.2, 5: 0.6, 7: 0.2}),
    (1.00, {4: 0.02, 5: 0.04, 7: 0.94}),
)
FUSED = {"mat_qkv": 3, "mat_kv": 2}  # matrices in one; other layers are one each


@dataclass(frozen=True)
class GeneratorRecipe:
    """Everything that decides the result; recorded in the checkpoint."""

    minutes: float = 85.0
    seed: int = 0
    images: int = 48_000
    text_steps: int = 600
    matrix_rate: float = 6e-3
    vector_rate: float = 2e-3
    text_rate_share: float = 0.3
    warmup_steps: int = 50
    constant_share: float = 0.5
    final_rate: float = 0.02
    max_flip: float = 0.25
    unconditional_share: float = 0.1
    average_decay: float = 0.99
    batch_share: float = 1.0

    def rate_factor(self, step: int, progress: float) -> float:
        """Learning rate over its peak: warm-up by steps, constant, then linear to `final_rate` at progress 1."""
        decay = max(0.0, progress - self.constant_share) / (1 - self.constant_share)
        return min(1.0, (step + 1) / self.warmup_steps) * (1 - (1 - self.final_rate) * min(1.0, decay))

    def batch_size(self, scales: int, batch: Mapping[int, int] = BATCH) -> int:
        """Samples of a step over that many scales."""
        return max(2, round(batch[scales] * self.batch_share))


def pick_scales(progress: float, draw: float, curriculum: Curriculum = CURRICULUM) -> int:
    """Number of scales of a step; `draw` is uniform in [0, 1)."""
    shares = next(shares for end, shares in curriculum if progress <= end or end == curriculum[-1][0])
    for scales, share in shares.items():
        draw -= share
        if draw < 0:
            return scales
    return max(shares)


def scale_losses(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Nats per bit of each scale [k] from logits [B, N, bits, 2] and targets [B, N, bits]."""
    return torch.stack(
        [
            F.binary_cross_entropy_with_logits((scale[..., 1] - scale[..., 0]).float(), target.float())
            for scale, target in zip(logits, targets, strict=True)
        ]
    )


def total_loss(losses: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Mean of the scales' losses, weighted by the square root of their token counts."""
    weights = torch.tensor([target.shape[1] ** 0.5 for target in targets], device=losses.device)
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def initialise(model: Infinity) -> None:
    """Start values: branches open (gates 1) with small output projections, unmodulated norms, sharp attention."""
    for block in model.layers():
        block.ada_gss.zero_()
        block.ada_gss[:, :, :2] = 1.0
        block.sa.scale_mul_1H11.fill_(8.0).log_()
        for projection in (block.sa.proj, block.ca.proj, block.ffn.fc2):
            nn.init.normal_(projection.weight, std=0.01)
            nn.init.zeros_(projection.bias)
    for linear in (model.shared_ada_lin[1], model.head_nm.ada_lin[1], model.head):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    for embedding in (model.lvl_embed.weight, model.pos_start):
        nn.init.normal_(embedding, std=0.1)


@torch.no_grad()
def initialise_star(model: InfinityStar) -> None:
    """Start values: small output projections; queries and keys have length sqrt(head width), which is sharp enough."""
    for block in model.layers():
        for projection in (block.attn.o_proj, block.mlp.down_proj):
            nn.init.normal_(projection.weight, std=0.01)
    for linear in (model.head, model.semantic_head2):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)


class Optimisers:
    """Muon for the block matrices, AdamW for the rest; the text encoder learns at a share of the rate."""

    def __init__(self, model: nn.Module, text: CaptionEncoder, recipe: GeneratorRecipe) -> None:
        matrices = [matrix for block in model.layers() for matrix in _matrices(block)]
        owned = {id(matrix.parameter) for matrix in matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in owned]
        self._muon = Muon(matrices, recipe.matrix_rate)
        self._adam = torch.optim.AdamW(
            [
                {"params": rest, "lr": recipe.vector_rate},
                {"params": list(text.parameters()), "lr": recipe.vector_rate * recipe.text_rate_share},
            ],
            betas=(0.9, 0.97),
            weight_decay=0.0,
            foreach=True,
        )
        self._groups = [(group, group["lr"]) for group in (*self._muon.param_groups, *self._adam.param_groups)]

    def step(self, rate_factor: float) -> None:
        """Updates everything at `rate_factor` times the peak rates and drops the gradients."""
        for group, peak in self._groups:
            group["lr"] = peak * rate_factor
        for optimiser in (self._muon, self._adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, object]]:
        """For `load`."""
        return [self._muon.state_dict(), self._adam.state_dict()]

    def load(self, state: list[dict[str, object]]) -> None:
        """Continues from `state`."""
        peaks = [peak for _, peak in self._groups]
        self._muon.load_state_dict(state[0])
        self._adam.load_state_dict(state[1])
        groups = (*self._muon.param_groups, *self._adam.param_groups)
        self._groups = list(zip(groups, peaks, strict=True))


def _matrices(block: nn.Module) -> list[MuonMatrix]:
    return [
        MuonMatrix(module.weight, FUSED.get(name.rsplit(".", 1)[-1], 1))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
