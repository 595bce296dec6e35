"""Closeness to the dense image of the same prompt and seed that needs no weights, through torchmetrics, in float32.

Videos are compared frame by frame.
"""

import numpy as np
import torch
from torch import Tensor

from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo
from autoprune.measure.metrics.frames import by_frame, with_worst

IDENTICAL_PSNR = 100.0
MS_SSIM_SIDE = 176  # five scales, each half of the one before, and windows of 11 pixels at the last


def psnr(images: Tensor, dense: Tensor) -> Tensor:
    """Returns the PSNR in dB of images [B, 3, H, W] in [0, 1], float32 [B]; identical ones have IDENTICAL_PSNR.

    Of videos [B, 3, F, H, W] it is the mean over frames, as those of SSIM and MS-SSIM are, but over those that differ: some
    may be equal bit by bit (a first frame that nothing prunes), and IDENTICAL_PSNR would count for far more than they do.
    """
    return _over_differing(by_frame(_psnr, images, dense)).cpu()


def ssim(images: Tensor, dense: Tensor) -> Tensor:
    """Returns the SSIM in [-1, 1] of images [B, 3, H, W] in [0, 1], float32 [B]; identical ones have 1."""
    return by_frame(_ssim, images, dense).mean(1).cpu()


def ms_ssim(images: Tensor, dense: Tensor) -> Tensor:
    """Returns the MS-SSIM in [0, 1] of images [B, 3, H, W] in [0, 1], float32 [B], negative scales counted as 0."""
    return by_frame(_ms_ssim, images, dense).mean(1).cpu()


class Psnr:
    """Peak signal-to-noise ratio."""

    info = MetricInfo("psnr", "paired", lower=False, source="-10 log10 of the mean squared error", unit="dB")

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        found = by_frame(_psnr, batch.images, batch.dense)
        return with_worst(found, lower=False, whole=_over_differing(found))


class Ssim:
    """Structural similarity, Gaussian windows of sigma 1.5."""

    info = MetricInfo("ssim", "paired", lower=False, source="Wang et al., IEEE TIP 13 (2004)", perfect=1.0)

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        return with_worst(by_frame(_ssim, batch.images, batch.dense), lower=False)


class MsSsim:
    """Structural similarity at five sizes."""

    info = MetricInfo(
        "ms_ssim", "paired", lower=False, source="Wang et al., Asilomar 2003", perfect=1.0, least_side=MS_SSIM_SIDE
    )

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        return with_worst(by_frame(_ms_ssim, batch.images, batch.dense), lower=False)


def _psnr(images: Tensor, dense: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = peak_signal_noise_ratio(images.float(), dense.float(), data_range=1.0, reduction="none", dim=(1, 2, 3))
    return torch.nan_to_num(found, posinf=IDENTICAL_PSNR).clamp(max=IDENTICAL_PSNR)


def _over_differing(found: Tensor) -> Tensor:
    """Returns the means [B] of PSNR [B, F] over frames that are not identical, IDENTICAL_PSNR where all are."""
    differ = found != IDENTICAL_PSNR
    count = differ.sum(1)
    return torch.where(count > 0, (found * differ).sum(1) / count.clamp(min=1), IDENTICAL_PSNR)


def _ssim(images: Tensor, dense: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images.float(), dense.float(), data_range=1.0, reduction="none").reshape(-1)


def _ms_ssim(images: Tensor, dense: Tensor) -> Tensor:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    measure = multiscale_structural_similarity_index_measure
    return measure(images.float(), dense.float(), data_range=1.0, reduction="none").reshape(-1)
