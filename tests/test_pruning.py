"""Plan and sandwich against naive loops and known values."""

import torch

from autoprune.backbones.schedules import scale_schedule
from autoprune.policy import Policy, token_count
from autoprune.pruning.plan import compile_plan, site
from autoprune.pruning.sandwich import Sandwich
from autoprune.rules import BranchRule, ScalePruning

SCHEDULE = scale_schedule()


def tokens(rows: int = 4, count: int = 16, width: int = 8) -> torch.Tensor:
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(0))


def test_plan_counts_keys_of_every_layer() -> None:
    scales = {
        5: ScalePruning(keep=0.5, cache_scale=4, layers=(2, 3)),
        6: ScalePruning(keep=0.25, cache_scale=4, granularity="scale"),
    }
    plan = compile_plan(Policy("tiny", 6, SCHEDULE, scales=scales), SCHEDULE, 6)
    early = sum(token_count(grid) for grid in SCHEDULE[:5])
    assert plan.key_capacity(0) == early + 144 + 64
    assert plan.key_capacity(2) == early + 72 + 64
    assert (site(2, "ffn"), "cached") in plan.scales[4].stores
    assert not plan.scales[3].stores


def test_plan_leaves_out_skipped_scales_and_drops_branches_for_good() -> None:
    plan = compile_plan(Policy("tiny", 6, SCHEDULE, guidance=BranchRule("cond", 4), skip_last=1), SCHEDULE, 6)
    assert [scale.branch for scale in plan.scales] == ["both"] * 4 + ["cond"] * 2


def test_sandwich_equals_a_naive_token_loop() -> None:
    scales = {6: ScalePruning(keep=0.4, cache_scale=5, interpolation="nearest")}
    plan = compile_plan(Policy("tiny", 6, SCHEDULE, scales=scales), SCHEDULE, 6)
    sandwich, place = Sandwich(seed=0, samples=(0,)), site(1, "ffn")
    earlier, x = tokens(2, 144), tokens(2, 256)
    sandwich.scale = plan.scales[5]
    assert torch.equal(sandwich.add(earlier, lambda y, kept: y * 2, site=place), earlier + earlier * 2)
    sandwich.scale = plan.scales[6]
    ours = sandwich.add(x, lambda y, kept: y.sin(), site=place)
    for row in range(2):
        energy = (x[row] - x[row].mean(0)).square().sum(-1)
        best = set(energy.argsort(descending=True)[: plan.scales[6].kept].tolist())
        for i in range(256):
            cell = (i // 16 * 12 // 16) * 12 + i % 16 * 12 // 16
            expected = x[row, i] + (x[row, i].sin() if i in best else earlier[row, cell] * 2)
            torch.testing.assert_close(ours[row, i], expected)


def test_shared_rows_keep_the_same_tokens_in_both_branches() -> None:
    seen = []
    scales = {6: ScalePruning(keep=0.4, cache_scale=5, rows="shared")}
    plan = compile_plan(Policy("tiny", 6, SCHEDULE, scales=scales), SCHEDULE, 6)
    sandwich = Sandwich(seed=0, samples=(0, 1), on_kept=lambda scale, place, kept: seen.append(kept))
    sandwich.scale = plan.scales[5]
    sandwich.add(tokens(4, 144), lambda y, kept: y, site=0)
    sandwich.scale = plan.scales[6]
    sandwich.add(tokens(4, 256), lambda y, kept: y, site=0)
    assert torch.equal(seen[0][:2], seen[0][2:])
