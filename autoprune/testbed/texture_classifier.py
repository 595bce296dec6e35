"""Tells an object's texture from its value channel: least squares on the harmonics that each texture would have.

Only fundamentals are fitted, so that blur, which takes the overtones first, changes amplitudes but not the answer.
"""

from functools import cache

import numpy as np

from autoprune.testbed.captions import TEXTURES
from autoprune.testbed.textures import STRIPE_ANGLES

PATCH = 36  # cells of 2x2 px: the largest object, radius 34 px, fits
PLAIN_DEVIATION = 0.055  # of the value: after 1.5 px of blur plain is below 0.035, textures above 0.07
STRIPE_BONUS = 0.12  # stripes have half the coefficients of dots and checkers, which contain them at some angles
_PERIODS = np.arange(8.5, 14.6, 0.5)


def classify_texture(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Index into TEXTURES for each of K surfaces: `values` [K, PATCH, PATCH], `weights` in [0, 1] (0 is outside)."""
    count = len(values)
    y, w = values.reshape(count, -1).astype(np.float64), weights.reshape(count, -1).astype(np.float64)
    total = np.maximum(w.sum(1), 1e-6)
    mean = (w * y).sum(1) / total
    y = y / np.maximum(mean, 1e-6)[:, None] - 1
    flat = _explained(y, w, _plane()[None])[:, 0]
    rest = np.maximum((w * y * y).sum(1) - flat, 1e-9)
    fits = np.stack([(_explained(y, w, _basis(name)) - flat[:, None]).max(1) / rest for name in TEXTURES[1:]], 1)
    fits[:, 0] += STRIPE_BONUS
    return np.where(np.sqrt(rest / total) < PLAIN_DEVIATION, 0, 1 + fits.argmax(1))


def _explained(y: np.ndarray, w: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Weighted sum of squares of y [K, P] that each model of `basis` [M, n, P] explains: [K, M]."""
    models, terms, cells = basis.shape
    products = (basis[:, :, None] * basis[:, None]).reshape(-1, cells)
    gram = (w @ products.T).reshape(len(y), models, terms, terms) + 1e-3 * np.eye(terms)
    projection = ((w * y) @ basis.reshape(models * terms, -1).T).reshape(len(y), models, terms, 1)
    return (projection * np.linalg.solve(gram, projection)).sum((-2, -1))


@cache
def _plane() -> np.ndarray:
    x, y = _cells()
    return np.stack([np.ones_like(x), x / PATCH - 1, y / PATCH - 1])


@cache
def _basis(texture: str) -> np.ndarray:
    """The plane and the fundamentals of `texture` for each period (and angle): [M, n, PATCH * PATCH]."""
    x, y = _cells()
    models = []
    for period in _PERIODS:
        across, down = 2 * np.pi * x / period, 2 * np.pi * y / period
        if texture == "striped":
            waves = [[np.cos(angle) * across + np.sin(angle) * down] for angle in STRIPE_ANGLES]
        else:
            waves = [[across, down]] if texture == "dotted" else [[across + down, across - down]]
        for model in waves:
            models.append(np.stack([*_plane(), *(turn(wave) for wave in model for turn in (np.cos, np.sin))]))
    return np.stack(models)


def _cells() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:PATCH, :PATCH] * 2.0
    return x.ravel(), y.ravel()
