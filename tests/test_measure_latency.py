"""Timing helpers and the latency table, on functions whose time is known and on a real generation."""

import mmap
import time

import pytest
import torch

from autoprune.backbones import load_backbone
from autoprune.generation import generate
from autoprune.measure.latency import REST, LatencyTable, ScaleClock, Timing, interleaved, scale_key, timed
from autoprune.measure.memory import PeakMemory
from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.pruning.plan import compile_plan

CPU = torch.device("cpu")


class FakeClock:
    """What a ScaleClock holds after a generation."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds


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


def test_the_table_sums_medians_and_divides_out_what_slowed_dense() -> None:
    keys = [scale_key(scale) for scale in plan_of().scales]
    table = LatencyTable(reference=1.0)
    assert table.estimate(plan_of()) is None
    for slow in (1.0, 2.0, 1.5):
        clock = FakeClock({key: slow * seconds for key, seconds in zip(keys, (0.1, 0.2, 0.4), strict=True)})
        table.add(clock, total=1.0 * slow, slowness=slow)
    latency, spread = table.estimate(plan_of())
    assert latency == pytest.approx(1.0) and spread == pytest.approx(0.0, abs=1e-9)
    assert table.estimate(plan_of(skip_last=1))[0] == pytest.approx(0.6)
    assert table.estimate(plan_of(scales={2: ScalePruning(0.5, 1)})) is None
    again = LatencyTable.from_plain(table.to_plain())
    assert again.estimate(plan_of()) == table.estimate(plan_of()) and REST in again.to_plain()["samples"]


def test_known_scales_say_how_slow_the_machine_is() -> None:
    keys = [scale_key(scale) for scale in plan_of().scales]
    table = LatencyTable(reference=1.0)
    times = dict(zip(keys, (0.1, 0.2, 0.4), strict=True))
    assert table.slowness(FakeClock(times), total=1.0) is None, "an empty table knows nothing"
    for _ in range(2):
        table.add(FakeClock(times), total=1.0, slowness=1.0)
    fresh = FakeClock({keys[0]: 0.2, keys[1]: 0.4, "unknown": 5.0})
    assert table.slowness(fresh, total=6.2) is None, "0.2, 0.4 and the rest 0.6 are less than 30 % of the run"
    fresh = FakeClock({keys[0]: 0.2, keys[1]: 0.4, "unknown": 0.8})
    assert table.slowness(fresh, total=2.0) == pytest.approx(2.0)


def test_the_clock_stamps_every_scale_that_runs() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backbone = load_backbone("tiny", weights="random")
    policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), scales={5: ScalePruning(0.5, 4)}, skip_last=1)
    clock = ScaleClock(CPU)
    _, total = timed(lambda: generate(backbone, ["a red circle"], policy=policy, observer=clock), CPU)
    torch.set_num_threads(threads)
    plan = compile_plan(policy, policy.scale_schedule, policy.depth)
    assert list(clock.seconds) == [scale_key(scale) for scale in plan.scales]
    assert all(seconds > 0 for seconds in clock.seconds.values()) and sum(clock.seconds.values()) < total


def test_peak_memory_sees_what_was_allocated_inside() -> None:
    with PeakMemory(CPU) as idle:
        pass
    with PeakMemory(CPU) as busy, mmap.mmap(-1, 64 * 2**20) as fresh:  # malloc might hand out memory that already counts
        fresh.write(b"1" * len(fresh))
    assert busy.megabytes >= idle.megabytes + 40
