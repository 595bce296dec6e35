"""Fidelity against the definitions of SSIM and PSNR."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from autoprune.measure.quality import IDENTICAL_PSNR, similarity


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(3, 3, 8, 8, generator=generator), (48, 40), mode="bilinear")
    return (coarse + 0.1 * torch.rand(3, 3, 48, 40, generator=generator)).clamp(0, 1), coarse


def naive_ssim(image: np.ndarray, dense: np.ndarray) -> float:
    """Wang et al. (2004) on one [3, H, W] pair: Gaussian windows of sigma 1.5, mirrored borders, mean over everything."""

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 1.5, 1.5), mode="mirror", truncate=3.5)

    mean_a, mean_b = smooth(image), smooth(dense)
    var_a, var_b = smooth(image**2) - mean_a**2, smooth(dense**2) - mean_b**2
    covariance = smooth(image * dense) - mean_a * mean_b
    top = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    return float((top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))).mean())


def test_ssim_is_its_definition_per_image() -> None:
    images, dense = pictures()
    ours = similarity(images, dense).ssim
    for index in range(3):
        theirs = naive_ssim(images[index].double().numpy(), dense[index].double().numpy())
        assert ours[index].item() == pytest.approx(theirs, abs=1e-4)


def test_psnr_is_its_definition_and_identical_images_are_capped() -> None:
    images, dense = pictures()
    error = ((images - dense) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(similarity(images, dense).psnr, -10 * error.log10(), atol=1e-4)
    same = similarity(dense, dense)
    assert same.psnr.tolist() == [IDENTICAL_PSNR] * 3 and torch.allclose(same.ssim, torch.ones(3))


def test_one_image_keeps_its_batch_dimension() -> None:
    images, dense = pictures()
    assert similarity(images[:1], dense[:1]).ssim.shape == (1,)
