"""Periodic patterns: what makes late scales carry high frequencies. Periods do not divide the 8 px latent cell."""

import numpy as np

EDGE = 1.4  # px over which coverage and patterns go from one level to the other
STRIPE_ANGLES = tuple(np.pi * quarter / 4 for quarter in range(4))
DOT_LEVEL = 0.75  # of cos + cos in [-2, 2]: dots cover about a quarter of the plane


def pattern(name: str, x: np.ndarray, y: np.ndarray, *, period: float, rng: np.random.Generator) -> np.ndarray:
    """Soft two-level pattern in [-1, 1], float32 [h, w], for pixel coordinates x [1, w] and y [h, 1]; random phase.

    `name` is striped (one of four angles), dotted or checkered (both along the axes); 1 is the mark, -1 the ground.
    """
    phase_x, phase_y, angle = rng.random(3)
    gain = period / (np.pi * EDGE)
    wave = np.float32(2 * np.pi / period)
    if name == "striped":
        theta = STRIPE_ANGLES[int(4 * angle)]
        turned = x * np.float32(np.cos(theta)) + y * np.float32(np.sin(theta))
        return _soft(np.cos(wave * turned + np.float32(2 * np.pi * phase_x)), gain)
    across = np.cos(wave * x + np.float32(2 * np.pi * phase_x))
    down = np.cos(wave * y + np.float32(2 * np.pi * phase_y))
    if name == "dotted":
        return _soft(across + down - np.float32(DOT_LEVEL), gain)
    return _soft(across, gain) * _soft(down, gain)


def noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit deviation at its knots (one every 5.8 px), float32 [size, size]."""
    knots = rng.standard_normal((_SPREAD.shape[1], _SPREAD.shape[1]), dtype=np.float32)
    spread = _SPREAD[:size]
    return spread @ knots @ spread.T


def _soft(wave: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(np.float32(gain) * wave, -1, 1)


def _linear_interpolation(size: int, knots: int) -> np.ndarray:
    position = np.linspace(0, knots - 1, size)[:, None]
    return np.clip(1 - np.abs(position - np.arange(knots)), 0, 1).astype(np.float32)


_SPREAD = _linear_interpolation(128, 23)
