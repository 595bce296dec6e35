"""Videos for metrics of images: pairs are compared in every frame, models see a few frames of each video."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TOGETHER = 16  # frames compared in one call, which bounds memory
SEEN = 8  # frames of a video that models see, evenly spread over it


def frames_of(images: Tensor) -> Tensor:
    """Returns images [B, 3, H, W] as they are and videos [B, 3, F, H, W] as the frames of one after the other."""
    return images if images.dim() == 4 else images.transpose(1, 2).flatten(0, 1)


def by_frame(compare: Callable[[Tensor, Tensor], Tensor], images: Tensor, dense: Tensor) -> Tensor:
    """Returns what `compare` makes of images [n, 3, H, W] and dense ones, [n], for each frame, [B, F]; F is 1 for images."""
    pairs = zip(*(frames_of(each).split(TOGETHER) for each in (images, dense)), strict=True)
    return torch.cat([compare(own, other) for own, other in pairs]).reshape(len(images), -1)


def with_worst(found: Tensor, *, lower: bool, whole: Tensor | None = None) -> np.ndarray:
    """Returns float64 [B] for numbers [B, 1] of images, and for those of frames, [B, F], [B, 2]: what counts for the `whole`
    video, by default the mean, and the worst frame's.
    """
    if found.shape[1] == 1:
        return found[:, 0].double().cpu().numpy()
    worst = found.amax(1) if lower else found.amin(1)
    return torch.stack([found.double().mean(1) if whole is None else whole.double(), worst.double()], 1).cpu().numpy()


def seen_frames(images: Tensor) -> Tensor:
    """Returns images [B, 3, H, W] as they are, and of videos [B, 3, F, H, W] at most SEEN frames, first and last included."""
    if images.dim() == 4 or images.shape[2] <= SEEN:
        return images
    return images[:, :, torch.linspace(0, images.shape[2] - 1, SEEN).round().long().to(images.device)]


def mean_score(score: Callable[[Tensor, Sequence[str]], Tensor], images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """Returns float64 [B]: what `score` makes of images [n, 3, H, W] and their prompts, [n], of videos the mean over frames."""
    frames = frames_of(seen_frames(images))
    count = len(frames) // len(images)
    found = score(frames, [prompt for prompt in prompts for _ in range(count)])
    return found.double().reshape(len(images), count).mean(1).cpu().numpy()
