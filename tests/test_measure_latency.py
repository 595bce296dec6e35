"""Timing helpers and the latency table, on functions whose time is known and on a real generation."""

import mmap
import time

import pytest
import torch

from autoprune.backbones import Backbone, load_backbone
from autoprune.generation import generate
from autoprune.measure.latency import (
    KNOWN_SAMPLES,
    REST,
    LatencyTable,
    ScaleClock,
    Timing,
    interleaved,
    plan_keys,
    scale_key,
    timed,
)
from autoprune.measure.memory import PeakMemory
from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.pruning.plan import Plan, compile_plan

CPU = torch.device("cpu")


def plan_of(**decisions: object):  # noqa: ANN201
    schedule = ((1, 1, 1), (1, 2, 2), (1, 4, 4))
    return compile_plan(Policy("tiny", 6, schedule, **decisions), schedule, 6)


def test_interleaved_runs_alternate_after_the_warm_up() -> None:
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleaved(runs, rounds=3, warm_up=1, device=CPU)
    rounds = ["".join(order[start : start + 3]) for start in range(0, 12, 3)]
    assert sorted(map(sorted, rounds)) == [list("abc")] * 4 and len(set(rounds[1:])) == 3
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_timed_measures_wall_clock_and_returns_the_result() -> None:
    result, seconds = timed(lambda: time.sleep(0.02) or torch.ones(1), CPU)
    assert result.item() == 1 and 0.02 <= seconds < 1


def test_timing_is_median_and_half_the_interquartile_range() -> None:
    assert Timing.of([1.0, 2.0, 3.0, 100.0]).median == 2.5


def test_keys_tell_apart_what_costs_differently_and_share_what_does_not() -> None:
    dense = plan_of().scales
    half = plan_of(scales={2: ScalePruning(0.5, 1)}).scales
    single = plan_of(guidance=BranchRule("cond", 2)).scales
    uncond = plan_of(guidance=BranchRule("uncond", 2)).scales
    assert scale_key(half[0]) == scale_key(dense[0]) and scale_key(single[2]) == scale_key(uncond[2])
    assert len({scale_key(plan[2]) for plan in (dense, half, single)}) == 3
    few = plan_of(scales={2: ScalePruning(0.5, 1, layers=(1, 4))}).scales
    assert scale_key(few[2]) != scale_key(half[2])


def runs_of(plan: Plan, seconds: tuple[float, ...]) -> list[tuple[str, float]]:
    return list(zip(plan_keys(plan), seconds, strict=True))


def test_the_table_sums_medians_and_divides_out_what_slowed_dense() -> None:
    table = LatencyTable(reference=1.0)
    assert table.total(plan_keys(plan_of())) is None
    for slow in (1.0, 2.0, 1.5):
        table.add(runs_of(plan_of(), (slow * 0.1, slow * 0.2, slow * 0.4, slow * 0.3)), slowness=slow)
    latency, spread = table.total(plan_keys(plan_of()))
    assert latency == pytest.approx(1.0) and spread == pytest.approx(0.0, abs=1e-9)
    assert [median for median, _ in table.parts(plan_keys(plan_of()))] == pytest.approx([0.1, 0.2, 0.4, 0.3])
    assert table.total(plan_keys(plan_of(skip_last=1)))[0] == pytest.approx(0.6)
    assert table.total(plan_keys(plan_of(scales={2: ScalePruning(0.5, 1)}))) is None
    again = LatencyTable.from_plain(table.to_plain())
    assert again.total(plan_keys(plan_of())) == (latency, spread) and REST in again.to_plain()["samples"]


def test_known_scales_say_how_slow_the_machine_is() -> None:
    first, second, third, rest = plan_keys(plan_of())
    table = LatencyTable(reference=1.0)
    times = runs_of(plan_of(), (0.1, 0.2, 0.4, 0.3))
    assert table.slowness(times) is None, "an empty table knows nothing"
    for _ in range(KNOWN_SAMPLES):
        assert table.slowness(times) is None
        table.add(times, slowness=1.0)
    fresh = [(first, 0.2), (second, 0.4), ("unknown", 5.0), (rest, 0.6)]
    assert table.slowness(fresh) is None, "0.2, 0.4 and the rest 0.6 are less than 30 % of the run"
    assert table.slowness([(first, 0.2), (second, 0.4), ("unknown", 0.8), (rest, 0.6)]) == pytest.approx(2.0)


def test_one_slow_start_does_not_set_what_a_scale_takes() -> None:
    """On a machine at its usual speed but for the first time that a scale runs."""
    table = LatencyTable(reference=1.0)
    for seconds in (2.0, *[1.0] * 11):
        runs = [("scale7/single", seconds)]
        table.add(runs, slowness=table.slowness(runs) or 1.0)
    assert table.total(["scale7/single"])[0] == pytest.approx(1.0)


@pytest.fixture
def random_backbone():  # noqa: ANN201
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_backbone("tiny", weights="random")
    torch.set_num_threads(threads)


def clocked(backbone: Backbone, prompts: int = 1, **decisions: object) -> tuple[ScaleClock, float, Plan]:
    policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), **decisions)
    clock, texts = ScaleClock(CPU, prompts), ["a red circle"] * prompts
    _, total = timed(lambda: generate(backbone, texts, policy=policy, observer=clock), CPU)
    return clock, total, compile_plan(policy, policy.scale_schedule, policy.depth)


def test_the_clock_stamps_every_scale_that_runs(random_backbone) -> None:  # noqa: ANN001
    clock, total, plan = clocked(random_backbone, scales={5: ScalePruning(0.5, 4)}, skip_last=1)
    assert clock.keys == plan_keys(plan)[:-1]
    assert all(seconds > 0 for _, seconds in clock.runs) and clock.seconds < total


def test_the_clock_names_what_data_decided_as_what_ran(random_backbone) -> None:  # noqa: ANN001
    alone, _, plan = clocked(random_backbone, guidance=BranchRule("cond", 5))
    dropped, _, _ = clocked(random_backbone, guidance=BranchRule("adaptive", 4, threshold=1e9))
    kept, _, _ = clocked(random_backbone, guidance=BranchRule("adaptive", 4, threshold=0.0))
    assert dropped.keys == alone.keys == plan_keys(plan)[:-1] != kept.keys
    at_most = ScalePruning(0.5, granularity="scale", restorer="zero_residual", select="threshold", threshold=1e9, floor=0.1)
    few, _, _ = clocked(random_backbone, scales={6: at_most})
    assert "kept25" in few.keys[-1]


def test_samples_that_go_alone_have_keys_of_their_own(random_backbone) -> None:  # noqa: ANN001
    clock, _, plan = clocked(random_backbone, prompts=2, guidance=BranchRule("adaptive", 4, threshold=0.0), batch="split")
    assert len(clock.runs) == 14 and all("/alone" in key for key in clock.keys)
    assert plan_keys(plan)[-1].endswith("/alone")


def test_peak_memory_sees_what_was_allocated_inside() -> None:
    with PeakMemory(CPU) as idle:
        pass
    with PeakMemory(CPU) as busy, mmap.mmap(-1, 64 * 2**20) as fresh:  # malloc might hand out memory that already counts
        fresh.write(b"1" * len(fresh))
    assert busy.megabytes >= idle.megabytes + 40
