"""What the data says while generating: have the branches converged, has the latent settled, is the image simple.

LD-Pruning (arXiv 2606.00310; formulas inferred, no code is published) and SkipVAR (2506.08908). One number or decision a
sample; a caller that decides for a batch reduces them.
"""

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.rules import ProbeRule

EPSILON = 1e-6  # below any latent's norm; also what SkipVAR adds to the total amplitude


def discrepancy(cond: Tensor, uncond: Tensor, *, metric: str) -> Tensor:
    """Returns how far the guidance branches of each sample are apart, float32 [B], 0 where they agree (2606.00310).

    mse_hidden, mse_logits: mean (c - u)^2. cos_hidden: mean over tokens of 1 - cos(c, u). kl_bits: mean over bits of
    KL(p_c || p_u), natural logarithm. Hidden states [B, N, C], logits [B, N, d, 2].
    """
    return DISCREPANCIES[metric](cond.float(), uncond.float()).flatten(1).mean(dim=1)


def latent_change(previous: Tensor, latest: Tensor, *, metric: str) -> Tensor:
    """Returns how much each position of the latent changed, float32 [B, H, W] (2606.00310; cosine: LazyVAR, CVPR 2026).

    previous, latest [B, d, H, W], or of a clip [B, d, t, H, W] with a result [B, t, H, W]. latent_cos: 1 - cos, 0 where either
    vector is 0. latent_l2: |latest - previous|. latent_relative: latent_l2 / (|previous| + 1e-6).
    """
    return LATENT_CHANGES[metric](previous.float(), latest.float())


def changed_share(previous: Tensor, latest: Tensor, *, metric: str, threshold: float) -> Tensor:
    """Returns the share of positions [B] whose `latent_change` is above the threshold (2606.00310, when to stop)."""
    return (latent_change(previous, latest, metric=metric) > threshold).flatten(1).float().mean(dim=1)


def probe_features(old: Tensor, new: Tensor, *, radius: float) -> Tensor:
    """Returns SkipVAR's two features of small images (2506.08908, official code): [B, 2] float32.

    old, new [B, 3, H, W]. First mean |Sobel(new) - Sobel(old)| of the channel mean, then the share of new's spectral
    amplitude farther than int(radius * min(H, W) / 2) from the centre.
    """
    old, new = old.float().mean(dim=1), new.float().mean(dim=1)
    change = (_edges(new) - _edges(old)).abs().mean(dim=(1, 2))
    return torch.stack((change, _outer_amplitude(new, radius)), dim=1)


def probe_decision(features: Tensor, rule: ProbeRule) -> tuple[Tensor, Tensor]:
    """Returns how many last scales each sample skips, and how many it runs without the unconditional branch, int64 [B] each.

    features [B, 2]; z = weights . (features - mean) / deviation, and a decision is the number of its cuts at or below z.
    A sample that skips scales drops no branch (2506.08908).
    """
    terms = zip(features.unbind(dim=1), rule.mean, rule.deviation, rule.weights, strict=True)
    z = sum(weight * (feature - mean) / deviation for feature, mean, deviation, weight in terms)
    none = torch.zeros_like(z, dtype=torch.long)
    skip = sum(((z >= cut).long() for cut in rule.skip_cuts), none)
    drop = sum(((z >= cut).long() for cut in rule.drop_cuts), none)
    return skip, torch.where(skip == 0, drop, none)


def _square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square()


def _turn(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Returns 1 - cos(a, b) along `dim` as |a/|a| - b/|b||^2 / 2, which loses no digits where both nearly agree."""
    half = (functional.normalize(a, dim=dim) - functional.normalize(b, dim=dim)).square().sum(dim=dim) / 2
    return half * (a.any(dim=dim) & b.any(dim=dim))


def _bit_divergence(cond: Tensor, uncond: Tensor) -> Tensor:
    cond, uncond = cond.log_softmax(dim=-1), uncond.log_softmax(dim=-1)
    return (cond.exp() * (cond - uncond)).sum(dim=-1)


def _distance(previous: Tensor, latest: Tensor) -> Tensor:
    return (latest - previous).norm(dim=1)


DISCREPANCIES = {
    "mse_hidden": _square,
    "cos_hidden": lambda cond, uncond: _turn(cond, uncond, dim=-1),
    "mse_logits": _square,
    "kl_bits": _bit_divergence,
}
LATENT_CHANGES = {
    "latent_cos": lambda previous, latest: _turn(previous, latest, dim=1),
    "latent_l2": _distance,
    "latent_relative": lambda previous, latest: _distance(previous, latest) / (previous.norm(dim=1) + EPSILON),
}


def _edges(grey: Tensor) -> Tensor:
    """Returns the Sobel magnitude of [B, H, W], zeros beyond the border."""
    y = functional.pad(grey, (1, 1, 1, 1))
    across = y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]
    down = y[:, :, :-2] + 2 * y[:, :, 1:-1] + y[:, :, 2:]
    return torch.hypot(across[:, :, 2:] - across[:, :, :-2], down[:, 2:] - down[:, :-2])


def _outer_amplitude(grey: Tensor, radius: float) -> Tensor:
    """Returns the share [B] of |FFT| outside the centred circle."""
    height, width = grey.shape[1:]
    amplitude = torch.fft.fftshift(torch.fft.fft2(grey), dim=(1, 2)).abs()
    y = torch.arange(height, device=grey.device)[:, None] - height // 2
    x = torch.arange(width, device=grey.device) - width // 2
    outside = y.square() + x.square() > int(radius * min(height, width) / 2) ** 2
    return (amplitude * outside).sum(dim=(1, 2)) / (amplitude.sum(dim=(1, 2)) + EPSILON)
