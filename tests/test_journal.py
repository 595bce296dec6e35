"""Where the seconds of a study go: the sampler's are counted apart."""

import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from autoprune.search.journal import StudyJournal
from example_study import study_result

from autoprune.search.tables import findings


class SlowSampler(optuna.samplers.RandomSampler):
    def infer_relative_search_space(self, study, trial):  # noqa: ANN001, ANN201
        time.sleep(0.05)
        return super().infer_relative_search_space(study, trial)


def test_seconds_of_the_sampler_are_counted_apart_from_those_of_trials(tmp_path: Path) -> None:
    journal = StudyJournal(tmp_path / "study.journal", name="x", sampler=SlowSampler(seed=0))
    began = time.perf_counter()
    for _ in range(2):
        journal.ask({"keep": optuna.distributions.FloatDistribution(0, 1)})
    asked = time.perf_counter() - began
    time.sleep(0.01)
    assert 0.1 <= journal.spent_sampling() <= asked and journal.spent_sampling() == 0


def test_the_share_of_the_sampler_is_a_median_over_searched_trials(tmp_path: Path) -> None:
    result = study_result(tmp_path)
    assert result.sampler_share is None and not any("sampler took" in line for line in findings(result))
    spent = zip(result.trials, [9, 9, 9, 9, 0.15, 0.3, 0.45, 0.6, 1.2, 1.2, 0], strict=True)  # presets do not count
    result = replace(result, trials=tuple(replace(trial, sampler_seconds=seconds) for trial, seconds in spent))
    assert result.sampler_share == pytest.approx(0.35)
    assert findings(result)[-1] == "The sampler took 35.0 % of a trial's seconds (median)."
