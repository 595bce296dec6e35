"""The low-rank step: official ranks, scaling, products, and noise that shifts no other stream."""

import numpy as np
import pytest
import torch

from autoprune.noise import standard_normal, uniform
from autoprune.pruning.projection import mixing, project, rank_count

ENERGY_96 = (0.0168, 0.1365, 0.2104, 0.2503, 0.2559, 0.1979, 0.1570, 0.1909)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_ranks_at_40_by_40_are_the_official_ones() -> None:
    assert [rank_count(share, 1600) for share in ENERGY_96] == [27, 219, 337, 401, 410, 317, 252, 306]


@pytest.mark.parametrize(("share", "tokens", "expected"), [(1.0, 1600, 1600), (0.999, 4, 4), (1e-6, 1600, 1), (0.5, 1, 1)])
def test_ranks_are_at_least_one_and_at_most_all_tokens(share: float, tokens: int, expected: int) -> None:
    assert rank_count(share, tokens) == expected


@pytest.mark.parametrize("count", [1, 5, 12])
def test_projection_equals_a_naive_loop(count: int) -> None:
    x, noise = normal(2, 12, 7), normal(2, 12, count)
    ours = project(x, mixing(noise))
    expected = np.zeros((2, count, 7))
    for row in range(2):
        for r in range(count):
            for token in range(12):
                expected[row, r] += float(noise[row, token, r]) / np.sqrt(count) * x[row, token].double().numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_low_precision_tokens_are_mixed_in_float32() -> None:
    x, noise = normal(1, 400, 8, dtype=torch.bfloat16), normal(1, 400, 6)
    ours = project(x, mixing(noise))
    assert ours.dtype == torch.bfloat16
    expected = (mixing(noise).double().transpose(1, 2) @ x.double()).to(torch.bfloat16)
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-3)


def test_mixing_keeps_lengths_on_average() -> None:
    q = mixing(normal(400, 3, 50)).double()
    torch.testing.assert_close((q @ q.transpose(1, 2)).mean(0), torch.eye(3, dtype=torch.float64), rtol=0, atol=0.03)


def test_normal_noise_depends_on_its_whole_address_alone() -> None:
    address = (1, 2, 3)
    first = standard_normal(address, 1000, stream="project:4")
    uniform(address, 1000, stream="bits")
    torch.manual_seed(5)
    assert torch.equal(first, standard_normal(address, 1000, stream="project:4"))
    for other, stream in (((0, 2, 3), "project:4"), ((1, 0, 3), "project:4"), ((1, 2, 0), "project:4"), (address, "project:5")):
        assert not torch.equal(first, standard_normal(other, 1000, stream=stream))


def test_normal_noise_leaves_the_global_stream_untouched() -> None:
    state = torch.random.get_rng_state()
    standard_normal((1, 2, 3), 100, stream="project:4")
    assert torch.equal(state, torch.random.get_rng_state())


def test_normal_noise_is_normal_and_independent_of_uniform_noise_of_the_same_name() -> None:
    address, count = (1, 2, 3), 100_000
    noise, other = standard_normal(address, count, stream="s"), uniform(address, count, stream="s")
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(noise.pow(4).mean() - 3) < 0.15
    assert abs(torch.corrcoef(torch.stack((noise, other)))[0, 1]) < 0.02
