"""The Gaussian process against a plain inverse, expected improvement against sampling, and what the sampler asks."""

import itertools
import math
import time

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from autoprune.errors import UserError
from autoprune.search.acquisition import expected_improvement, probability_below
from autoprune.search.beliefs import Beliefs, coordinates
from autoprune.search.front import hypervolume
from autoprune.search.gaussian_process import GaussianProcess, negative_log_posterior
from autoprune.search.history import HistoryReader
from autoprune.search.model_sampler import ModelSampler
from autoprune.search.neighbour import joined, random_vector
from autoprune.search.sampler import make_sampler
from autoprune.search.settings import PENDING, SamplerSettings
from tests.test_space import space


def kernel(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> float:
    r = math.sqrt(5) * math.sqrt(sum(((x - y) / length) ** 2 for x, y, length in zip(a, b, lengths, strict=True)))
    return (1 + r + r * r / 3) * math.exp(-r)


def covariance(inputs: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    lengths, noise = np.exp(parameters[:-1]), math.exp(parameters[-1])
    rows = [[kernel(a, b, lengths) + (noise if i == j else 0) for j, b in enumerate(inputs)] for i, a in enumerate(inputs)]
    return np.array(rows)


def samples(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.random((count, 3))
    return inputs, np.sin(3 * inputs[:, 0]) + inputs[:, 1] + 0.05 * rng.normal(size=count), rng.random((5, 3))


def test_predictions_are_those_of_a_plain_inverse() -> None:
    inputs, values, fresh = samples(14)
    process = GaussianProcess(inputs, values)
    mean, deviation = process.predict(fresh)
    inverse = np.linalg.inv(covariance(inputs, process.parameters))
    for index, point in enumerate(fresh):
        row = np.array([kernel(point, known, np.exp(process.parameters[:-1])) for known in inputs])
        expected = values.mean() + row @ inverse @ (values - values.mean())
        assert mean[index] == pytest.approx(expected, abs=1e-8) == process.mean(fresh)[index]
        assert deviation[index] == pytest.approx(values.std() * math.sqrt(1 - row @ inverse @ row), abs=1e-8)


def test_what_a_fit_minimises_is_the_posterior_and_its_gradient() -> None:
    inputs, values, _ = samples(14)
    targets, parameters = (values - values.mean()) / values.std(), np.array([0.3, -0.2, 1.5, -2.5])

    def plain(parameters: np.ndarray) -> float:
        matrix = covariance(inputs, parameters)
        usual, deviations = [math.sqrt(2) + 0.5 * math.log(3)] * 3 + [-4.0], [math.sqrt(3)] * 3 + [2.0]
        prior = sum(((x - mean) / spread) ** 2 for x, mean, spread in zip(parameters, usual, deviations, strict=True))
        return 0.5 * (targets @ np.linalg.inv(matrix) @ targets + np.linalg.slogdet(matrix)[1] + prior)

    loss, gradient = negative_log_posterior(parameters, inputs, targets)
    steps = 1e-5 * np.eye(4)
    assert loss == pytest.approx(plain(parameters))
    assert gradient.tolist() == pytest.approx([(plain(parameters + h) - plain(parameters - h)) / 2e-5 for h in steps], rel=1e-5)


def test_a_fit_is_a_minimum() -> None:
    inputs, values, _ = samples(20)
    targets, best = (values - values.mean()) / values.std(), GaussianProcess(inputs, values).parameters
    lowest = negative_log_posterior(best, inputs, targets)[0]
    assert all(negative_log_posterior(best + h, inputs, targets)[0] > lowest for h in (*0.1 * np.eye(4), *-0.1 * np.eye(4)))


def test_the_process_predicts_a_smooth_function_it_has_not_seen() -> None:
    rng = np.random.default_rng(1)
    inputs, fresh = rng.random((60, 6)), rng.random((40, 6))

    def function(x: np.ndarray) -> np.ndarray:
        return np.sin(4 * x[:, 0]) + x[:, 1] * x[:, 2]

    mean, deviation = GaussianProcess(inputs, function(inputs)).predict(fresh)
    error = np.abs(mean - function(fresh))
    assert error.mean() < 0.1 * function(fresh).std() and (error < 4 * deviation + 1e-3).mean() > 0.9


def test_telling_more_is_a_process_of_all_with_the_same_parameters() -> None:
    inputs, values, fresh = samples(14)
    process = GaussianProcess(inputs[:10], values[:10])
    process.tell(inputs[10:], values[10:])
    inverse = np.linalg.inv(covariance(inputs, process.parameters))
    row = np.array([kernel(fresh[0], known, np.exp(process.parameters[:-1])) for known in inputs])
    centre = values[:10].mean()
    assert process.mean(fresh)[0] == pytest.approx(centre + row @ inverse @ (values - centre))


def test_telling_what_is_believed_leaves_means_and_lowers_deviations() -> None:
    inputs, values, fresh = samples(14)
    process = GaussianProcess(inputs, values)
    mean, deviation = process.predict(fresh)
    process.tell(fresh[:2], process.mean(fresh[:2]))
    after, less = process.predict(fresh)
    assert after.tolist() == pytest.approx(mean.tolist()) and (less <= deviation).all()
    assert (less[:2] < 0.9 * deviation[:2]).all()


def test_equal_inputs_and_constant_values_do_not_break_the_fit() -> None:
    inputs = np.ones((8, 2))
    mean, deviation = GaussianProcess(inputs, np.full(8, 3.0)).predict(inputs[:1])
    assert mean[0] == pytest.approx(3.0) and np.isfinite(deviation).all()


def test_expected_improvement_is_the_mean_of_sampled_improvements() -> None:
    points, reference = [(-1.0, 0.2), (-0.5, 0.1), (-0.3, 0.3), (0.2, 0.01)], (0.0, 0.35)
    first = (np.array([-0.7, -1.4, -0.1]), np.array([0.2, 0.3, 0.1]))
    second = (np.array([0.12, 0.3, 0.02]), np.array([0.05, 0.1, 0.01]))
    exact = expected_improvement(first, second, points=points, window=(-math.inf, reference[1]))
    rng, before = np.random.default_rng(0), hypervolume(points, reference)
    for index in range(3):
        draws = [rng.normal(belief[0][index], belief[1][index], 4000) for belief in (first, second)]
        gains = [hypervolume([*points, point], reference) - before for point in zip(*draws, strict=True)]
        assert exact[index] == pytest.approx(np.mean(gains), abs=4 * np.std(gains) / math.sqrt(4000))


def test_windows_of_loss_share_the_expected_improvement() -> None:
    points = [(-1.0, 0.2), (-0.5, 0.1)]
    beliefs = (np.array([-0.7, -1.4]), np.array([0.2, 0.3])), (np.array([0.12, 0.3]), np.array([0.05, 0.1]))
    edges = [-math.inf, 0.05, 0.1, 0.17, 0.2, 0.35]
    parts = [expected_improvement(*beliefs, points=points, window=window) for window in itertools.pairwise(edges)]
    whole = expected_improvement(*beliefs, points=points, window=(-math.inf, 0.35))
    assert np.sum(parts, axis=0).tolist() == pytest.approx(whole.tolist())
    assert all((part >= 0).all() for part in parts)


def test_probability_below_is_the_normal_distribution() -> None:
    belief = (np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    assert probability_below(belief, 1.0).tolist() == pytest.approx([0.841345, 0.5], abs=1e-5)


def test_coordinates_are_places_in_the_range_and_one_column_a_choice() -> None:
    flat = {"a": IntDistribution(2, 6), "b": CategoricalDistribution(("x", 1, 0)), "c": FloatDistribution(-1, 1, step=0.5)}
    vectors = [{"a": 3, "b": 0, "c": 1.0}, {"a": 6, "b": "x", "c": -1.0}]
    assert coordinates(vectors, flat).tolist() == [[0.25, 0, 0, 1, 1], [1, 1, 0, 0, 0]]


def test_unused_dimensions_are_neutral_and_change_nothing() -> None:
    here, rng = space("unified", "tiny"), np.random.default_rng(0)
    for _ in range(200):
        vector, other = random_vector(here, rng), random_vector(here, rng)
        normal = here.normal(vector)
        assert here.policy(normal) == here.policy(vector) and here.normal(normal) == normal
        free = {name for name in vector if normal[name] != vector[name]}
        moved = {name: other[name] if name in free else value for name, value in vector.items()}
        assert here.policy(moved).key() == here.policy(vector).key()


def test_a_member_joined_by_another_trial_takes_all_its_decisions() -> None:
    here = space("unified", "tiny")
    found = {preset.name: preset for preset in here.presets()}
    single, pruned = found["cond-only-2"], found["fastvar-no-skip"]
    both = here.policy(joined(here.normal(single.vector), here.normal(pruned.vector), here.normal({})))
    assert single.policy.guidance.branch == "cond" and pruned.policy.scales
    assert (both.guidance, both.scales) == (single.policy.guidance, pruned.policy.scales)


HERE = space("fastvar", "tiny")


def objectives(vector: dict) -> tuple[float, float]:
    policy = HERE.policy(vector)
    computed = loss = 0.0
    for scale, grid in enumerate(policy.scale_schedule):
        rule, skipped = policy.scales.get(scale), scale >= len(policy.scale_schedule) - policy.skip_last
        keep = 0.0 if skipped else rule.keep if rule else 1.0
        branches = 0.5 if policy.guidance.branch != "both" and scale >= policy.guidance.from_scale else 1.0
        computed += keep * branches * grid[1] * grid[2]
        loss += 0.1 * (1 - keep) ** 2 + 0.02 * (1 - branches)
    return math.log((computed + 50) / 571), loss


def told_study(sampler: optuna.samplers.BaseSampler, count: int) -> optuna.Study:
    """Returns a study of random vectors, told."""
    study, rng = optuna.create_study(directions=["minimize"] * 2, sampler=sampler), np.random.default_rng(0)
    for _ in range(count):
        vector = random_vector(HERE, rng)
        values = objectives(vector)
        study.enqueue_trial(vector)
        trial = study.ask(fixed_distributions=HERE.distributions)
        trial.set_constraint("score_drop", values[1] - 0.25)
        study.tell(trial, list(values))
    return study


def key(trial: optuna.trial.Trial) -> str:
    return HERE.policy(trial.params).key()


def test_the_sampler_asks_no_policy_twice_and_finds_more_than_random() -> None:
    def front(sampler: optuna.samplers.BaseSampler) -> tuple[float, int]:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        told = {}
        for _ in range(40):
            trial = study.ask(fixed_distributions=HERE.distributions)
            values = told[key(trial)] = objectives(trial.params)
            trial.set_constraint("drop", values[1] - 0.25)
            study.tell(trial, list(values))
        return hypervolume([values for values in told.values() if values[1] <= 0.25], (0.0, 0.25)), len(told)

    modelled, asked = front(ModelSampler(HERE, startup=10, seed=0))
    random = max(front(optuna.samplers.RandomSampler(seed=seed))[0] for seed in range(3))
    assert asked == 40 and modelled > 1.05 * random


def test_a_part_of_all_asks_looks_for_what_keeps_a_margin_of_the_score_budget() -> None:
    """Skipping drops nearly all of the score that may be dropped, which a search of the whole budget does not mind."""

    def careful_area(*, margin: float, seed: int) -> float:
        study = optuna.create_study(
            directions=["minimize"] * 2, sampler=ModelSampler(HERE, startup=10, seed=seed, margin=margin)
        )
        points = []
        for _ in range(40):
            trial = study.ask(fixed_distributions=HERE.distributions)
            values, drops = objectives(trial.params), HERE.policy(trial.params).skip_last > 0
            trial.set_constraint("score_drop", -0.01 if drops else -0.12)
            study.tell(trial, list(values))
            points += [] if drops else [values]
        return hypervolume(points, (0.0, 0.25))

    areas = {margin: [careful_area(margin=margin, seed=seed) for seed in range(3)] for margin in (0.0, 0.06)}
    assert np.mean(areas[0.06]) > 1.05 * np.mean(areas[0.0])


@pytest.mark.parametrize("pending", PENDING)
@pytest.mark.parametrize("told", [4, 14])
def test_no_policy_that_runs_is_asked(pending: str, told: int) -> None:
    study = told_study(ModelSampler(HERE, startup=10, seed=0, pending=pending), told)
    known = {key(trial) for trial in study.trials}
    asked = [key(study.ask(fixed_distributions=HERE.distributions)) for _ in range(12)]
    assert len(set(asked)) == 12 and known.isdisjoint(asked)


def test_an_ask_follows_from_seed_and_history_whoever_asks() -> None:
    def sampler(seed: int) -> ModelSampler:
        return ModelSampler(HERE, startup=10, seed=seed, margin=0.1)

    def asked(*, seed: int, fresh: bool) -> list[str]:
        study, keys = told_study(sampler(seed), 12), []
        for number in range(6):
            study.sampler = sampler(seed) if fresh or not number else study.sampler
            trial = study.ask(fixed_distributions=HERE.distributions)
            keys.append(key(trial))
            if number % 2:
                study.tell(trial, list(objectives(trial.params)))
        return keys

    assert asked(seed=0, fresh=False) == asked(seed=0, fresh=True) != asked(seed=1, fresh=True)


def test_what_runs_moves_the_next_ask_unless_it_counts_for_nothing() -> None:
    def gains(pending: str) -> np.ndarray:
        told = HistoryReader(HERE).read(told_study(optuna.samplers.RandomSampler(seed=0), 20)).told
        belief, rng = Beliefs(told, HERE.distributions), np.random.default_rng(1)
        running = [HERE.normal(random_vector(HERE, rng)) for _ in range(5)]
        belief.expect(running, pending)
        return belief.gain(running, (-math.inf, 0.3))

    nothing, believed, bad = gains("none"), gains("believer"), gains("liar")
    promising = nothing > 0.05 * nothing.max()
    assert (
        promising.any()
        and (believed[promising] < 0.5 * nothing[promising]).all()
        and (bad[promising] < nothing[promising]).all()
    )


def test_a_long_study_is_asked_from_a_limited_model() -> None:
    study = told_study(ModelSampler(HERE, startup=10, seed=0), 0)
    rng, known = np.random.default_rng(0), set()
    for _ in range(2000):
        vector = random_vector(HERE, rng)
        values, known = objectives(vector), known | {HERE.policy(vector).key()}
        study.add_trial(create_trial(params=dict(vector), distributions=HERE.distributions, values=values))
    began = time.process_time()
    assert key(study.ask(fixed_distributions=HERE.distributions)) not in known
    assert time.process_time() - began < 10  # a Cholesky factor of 2,000 rows a step of the fit takes minutes


def test_out_of_memory_is_learnt_and_does_not_end_the_study() -> None:
    study = told_study(ModelSampler(HERE, startup=4, seed=0), 8)
    failed = set()
    for _ in range(6):
        trial = study.ask(fixed_distributions=HERE.distributions)
        trial.set_constraint("memory_mb", 4000.0)
        study.tell(trial, state=TrialState.FAIL)
        failed.add(key(trial))
    assert len(failed) == 6 and key(study.ask(fixed_distributions=HERE.distributions)) not in failed


def test_running_trials_are_bad_to_tpe_unless_ignored() -> None:
    samplers = [make_sampler(HERE, SamplerSettings("tpe", pending=pending), 0) for pending in PENDING]
    assert [sampler._constant_liar for sampler in samplers] == [True, True, False]


def test_an_unknown_way_to_take_running_trials_is_refused() -> None:
    with pytest.raises(UserError, match="unknown sampler.pending 'fantasy'; choose from believer, liar, none"):
        SamplerSettings(pending="fantasy")
