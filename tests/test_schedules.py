"""The scale schedules against the token totals of the official table, and rotary positions against a direct formula."""

import math

import pytest
import torch

from autoprune.backbones.rope import gather_rotation, rotate, rotation
from autoprune.backbones.schedules import ASPECT_RATIOS, PIXEL_BUDGETS, position_frame, scale_schedule
from autoprune.errors import UserError
from autoprune.policy import token_count

TOTALS = {
    1.0: (521, 2521, 6425, 10521),
    1.25: (614, 2814, 6854, 10774),
    1.333: (665, 2657, 7085, 10973),
    1.5: (533, 2759, 6941, 10997),
    1.75: (472, 2628, 7220, 11252),
    2.0: (451, 2681, 7219, 11269),
    2.5: (555, 2555, 6805, 10805),
    3.0: (509, 2588, 7016, 11123),
}


@pytest.mark.parametrize("ratio", TOTALS)
def test_token_totals_of_every_budget(ratio: float) -> None:
    totals = tuple(sum(map(token_count, scale_schedule(ratio, budget))) for budget in PIXEL_BUDGETS)
    assert totals == TOTALS[ratio]


def test_there_are_fifteen_templates_and_transposed_ones_mirror() -> None:
    assert len(ASPECT_RATIOS) == 15
    for ratio in TOTALS:
        mirrored = tuple((1, w, h) for _, h, w in scale_schedule(ratio, "1M"))
        assert scale_schedule(int(1000 / ratio) / 1000, "1M") == mirrored


def test_the_nearest_template_is_taken() -> None:
    assert scale_schedule(0.6) == scale_schedule(0.571)
    assert scale_schedule(9.0) == scale_schedule(3.0)


def test_bad_ratios_and_budgets_are_one_sentence() -> None:
    with pytest.raises(UserError, match="above 0, got -1"):
        scale_schedule(-1)
    with pytest.raises(UserError, match="choose from 0.06M"):
        scale_schedule(1.0, "2M")


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_positions_are_counted_in_the_full_template_at_every_budget(ratio: float) -> None:
    for budget in PIXEL_BUDGETS:
        assert position_frame(scale_schedule(ratio, budget)) == scale_schedule(ratio, "1M")[-1]


def test_rotation_turns_each_pair_by_its_own_angle() -> None:
    grid, frame, width = (1, 4, 6), (1, 64, 90), 16
    factors = rotation(grid, frame, width, torch.device("cpu"), torch.float32)
    x = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, factors)
    for token in (0, 7, 23):
        y_position, x_position = round(token // 6 * 64 / 4), round(token % 6 * 90 / 6)
        for pair in range(8):
            angle = (y_position if pair < 4 else x_position) * 10000 ** (-2 * (pair % 4) / 8)
            a, b = x[token, 2 * pair].item(), x[token, 2 * pair + 1].item()
            expected = (math.cos(angle) * a - math.sin(angle) * b, math.sin(angle) * a + math.cos(angle) * b)
            torch.testing.assert_close(turned[token, 2 * pair : 2 * pair + 2], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_kept_tokens_keep_their_positions() -> None:
    factors = rotation((1, 4, 4), (1, 64, 64), 8, torch.device("cpu"), torch.float32)
    kept = torch.tensor([[3, 0], [9, 15]])
    x = torch.randn(2, 1, 16, 8)
    dense = rotate(x, factors)
    picked = rotate(x.gather(2, kept[:, None, :, None].expand(2, 1, 2, 8)), gather_rotation(factors, kept))
    torch.testing.assert_close(picked, dense.gather(2, kept[:, None, :, None].expand(2, 1, 2, 8)))
