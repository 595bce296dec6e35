"""Token merging (ToMe for generation, arXiv 2303.17604): similar tokens are averaged into one and share its output.

Destinations are the top left of each cell (the official no_rand), so no random stream is involved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Merge:
    """`kept` [R, M] raster positions of the tokens that stay: unmerged sources, then destinations, both in raster order.

    `target` [R, N] is for every token the index into the M kept ones of itself or of what it was merged into.
    """

    kept: Tensor
    target: Tensor


def match(x: Tensor, grid: Grid, *, cell: int, count: int) -> Merge:
    """Merges the N - count sources that are most similar to a destination into their most similar one (2303.17604, 3.1).

    x [R, N, C] on `grid`. One destination a cell of `cell` x `cell` positions of a frame, cut cells at the border have one
    too; all other tokens are sources. Similarity is the cosine, multiplied in the type of x. Of equals the first in raster
    order is merged first, into the first destination. `count` is at least the number of cells. Cost: about
    R N^2 C / cell^2 multiplications, a sort of the sources.
    """
    rows, tokens, _ = x.shape
    sources, destinations = _split(grid, cell, x.device)
    cells = len(destinations)
    assert cells <= count <= tokens
    unit = functional.normalize(x.float(), dim=-1).to(x.dtype)
    similarity, nearest = (unit[:, sources] @ unit[:, destinations].transpose(1, 2)).max(dim=-1)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    gone, stays = order[:, : tokens - count], order[:, tokens - count :].sort(dim=1).values
    kept = torch.cat((sources[stays], destinations.expand(rows, -1)), dim=1)
    slots = torch.arange(count, device=x.device).expand(rows, -1)
    target = torch.zeros(rows, tokens, dtype=torch.long, device=x.device).scatter(1, kept, slots)
    return Merge(kept, target.scatter(1, sources[gone], count - cells + nearest.gather(1, gone)))


def merge_mean(x: Tensor, merge: Merge) -> Tensor:
    """Returns every kept token averaged with the tokens merged into it, itself included.

    x [R, N, C] -> [R, M, C] in the type of x, summed in float32 and in raster order, so that a device always gives the same
    sums (a scatter-add on a GPU does not).
    """
    rows, tokens, channels = x.shape
    order = merge.target.argsort(dim=1, stable=True)
    members = order + tokens * torch.arange(rows, device=x.device)[:, None]
    sizes = torch.zeros_like(merge.kept).scatter_add(1, merge.target, torch.ones_like(merge.target)).flatten()
    starts = sizes.cumsum(0) - sizes
    mean = functional.embedding_bag(members.flatten(), x.float().reshape(-1, channels), starts, mode="mean")
    return mean.view(rows, -1, channels).to(x.dtype)


def _split(grid: Grid, cell: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the raster positions of sources and of destinations, both ascending."""
    frames, height, width = grid
    mask = torch.zeros(grid, dtype=torch.uint8, device=device)
    mask[:, ::cell, ::cell] = 1
    cells = frames * -(-height // cell) * -(-width // cell)
    order = mask.flatten().argsort(stable=True)
    return order[: len(order) - cells], order[len(order) - cells :]
