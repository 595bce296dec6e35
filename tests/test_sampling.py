"""Random numbers by address, and the three ways to draw bits."""

import math

import pytest
import torch

from autoprune.backbones import Sampling
from autoprune.errors import UserError
from autoprune.noise import uniform
from autoprune.sampling import GeneratorStream, GridNoise, likeliest, limited

PINNED = [0.2544127, 0.8126707, 0.6899274, 0.3831199]


def logits_of(probability: float, count: int = 20000) -> torch.Tensor:
    gap = torch.logit(torch.tensor(probability))
    return torch.stack((torch.zeros(1, count, 1), gap.expand(1, count, 1)), dim=-1)


def test_noise_depends_on_its_address_only() -> None:
    assert torch.equal(uniform((1, 2, 3), 50, stream="bits"), uniform((1, 2, 3), 50, stream="bits"))
    others = [uniform(address, 50, stream="bits") for address in ((0, 2, 3), (1, 3, 3), (1, 2, 4))]
    others.append(uniform((1, 2, 3), 50, stream="score"))
    assert not any(torch.equal(other, uniform((1, 2, 3), 50, stream="bits")) for other in others)


def test_noise_is_pinned_so_that_published_seeds_stay_valid() -> None:
    expected = torch.tensor(PINNED)
    torch.testing.assert_close(uniform((0, 0, 0), 4, stream="bits"), expected)


def test_grid_noise_draws_ones_with_their_probability() -> None:
    bits = GridNoise(0, (0,))(logits_of(0.3), 5)
    assert abs(bits.float().mean() - 0.3) < 0.02


def test_generator_stream_removes_the_rare_class() -> None:
    stream = GeneratorStream(torch.Generator().manual_seed(0), top_p=0.97)
    assert stream(logits_of(0.02), 0).sum() == 0
    assert abs(stream(logits_of(0.1), 0).float().mean() - 0.1) < 0.02


def test_greedy_takes_the_likeliest() -> None:
    assert likeliest(logits_of(0.6), 0).all()
    assert not likeliest(logits_of(0.4), 0).any()


def test_code_numbers_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(1, 30000, 3)
    drawn = GridNoise(0, (0,))(logits, 2)
    assert drawn.shape == (1, 30000) and drawn.dtype is torch.int64
    torch.testing.assert_close(drawn[0].bincount(minlength=3) / 30000, torch.tensor([0.1, 0.6, 0.3]), atol=0.01, rtol=0)
    assert torch.equal(drawn, GridNoise(0, (0,))(logits, 2)) and not torch.equal(drawn, GridNoise(1, (0,))(logits, 2))


def test_impossible_codes_are_never_drawn() -> None:
    logits = torch.randn(2, 5000, 7).masked_fill(torch.arange(7) % 2 == 0, float("-inf"))
    assert (GridNoise(3, (0, 1))(logits, 0) % 2 == 1).all()


def limited_naively(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Returns which values stay: the k largest, then those that are not in the least likely mass of 1 - top_p."""
    least = sorted(logits, reverse=True)[min(top_k or len(logits), len(logits)) - 1]
    kept = [index for index, value in enumerate(logits) if value >= least]
    if not top_p:
        return set(kept)
    total, mass, stay = sum(math.exp(logits[index]) for index in kept), 0.0, set()
    for place, index in enumerate(sorted(kept, key=lambda index: logits[index])):
        mass += math.exp(logits[index]) / total
        if mass > 1 - top_p or place == len(kept) - 1:
            stay.add(index)
    return stay


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (3, 0.0), (0, 0.7), (4, 0.5), (1, 0.0), (0, 1e-6), (9, 0.9)])
def test_limits_keep_what_a_naive_loop_keeps(top_k: int, top_p: float) -> None:
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    ours = limited(logits, top_k, top_p)
    for row, kept in zip(logits.tolist(), ours, strict=True):
        assert set(kept.isfinite().nonzero().flatten().tolist()) == limited_naively(row, top_k, top_p)
    assert torch.equal(ours[ours.isfinite()], logits[ours.isfinite()])


def test_limits_are_given_by_scale_and_checked() -> None:
    sampling = Sampling(top_k=(2, 1, 5), top_p=0.9)
    assert sampling.limits_for(3) == ((2, 0.9), (1, 0.9), (5, 0.9))
    logits = torch.randn(1, 50, 6)
    noise = GridNoise(0, (0,), sampling.limits_for(3))
    assert torch.equal(noise(logits, 1), likeliest(logits, 1))
    with pytest.raises(UserError, match="top_k must be at least 0 and top_p in"):
        Sampling(top_p=1.5).limits_for(2)


def test_guidance_that_ramps_starts_at_one_and_ends_at_one_more_than_its_weight() -> None:
    assert Sampling(guidance=4.0, ramp=True).guidance_for(5) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert Sampling(guidance=4.0).guidance_for(2) == (4.0, 4.0)
