"""From scores to kept tokens: weigh, then take the best, draw, or count those above a threshold. No host sync anywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
LEAST = torch.finfo(torch.float32).min
BELOW_ONE = 1 - torch.finfo(torch.float32).eps / 2
NEVER = -1000.0  # below the logarithm of any positive float32 (-104) by more than Gumbel numbers span (-5 to 17)


def normalised(score: Tensor, rule: str) -> Tensor:
    """Returns each row of a score [R, N] on a common footing, float32 [R, N].

    none: as it is. zscore: (s - mean) / standard deviation (of N). minmax: (s - min) / (max - min). rank: the share of the
    other tokens that score lower, equal ones counting half. Rows whose scores are all equal stay finite and equal.
    """
    return NORMALISED[rule](score.float())


def combined(scores: Sequence[Tensor], weights: Sequence[float], rule: str) -> Tensor:
    """Returns sum_j w_j * normalised(s_j) of scores [R, N], float32 [R, N]; StepVAR's joint score (arXiv 2603.01757)."""
    total = None
    for score, weight in zip(scores, weights, strict=True):
        term = normalised(score, rule) * weight
        total = term if total is None else total + term
    return total


def anchor_index(grid: tuple[int, int, int], stride: int) -> Tensor:
    """Returns the raster positions, ascending, of SparseVAR's anchors (arXiv 2507.20454): int64 [A] on the default device.

    In each frame rows and columns 0, stride, 2 * stride, ... and the last: 121, 169, 289 for sides 40, 48, 64 at stride 4.
    """
    frames, height, width = grid
    rows, columns = _anchors_on_axis(height, stride), _anchors_on_axis(width, stride)
    frame = torch.arange(frames)[:, None, None] * height
    return ((frame + rows[:, None]) * width + columns).flatten()


def top(score: Tensor, count: int, always: Tensor | None = None) -> Tensor:
    """Returns the positions of the `count` highest scores, int64 [R, count], best first, all distinct.

    score [R, N]. `always` [A], distinct, A <= count: positions that every row keeps whatever they score; they come first.
    """
    score = score.float()
    if always is None:
        return score.topk(count, dim=1).indices
    others = score.clamp_min(LEAST).index_fill(1, always, -torch.inf)
    best = others.topk(count - len(always), dim=1).indices
    return torch.cat((always.expand(len(score), -1), best), dim=1)


def draw(score: Tensor, count: int, noise: Tensor) -> Tensor:
    """Returns `count` positions a row drawn without replacement with p_i ~ score_i, int64 [R, count], in the order drawn.

    The largest log(score_i) - log(-log(u_i)) are such a draw (Gumbel top-k; Kool et al., arXiv 1903.06059); StageVAR draws its
    representatives so (2512.16483). score [R, N]; scores of 0 or below come last, each as likely. noise u [R, N] in [0, 1).
    """
    gumbel = -(-noise.float().clamp(TINY, BELOW_ONE).log()).log()
    chance = score.float().clamp_min(0).log().clamp_min(NEVER)
    return (chance + gumbel).topk(count, dim=1).indices


def threshold_count(score: Tensor, *, threshold: float, of: str, least: int, most: int) -> Tensor:
    """Returns how many tokens of each row score above the threshold, within [least, most]: int64 [R].

    score [R, N]. of = absolute: s_i > threshold; maximum: s_i > threshold * max_j s_j (SparseVAR's ratio, arXiv 2507.20454).
    """
    score = score.float()
    limit = score.amax(dim=1, keepdim=True) * threshold if of == "maximum" else threshold
    return (score > limit).sum(dim=1).clamp(least, most)


def _anchors_on_axis(side: int, stride: int) -> Tensor:
    count = -(-(side - 1) // stride) + 1
    return (torch.arange(count) * stride).clamp_max(side - 1)


def _zscore(score: Tensor) -> Tensor:
    apart = score - score.mean(dim=1, keepdim=True)
    return apart / apart.square().mean(dim=1, keepdim=True).sqrt().clamp_min(TINY)


def _minmax(score: Tensor) -> Tensor:
    above = score - score.amin(dim=1, keepdim=True)
    return above / above.amax(dim=1, keepdim=True).clamp_min(TINY)


def _rank(score: Tensor) -> Tensor:
    ascending = score.sort(dim=1).values
    lower = torch.searchsorted(ascending, score)
    not_higher = torch.searchsorted(ascending, score, right=True)
    return (lower + not_higher - 1).float() / (2 * max(score.shape[1] - 1, 1))


NORMALISED = {"none": lambda score: score, "zscore": _zscore, "minmax": _minmax, "rank": _rank}
