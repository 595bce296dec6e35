"""Every scorer against a float64 loop over tokens, and what each must not see."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune import rules
from autoprune.errors import UserError
from autoprune.pruning import SCORERS
from autoprune.pruning.scorers import ScoreContext
from autoprune.pruning.signals import Signals

GRIDS = [(1, 4, 4), (1, 7, 3), (2, 3, 5), (1, 1, 6)]
LATENT = (9, 10)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def context_of(grid: tuple[int, int, int], *, rows: int = 4, dtype: torch.dtype = torch.float32) -> ScoreContext:
    signals = Signals(
        latents=[normal(2, 6, *LATENT, seed=1).to(dtype), normal(2, 6, *LATENT, seed=2).to(dtype)],
        delta=normal(rows, 12, seed=3).square().to(dtype),
        delta_grid=(1, 3, 4),
        hidden=normal(4, 10, 8, seed=4).to(dtype),
        hidden_grid=(1, 5, 2),
    )
    return ScoreContext(scale=5, grid=grid, site=3, seed=1, samples=(0, 1), signals=signals)


def tokens(grid: tuple[int, int, int], *, rows: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(rows, grid[0] * grid[1] * grid[2], 8).to(dtype)


def places(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    return [(t, y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]


def naive_dc(x: np.ndarray, context: ScoreContext) -> list:
    return [[sum((token - row.mean(0)) ** 2) for token in row] for row in x]


def naive_norm(x: np.ndarray, context: ScoreContext) -> list:
    return [[sum(value * value for value in token) for token in row] for row in x]


def naive_structure(x: np.ndarray, context: ScoreContext) -> list:
    result = []
    for row in x:
        apart = row - row.mean(0)
        v = np.ones(row.shape[1]) / np.sqrt(row.shape[1])
        for _ in range(5):
            v = sum(token * (token @ v) for token in apart)
            v = v / np.sqrt(v @ v)
        result.append([abs(token @ v) for token in apart])
    return result


def naive_texture(x: np.ndarray, context: ScoreContext) -> list:
    result = []
    for row in x:
        image = row.reshape(*context.grid, -1)
        scores = []
        for t, i, j in places(context.grid):
            near = image[t, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            scores.append(sum((image[t, i, j] - near.mean((0, 1))) ** 2))
        result.append(scores)
    return result


def naive_change(old: np.ndarray, new: np.ndarray, metric: str) -> float:
    if metric in ("latent_cos", "spatiotemporal"):
        turn = 1 - old @ new / np.sqrt((old @ old) * (new @ new))
        return turn if metric == "latent_cos" else np.sqrt(turn**2 + 1)
    length = np.sqrt(sum((new - old) ** 2))
    return length if metric == "latent_l2" else length / (np.sqrt(old @ old) + 1e-6)


def naive_latent(x: np.ndarray, context: ScoreContext, metric: str) -> list:
    old, new = (latent.double().numpy() for latent in context.signals.latents)
    (_, height, width), region = context.grid, context.region
    result = []
    for b in range(len(old)):
        change = np.array([[naive_change(old[b, :, i, j], new[b, :, i, j], metric) for j in range(10)] for i in range(9)])
        area = np.empty((height, width))
        for i, j in np.ndindex(height, width):
            window = change[i * 9 // height : -(-(i + 1) * 9 // height), j * 10 // width : -(-(j + 1) * 10 // width)]
            area[i, j] = window.mean()
        scores = []
        for _, i, j in places(context.grid):
            top, left = i // region * region, j // region * region
            scores.append(area[top : top + region, left : left + region].mean())
        result.append(scores)
    return result * (len(x) // len(old))


def naive_upsampled(score: np.ndarray, grid: tuple[int, int, int], target: tuple[int, int, int]) -> list:
    (frames, height, width), (old_t, old_h, old_w) = target, grid
    image = score.reshape(grid)
    return [image[t * old_t // frames, y * old_h // height, x * old_w // width] for t, y, x in places(target)]


def naive_delta(x: np.ndarray, context: ScoreContext) -> list:
    change = context.signals.delta.double().numpy()
    maps = [np.mean([change[row] for row in range(b, len(change), 2)], axis=0) for b in range(2)]
    return [naive_upsampled(one, context.signals.delta_grid, context.grid) for one in maps] * (len(x) // 2)


def naive_cond_uncond(x: np.ndarray, context: ScoreContext) -> list:
    hidden = context.signals.hidden.double().numpy()
    maps = [np.array([sum((c - u) ** 2) for c, u in zip(hidden[b], hidden[b + 2], strict=True)]) for b in range(2)]
    return [naive_upsampled(one, context.signals.hidden_grid, context.grid) for one in maps] * (len(x) // 2)


NAIVE = {
    "dc": naive_dc,
    "structure": naive_structure,
    "texture": naive_texture,
    "norm": naive_norm,
    "delta": naive_delta,
    "cond_uncond": naive_cond_uncond,
} | {name: lambda x, context, name=name: naive_latent(x, context, name) for name in rules.OF_LATENTS}


def test_every_scorer_but_the_random_one_has_a_naive_loop() -> None:
    assert set(SCORERS) == set(rules.SCORERS) == set(NAIVE) | {"random"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAIVE)
def test_scorer_equals_a_naive_loop(name: str, grid: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, context = tokens(grid, dtype=dtype), context_of(grid, dtype=dtype)
    scores = SCORERS[name](x, context)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores, NAIVE[name](x.double().numpy(), context), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", rules.SCORERS)
def test_scorer_gives_one_finite_number_a_token_of_bfloat16(name: str) -> None:
    scores = SCORERS[name](tokens((1, 4, 4), dtype=torch.bfloat16), context_of((1, 4, 4), dtype=torch.bfloat16))
    assert scores.shape == (4, 16) and scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", rules.SCORERS)
def test_scorer_gives_the_rows_of_one_branch(name: str) -> None:
    context = context_of((1, 4, 4))
    both, alone = SCORERS[name](tokens((1, 4, 4)), context), SCORERS[name](tokens((1, 4, 4))[:2], context)
    torch.testing.assert_close(alone, both[:2])


@pytest.mark.parametrize("name", ["dc", "structure", "texture"])
def test_scorer_ignores_a_constant_added_to_all_tokens(name: str) -> None:
    x, context = tokens((1, 7, 3)), context_of((1, 7, 3))
    torch.testing.assert_close(
        SCORERS[name](x + normal(8, seed=9) * 5, context), SCORERS[name](x, context), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["dc", "structure", "texture"])
@pytest.mark.parametrize("grid", [(1, 5, 7), (2, 3, 3), (1, 1, 1)])
def test_equal_tokens_score_nothing_up_to_the_border(name: str, grid: tuple[int, int, int]) -> None:
    x = normal(4, 1, 8).expand(-1, grid[0] * grid[1] * grid[2], -1)
    assert SCORERS[name](x, context_of(grid)).abs().max() < 1e-5


def test_texture_of_frames_is_that_of_each_alone() -> None:
    x = tokens((2, 3, 5))
    alone = [SCORERS["texture"](frame, context_of((1, 3, 5))) for frame in x.split(15, dim=1)]
    assert torch.equal(SCORERS["texture"](x, context_of((2, 3, 5))), torch.cat(alone, dim=1))


def stretched(direction: torch.Tensor, *, rows: int = 3, count: int = 30) -> torch.Tensor:
    """Returns tokens spread mostly along a direction [C]."""
    direction = direction / direction.norm()
    return normal(rows, count, 1, seed=5) * 10 * direction + normal(rows, count, len(direction), seed=6)


def first_principal(x: torch.Tensor) -> np.ndarray:
    apart = x.double().numpy() - x.double().numpy().mean(1, keepdims=True)
    return np.stack([np.abs(row @ np.linalg.svd(row)[2][0]) for row in apart])


def test_structure_is_the_projection_on_the_first_singular_vector() -> None:
    x = stretched(normal(16, seed=7))
    np.testing.assert_allclose(SCORERS["structure"](x, context_of((1, 5, 6))), first_principal(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_structure_of_tokens_orthogonal_to_its_start_is_right(dtype: torch.dtype) -> None:
    x = stretched(normal(16, seed=7))
    x = (x - x.mean(dim=2, keepdim=True)).to(dtype)
    x[1] = stretched(normal(16, seed=8))[1].to(dtype)
    np.testing.assert_allclose(SCORERS["structure"](x, context_of((1, 5, 6))), first_principal(x), rtol=1e-3, atol=1e-3)


def test_structure_of_tokens_exactly_orthogonal_to_its_start_is_right() -> None:
    half = stretched(normal(8, seed=7), count=15).round()
    signed = torch.cat((half, -half), dim=2)
    x = torch.cat((signed, -signed), dim=1)
    assert not x.sum(dim=1).any() and not x.sum(dim=2).any()
    np.testing.assert_allclose(SCORERS["structure"](x, context_of((1, 5, 6))), first_principal(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_structure_scales_with_its_tokens(scale: float) -> None:
    x, context = tokens((1, 4, 4)), context_of((1, 4, 4))
    torch.testing.assert_close(SCORERS["structure"](x * scale, context) / scale, SCORERS["structure"](x, context))


@pytest.mark.parametrize("region", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("grid", GRIDS)
def test_latent_scores_are_averaged_over_regions(grid: tuple[int, int, int], region: int) -> None:
    x, context = tokens(grid), replace(context_of(grid), region=region)
    expected = naive_latent(x.numpy(), context, "latent_l2")
    np.testing.assert_allclose(SCORERS["latent_l2"](x, context), expected, rtol=1e-5)


def clip_of(*, before: bool) -> Signals:
    latents = [normal(2, 6, 3, *LATENT, seed=seed) for seed in (1, 2)]
    return Signals(latents=latents, before=normal(2, 6, 1, *LATENT, seed=3) if before else None)


@pytest.mark.parametrize("before", [True, False], ids=["after another clip", "first clip"])
def test_spatiotemporal_scores_compare_with_the_frame_before_and_across_clips(before: bool) -> None:
    signals, grid = clip_of(before=before), (3, 9, 10)
    context = replace(context_of(grid), signals=signals)
    old, new = (latent.double().numpy() for latent in signals.latents)
    expected = np.empty((2, *grid))
    for b, t, i, j in np.ndindex(*expected.shape):
        here = new[b, :, t, i, j]
        earlier = new[b, :, t - 1, i, j] if t else signals.before.double().numpy()[b, :, 0, i, j] if before else None
        across = 1.0 if earlier is None else naive_change(earlier, here, "latent_cos")
        expected[b, t, i, j] = np.hypot(naive_change(old[b, :, t, i, j], here, "latent_cos"), across)
    ours = SCORERS["spatiotemporal"](tokens(grid), context)
    np.testing.assert_allclose(ours, np.tile(expected.reshape(2, -1), (2, 1)), rtol=1e-5)


@pytest.mark.parametrize("name", rules.LATENT_SCORERS)
def test_latent_scores_of_a_clip_are_those_of_its_frames(name: str) -> None:
    signals, grid = clip_of(before=False), (3, 4, 5)
    ours = SCORERS[name](tokens(grid), replace(context_of(grid), signals=signals)).view(4, 3, 20)
    for frame in range(3):
        image = Signals(latents=[latent[:, :, frame] for latent in signals.latents])
        alone = SCORERS[name](tokens((1, 4, 5)), replace(context_of((1, 4, 5)), signals=image))
        torch.testing.assert_close(ours[:, frame], alone)


def test_a_clip_opens_with_the_last_frame_of_the_one_before() -> None:
    signals = clip_of(before=False)
    last = signals.latents[-1][:, :, -1:]
    signals.open_clip()
    assert torch.equal(signals.before, last) and signals.latents == []


def test_latents_are_compared_in_float32() -> None:
    context = context_of((1, 9, 10))
    context.signals.latents[1] = context.signals.latents[0].bfloat16()
    context.signals.latents[0] = context.signals.latents[0].bfloat16()
    for name in rules.LATENT_SCORERS:
        assert not SCORERS[name](tokens((1, 9, 10)), context).any()


@pytest.mark.parametrize("side", [6, 8, 12, 16, 20, 24, 32, 40, 48, 64])
def test_upsampling_takes_the_exact_cell(side: int) -> None:
    context = context_of((1, side, side))
    context.signals.delta, context.signals.delta_grid = torch.arange(25.0).expand(2, -1), (1, 5, 5)
    expected = [y * 5 // side * 5 + x * 5 // side for y in range(side) for x in range(side)]
    assert SCORERS["delta"](torch.zeros(2, side * side, 1), context)[0].tolist() == expected


def test_delta_of_one_branch_is_used_as_it_is() -> None:
    x, context = tokens((1, 7, 3), rows=2), context_of((1, 7, 3), rows=2)
    np.testing.assert_allclose(SCORERS["delta"](x, context), naive_delta(x.numpy(), context), rtol=1e-6)


def test_cond_uncond_without_both_branches_is_a_user_error() -> None:
    context = context_of((1, 4, 4))
    context.signals.keep_rows(slice(0, 2))
    with pytest.raises(UserError, match="both branches at the scale before, got 2 rows for 2 samples at scale 5"):
        SCORERS["cond_uncond"](tokens((1, 4, 4)), context)


@pytest.mark.parametrize("name", [*rules.OF_LATENTS, "delta", "cond_uncond"])
@pytest.mark.parametrize("signals", [None, Signals()])
def test_scorers_of_earlier_scales_say_when_nothing_was_left(name: str, signals: Signals | None) -> None:
    with pytest.raises(UserError, match=f"scorer {name} needs .* at scale 5"):
        SCORERS[name](tokens((1, 4, 4)), replace(context_of((1, 4, 4)), signals=signals))


@pytest.mark.parametrize("name", NAIVE)
def test_scorer_reads_no_value_on_the_host(name: str) -> None:
    context = replace(context_of((1, 4, 4)), region=3)
    left = context.signals
    left.latents = [latent.to("meta") for latent in left.latents]
    left.delta, left.hidden = left.delta.to("meta"), left.hidden.to("meta")
    assert SCORERS[name](tokens((1, 4, 4)).to("meta"), context).shape == (4, 16)


def test_random_scores_depend_on_the_sample_not_on_the_batch() -> None:
    both = SCORERS["random"](tokens((1, 4, 4)), ScoreContext(5, (1, 4, 4), 3, 1, (0, 1)))
    alone = SCORERS["random"](tokens((1, 4, 4), rows=1), ScoreContext(5, (1, 4, 4), 3, 1, (1,)))
    assert torch.equal(both[1], alone[0])
    assert torch.equal(both[:2], both[2:])
    assert not torch.equal(both[0], both[1])


def test_random_scores_keep_their_stream() -> None:
    scores = SCORERS["random"](tokens((1, 1, 6), rows=1), ScoreContext(5, (1, 1, 6), 3, 1, (0,)))
    np.testing.assert_allclose(scores[0, :3], [0.878523, 0.519236, 0.348060], atol=1e-6)
