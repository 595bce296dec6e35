"""The tier rules on hand-made held-out measurements."""

from dataclasses import replace

import pytest
from scipy import stats

from autoprune.search.tiers import TIER_RULES, choose_tiers, drop_p
from tests.test_front import measured

LOSSLESS, _, _, FAST = TIER_RULES


def held_out(latency: float, loss: float, drop: float, low: float):  # noqa: ANN201
    return replace(measured(latency, loss), score_drop=drop, score_drop_interval=(low, drop + 0.01))


def test_each_tier_is_the_fastest_that_keeps_its_promise() -> None:
    members = [
        held_out(0.8, 0.02, 0.0, -0.02),
        held_out(0.6, 0.08, 0.01, -0.01),
        held_out(0.4, 0.20, 0.02, -0.001),
        held_out(0.3, 0.30, 0.03, 0.01),
        held_out(0.2, 0.40, 0.20, 0.1),
    ]
    assert choose_tiers(members, 0.05) == {"lossless": 0, "high": 1, "balanced": 2, "fast": 3}


def test_a_looser_tier_falls_back_to_the_stricter_member_and_an_unkeepable_one_is_missing() -> None:
    assert choose_tiers([held_out(0.8, 0.02, 0.0, -0.02)], 0.05) == dict.fromkeys(("lossless", "high", "balanced", "fast"), 0)
    assert choose_tiers([held_out(0.5, 0.3, 0.03, 0.01)], 0.05) == {"fast": 0}
    assert choose_tiers([held_out(1.2, 0.01, 0.0, -0.02)], 0.05) == {}
    assert choose_tiers([], 0.05) == {}


def test_a_single_member_is_exported_exactly_while_its_interval_ends_within_the_limits() -> None:
    assert "fast" in choose_tiers([held_out(0.5, 0.3, 0.0399, 0.03)], 0.05)
    assert "fast" not in choose_tiers([held_out(0.5, 0.3, 0.0401, 0.03)], 0.05)
    near = held_out(0.5, 0.04, 0.0, -0.01)
    assert "lossless" in choose_tiers([replace(near, loss_interval=(0.03, 0.0499))], 0.05)
    assert "lossless" not in choose_tiers([replace(near, loss_interval=(0.03, 0.0501))], 0.05)
    assert "lossless" not in choose_tiers([replace(near, loss_interval=None)], 0.05), "no interval, no promise"


def test_p_values_are_corrected_for_all_members_and_what_is_sure_costs_the_others_nothing() -> None:
    alone, broken = held_out(0.5, 0.3, 0.0395, 0.01), held_out(0.4, 0.3, 0.2, 0.1)
    (single,), sure = FAST.promise_p([alone], 0.05), held_out(0.9, 0.3, 0.0, -0.01)
    assert FAST.promise_p([alone, *[broken] * 4], 0.05)[0] == pytest.approx(5 * single)
    assert FAST.promise_p([alone, *[sure] * 4], 0.05)[0] == pytest.approx(single)
    assert choose_tiers([alone, *[broken] * 4], 0.05) == {"fast": 0}


def test_more_members_do_not_let_a_clear_drop_pass_as_none() -> None:
    dropping = held_out(0.5, 0.02, 0.011, 0.001)
    assert LOSSLESS.chosen([dropping] * 20, 0.05) is None and FAST.chosen([dropping] * 20, 0.05) == 0


def test_right_or_wrong_scores_are_judged_by_their_flips() -> None:
    scored = replace(held_out(0.5, 0.02, 0.05, 0.0), prompts=160, score_flips=(19, 11))
    assert drop_p([scored]) == pytest.approx([stats.binomtest(19, 30).pvalue])
    assert FAST.promise_p([scored], 0.12)[0] == pytest.approx(0.0253, abs=1e-4), "its interval ends at 0.1202"
    assert drop_p([replace(scored, score_flips=None)] * 2)[0] == pytest.approx(0.10), "an interval that ends at zero, twice"
    assert drop_p([unscored(0.5, 0.1)]) == [None]


def unscored(latency: float, loss: float):  # noqa: ANN201
    none = dict.fromkeys(("score_dense", "score", "score_drop", "score_drop_interval"))
    return replace(measured(latency, loss), **none)


def test_without_scores_each_tier_is_the_fastest_within_its_loss_and_the_budget() -> None:
    members = [unscored(0.8, 0.05), unscored(0.6, 0.10), unscored(0.4, 0.16), unscored(0.3, 0.30), unscored(0.2, 0.33)]
    assert choose_tiers(members, 0.32) == {"lossless": 0, "high": 1, "balanced": 2, "fast": 3}
    assert choose_tiers(members, 0.12) == {"lossless": 0, "high": 1, "balanced": 1, "fast": 1}
    assert choose_tiers([unscored(1.2, 0.01)], 0.32) == {}


def test_rules_say_what_they_promise() -> None:
    assert [rule.tier for rule in TIER_RULES] == ["lossless", "high", "balanced", "fast"]
    assert "interval includes zero and a loss (1 - SSIM to dense) of at most 0.05" in TIER_RULES[0].text(0.05)
    assert "at most 0.07," in TIER_RULES[3].text(0.07) and "95 % interval on held-out" in TIER_RULES[3].text(0.07)
    alone = [rule.text(0.12, scored=False) for rule in TIER_RULES]
    assert not any("score" in text for text in alone)
    assert [text.split("at most ")[1].split(",")[0] for text in alone] == ["0.05", "0.1", "0.12", "0.12"]
