"""Squared maximum mean discrepancy of two sets of features (Gretton et al., JMLR 13 (2012)) and of many subsets of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
_ROWS = 512  # of a kernel with a large reference at a time


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel (x . y / F + 1)^3 of KID (arXiv 1801.01401). x [n, F], y [m, F] -> [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel exp(-|x - y|^2 / 200) of CMMD (arXiv 2401.09603: sigma 10). x [n, F], y [m, F] -> [n, m]."""
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-squared / (2 * 10.0**2))


@dataclass(frozen=True)
class Discrepancy:
    """E k(x, x') + E k(y, y') - 2 E k(x, y). `unbiased` leaves out what a sample has with itself, or with its own pair.

    Features are [n, D] of images or [n, F, D] of frames of videos; the kernel of two videos is the mean over pairs of frames.
    """

    kernel: Kernel
    unbiased: bool

    def of_pairs(self, features: np.ndarray, dense: np.ndarray, subsets: Sequence[np.ndarray]) -> np.ndarray:
        """Returns one value a subset of rows of features and dense ones, row i of both from one prompt (eq. 4)."""
        terms = self._terms(features, features) + self._terms(dense, dense) - 2 * self._terms(features, dense)
        return np.array([self._mean(terms[np.ix_(rows, rows)]) for rows in subsets])

    def to_reference(
        self, features: np.ndarray, reference: np.ndarray, within: float, subsets: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Returns one value a subset of rows of features against a whole reference [m, D] of which `within` is known."""
        frames = _frames(features)
        own, cross = self._terms(features, features), _row_means(self.kernel, frames, reference)
        cross = cross.reshape(len(features), -1).mean(axis=1)
        return np.array([self._mean(own[np.ix_(rows, rows)]) + within - 2 * cross[rows].mean() for rows in subsets])

    def within(self, reference: np.ndarray) -> float:
        """Returns E k(y, y') of a reference [m, D], a block of rows at a time."""
        total, count = _row_means(self.kernel, reference, reference).mean() * len(reference) ** 2, len(reference)
        if not self.unbiased:
            return total / count**2
        alone = sum(float(self.kernel(row, row)[0, 0]) for row in reference[:, None])
        return (total - alone) / (count * (count - 1))

    def _terms(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Returns the kernel of every row of x with every one of y, [n, m]."""
        found = self.kernel(_frames(x), _frames(y))
        return found.reshape(len(x), len(found) // len(x), len(y), -1).mean(axis=(1, 3))

    def _mean(self, terms: np.ndarray) -> float:
        if not self.unbiased:
            return float(terms.mean())
        return float((terms.sum() - np.trace(terms)) / (len(terms) * (len(terms) - 1)))


def _frames(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1, features.shape[-1])


def _row_means(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    blocks = (kernel(x[first : first + _ROWS], y).mean(1) for first in range(0, len(x), _ROWS))
    return np.concatenate(list(blocks))
