"""Which trials of a study the model sampler learns from, and which of many."""

import math

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from autoprune.search.history import History, HistoryReader, Told, best, selected
from autoprune.search.neighbour import random_vector
from tests.test_space import space

HERE = space("fastvar", "tiny")


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))


def asked(study: optuna.Study, constraint: float | None = None) -> optuna.trial.Trial:
    trial = study.ask(fixed_distributions=HERE.distributions)
    if constraint is not None:
        trial.set_constraint("memory_mb", constraint)
    return trial


def test_failures_count_where_they_broke_a_constraint(study: optuna.Study) -> None:
    study.tell(asked(study, -0.1), [-0.5, 0.2])
    study.tell(asked(study, 0.0), [-0.4, math.inf])
    study.tell(asked(study, 300.0), state=TrialState.FAIL)
    study.tell(asked(study, -0.1), state=TrialState.FAIL)
    study.tell(asked(study), state=TrialState.FAIL)
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"source": "preset:x"}))
    history = HistoryReader(HERE).read(study)
    assert [(trial.point, trial.constraint) for trial in history.told] == [((-0.5, 0.2), -0.1), (None, 300.0)]
    assert history.keys == {HERE.policy(study.trials[number].params).key() for number in (0, 2)} and history.valued == 1
    assert [trial.vector for trial in history.told if trial.feasible] == [HERE.normal(study.trials[0].params)]


def test_a_careful_history_keeps_a_part_of_the_score_budget_and_of_no_other(study: optuna.Study) -> None:
    for drop, memory in ((-0.01, -5.0), (-0.06, -5.0), (-0.1, -0.02), (-0.1, 7.0)):
        trial = asked(study, memory)
        trial.set_constraint("score_drop", drop)
        study.tell(trial, [-0.5, 0.2])
    study.tell(asked(study, -0.02), [-0.4, 0.1])  # a study without scores
    history = HistoryReader(HERE, margin=0.06).read(study)
    assert [trial.constraint for trial in history.told] == [-0.01, -0.06, -0.02, 7.0, -0.02]
    assert [trial.constraint for trial in history.careful().told] == pytest.approx([0.05, 0.0, -0.02, 7.0, -0.02])
    assert HistoryReader(HERE).read(study).careful() == HistoryReader(HERE).read(study)


def test_running_trials_count_once_their_vector_is_whole_and_change_to_told(study: optuna.Study) -> None:
    reader, whole = HistoryReader(HERE), asked(study)
    half = study.ask()
    half.suggest_int("pruned_scales", 0, 1)
    study.ask()
    history = reader.read(study)
    assert history.running == [HERE.normal(whole.params)] and not history.told
    study.tell(whole, [-0.1, 0.1])
    assert [trial.vector for trial in reader.read(study).told] == history.running and not reader.read(study).running


def test_trials_come_in_the_order_in_which_they_ended(study: optuna.Study) -> None:
    first, second = asked(study), asked(study)
    study.tell(second, [-0.2, 0.1])
    study.tell(first, [-0.3, 0.1])
    assert [trial.point[0] for trial in HistoryReader(HERE).read(study).told] == [-0.2, -0.3]


def test_of_many_trials_the_front_stays_with_what_is_near_and_some_of_all_the_rest() -> None:
    rng = np.random.default_rng(0)
    told = [Told(random_vector(HERE, rng), (-x, x * x + y), float(rng.choice([-1, 1])), 1.0) for x, y in rng.random((900, 2))]
    told += [Told(told[0].vector, None, 1.0, 1.0)]
    chosen = selected(told, 100)
    places = [next(index for index, trial in enumerate(told) if trial is each) for each in chosen]
    assert len(chosen) == 100 and places == sorted(set(places))
    assert all(any(member is each for each in chosen) for member in best(told))
    above = np.array([trial.point[1] - trial.point[0] ** 2 for trial in chosen if trial.point])
    assert np.sort(above)[49] < 0.15 and above.max() > 0.8 and max(np.diff(places)) < 100
    assert selected(told[:80], 100) == told[:80]


def test_a_model_always_has_trials_with_values() -> None:
    broken, slow, fast = Told({}, None, 1.0, 1.0), Told({}, (-0.2, 0.3), 0.1, 0.1), Told({}, (-0.5, 0.4), 0.2, 0.2)
    told = [broken] * 5 + [fast, slow] + [broken] * 200
    history = History(told, [], frozenset())
    assert history.valued == 2 and history.first(1) == told[:6] and history.first(2) == told[:7]
    assert [trial.point for trial in selected(told, 10) if trial.point] == [(-0.5, 0.4), (-0.2, 0.3)]
