"""The Gaussian process against a plain inverse, expected improvement against sampling, and what the sampler asks."""

import itertools
import math

import numpy as np
import optuna
import pytest
import torch

from autoprune.search.acquisition import expected_improvement, probability_below
from autoprune.search.front import hypervolume
from autoprune.search.gaussian_process import GaussianProcess
from autoprune.search.model_sampler import ModelSampler
from autoprune.search.neighbour import random_vector
from tests.test_space import space


def test_predictions_are_those_of_a_plain_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(14, 3, generator=generator, dtype=torch.float64)
    values = (3 * inputs[:, 0]).sin() + inputs[:, 1] + 0.05 * torch.randn(14, generator=generator, dtype=torch.float64)
    process = GaussianProcess(inputs, values)
    fresh = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    mean, deviation = process.predict(fresh)
    lengths, noise = np.exp(process._log_lengths.numpy()), math.exp(process._log_noise)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        r = math.sqrt(5) * math.sqrt(sum(((x - y) / length) ** 2 for x, y, length in zip(a, b, lengths, strict=True)))
        return (1 + r + r * r / 3) * math.exp(-r)

    known, asked, y = inputs.numpy(), fresh.numpy(), values.numpy()
    inverse = np.linalg.inv(
        [[kernel(a, b) + (noise if i == j else 0) for j, b in enumerate(known)] for i, a in enumerate(known)]
    )
    for index, point in enumerate(asked):
        row = np.array([kernel(point, b) for b in known])
        assert mean[index].item() == pytest.approx(y.mean() + row @ inverse @ (y - y.mean()), abs=1e-5)
        assert deviation[index].item() == pytest.approx(y.std() * math.sqrt(1 - row @ inverse @ row), abs=1e-5)


def test_the_process_predicts_a_smooth_function_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(60, 6, generator=generator, dtype=torch.float64)
    fresh = torch.rand(40, 6, generator=generator, dtype=torch.float64)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (4 * x[:, 0]).sin() + x[:, 1] * x[:, 2]

    mean, deviation = GaussianProcess(inputs, function(inputs)).predict(fresh)
    error = (mean - function(fresh)).abs()
    assert error.mean() < 0.1 * function(fresh).std() and (error < 4 * deviation + 1e-3).float().mean() > 0.9


def test_equal_inputs_and_constant_values_do_not_break_the_fit() -> None:
    inputs = torch.ones(8, 2, dtype=torch.float64)
    mean, deviation = GaussianProcess(inputs, torch.full((8,), 3.0, dtype=torch.float64)).predict(inputs[:1])
    assert mean.item() == pytest.approx(3.0) and deviation.isfinite().all()


def test_expected_improvement_is_the_mean_of_sampled_improvements() -> None:
    points, reference = [(-1.0, 0.2), (-0.5, 0.1), (-0.3, 0.3), (0.2, 0.01)], (0.0, 0.35)
    first = (torch.tensor([-0.7, -1.4, -0.1]), torch.tensor([0.2, 0.3, 0.1]))
    second = (torch.tensor([0.12, 0.3, 0.02]), torch.tensor([0.05, 0.1, 0.01]))
    exact = expected_improvement(first, second, points=points, window=(-math.inf, reference[1]))
    rng, before = np.random.default_rng(0), hypervolume(points, reference)
    for index in range(3):
        draws = [rng.normal(belief[0][index], belief[1][index], 4000) for belief in (first, second)]
        gains = [hypervolume([*points, point], reference) - before for point in zip(*draws, strict=True)]
        assert exact[index].item() == pytest.approx(np.mean(gains), abs=4 * np.std(gains) / math.sqrt(4000))


def test_windows_of_loss_share_the_expected_improvement() -> None:
    points = [(-1.0, 0.2), (-0.5, 0.1)]
    beliefs = (torch.tensor([-0.7, -1.4]), torch.tensor([0.2, 0.3])), (torch.tensor([0.12, 0.3]), torch.tensor([0.05, 0.1]))
    edges = [-math.inf, 0.05, 0.1, 0.17, 0.2, 0.35]
    parts = [expected_improvement(*beliefs, points=points, window=window) for window in itertools.pairwise(edges)]
    whole = expected_improvement(*beliefs, points=points, window=(-math.inf, 0.35))
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)
    assert all((part >= 0).all() for part in parts)


def test_probability_below_is_the_normal_distribution() -> None:
    belief = (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert probability_below(belief, 1.0).tolist() == pytest.approx([0.841345, 0.5], abs=1e-5)


def test_unused_dimensions_are_neutral_and_change_nothing() -> None:
    here, rng = space("unified", "tiny"), np.random.default_rng(0)
    for _ in range(200):
        vector, other = random_vector(here, rng), random_vector(here, rng)
        normal = here.normal(vector)
        assert here.policy(normal) == here.policy(vector) and here.normal(normal) == normal
        free = {name for name in vector if normal[name] != vector[name]}
        moved = {name: other[name] if name in free else value for name, value in vector.items()}
        assert here.policy(moved).key() == here.policy(vector).key()


def test_the_sampler_asks_no_policy_twice_and_finds_more_than_random() -> None:
    here = space("fastvar", "tiny")

    def objectives(vector: dict) -> tuple[float, float]:
        policy = here.policy(vector)
        computed = loss = 0.0
        for scale, grid in enumerate(policy.scale_schedule):
            rule, skipped = policy.scales.get(scale), scale >= len(policy.scale_schedule) - policy.skip_last
            keep = 0.0 if skipped else rule.keep if rule else 1.0
            branches = 0.5 if policy.guidance.branch != "both" and scale >= policy.guidance.from_scale else 1.0
            computed += keep * branches * grid[1] * grid[2]
            loss += 0.1 * (1 - keep) ** 2 + 0.02 * (1 - branches)
        return math.log((computed + 50) / 571), loss

    def front(sampler: optuna.samplers.BaseSampler) -> tuple[float, int]:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        told = {}
        for _ in range(40):
            trial = study.ask(fixed_distributions=here.distributions)
            key, values = here.policy(trial.params).key(), objectives(trial.params)
            told[key] = values
            trial.set_constraint("drop", values[1] - 0.25)
            study.tell(trial, list(values))
        return hypervolume([values for values in told.values() if values[1] <= 0.25], (0.0, 0.25)), len(told)

    modelled, asked = front(ModelSampler(here, startup=10, seed=0))
    random = max(front(optuna.samplers.RandomSampler(seed=seed))[0] for seed in range(3))
    assert asked == 40 and modelled > 1.05 * random
