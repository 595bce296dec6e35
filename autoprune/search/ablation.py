"""What the trials of a study say about its dimensions: which decide the objectives, and what the front owes to each."""

import warnings
from collections.abc import Sequence

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from autoprune.search.front import hypervolume, may_lead, objectives, reference_of
from autoprune.search.records import DimensionRow, TrialRecord
from autoprune.search.space import SearchSpace, Vector

FEWEST_TRIALS = 20  # below which importances are noise and none are given


def dimension_rows(space: SearchSpace, trials: Sequence[tuple[Vector, TrialRecord]]) -> list[DimensionRow]:
    """Returns a row for every free dimension, the one that the front owes most to first."""
    measured = [(space.normal(vector), trial) for vector, trial in trials if trial.measurement is not None]
    latency, loss = (_importances(space, measured, objective) for objective in (0, 1))
    leading = [(vector, objectives(trial.measurement)) for vector, trial in measured if may_lead(trial)]
    reference = reference_of(point for _, point in leading)
    whole, neutral = hypervolume((point for _, point in leading), reference), space.normal({})
    rows = []
    for name in space.distributions:
        without = hypervolume((point for vector, point in leading if vector[name] == neutral[name]), reference)
        used = sum(vector[name] != neutral[name] for vector, _ in measured)
        owed = 1 - without / whole if whole else 0.0
        rows.append(DimensionRow(name, used, latency.get(name, 0.0), loss.get(name, 0.0), owed))
    return sorted(rows, key=lambda row: (-row.owed, -row.latency - row.loss, row.name))


def _importances(space: SearchSpace, measured: Sequence[tuple[Vector, TrialRecord]], objective: int) -> dict[str, float]:
    """Returns importances of dimensions for one objective, computed on canonical vectors: what is inactive cannot matter.

    By a forest: being active depends on other dimensions, which marginal measures (PED-ANOVA) count as an effect.
    """
    if len(measured) < FEWEST_TRIALS:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for vector, trial in measured:
        value = objectives(trial.measurement)[objective]
        study.add_trial(create_trial(params=dict(vector), distributions=space.distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
