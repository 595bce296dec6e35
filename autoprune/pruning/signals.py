"""What earlier scales of one generation left behind for the scores and restorers of later ones."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoprune.policy import Grid

LATENT, DELTA, HIDDEN, LOGITS = "latent", "delta", "hidden", "logits"


def nearest_source(grid: Grid, target: Grid, device: torch.device) -> Tensor:
    """Returns the raster position on `grid` that each position of `target` takes [N], place i of n taking i * n0 // n."""
    t, y, x = (torch.arange(new, device=device) * old // new for old, new in zip(grid, target, strict=True))
    return ((t[:, None, None] * grid[1] + y[:, None]) * grid[2] + x).flatten()


@dataclass
class Signals:
    """`latents`: accumulated latents [B, d, H, W] after the last two scales, oldest first; of videos [B, d, t, H, W], those of
    the clip at hand, and `before` the last frame [B, d, 1, H, W] of the one before. Of the previous scale: `delta`, the mean
    squared change of one chunk [R, N]; `hidden`, the last block's output [R, N, C]; `logits`, guided [B, N, d, 2].
    """

    latents: list[Tensor] = field(default_factory=list)
    before: Tensor | None = None
    delta: Tensor | None = None
    delta_grid: Grid = (1, 1, 1)
    hidden: Tensor | None = None
    hidden_grid: Grid = (1, 1, 1)
    logits: Tensor | None = None
    logits_grid: Grid = (1, 1, 1)

    def record_latent(self, latent: Tensor) -> None:
        """Adds the latent after a scale and forgets the oldest of three."""
        self.latents = [*self.latents[-1:], latent]

    def open_clip(self) -> None:
        """Begins a clip: of the one before its last frame counts."""
        self.before = self.latents[-1][:, :, -1:] if self.latents else None
        self.latents = []

    def keep_rows(self, rows: slice) -> None:
        """Forgets the rows of a dropped guidance branch."""
        self.delta = None if self.delta is None else self.delta[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
