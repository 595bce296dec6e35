"""Nearest kept tokens and nearest anchors against loops over all pairs of positions."""

import itertools

import numpy as np
import pytest
import torch

from autoprune.pruning.restorers import cached, nearest_anchor, nearest_kept
from autoprune.pruning.selection import anchor_index

Grid = tuple[int, int, int]


def places(grid: Grid) -> list[tuple[int, int, int]]:
    return list(itertools.product(*(range(side) for side in grid)))


def squared(a: tuple[int, int, int], b: tuple[int, int, int]) -> int:
    return sum((i - j) ** 2 for i, j in zip(a, b, strict=True))


def drawn(grid: Grid, count: int, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.stack([torch.randperm(len(places(grid)), generator=generator)[:count] for _ in range(rows)])


def naive_nearest(kept: list[int], grid: Grid) -> list[int]:
    """Returns the raster position of the nearest kept token of every position."""
    where, result = places(grid), []
    for place in where:
        same = [i for i in kept if where[i][0] == place[0]] or kept
        result.append(min(same, key=lambda i: (squared(place, where[i]), i)))
    return result


@pytest.mark.parametrize(
    ("grid", "count"),
    [
        ((1, 6, 6), 1),
        ((1, 6, 6), 9),
        ((1, 6, 6), 36),
        ((1, 9, 4), 5),
        ((1, 3, 11), 4),
        ((1, 1, 1), 1),
        ((1, 1, 8), 2),
        ((3, 4, 5), 1),
        ((3, 4, 5), 4),
        ((4, 3, 3), 30),
        ((6, 2, 5), 3),
    ],
)
def test_nearest_kept_equals_a_naive_loop(grid: Grid, count: int) -> None:
    kept = drawn(grid, count)
    ours = nearest_kept(kept, grid)
    for row in range(len(kept)):
        assert kept[row][ours[row]].tolist() == naive_nearest(kept[row].tolist(), grid)


def test_kept_positions_find_themselves() -> None:
    kept = drawn((1, 20, 14), 60)
    index = nearest_kept(kept, (1, 20, 14))
    assert torch.equal(index.gather(1, kept), torch.arange(60).expand(3, -1))


def test_on_a_checkerboard_every_removed_token_has_a_kept_neighbour() -> None:
    where = places((1, 8, 8))
    kept = [i for i, (_, y, x) in enumerate(where) if (y + x) % 2 == 0]
    index = nearest_kept(torch.tensor([kept]), (1, 8, 8))[0]
    assert {squared(where[i], where[kept[j]]) for i, j in enumerate(index.tolist())} == {0, 1}


def test_nearest_kept_is_exact_at_the_largest_scale() -> None:
    kept = drawn((1, 64, 64), 1024, rows=2)
    ours = kept.gather(1, nearest_kept(kept, (1, 64, 64)))
    y, x = np.divmod(np.arange(4096), 64)
    for row in range(2):
        ordered = np.sort(kept[row].numpy())
        distance = (y[:, None] - ordered // 64) ** 2 + (x[:, None] - ordered % 64) ** 2
        np.testing.assert_array_equal(ours[row], ordered[distance.argmin(1)])


def naive_anchors(grid: Grid, stride: int) -> list[int]:
    where = places(grid)
    on = [{*range(0, side, stride), side - 1} for side in grid[1:]]
    return [i for i, (_, y, x) in enumerate(where) if y in on[0] and x in on[1]]


def naive_anchor(logits: np.ndarray, logits_grid: Grid, grid: Grid, stride: int) -> tuple[list[int], list[float]]:
    where, columns = places(grid), places(logits_grid)
    source = [columns.index(tuple(p * o // n for p, o, n in zip(q, logits_grid, grid, strict=True))) for q in where]
    anchors, index, cosines = naive_anchors(grid, stride), [], []
    for i, place in enumerate(where):
        frame = [a for a in anchors if where[a][0] == place[0]]
        near = sorted(frame, key=lambda a: (squared(place, where[a]), a))[:4]
        a = logits[source[i]]
        values = []
        for j in near:
            b = logits[source[j]]
            values.append(round(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 9))
        best = 0 if i in anchors else int(np.argmax(values))
        index.append(near[best])
        cosines.append(1.0 if i in anchors else values[best])
    return index, cosines


@pytest.mark.parametrize(
    ("logits_grid", "grid", "stride"),
    [
        ((1, 4, 4), (1, 6, 6), 4),
        ((1, 6, 6), (1, 8, 8), 3),
        ((1, 3, 5), (1, 5, 9), 2),
        ((1, 5, 4), (1, 11, 7), 4),
        ((1, 1, 1), (1, 2, 2), 4),
        ((1, 1, 1), (1, 1, 1), 4),
        ((1, 2, 2), (1, 1, 6), 2),
        ((2, 3, 3), (3, 5, 4), 3),
    ],
)
def test_nearest_anchor_equals_a_naive_loop(logits_grid: Grid, grid: Grid, stride: int) -> None:
    logits = torch.randn(2, len(places(logits_grid)), 6, generator=torch.Generator().manual_seed(2))
    index, cosine = nearest_anchor(logits, logits_grid, grid, stride)
    for row in range(2):
        expected, values = naive_anchor(logits[row].double().numpy(), logits_grid, grid, stride)
        assert index[row].tolist() == expected
        np.testing.assert_allclose(cosine[row], values, rtol=0, atol=1e-5)


def test_anchors_find_themselves_with_cosine_one_even_where_logits_are_zero() -> None:
    anchors = anchor_index((1, 10, 7), 4)
    index, cosine = nearest_anchor(torch.zeros(1, 12, 5, 2), (1, 4, 3), (1, 10, 7), 4)
    assert torch.equal(index[0, anchors], anchors)
    assert (cosine[0, anchors] == 1).all()
    others = torch.ones(70, dtype=torch.bool).index_fill(0, anchors, False)
    assert (cosine[0, others] == 0).all()


def test_anchors_find_themselves_among_others_of_the_same_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(64, generator=generator) * torch.rand(1, 100, 1, generator=generator)
    anchors = anchor_index((1, 10, 10), 3)
    index, _ = nearest_anchor(logits, (1, 10, 10), (1, 10, 10), 3)
    assert torch.equal(index[0, anchors], anchors)


@pytest.mark.parametrize(("old", "new"), [(1, 4), (24, 32), (32, 40), (40, 48), (48, 64), (26, 32), (37, 45)])
def test_upsampling_takes_the_positions_of_nearest_interpolation(old: int, new: int) -> None:
    numbers = torch.arange(old * old, dtype=torch.float32).view(1, 1, old, old)
    expected = torch.nn.functional.interpolate(numbers, size=(new, new), mode="nearest").flatten().long()
    anchors = naive_anchors((1, new, new), new)
    logits = torch.eye(old * old)[None]
    _, cosine = nearest_anchor(logits, (1, old, old), (1, new, new), new)
    same = torch.stack([expected == expected[anchor] for anchor in anchors]).any(dim=0)
    torch.testing.assert_close(cosine[0], same.float())


@pytest.mark.parametrize(("interpolation", "mode"), [("area", "area"), ("nearest", "nearest"), ("bilinear", "trilinear")])
@pytest.mark.parametrize(("grid", "target"), [((4, 3, 5), (4, 6, 7)), ((1, 3, 5), (4, 6, 7)), ((6, 4, 4), (4, 5, 3))])
def test_videos_are_resized_in_three_dimensions(interpolation: str, mode: str, grid: Grid, target: Grid) -> None:
    cache = torch.randn(2, len(places(grid)), 3, generator=torch.Generator().manual_seed(0))
    options = {"align_corners": False} if mode == "trilinear" else {}
    volume = cache.view(2, *grid, 3).permute(0, 4, 1, 2, 3)
    expected = torch.nn.functional.interpolate(volume, size=target, mode=mode, **options).permute(0, 2, 3, 4, 1)
    ours = cached(cache, grid, target=target, interpolation=interpolation)
    torch.testing.assert_close(ours, expected.reshape(2, -1, 3))


def test_frames_are_resized_apart_where_there_are_as_many() -> None:
    cache = torch.randn(2, 3 * 20, 5, generator=torch.Generator().manual_seed(1))
    whole = cached(cache, (3, 4, 5), target=(3, 7, 8), interpolation="bicubic").view(2, 3, 56, 5)
    for frame in range(3):
        alone = cached(cache.view(2, 3, 20, 5)[:, frame], (1, 4, 5), target=(1, 7, 8), interpolation="bicubic")
        torch.testing.assert_close(whole[:, frame], alone)
