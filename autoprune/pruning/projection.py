"""Low-rank step of FasterVAR/StageVAR (arXiv 2512.16483): a chunk runs on few random mixtures of all tokens."""

from torch import Tensor


def rank_count(share: float, tokens: int) -> int:
    """Returns how many mixtures stand for `tokens`: int(share * tokens) + 1, at most all (the official rank rule)."""
    return min(tokens, int(share * tokens + 1e-9) + 1)


def mixing(noise: Tensor) -> Tensor:
    """Returns the random projection Q = noise / sqrt(M), so that E[Q Q^T] = I (2512.16483, random projection).

    noise [R, N, M] standard normal -> [R, N, M]. The noise has a stream of its own, see `autoprune.noise.standard_normal`.
    """
    return noise / noise.shape[2] ** 0.5


def project(x: Tensor, mixing: Tensor) -> Tensor:
    """Returns the mixtures Q^T x, each a random sum of all tokens, computed in float32 as the official code does.

    x [R, N, C], mixing [R, N, M] -> [R, M, C] in the type of x.
    """
    return (mixing.float().transpose(1, 2) @ x.float()).to(x.dtype)
