"""How important each token is. A scorer maps hidden tokens to one number a token; the highest are kept."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import UserError
from autoprune.noise import placed, uniform
from autoprune.pruning.decisions import latent_change
from autoprune.pruning.signals import Signals, nearest_source

POWER_STEPS = 5  # StepVAR's review names the power iteration, not its length; five is our inference
REACH = 0.01  # of what a random direction reaches; bf16 rounding of tokens orthogonal to the start gives 0.002
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ScoreContext:
    """What a scorer may need beside the tokens: where they are, whose random stream to use, what earlier scales left.

    `grid` is (t, h, w), `samples` number the B samples of the batch, whose rows are [cond x B] or [cond x B, uncond x B].
    `scale` numbers the run at hand where scales run several times.
    """

    scale: int
    grid: tuple[int, int, int]
    site: int
    seed: int
    samples: tuple[int, ...]
    region: int = 1
    signals: Signals | None = None


def dc(x: Tensor, context: ScoreContext) -> Tensor:
    """Squared distance of each token from the mean token, s_i = sum_c (x_ic - mean_c)^2 (FastVAR, arXiv 2503.23367).

    x [R, N, C] -> [R, N] float32.
    """
    return _centred(x).square().sum(dim=-1)


def structure(x: Tensor, context: ScoreContext) -> Tensor:
    """Share of each token in the first principal direction, s_i = |(x_i - mean) . v| (StepVAR, arXiv 2603.01757).

    v is found by five steps v <- X^T X v / |X^T X v| of the centred tokens X, in float32, from v = ones / sqrt(C). A row whose
    tokens are all orthogonal to ones starts from its token farthest from the mean instead, which cannot be orthogonal to all
    of them (to itself, at least) unless all are equal, and then scores are 0. Centring and the number of steps are inferred.
    x [R, N, C] -> [R, N] float32.
    """
    x = _centred(x)
    direction = _start(x)
    for _ in range(POWER_STEPS):
        direction = functional.normalize(direction @ x.mT @ x, dim=2, eps=TINY)
    return (direction @ x.mT).squeeze(1).abs()


def texture(x: Tensor, context: ScoreContext) -> Tensor:
    """High-pass energy, s_i = sum_c (x_ic - mean of x_c over the 3 x 3 tokens around i)^2 (StepVAR, arXiv 2603.01757).

    Per frame; at the border only tokens inside count (inferred), so that a constant map has none.
    x [R, N, C] -> [R, N] float32.
    """
    frames, height, width = context.grid
    image = x.float().reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)
    smooth = functional.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    return (image - smooth).square().sum(dim=1).reshape(len(x), -1)


def latent_cos(x: Tensor, context: ScoreContext) -> Tensor:
    """Turn of the latent by the last scale, 1 - cos(f_k-1, f_k-2) at each place (LazyVAR; LD-Pruning, arXiv 2606.00310).

    Of latents [B, d, H, W]: averaged over each token's area, then over region x region tokens; the same for all branches. Of
    videos frame by frame. Inferred for LD-Pruning. x [R, N, C] -> [R, N] float32.
    """
    return _latent_score(x, context, "latent_cos")


def latent_l2(x: Tensor, context: ScoreContext) -> Tensor:
    """Change of the latent by the last scale, |f_k-1 - f_k-2| at each place, averaged as in `latent_cos` (arXiv 2606.00310).

    Inferred. x [R, N, C] -> [R, N] float32.
    """
    return _latent_score(x, context, "latent_l2")


def latent_relative(x: Tensor, context: ScoreContext) -> Tensor:
    """Relative change |f_k-1 - f_k-2| / (|f_k-2| + 1e-6) at each place, averaged as in `latent_cos` (arXiv 2606.00310).

    Inferred. x [R, N, C] -> [R, N] float32.
    """
    return _latent_score(x, context, "latent_relative")


def spatiotemporal(x: Tensor, context: ScoreContext) -> Tensor:
    """What neither the last scale nor the last frame already says, ((1 - c_s)^2 + (1 - c_t)^2)^(1/2) (FastSTAR, arXiv
    2603.07192).

    c_s is the cosine of the latent before and after the last scale, c_t that of a place in this frame and in the one before,
    which for a clip's first frame is the last one of the clip before; where there is none 1 - c_t is 1. Averaged as in
    `latent_cos`. x [R, N, C] -> [R, N] float32.
    """
    previous, latest = _latents(context, "spatiotemporal")
    within = latent_change(previous, latest, metric="latent_cos")
    if latest.dim() == 4:
        return _averaged((within.square() + 1).sqrt(), x, context)
    before = context.signals.before
    earlier = torch.cat((latest[:, :, :1] if before is None else before, latest[:, :, :-1]), dim=2)
    across = latent_change(earlier, latest, metric="latent_cos")
    if before is None:
        across = torch.cat((torch.ones_like(across[:, :1]), across[:, 1:]), dim=1)
    return _averaged((within.square() + across.square()).sqrt(), x, context)


def delta(x: Tensor, context: ScoreContext) -> Tensor:
    """What one chunk changed at the previous scale, m_i = mean_c (out_ic - in_ic)^2 (SparseVAR, arXiv 2507.20454).

    Averaged over the branches of each sample and nearest-upsampled. x [R, N, C] -> [R, N] float32.
    """
    signals = context.signals
    change = _left(signals and signals.delta, context, "delta").float().unflatten(0, (-1, len(context.samples))).mean(dim=0)
    return _repeated(change[:, nearest_source(signals.delta_grid, context.grid, x.device)], x)


def norm(x: Tensor, context: ScoreContext) -> Tensor:
    """Squared norm, s_i = sum_c x_ic^2: what StageVAR's tokens are drawn in proportion to (arXiv 2512.16483).

    x [R, N, C] -> [R, N] float32.
    """
    return x.float().square().sum(dim=-1)


def cond_uncond(x: Tensor, context: ScoreContext) -> Tensor:
    """Difference of the branches, s_i = sum_c (c_ic - u_ic)^2 of the previous scale's last block, nearest-upsampled.

    The same for both branches. Source: an unpublished HART variant called SpaceVAR, known by its idea only. Raises UserError
    when the previous scale ran one branch. x [R, N, C] -> [R, N] float32.
    """
    signals, batch = context.signals, len(context.samples)
    hidden = _left(signals and signals.hidden, context, "cond_uncond").float()
    if len(hidden) != 2 * batch:
        raise UserError(
            f"scorer cond_uncond needs both branches at the scale before, got {len(hidden)} rows for {batch} samples at scale "
            f"{context.scale}; use another scorer once a branch is dropped."
        )
    apart = (hidden[:batch] - hidden[batch:]).square().sum(dim=-1)
    return _repeated(apart[:, nearest_source(signals.hidden_grid, context.grid, x.device)], x)


def random(x: Tensor, context: ScoreContext) -> Tensor:
    """Uniform random scores, the control every scorer has to beat; the same for both branches of a sample.

    x [R, N, C] -> [R, N] float32.
    """
    stream = f"score:{context.site}"
    rows = [uniform((context.seed, sample, context.scale), x.shape[1], stream=stream) for sample in context.samples]
    scores = placed(torch.stack(rows), x.device)
    return scores.repeat(x.shape[0] // len(rows), 1)


def _centred(x: Tensor) -> Tensor:
    x = x.float()
    return x - x.mean(dim=1, keepdim=True)


def _start(x: Tensor) -> Tensor:
    """Returns where the power iteration of centred tokens [R, N, C] starts, [R, 1, C]."""
    lengths = x.norm(dim=2)
    farthest = x.gather(1, lengths.argmax(dim=1)[:, None, None].expand(-1, 1, x.shape[2]))
    even = torch.full_like(farthest, x.shape[2] ** -0.5)
    reached = (even @ x.mT).norm(dim=2, keepdim=True)
    expected = lengths.norm(dim=1)[:, None, None] * x.shape[2] ** -0.5
    return torch.where(reached > REACH * expected, even, farthest)


def _latent_score(x: Tensor, context: ScoreContext, metric: str) -> Tensor:
    return _averaged(latent_change(*_latents(context, metric), metric=metric), x, context)


def _latents(context: ScoreContext, scorer: str) -> list[Tensor]:
    latents = context.signals.latents if context.signals else []
    if len(latents) < 2:
        raise UserError(
            f"scorer {scorer} needs the latents of two scales, got {len(latents)} at scale {context.scale}; use it later."
        )
    return latents[-2:]


def _averaged(change: Tensor, x: Tensor, context: ScoreContext) -> Tensor:
    """Returns a map of the latent [B, H, W], or of each frame [B, t, H, W], averaged over each token's area for all rows."""
    frames, height, width = context.grid
    change = change if change.dim() == 4 else change[:, None].expand(-1, frames, -1, -1)
    change = functional.interpolate(change, (height, width), mode="area")
    return _repeated(_region_mean(change, context.region).flatten(1), x)


def _region_mean(change: Tensor, region: int) -> Tensor:
    """Returns [B, t, h, w] averaged over region x region places, what remains at the far sides over those that are there."""
    if region == 1:
        return change
    means = functional.avg_pool2d(change, region, ceil_mode=True, count_include_pad=False)
    y, x = (torch.arange(side, device=change.device) // region for side in change.shape[2:])
    return means[:, :, y[:, None], x]


def _left(signal: Tensor | None, context: ScoreContext, scorer: str) -> Tensor:
    if signal is None:
        raise UserError(
            f"scorer {scorer} needs what the scale before left behind, got nothing at scale {context.scale}; use it later."
        )
    return signal


def _repeated(score: Tensor, x: Tensor) -> Tensor:
    """Returns the score [B, N] of each sample for all its rows, [R, N]."""
    return score.repeat(len(x) // len(score), 1)
