"""Fidelity without weights against scikit-image and the definitions."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from autoprune.measure.metrics.similarity import IDENTICAL_PSNR, MS_SSIM_SIDE, ms_ssim, psnr, ssim

BORDER = 12  # wider than a window


def pictures(height: int = 64, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns three images and coarser ones that differ from them everywhere but near the border."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(3, 3, 8, 8, generator=generator), (height, width), mode="bilinear")
    inside = torch.zeros(height, width)
    inside[BORDER:-BORDER, BORDER:-BORDER] = 1
    strength = torch.tensor([0.1, 0.3, 0.6]).view(3, 1, 1, 1)
    return (coarse + strength * inside * (torch.rand(coarse.shape, generator=generator) - 0.3)).clamp(0, 1), coarse


def maps(image: np.ndarray, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its contrast-structure part of one [3, H, W] pair: Gaussian windows of sigma 1.5, mirrored borders."""

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 1.5, 1.5), mode="mirror", truncate=3.5)

    mean_a, mean_b = smooth(image), smooth(dense)
    var_a, var_b = smooth(image**2) - mean_a**2, smooth(dense**2) - mean_b**2
    structure = (2 * (smooth(image * dense) - mean_a * mean_b) + 0.03**2) / (var_a + var_b + 0.03**2)
    return (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2) * structure, structure


def naive_ms_ssim(image: np.ndarray, dense: np.ndarray) -> float:
    """Wang et al. (2003), eq. 7: structure at five sizes, luminance at the last, windows that lie inside the image for
    structure alone (of the last size the whole map)."""
    product = 1.0
    for level, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        whole, structure = maps(image, dense)
        part = whole if level == 4 else structure[:, 5:-5, 5:-5]
        product *= max(part.mean(), 0) ** weight
        image, dense = (x.reshape(3, x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4)) for x in (image, dense))
    return product


def test_psnr_is_scikit_images_and_identical_images_are_capped() -> None:
    images, dense = pictures()
    theirs = [
        peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0)
        for a, b in zip(images.double(), dense.double(), strict=True)
    ]
    assert psnr(images, dense).tolist() == pytest.approx(theirs, abs=1e-4)
    assert psnr(dense, dense).tolist() == [IDENTICAL_PSNR] * 3


def test_ssim_is_scikit_images_where_borders_agree() -> None:
    images, dense = pictures()
    for ours, a, b in zip(ssim(images, dense).tolist(), images.double().numpy(), dense.double().numpy(), strict=True):
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "full": True}
        assert ours == pytest.approx(structural_similarity(a, b, channel_axis=0, **options)[1].mean(), abs=1e-5)
        assert ours == pytest.approx(maps(a, b)[0].mean(), abs=1e-5)


def test_ssim_mirrors_the_border() -> None:
    images, dense = torch.rand(2, 2, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    theirs = [maps(a, b)[0].mean() for a, b in zip(images.double().numpy(), dense.double().numpy(), strict=True)]
    assert ssim(images, dense).tolist() == pytest.approx(theirs, abs=1e-4)


def test_ms_ssim_is_its_definition() -> None:
    images, dense = pictures(192, 224)
    theirs = [naive_ms_ssim(a, b) for a, b in zip(images.double().numpy(), dense.double().numpy(), strict=True)]
    assert ms_ssim(images, dense).tolist() == pytest.approx(theirs, abs=1e-4)
    assert max(theirs) - min(theirs) > 0.05 and ms_ssim(dense, dense).tolist() == pytest.approx([1.0] * 3)


def test_ms_ssim_needs_the_side_it_says() -> None:
    assert ms_ssim(*torch.rand(2, 1, 3, MS_SSIM_SIDE, MS_SSIM_SIDE)).shape == (1,)
    with pytest.raises(ValueError, match="must be larger than"):
        ms_ssim(*torch.rand(2, 1, 3, MS_SSIM_SIDE - 1, MS_SSIM_SIDE - 1))


def test_one_image_keeps_its_batch_dimension() -> None:
    images, dense = pictures()
    assert ssim(images[:1], dense[:1]).shape == psnr(images[:1], dense[:1]).shape == (1,)
