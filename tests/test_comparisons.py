"""Comparisons beside the next generation: what they return, when, and what they raise."""

import threading

import pytest
import torch

from autoprune.search.comparisons import Comparisons

CPU = torch.device("cpu")


def comparing(compare, *, beside: bool) -> Comparisons:  # noqa: ANN001
    return Comparisons(compare, device=CPU, beside=beside)


@pytest.mark.parametrize("beside", [False, True])
def test_results_come_in_the_order_they_were_added(beside: bool) -> None:
    with comparing(lambda images, batch: float(images.sum()) + batch, beside=beside) as comparisons:
        for number in range(5):
            comparisons.add(torch.full((2,), number), 10 * number)
        assert comparisons.results() == [0.0, 12.0, 24.0, 36.0, 48.0] and not comparisons.busy


def test_beside_means_that_adding_does_not_wait_and_busy_says_so() -> None:
    go = threading.Event()
    with comparing(lambda images, batch: go.wait(10), beside=True) as comparisons:
        comparisons.add(torch.zeros(1), 0)
        assert comparisons.busy
        go.set()
        assert comparisons.results() == [True] and not comparisons.busy


@pytest.mark.parametrize("beside", [False, True])
def test_what_a_comparison_raises_reaches_the_caller(beside: bool) -> None:
    def broken(images: torch.Tensor, batch: int) -> int:
        raise ArithmeticError("no score")

    with pytest.raises(ArithmeticError, match="no score"), comparing(broken, beside=beside) as comparisons:
        comparisons.add(torch.zeros(1), 0)
        comparisons.results()


def test_ctrl_c_waits_for_the_comparison_at_hand_only() -> None:
    begun, go, seen = threading.Event(), threading.Event(), []

    def slow(images: torch.Tensor, batch: int) -> None:
        begun.set()
        go.wait(10)
        seen.append(batch)

    with pytest.raises(KeyboardInterrupt), comparing(slow, beside=True) as comparisons:
        for number in range(3):
            comparisons.add(torch.zeros(1), number)
        begun.wait(10)
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt
    assert seen == [0]
