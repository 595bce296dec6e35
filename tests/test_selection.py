"""Selection against numpy and scipy, and against the probabilities of drawing without replacement."""

import numpy as np
import pytest
import torch
from scipy import stats

from autoprune import rules
from autoprune.pruning.selection import anchor_index, combined, draw, normalised, threshold_count, top

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def scores(rows: int = 3, count: int = 35, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(0)).to(dtype) * 3 - 1


def naive_normalised(row: np.ndarray, rule: str) -> np.ndarray:
    if rule == "zscore":
        return (row - row.mean()) / row.std()
    if rule == "minmax":
        return (row - row.min()) / (row.max() - row.min())
    return (stats.rankdata(row) - 1) / (len(row) - 1) if rule == "rank" else row


@DTYPES
@pytest.mark.parametrize("rule", rules.NORMALISATIONS)
def test_normalised_equals_numpy_row_by_row(rule: str, dtype: torch.dtype) -> None:
    score = scores(dtype=dtype)
    score[1, 4:9] = score[1, 20]
    ours = normalised(score, rule)
    assert ours.dtype == torch.float32
    expected = [naive_normalised(row, rule) for row in score.double().numpy()]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", rules.NORMALISATIONS)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 3e9])
@pytest.mark.parametrize("count", [1, 9])
def test_equal_scores_stay_finite_and_equal(rule: str, value: float, count: int) -> None:
    ours = normalised(torch.full((2, count), value), rule)
    assert ours.isfinite().all() and (ours == ours[0, 0]).all()


@pytest.mark.parametrize("rule", rules.NORMALISATIONS)
def test_combined_is_the_weighted_sum(rule: str) -> None:
    one, other = scores(), scores().flip(0, 1).square() * 1000
    pairs = zip(one.double().numpy(), other.double().numpy(), strict=True)
    expected = [0.5 * naive_normalised(a, rule) + 2 * naive_normalised(b, rule) for a, b in pairs]
    np.testing.assert_allclose(combined([one, other], [0.5, 2.0], rule), expected, rtol=1e-4, atol=1e-5)


def test_one_score_of_weight_one_is_left_alone() -> None:
    assert torch.equal(combined([scores()], [1.0], "none"), scores())


def naive_anchors(grid: tuple[int, int, int], stride: int) -> list[int]:
    frames, height, width = grid
    rows, columns = (sorted({*range(0, side, stride), side - 1}) for side in (height, width))
    return [(t * height + y) * width + x for t in range(frames) for y in rows for x in columns]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 8, 8), (1, 9, 9), (1, 39, 26), (3, 5, 7), (1, 1, 6), (1, 2, 2)])
def test_anchors_are_every_stride_and_the_last_of_each_axis(grid: tuple[int, int, int], stride: int) -> None:
    assert anchor_index(grid, stride).tolist() == naive_anchors(grid, stride)


@pytest.mark.parametrize(("side", "count"), [(40, 121), (48, 169), (64, 289)])
def test_anchors_are_as_many_as_published(side: int, count: int) -> None:
    index = anchor_index((1, side, side), 4)
    assert len(index) == count and index.dtype == torch.int64


@DTYPES
@pytest.mark.parametrize("count", [1, 12, 35])
def test_top_is_the_best_first(count: int, dtype: torch.dtype) -> None:
    score = scores(dtype=dtype) if dtype == torch.float32 else torch.randperm(35).expand(3, -1).to(dtype)
    expected = np.argsort(-score.double().numpy(), axis=1)[:, :count]
    np.testing.assert_array_equal(top(score, count), expected)


@pytest.mark.parametrize("always", [None, torch.tensor([0, 7, 34]), torch.arange(12)])
@pytest.mark.parametrize("value", [0.0, 1.0, -torch.inf])
def test_ties_are_distinct_and_exactly_as_many(always: torch.Tensor | None, value: float) -> None:
    for kept in top(torch.full((3, 35), value), 12, always):
        assert len(kept) == 12 and len(kept.unique()) == 12


@DTYPES
@pytest.mark.parametrize("count", [4, 5, 20, 35])
def test_top_keeps_the_anchors_first_then_the_best_others(count: int, dtype: torch.dtype) -> None:
    score, always = scores(dtype=dtype), torch.tensor([0, 4, 30, 34])
    kept = top(score, count, always)
    assert kept.shape == (3, count) and kept.dtype == torch.int64
    for row, index in zip(score.double().numpy(), kept.numpy(), strict=True):
        assert index[:4].tolist() == always.tolist()
        assert len(set(index)) == count
        others = np.delete(row, always.numpy())
        np.testing.assert_array_equal(row[index[4:]], np.sort(others)[::-1][: count - 4])


def uniform(rows: int, count: int) -> torch.Tensor:
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(1))


def test_draws_follow_the_probabilities_without_replacement() -> None:
    rows, score = 20_000, torch.tensor([0.5, 1.0, 2.0, 2.0, 4.5])
    drawn = draw(score.expand(rows, -1), 2, uniform(rows, 5)).numpy()
    p = (score / score.sum()).double().numpy()
    for first in range(5):
        for second in range(5):
            expected = 0 if first == second else p[first] * p[second] / (1 - p[first])
            found = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).mean()
            assert abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows)


@DTYPES
def test_zero_scores_are_drawn_last_and_alike(dtype: torch.dtype) -> None:
    rows, score = 8_000, torch.tensor([0.0, 1e-38, 0.0, 1e30, 0.0, 5.0, -1.0])
    drawn = draw(score.expand(rows, -1).to(dtype), 7, uniform(rows, 7))
    assert (drawn[:, :3].sort(dim=1).values == torch.tensor([1, 3, 5])).all()
    found = np.bincount(drawn[:, 3], minlength=7)[[0, 2, 4, 6]] / rows
    np.testing.assert_allclose(found, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / rows))


@pytest.mark.parametrize("score", [torch.zeros(2, 9), torch.ones(2, 9), torch.full((2, 9), 3e38)])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("count", [1, 5, 9])
def test_draws_are_distinct_and_exactly_as_many(score: torch.Tensor, noise: float, count: int) -> None:
    drawn = draw(score, count, torch.full((2, 9), noise))
    assert drawn.shape == (2, count) and drawn.dtype == torch.int64
    assert all(len(row.unique()) == count for row in drawn)


def test_draws_depend_on_each_row_alone() -> None:
    score, noise = scores().abs(), uniform(3, 35)
    assert torch.equal(draw(score, 9, noise)[1:2], draw(score[1:2], 9, noise[1:2]))


@DTYPES
@pytest.mark.parametrize("of", rules.THRESHOLDS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_threshold_counts_equal_a_naive_loop(threshold: float, of: str, dtype: torch.dtype) -> None:
    score = scores(dtype=dtype).abs() * torch.tensor([[1.0], [5.0], [0.1]], dtype=dtype)
    expected = []
    for row in score.float().numpy():
        limit = np.float32(threshold) * (row.max() if of == "maximum" else np.float32(1))
        expected.append(min(max(sum(value > limit for value in row), 4), 20))
    counts = threshold_count(score, threshold=threshold, of=of, least=4, most=20)
    assert counts.tolist() == expected and not counts.is_floating_point()


def test_a_row_of_zeros_keeps_the_least() -> None:
    assert threshold_count(torch.zeros(2, 9), threshold=0.0, of="maximum", least=2, most=9).tolist() == [2, 2]


def test_nothing_is_read_on_the_host() -> None:
    score = scores().to("meta")
    with torch.device("meta"):
        always = anchor_index((1, 5, 7), 4)
    assert all(normalised(score, rule).is_meta for rule in rules.NORMALISATIONS)
    assert top(score, 9, always).shape == draw(score, 9, score).shape == (3, 9)
    assert threshold_count(score, threshold=0.5, of="maximum", least=1, most=9).shape == (3,)
