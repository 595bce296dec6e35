"""Projected guidance against the published formula in numpy, float64."""

import numpy as np
import pytest
import torch

from autoprune.backbones.guidance import projected_difference


def expected(cond: np.ndarray, uncond: np.ndarray, limit: float) -> np.ndarray:
    """Equations of arXiv 2410.02416 for one sample: limit the difference's root mean square, drop what is along cond."""
    difference = cond - uncond
    size = np.sqrt(np.mean(difference**2))
    difference = difference * min(1.0, limit / size) if size else difference
    unit = cond / np.linalg.norm(cond)
    return difference - np.sum(difference * unit) * unit


@pytest.mark.parametrize("limit", [0.05, 1e6], ids=["limited", "as it is"])
def test_each_sample_follows_the_formula_over_all_of_its_logits(limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 5, 4, 2, generator=generator) for _ in range(2))
    uncond[1] *= 10
    ours = projected_difference(cond, uncond, limit=limit)
    for sample in range(2):
        wanted = expected(cond[sample].double().numpy(), uncond[sample].double().numpy(), limit)
        np.testing.assert_allclose(ours[sample], wanted, rtol=1e-5, atol=1e-6)
        assert abs(float((ours[sample].double() * cond[sample].double()).sum())) < 1e-5 * float(cond[sample].norm())


def test_branches_that_agree_add_nothing() -> None:
    cond = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    assert not projected_difference(cond, cond.clone(), limit=0.05).any()
