"""Distance of the Gaussians fitted to two sets of features (Heusel et al., arXiv 1706.08500), without F x F roots."""

import numpy as np


def deviations(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [F] of features [n, F], and a root R [min(n, F), F] of their covariance, R^T R."""
    mean = features.mean(axis=0)
    root = (features - mean) / np.sqrt(len(features) - 1)
    return mean, np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root


def frechet_distance(own: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """Returns |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets' `deviations`.

    The eigenvalues of S1 S2 = R1^T R1 R2^T R2 are the squared singular values of R1 R2^T.
    """
    means, traces = own[0] - other[0], (own[1] ** 2).sum() + (other[1] ** 2).sum()
    return float(means @ means + traces - 2 * np.linalg.svd(own[1] @ other[1].T, compute_uv=False).sum())
