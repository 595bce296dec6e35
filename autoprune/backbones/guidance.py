"""Adaptive projected guidance (APG, arXiv 2410.02416), as InfinityStar uses it: no momentum, nothing along the condition."""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny


def projected_difference(cond: Tensor, uncond: Tensor, *, limit: float) -> Tensor:
    """Returns what guidance adds to cond, times (weight - 1): the difference of the branches, its root mean square limited,
    less its part along cond.

    cond, uncond [B, N, ...] are the logits of a whole scale, and norms and products run over all of a sample; the projection is
    computed in float64 (official code).
    """
    difference = (cond - uncond).flatten(1)
    size = difference.square().mean(dim=1, keepdim=True).sqrt()
    difference = (difference * (limit / size).clamp_max(1.0)).double()
    along = cond.flatten(1).double()
    share = (difference * along).sum(dim=1, keepdim=True) / along.square().sum(dim=1, keepdim=True).clamp_min(TINY)
    return (difference - share * along).to(cond.dtype).view_as(cond)
