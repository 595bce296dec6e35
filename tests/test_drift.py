"""Drift of the dense runs in one measurement, on a machine whose clock and slowness are written down."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from autoprune.measure.drift import MOST_REPEATS, UNSTEADY, drift_of, steadiest
from autoprune.measure.latency import LatencyTable, Timing, interleaved
from autoprune.search.tally import DENSE, Tally

CPU = torch.device("cpu")


class Machine:
    """Its seconds pass only while it works, and `slowness(now)` is how much longer than it should."""

    def __init__(self, slowness: Callable[[float], float]) -> None:
        self.now, self._slowness = 0.0, slowness

    def work(self, seconds: float) -> None:
        self.now += seconds * self._slowness(self.now)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], float]], Machine]:
    def made(slowness: Callable[[float], float]) -> Machine:
        found = Machine(slowness)
        monkeypatch.setattr(time, "perf_counter", lambda: found.now)
        return found

    return made


def measured(machine: Machine, *, expected: float | None = None):  # noqa: ANN201
    """Times dense (2 s) and a policy (1 s) over five rounds, 15 s on a quiet machine."""

    def measure() -> dict[str, Timing]:
        runs = {DENSE: lambda: machine.work(2.0), "policy": lambda: machine.work(1.0)}
        return interleaved(runs, rounds=5, warm_up=0, device=CPU)

    return steadiest(measure, dense=DENSE, expected=expected)


def test_a_quiet_machine_is_measured_once(machine) -> None:  # noqa: ANN001
    quiet = machine(lambda now: 1.0)
    timings, drift = measured(quiet, expected=2.0)
    assert quiet.now == 15 and timings[DENSE].median == 2 and timings["policy"].median == 1
    assert drift.steady and drift.fields == {"drift": 0.0, "repeats": 0}


def test_a_machine_that_slows_down_midway_is_measured_again_and_the_steady_time_kept(machine) -> None:  # noqa: ANN001
    heating = machine(lambda now: 1.0 if now < 8 else 1.3)
    timings, drift = measured(heating)
    assert timings[DENSE].samples == pytest.approx([2.6] * 5) and timings["policy"].median == pytest.approx(1.3)
    assert drift.repeats == 1 and drift.steady


def test_load_that_passes_is_waited_for(machine) -> None:  # noqa: ANN001
    busy = machine(lambda now: 1.4 if now < 20 else 1.0)
    timings, drift = measured(busy, expected=2.0)
    assert timings[DENSE].samples == pytest.approx([2.0] * 5) and drift.shift == pytest.approx(0) and drift.repeats == 1


def test_a_machine_that_never_settles_is_measured_three_times_and_the_steadiest_told(machine) -> None:  # noqa: ANN001
    swinging = machine(lambda now: 1 + 0.5 * np.exp(-now / 20) * (1 + np.sin(3 * now)) + 0.02 * now)
    timings, drift = measured(swinging)
    again = machine(lambda now: 1 + 0.5 * np.exp(-now / 20) * (1 + np.sin(3 * now)) + 0.02 * now)
    alone = []
    for _ in range(MOST_REPEATS + 1):
        runs = {DENSE: lambda: again.work(2.0), "policy": lambda: again.work(1.0)}
        alone.append(interleaved(runs, rounds=5, warm_up=0, device=CPU))
    worst = [drift_of(each[DENSE].samples).worst for each in alone]
    assert min(worst) > 1 and drift.repeats == MOST_REPEATS and not drift.steady
    assert timings == alone[int(np.argmin(worst))] and drift.fields["drift"] > UNSTEADY


def test_a_lasting_shift_from_what_the_study_saw_is_unsteady_and_a_small_one_is_not() -> None:
    assert not drift_of([2.4] * 5, expected=2.0).steady and not drift_of([1.6] * 5, expected=2.0).steady
    assert drift_of([2.2] * 5, expected=2.0).steady and drift_of([2.4] * 5).steady


def test_the_trend_is_that_of_a_line_and_one_slow_round_does_not_move_it() -> None:
    line = [1.0 + 0.01 * place for place in range(9)]
    assert drift_of(line).trend == pytest.approx(0.08 / 1.04)
    assert drift_of([*line[:4], 9.0, *line[5:]]).trend == pytest.approx(drift_of(line).trend, rel=0.3)
    falling = drift_of(line[::-1])
    assert falling.trend == pytest.approx(-0.08 / 1.04) and not falling.steady
    assert drift_of([1.0]).steady and drift_of([1.0]).fields == {"drift": 0.0, "repeats": 0}


def test_noise_as_on_a_quiet_machine_is_seldom_measured_again() -> None:
    """Half the interquartile range of a normal is 0.674 deviations: 2 % of it, as in the published runs, is noise of 3 %."""
    rng = np.random.default_rng(0)
    ten = [drift_of(rng.normal(1.0, 0.02 / 0.674, 10)).steady for _ in range(400)]
    assert 0.6 < np.mean(ten) < 1


def test_rounds_of_a_validation_are_timed_again_while_dense_drifts() -> None:
    tally, seconds = Tally(["p"]), iter([1.0, 1.2, 1.4, 1.6] + [1.5, 1.51, 1.5, 1.51] + [9.0])
    turns = []
    for turn in tally.turns(4):
        turns.append(turn)
        dense = next(seconds)
        tally.add({DENSE: dense, "p": dense / 2})
    assert turns == list(range(8)) and tally.seconds == {DENSE: [1.5, 1.51, 1.5, 1.51], "p": [0.75, 0.755, 0.75, 0.755]}
    assert tally.drift.repeats == 1 and tally.drift.steady


def test_what_time_cut_short_counts_only_where_there_is_nothing_else() -> None:
    tally, seconds = Tally(["p"]), [1.0, 1.2, 1.4, 1.6, 1.5]
    for turn in tally.turns(4):
        tally.add({DENSE: seconds[turn], "p": 0.5})
        if turn == 4:
            break
    assert tally.seconds[DENSE] == [1.0, 1.2, 1.4, 1.6] and tally.drift.repeats == 0 and not tally.drift.steady
    short = Tally(["p"])
    for turn in short.turns(4):
        short.add({DENSE: 1.0, "p": 0.5})
        if turn == 1:
            break
    assert short.seconds == {DENSE: [1.0, 1.0], "p": [0.5, 0.5]} and short.drift.fields == {"drift": 0.0, "repeats": 0}


def dense_runs(*slowness: float, shares: tuple[float, ...] = (0.1, 0.3, 0.6)) -> list[list[tuple[str, float]]]:
    return [[(f"scale{place}", slow * share) for place, share in enumerate(shares)] for slow in slowness]


def test_a_saved_table_goes_on_on_a_slower_machine_and_not_where_scales_take_other_shares() -> None:
    table = LatencyTable.begun(dense_runs(1.0, 1.1, 0.9))
    table.add([("pruned", 0.2)], slowness=1.0)
    assert table.reference == pytest.approx(1.0)
    slower = LatencyTable.begun(dense_runs(1.6, 1.7), saved=LatencyTable.from_plain(table.to_plain()))
    assert slower.reference == table.reference and slower.total(["pruned"]) == table.total(["pruned"])
    assert slower.total(["scale0", "scale2"])[0] == pytest.approx(0.7)
    other = LatencyTable.begun(dense_runs(1.0, 1.0, shares=(0.4, 0.3, 0.3)), saved=LatencyTable.from_plain(table.to_plain()))
    assert other.total(["pruned"]) is None and other.total(["scale0"])[0] == pytest.approx(0.4)
