"""Early discard: what an optimistic reading of the first batch still allows must go on."""

from dataclasses import replace

from autoprune.search.discard import constraint_values, discard_reason
from autoprune.search.settings import QualitySettings
from tests.test_front import measured

QUALITY = QualitySettings(prompts=48, max_score_drop=0.05)


def first(latency: float, loss: float, lost: int = 0):  # noqa: ANN201
    return replace(measured(latency, loss), prompts=16, score_drop=lost / 16)


def test_a_dominated_trial_ends_only_beyond_both_margins() -> None:
    rivals = [first(0.5, 0.1)]
    assert discard_reason(first(0.6, 0.2), rivals, QUALITY)
    assert not discard_reason(first(0.52, 0.2), rivals, QUALITY)
    assert not discard_reason(first(0.6, 0.105), rivals, QUALITY)
    assert not discard_reason(first(0.4, 0.9), rivals, QUALITY)


def test_a_score_drop_ends_a_trial_only_when_no_later_prompt_could_save_it() -> None:
    assert not discard_reason(first(0.2, 0.1, lost=3), [], QUALITY)
    assert "4 of 16 prompts lost" in discard_reason(first(0.2, 0.1, lost=4), [], QUALITY)


def unscored(latency: float, loss: float):  # noqa: ANN201
    return replace(first(latency, loss), score_dense=None, score=None, score_drop=None, score_drop_interval=None)


def test_without_scores_the_loss_is_what_the_budget_limits() -> None:
    quality = QualitySettings(name="fidelity", max_loss=0.2)
    assert not discard_reason(unscored(0.2, 0.22), [], quality), "other prompts may be 10 % better"
    assert "cannot stay within 0.2" in discard_reason(unscored(0.2, 0.23), [], quality)
    assert constraint_values(unscored(0.2, 0.22), quality)["loss"] > 0 >= constraint_values(unscored(0.2, 0.2), quality)["loss"]
    assert constraint_values(first(0.2, 0.9, lost=1), QUALITY) == {"score_drop": 1 / 16 - 0.05}


def test_a_trial_with_the_images_of_a_known_policy_ends_unless_it_is_faster() -> None:
    rivals = [first(0.5, 0.1)]
    assert "same images" in discard_reason(first(0.49, 0.1), rivals, QUALITY)
    assert not discard_reason(first(0.45, 0.1), rivals, QUALITY)
    assert not discard_reason(first(0.49, 0.1 + 1e-9), rivals, QUALITY)
