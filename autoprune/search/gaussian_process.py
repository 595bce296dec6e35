"""Exact Gaussian-process regression on a few hundred points.

Matern-5/2 kernel with one length a dimension; the prior of the lengths grows with the number of dimensions
(Hvarfner et al., arXiv 2402.02229), so that many dimensions and few points stay well behaved.
"""

import math

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize

ITERATIONS = 40
LOG_LENGTHS, LOG_NOISE = (-3.0, 6.0), (math.log(1e-4), 0.0)  # bounds; targets have variance 1
USUAL_LOG_NOISE = -4.0
LENGTH_VARIANCE, NOISE_VARIANCE = 3.0, 4.0  # of the priors of log lengths and log noise


class GaussianProcess:
    """Fitted to inputs [n, d] in [0, 1] and values [n], float64.

    `parameters` are log lengths and the log noise variance [d + 1]; those that maximise the posterior unless given.
    """

    def __init__(self, inputs: np.ndarray, values: np.ndarray, parameters: np.ndarray | None = None) -> None:
        self._inputs, self._mean, self._spread = inputs, values.mean(), max(values.std(), 1e-12)
        self._targets = (values - self._mean) / self._spread
        self.parameters = _fitted(inputs, self._targets) if parameters is None else parameters
        self._solve()

    def tell(self, inputs: np.ndarray, values: np.ndarray) -> None:
        """Adds values [k] at inputs [k, d]; parameters, mean and spread stay as they were fitted."""
        self._inputs = np.concatenate([self._inputs, inputs])
        self._targets = np.concatenate([self._targets, (values - self._mean) / self._spread])
        self._solve()

    def predict(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation [m] of the noise-free value at inputs [m, d]."""
        cross = self._cross(inputs)
        variance = 1 - np.square(solve_triangular(self._factor, cross.T, lower=True, check_finite=False)).sum(0)
        return self._mean + self._spread * (cross @ self._weights), self._spread * np.sqrt(variance.clip(1e-10))

    def mean(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the mean [m] at inputs [m, d]."""
        return self._mean + self._spread * (self._cross(inputs) @ self._weights)

    def _cross(self, inputs: np.ndarray) -> np.ndarray:
        scale = _scale(self.parameters)
        return _matern(_distance(inputs * scale, self._inputs * scale))

    def _solve(self) -> None:
        covariance = self._cross(self._inputs)
        covariance[np.diag_indices_from(covariance)] += math.exp(self.parameters[-1])
        self._factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        self._weights = cho_solve((self._factor, True), self._targets, check_finite=False)


def _fitted(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    width = inputs.shape[1]
    bounds, options = [LOG_LENGTHS] * width + [LOG_NOISE], {"maxiter": ITERATIONS}
    arguments, start = (inputs, targets), _usual(width)
    found = minimize(negative_log_posterior, start, arguments, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    return found.x


def negative_log_posterior(parameters: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns what a fit minimises, but for a constant, and its gradient [d + 1]: targets [n] of variance 1 at inputs [n, d].

    With W = (inverse covariance - weights weights^T) / 2 the gradient of the likelihood is the sum of W times that of the
    covariance (Rasmussen and Williams, Gaussian Processes for Machine Learning, 5.9).
    """
    scaled, noise = inputs * _scale(parameters), math.exp(parameters[-1])
    distance = _distance(scaled, scaled)
    covariance = _matern(distance)
    covariance[np.diag_indices_from(covariance)] += noise
    factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
    weights = cho_solve((factor, True), targets, check_finite=False)
    inverse = np.tril(dpotri(factor, lower=1)[0])
    inverse += np.tril(inverse, -1).T
    pull = 0.5 * (inverse - np.outer(weights, weights))
    variances = np.append(np.full(inputs.shape[1], LENGTH_VARIANCE), NOISE_VARIANCE)
    offset = parameters - _usual(inputs.shape[1])
    loss = 0.5 * targets @ weights + np.log(factor.diagonal()).sum() + 0.5 * (offset * offset / variances).sum()
    slope = pull * (1 + distance) * np.exp(-distance) / 3  # of the kernel by half the log length, over squared differences
    lengths = 2 * (np.square(scaled).T @ slope.sum(1) - ((slope @ scaled) * scaled).sum(0))
    return loss, np.append(lengths, noise * pull.trace()) + offset / variances


def _usual(width: int) -> np.ndarray:
    """Returns the parameters that are likeliest before anything is known."""
    return np.append(np.full(width, math.sqrt(2) + 0.5 * math.log(width)), USUAL_LOG_NOISE)


def _scale(parameters: np.ndarray) -> np.ndarray:
    return math.sqrt(5) * np.exp(-parameters[:-1])


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    square = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(square.clip(0))


def _matern(distance: np.ndarray) -> np.ndarray:
    """Returns (1 + r + r^2 / 3) exp(-r) of distances in lengths over sqrt(5)."""
    return (1 + distance + distance * distance / 3) * np.exp(-distance)
