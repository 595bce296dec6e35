"""Closeness to the dense image of the same prompt and seed that needs no weights, through torchmetrics, in float32."""

import numpy as np
import torch
from torch import Tensor

from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo

IDENTICAL_PSNR = 100.0
MS_SSIM_SIDE = 176  # five scales, each half of the one before, and windows of 11 pixels at the last


def psnr(images: Tensor, dense: Tensor) -> Tensor:
    """Returns the PSNR in dB of images [B, 3, H, W] in [0, 1], float32 [B]; identical ones have IDENTICAL_PSNR.

    Of videos [B, 3, F, H, W] all frames count as one image, here; SSIM is averaged over frames.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    places = tuple(range(1, images.dim()))
    found = peak_signal_noise_ratio(images.float(), dense.float(), data_range=1.0, reduction="none", dim=places)
    return torch.nan_to_num(found, posinf=IDENTICAL_PSNR).clamp(max=IDENTICAL_PSNR).cpu()


def ssim(images: Tensor, dense: Tensor) -> Tensor:
    """Returns the SSIM in [-1, 1] of images [B, 3, H, W] in [0, 1], float32 [B]; identical ones have 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = frames_of(images.float()), frames_of(dense.float())
    found = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    return found.reshape(len(images), -1).mean(dim=1).cpu()


def ms_ssim(images: Tensor, dense: Tensor) -> Tensor:
    """Returns the MS-SSIM in [0, 1] of images [B, 3, H, W] in [0, 1], float32 [B], negative scales counted as 0."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    pair = frames_of(images.float()), frames_of(dense.float())
    found = multiscale_structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    return found.reshape(len(images), -1).mean(dim=1).cpu()


def frames_of(images: Tensor) -> Tensor:
    """Returns images [B, 3, H, W] as they are and videos [B, 3, F, H, W] as the frames of one after the other."""
    return images if images.dim() == 4 else images.transpose(1, 2).flatten(0, 1)


class Psnr:
    """Peak signal-to-noise ratio."""

    info = MetricInfo("psnr", "paired", lower=False, source="-10 log10 of the mean squared error", unit="dB")

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        return psnr(batch.images, batch.dense).double().numpy()


class Ssim:
    """Structural similarity, Gaussian windows of sigma 1.5."""

    info = MetricInfo("ssim", "paired", lower=False, source="Wang et al., IEEE TIP 13 (2004)", perfect=1.0)

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        return ssim(batch.images, batch.dense).double().numpy()


class MsSsim:
    """Structural similarity at five sizes."""

    info = MetricInfo(
        "ms_ssim", "paired", lower=False, source="Wang et al., Asilomar 2003", perfect=1.0, least_side=MS_SSIM_SIDE
    )

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        return ms_ssim(batch.images, batch.dense).double().numpy()
