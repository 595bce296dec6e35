"""Exact Gaussian-process regression on a few hundred points, small enough to refit before every question.

Matern-5/2 kernel with one length a dimension; the prior of the lengths grows with the number of dimensions
(Hvarfner et al., arXiv 2402.02229), so that many dimensions and few points stay well behaved.
"""

import math

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

ITERATIONS = 40
LOG_LENGTHS, LOG_NOISE = (-3.0, 6.0), (math.log(1e-4), 0.0)  # bounds; targets have variance 1
USUAL_LOG_NOISE = -4.0


class GaussianProcess:
    """Fitted to inputs [n, d] in [0, 1] and values [n], float64; hyperparameters maximise the posterior."""

    def __init__(self, inputs: Tensor, values: Tensor) -> None:
        self._inputs = inputs
        self._mean, self._spread = values.mean(), values.std(correction=0).clamp_min(1e-12)
        self._targets = (values - self._mean) / self._spread
        self._prior_length = math.sqrt(2) + 0.5 * math.log(inputs.shape[1])
        self._log_lengths, self._log_noise = self._fitted()
        self._factor = torch.linalg.cholesky(self._covariance(self._log_lengths, self._log_noise))
        self._weights = torch.cholesky_solve(self._targets[:, None], self._factor)[:, 0]

    def predict(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation [m] of the noise-free value at inputs [m, d]."""
        cross = _matern(inputs, self._inputs, self._log_lengths)
        variance = 1 - torch.linalg.solve_triangular(self._factor, cross.T, upper=False).square().sum(0)
        return self._mean + self._spread * (cross @ self._weights), self._spread * variance.clamp_min(1e-10).sqrt()

    def _fitted(self) -> tuple[Tensor, Tensor]:
        """Returns the log lengths [d] and the log noise variance."""
        width = self._inputs.shape[1]
        start = np.array([self._prior_length] * width + [USUAL_LOG_NOISE])
        bounds = [LOG_LENGTHS] * width + [LOG_NOISE]
        options = {"maxiter": ITERATIONS}
        best = minimize(self._loss_and_gradient, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options).x
        return torch.from_numpy(best[:-1]), torch.tensor(best[-1])

    def _loss_and_gradient(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.inference_mode(False), torch.enable_grad():
            variables = torch.from_numpy(parameters).clone().requires_grad_()
            loss = self._negative_log_posterior(variables[:-1], variables[-1])
            loss.backward()
        return loss.item(), variables.grad.numpy()

    def _negative_log_posterior(self, log_lengths: Tensor, log_noise: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(self._covariance(log_lengths, log_noise))
        solved = torch.linalg.solve_triangular(factor, self._targets[:, None], upper=False)
        misfit = 0.5 * solved.square().sum() + factor.diagonal().log().sum()
        lengths = ((log_lengths - self._prior_length) / math.sqrt(3)).square().sum()
        return misfit + 0.5 * lengths + 0.5 * ((log_noise - USUAL_LOG_NOISE) / 2).square()

    def _covariance(self, log_lengths: Tensor, log_noise: Tensor) -> Tensor:
        diagonal = torch.eye(len(self._inputs), dtype=self._inputs.dtype)
        return _matern(self._inputs, self._inputs, log_lengths) + log_noise.exp() * diagonal


def _matern(a: Tensor, b: Tensor, log_lengths: Tensor) -> Tensor:
    """Returns (1 + r + r^2 / 3) exp(-r), r = sqrt(5) |a - b| in lengths: [n, d], [m, d] -> [n, m]."""
    a, b = (points * (math.sqrt(5) * (-log_lengths).exp()) for points in (a, b))
    square = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
    distance = (square + 1e-12).sqrt()
    return (1 + distance + square / 3) * (-distance).exp()
