"""Fidelity to the dense image of the same prompt and seed, per image, through torchmetrics."""

from dataclasses import dataclass

import torch
from torch import Tensor

IDENTICAL_PSNR = 100.0


@dataclass(frozen=True)
class Similarity:
    """SSIM [B] in [-1, 1] and PSNR [B] in dB; identical images have SSIM 1 and PSNR capped at IDENTICAL_PSNR."""

    ssim: Tensor
    psnr: Tensor


def similarity(images: Tensor, dense: Tensor) -> Similarity:
    """Compares images [B, 3, H, W] in [0, 1] with the dense ones, pair by pair, in float32."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images, dense = images.float(), dense.float()
    ssim = structural_similarity_index_measure(images, dense, data_range=1.0, reduction="none")
    psnr = peak_signal_noise_ratio(images, dense, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return Similarity(ssim.reshape(-1).cpu(), torch.nan_to_num(psnr, posinf=IDENTICAL_PSNR).clamp(max=IDENTICAL_PSNR).cpu())
