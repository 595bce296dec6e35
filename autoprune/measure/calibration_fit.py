"""The maths of a calibration: ranks that hold a share of the energy, labels by fidelity, an ordinal fit of decisions.

StageVAR's rank table (arXiv 2512.16483) and SkipVAR's decision (arXiv 2506.08908) were published as numbers of one
backbone and as pickled classifiers; here both are measured and fitted again, on any backbone.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ALWAYS = -1e6  # a cut below any score: no measured prompt needed less than this level


def energy_ranks(x: Tensor, energies: tuple[float, ...]) -> Tensor:
    """Returns for each row of x [R, N, C] and each energy the smallest r that holds it, int64 [R, len(energies)].

    sum_{i <= r} s_i^2 >= energy * sum_i s_i^2 for the singular values s_1 >= s_2 >= ... of x minus its mean token
    (StageVAR, arXiv 2512.16483, its offline rank table). At least 1, also where all tokens are equal.
    """
    centred = x.double() - x.double().mean(1, keepdim=True)
    gram = centred @ centred.mT if x.shape[1] <= x.shape[2] else centred.mT @ centred
    held = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0).cumsum(-1)
    wanted = torch.tensor(energies, dtype=held.dtype, device=held.device)[:, None] * held[:, None, -1:]
    return ((held[:, None] < wanted).sum(-1) + 1).clamp(max=held.shape[-1])


def faithful_level(ssim: Tensor, target: float) -> Tensor:
    """Returns the most aggressive level whose image stays faithful, int64 [B], 0 for none.

    ssim [B, L] compares level 1..L with the full image; a level counts from `target` on, whatever milder ones do
    (SkipVAR, arXiv 2506.08908; its label rule is not published, this one is inferred from the names of its files).
    """
    levels = torch.arange(1, ssim.shape[1] + 1, device=ssim.device)
    return torch.where(ssim >= target, levels, 0).amax(1) if len(levels) else ssim.new_zeros(len(ssim), dtype=torch.int64)


def joint_level(drop: Tensor, skip: Tensor, *, drops: int) -> Tensor:
    """Orders both decisions on one axis: 0, then 1..drops scales of one branch, then 1, 2, ... skipped scales; int64 [B].

    Dropping a branch counts only where nothing is skipped, as in SkipVAR's two classifiers.
    """
    return torch.where(skip > 0, drops + skip, drop)


@dataclass(frozen=True)
class OrdinalFit:
    """A linear score of standardised features and ascending cuts: the level is how many cuts lie at or below the score."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    weights: tuple[float, ...]
    cuts: tuple[float, ...]

    def score(self, features: np.ndarray) -> np.ndarray:
        """Returns z = weights . (features - mean) / deviation, [n] for features [n, F]."""
        return (np.asarray(features, dtype=float) - self.mean) / self.deviation @ np.asarray(self.weights)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns the level of each row of features [n, F], int [n]."""
        return (np.asarray(self.cuts)[None] <= self.score(features)[:, None]).sum(1)


def fit_levels(features: np.ndarray, levels: np.ndarray) -> OrdinalFit:
    """Fits a proportional-odds model P(level >= n) = sigmoid(z - cut_n) to features [n, F] and levels [n] from 0 on.

    McCullagh (1980), with half the squared weights as penalty, so that separable data stay finite; a level is predicted
    from even odds on. Levels no sample has share the cut of the next one up; there is no cut above the highest level,
    and below the lowest one it is ALWAYS.
    """
    features, levels = np.asarray(features, dtype=float), np.asarray(levels, dtype=int)
    mean, deviation = features.mean(0), features.std(0)
    deviation = np.where(deviation > 1e-12, deviation, 1.0)
    present, classes = np.unique(levels, return_inverse=True)
    weights, between = _proportional_odds((features - mean) / deviation, classes, len(present))
    cuts = [ALWAYS] * int(present[0]) + list(np.repeat(between, np.diff(present)))
    return OrdinalFit(*(tuple(map(float, part)) for part in (mean, deviation, weights, cuts)))


def leave_one_out_accuracy(features: np.ndarray, levels: np.ndarray) -> float:
    """Returns the share of samples whose level a fit to all the others predicts, features [n, F], levels [n]."""
    right = []
    for row in range(len(levels)):
        others = np.arange(len(levels)) != row
        fit = fit_levels(features[others], levels[others])
        right.append(fit.predict(features[row : row + 1])[0] == levels[row])
    return float(np.mean(right))


def majority_share(levels: np.ndarray) -> float:
    """Returns how often the most frequent level is right: what a fit has to beat."""
    return float(np.unique(levels, return_counts=True)[1].max() / len(levels))


def quantiles(values: Tensor, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the quantiles of all finite values of a tensor of any shape, 0 being the smallest and 1 the largest."""
    finite = values.double().cpu().flatten()
    return tuple(float(value) for value in np.quantile(finite[finite.isfinite()].numpy(), shares))


def _proportional_odds(features: np.ndarray, classes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights [F] and the count - 1 ascending cuts between classes 0..count - 1, all of which occur."""
    if count == 1:
        return np.zeros(features.shape[1]), np.zeros(0)
    x, y = torch.from_numpy(features), torch.from_numpy(classes)
    free = torch.zeros(x.shape[1] + count - 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([free], max_iter=200, tolerance_change=1e-13, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        weights, cuts = _unpacked(free, x.shape[1])
        value = _negative_log_likelihood(x @ weights, y, cuts) + weights.square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)
    weights, cuts = _unpacked(free.detach(), x.shape[1])
    return weights.numpy(), cuts.numpy()


def _unpacked(free: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Splits parameters into weights and cuts: the first cut, then the logarithm of each step up."""
    weights, first, steps = free[:features], free[features : features + 1], free[features + 1 :]
    return weights, first + torch.cat([torch.zeros_like(first), steps.exp().cumsum(0)])


def _negative_log_likelihood(score: Tensor, classes: Tensor, cuts: Tensor) -> Tensor:
    """-sum log(sigmoid(score - lower) - sigmoid(score - upper)) with the cuts around each class, without cancellation."""
    everywhere = torch.cat([cuts.new_full((1,), -1e3), cuts, cuts.new_full((1,), 1e3)])
    lower, upper = everywhere[classes], everywhere[classes + 1]
    inside = F.logsigmoid(score - lower) + F.logsigmoid(upper - score)
    return -(inside + torch.log(-torch.expm1(lower - upper))).sum()
