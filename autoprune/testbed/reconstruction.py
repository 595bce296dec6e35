"""The tokenizer's training loss and its measure: how close decoded latents come to the image."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.backbones.clip_tokenizer import TIME
from autoprune.testbed.worlds import IMAGES, World

SQUARED_WEIGHT = 2.0
EDGE_WEIGHT = 0.5
MOTION_WEIGHT = 40.0  # at 8 the frames of a latent frame were still decoded as their mean after 250 steps
COMMITMENT_WEIGHT = 0.15
EARLY_STEPS = 0.5  # share of the steps in which some samples decode from early scales only
EARLY_SAMPLES = 4  # every fourth of them
FIRST_EARLY_SCALE = 3


@dataclass(frozen=True)
class Reconstruction:
    """`residual_sizes` [scales] is mean |residual| before each sign; `squared_error` of the full latents only."""

    loss: Tensor
    squared_error: Tensor
    residual_sizes: Tensor


def reconstruct(
    model: nn.Module, images: Tensor, *, train_encoder: bool, flip_rate: float, world: World = IMAGES
) -> Reconstruction:
    """Images [B, 3, h, w] or videos [B, 3, F, h, w] in [-1, 1] through the quantiser and back, with the loss of it.

    A positive `flip_rate` turns over up to that share of the bits in every second sample. Samples that decode from
    early scales teach the decoder only.
    """
    with torch.set_grad_enabled(train_encoder):
        features = model.encode(images)
    rates = torch.rand(len(images), device=images.device) * flip_rate
    rates[::2] = 0
    steps = list(model.quantisation_steps(features.detach(), world.runs, flip_rates=rates if flip_rate > 0 else None))
    total = steps[-1].latent
    latent = features + (total - features).detach()
    early = _early_samples(len(images))
    if early:
        cut = int(torch.randint(FIRST_EARLY_SCALE, len(steps) - 1, ()))
        latent = torch.cat([steps[cut].latent[:early], latent[early:]])
    decoded = model.decoder(latent).float()
    commitment = (features - total).square().mean() / features.square().mean()
    loss = _image_loss(decoded, images) + (COMMITMENT_WEIGHT * commitment if train_encoder else 0.0)
    return Reconstruction(
        loss,
        (decoded[early:].detach().clamp(-1, 1) - images[early:]).square().mean(),
        torch.stack([step.residual.abs().mean() for step in steps]).float(),
    )


@torch.inference_mode()
def reconstruction_psnr(model: nn.Module, images: np.ndarray, *, world: World = IMAGES) -> list[float]:
    """PSNR in dB of uint8 pixels [N, (F,) h, w, 3], decoded from the scales up to each one; pooled squared error."""
    device = next(model.parameters()).device
    errors = torch.zeros(len(world.runs))
    for start in range(0, len(images), 16):
        batch = world.batch(images[start : start + 16], device)
        for scale, step in enumerate(model.quantisation_steps(model.encode(batch), world.runs)):
            errors[scale] += (model.decode(step.latent) - batch).square().mean().cpu() * len(batch) / len(images)
    return (10 * torch.log10(4 / errors)).tolist()


def _early_samples(batch: int) -> int:
    return batch // EARLY_SAMPLES if float(torch.rand(())) < EARLY_STEPS else 0


def _image_loss(decoded: Tensor, images: Tensor) -> Tensor:
    error = decoded - images
    difference = error.movedim(1, -3).flatten(0, -4)  # frames of videos are images
    edges = _edge_loss(difference) + _edge_loss(F.avg_pool2d(difference, 2))
    still = difference.abs().mean() + SQUARED_WEIGHT * difference.square().mean() + EDGE_WEIGHT * edges
    return still if images.dim() == 4 else still + MOTION_WEIGHT * _motion_loss(error)


def _motion_loss(difference: Tensor) -> Tensor:
    """Squared error [B, 3, F, h, w] of what frames differ by from the mean of their latent frame."""
    groups = difference[:, :, 1:].unflatten(2, (-1, TIME))
    return (groups - groups.mean(dim=3, keepdim=True)).square().mean()


def _edge_loss(difference: Tensor) -> Tensor:
    """L1 between the image gradients, which is the L1 of the difference's gradients."""
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
