"""Random numbers by address, and the three ways to draw bits."""

import torch

from autoprune.noise import uniform
from autoprune.sampling import GeneratorStream, GridNoise, likeliest

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
