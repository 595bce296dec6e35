"""The front against the presets."""

import math

import pytest
from example_study import measured

from autoprune.search.rivalry import rivalry

PRESETS = {
    "a": measured(1.5, 0.04),
    "b": measured(2.0, 0.08),
    "beaten": measured(1.9, 0.09),
    "broken": measured(9.0, 0.05, 0.5),
}


def test_ratios_compare_speed_at_the_loss_of_each_undominated_preset_within_the_budget() -> None:
    front = [measured(1.2, 0.01), measured(2.4, 0.08)]
    found = rivalry(front, PRESETS, max_drop=0.12)
    assert found.ratios == {"a": pytest.approx(1.2 / 1.5), "b": pytest.approx(2.4 / 2.0)}
    assert found.best == "a", "log(1.5) * (0.088 - 0.04) is more than log(2.0) * (0.088 - 0.08)"


def test_hypervolumes_share_one_corner() -> None:
    found = rivalry([measured(2.0, 0.04)], {"a": measured(1.5, 0.1)}, max_drop=0.12)
    assert found.front / found.presets == pytest.approx(
        math.log(2.0) * (0.11 - 0.04) / (math.log(1.5) * (0.11 - 0.1)), rel=1e-3
    )


def test_without_a_preset_in_the_budget_there_is_nothing_to_compare() -> None:
    assert rivalry([measured(2.0, 0.04)], {"broken": PRESETS["broken"]}, max_drop=0.12) is None
    assert rivalry([], PRESETS, max_drop=0.12).ratios["b"] == pytest.approx(1 / 2.0)
