"""The key budget against loops over queries and keys."""

import math

import numpy as np
import pytest
import torch

from autoprune.pruning.key_budget import importance, select_keys, window_positions


def inputs(keys: int = 11, window: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, count, 4, generator=generator) for count in (window, keys))
    return q.to(dtype), k.to(dtype)


def naive_importance(q: torch.Tensor, k: torch.Tensor, scale: float) -> np.ndarray:
    result = np.zeros((*k.shape[:2], k.shape[2]))
    for row in range(k.shape[0]):
        for head in range(k.shape[1]):
            total = np.zeros(k.shape[2])
            for query in q[row, head].double().numpy():
                weights = [math.exp(scale * float(query @ key)) for key in k[row, head].double().numpy()]
                total += np.array(weights) / sum(weights)
            for i in range(len(total)):
                result[row, head, i] = max(total[max(0, i - 2) : i + 3])
    return result


@pytest.mark.parametrize(("keys", "window", "scale"), [(11, 3, 1.0), (1, 1, 0.5), (3, 16, 0.125)])
def test_importance_equals_a_naive_loop(keys: int, window: int, scale: float) -> None:
    q, k = inputs(keys, window)
    np.testing.assert_allclose(importance(q, k, scale=scale), naive_importance(q, k, scale), rtol=1e-4)


def test_importance_of_low_precision_keys_is_float32() -> None:
    q, k = inputs(dtype=torch.bfloat16)
    ours = importance(q, k, scale=1.0)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours, naive_importance(q, k, 1.0), rtol=0.05)


@pytest.mark.parametrize("count", [2, 5, 11])
def test_selected_keys_are_the_most_important_beside_those_that_always_stay(count: int) -> None:
    score, always = importance(*inputs(), scale=1.0), torch.tensor([9, 4])
    ours = select_keys(score, count, always=always)
    for row in range(2):
        for head in range(3):
            rest = [i for i in range(11) if i not in (4, 9)]
            best = sorted(rest, key=lambda i: (-float(score[row, head, i]), i))[: count - 2]
            assert ours[row, head].tolist() == sorted([4, 9, *best])


def test_of_equally_important_keys_the_older_stay() -> None:
    score = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 1.0, 1.0]]])
    assert select_keys(score, 2).tolist() == [[[1, 2]]]
    assert select_keys(score, 4).tolist() == [[[0, 1, 2, 3]]]


def test_selecting_does_not_change_the_scores() -> None:
    score = importance(*inputs(), scale=1.0)
    copy = score.clone()
    select_keys(score, 3, always=torch.tensor([0]))
    assert torch.equal(score, copy)


def test_window_is_the_centres_of_a_partition() -> None:
    centres = [8, 24, 40, 56]
    assert window_positions((1, 64, 64), 16).tolist() == [64 * y + x for y in centres for x in centres]
    assert window_positions((1, 40, 20), 4).tolist() == [10 * 20 + 5, 10 * 20 + 15, 30 * 20 + 5, 30 * 20 + 15]
    assert window_positions((1, 9, 7), 1).tolist() == [4 * 7 + 3]


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 2), (1, 1, 9), (1, 9, 1), (1, 3, 50), (1, 50, 3), (5, 6, 4), (1, 39, 26)])
@pytest.mark.parametrize("window", [1, 2, 3, 7, 12, 16, 64])
def test_window_is_distinct_sorted_and_inside_one_frame(grid: tuple[int, int, int], window: int) -> None:
    ours = window_positions(grid, window).tolist()
    size = grid[1] * grid[2]
    assert ours == sorted(set(ours))
    assert {place // size for place in ours} == {grid[0] // 2}
    assert 1 <= len(ours) <= window
    assert len(ours) >= min(size, window) / 2
