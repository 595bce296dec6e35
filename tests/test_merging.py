"""Token merging against a loop over tokens in float64."""

import numpy as np
import pytest
import torch

from autoprune.pruning.merging import match, merge_mean

Grid = tuple[int, int, int]
CASES = [
    ((1, 4, 4), 2, 4),
    ((1, 4, 4), 2, 9),
    ((1, 4, 4), 2, 16),
    ((1, 5, 7), 2, 12),
    ((1, 5, 7), 3, 20),
    ((1, 3, 8), 4, 2),
    ((2, 4, 3), 2, 8),
    ((3, 2, 5), 2, 20),
    ((1, 1, 1), 2, 1),
    ((1, 1, 6), 3, 4),
]


def tokens(grid: Grid, rows: int = 2, width: int = 6) -> torch.Tensor:
    return torch.randn(rows, grid[0] * grid[1] * grid[2], width, generator=torch.Generator().manual_seed(1))


def naive_match(x: np.ndarray, grid: Grid, cell: int, count: int) -> tuple[list[int], list[int]]:
    """Returns the raster positions that stay and, for every token, the raster position it ends up in."""
    places = [(f, y, c) for f in range(grid[0]) for y in range(grid[1]) for c in range(grid[2])]
    destinations = [i for i, (_, y, c) in enumerate(places) if y % cell == 0 and c % cell == 0]
    sources = [i for i in range(len(places)) if i not in destinations]
    best = {}
    for i in sources:
        cosines = [x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in destinations]
        best[i] = (max(cosines), destinations[int(np.argmax(cosines))])
    merged = sorted(sources, key=lambda i: -best[i][0])[: len(places) - count]
    owner = [best[i][1] if i in merged else i for i in range(len(places))]
    return [i for i in sources if i not in merged] + destinations, owner


@pytest.mark.parametrize(("grid", "cell", "count"), CASES)
def test_matching_equals_a_naive_loop(grid: Grid, cell: int, count: int) -> None:
    x = tokens(grid)
    merge = match(x, grid, cell=cell, count=count)
    assert merge.kept.shape == (2, count)
    for row in range(2):
        kept, owner = naive_match(x[row].double().numpy(), grid, cell, count)
        assert merge.kept[row].tolist() == kept
        assert merge.kept[row][merge.target[row]].tolist() == owner


@pytest.mark.parametrize(("grid", "cell", "count"), CASES)
def test_means_include_the_destination(grid: Grid, cell: int, count: int) -> None:
    x = tokens(grid)
    ours = merge_mean(x, match(x, grid, cell=cell, count=count))
    for row in range(2):
        values = x[row].double().numpy()
        kept, owner = naive_match(values, grid, cell, count)
        expected = [np.mean([values[i] for i in range(len(values)) if owner[i] == place], axis=0) for place in kept]
        np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_nothing_and_restoring_is_the_identity(dtype: torch.dtype) -> None:
    x = tokens((1, 6, 4)).to(dtype)
    merge = match(x, (1, 6, 4), cell=2, count=24)
    restored = merge_mean(x, merge).gather(1, merge.target[..., None].expand_as(x))
    assert torch.equal(restored, x)


def test_kept_tokens_target_themselves() -> None:
    merge = match(tokens((1, 8, 8)), (1, 8, 8), cell=2, count=30)
    assert torch.equal(merge.target.gather(1, merge.kept), torch.arange(30).expand(2, -1))
    assert all(len(set(row)) == 30 for row in merge.kept.tolist())


def test_equal_tokens_merge_in_raster_order_into_the_first_destination() -> None:
    merge = match(torch.ones(1, 16, 3), (1, 4, 4), cell=2, count=13)
    assert merge.kept.tolist() == [[5, 6, 7, 9, 11, 12, 13, 14, 15, 0, 2, 8, 10]]
    assert merge.kept[0][merge.target[0]].tolist() == [0, 0, 2, 0, 0, *range(5, 16)]


def test_zero_tokens_and_low_precision_give_finite_means() -> None:
    x = tokens((1, 4, 4)).bfloat16()
    x[:, 3:7] = 0
    merge = match(x, (1, 4, 4), cell=2, count=6)
    mean = merge_mean(x, merge)
    assert mean.dtype == torch.bfloat16
    assert mean.isfinite().all()


def test_rows_do_not_influence_each_other() -> None:
    x = tokens((1, 6, 6), rows=3)
    both, alone = match(x, (1, 6, 6), cell=2, count=15), match(x[1:2], (1, 6, 6), cell=2, count=15)
    assert torch.equal(both.kept[1:2], alone.kept)
    assert torch.equal(merge_mean(x, both)[1:2], merge_mean(x[1:2], alone))
