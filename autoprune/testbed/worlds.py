"""The two embedded worlds as training sees them: what is rendered, how it is quantised, and the models that learn it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.backbones import bsq_tokenizer
from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.caption_encoder import MOTION_VOCABULARY, VOCABULARY
from autoprune.backbones.clip_tokenizer import ClipTokenizer
from autoprune.backbones.schedules import scale_schedule
from autoprune.backbones.tiny_video import FRAMES, RUNS, TOKENIZER
from autoprune.policy import Grid
from autoprune.testbed.motion import MOTION_VERSION, VIDEO_SIZE, motion_pair
from autoprune.testbed.scenes import DATA_VERSION, IMAGE_SIZE, training_pair

Pair = tuple[np.ndarray, str, object]


@dataclass(frozen=True)
class World:
    """`pair(seed, index)` is pixels uint8 of `shape` and their caption; `runs` are the grids in which the quantiser works,
    of one clip of a video."""

    name: str
    version: str
    shape: tuple[int, ...]
    pair: Callable[[int, int], Pair]
    runs: tuple[Grid, ...]
    tokenizer: Callable[[object], nn.Module]
    config: object
    vocabulary: tuple[str, ...] = VOCABULARY

    def batch(self, pixels: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Pixels uint8 [B, (F,) h, w, 3] -> float [B, 3, (F,) h, w] in [-1, 1]."""
        return torch.from_numpy(np.array(pixels)).to(device).movedim(-1, 1).float() / 127.5 - 1

    def by_scale(self, sizes: Tensor) -> Tensor:
        """Means over the runs of each scale of one number a run."""
        sides = sorted({grid[1] for grid in self.runs})
        scales = torch.tensor([sides.index(grid[1]) for grid in self.runs])
        return torch.zeros(len(sides)).index_add_(0, scales, sizes.cpu().float()) / torch.bincount(scales)


IMAGES = World(
    name="images",
    version=DATA_VERSION,
    shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
    pair=training_pair,
    runs=scale_schedule(pixel_budget="0.06M"),
    tokenizer=BSQTokenizer,
    config=bsq_tokenizer.TINY,
)
VIDEOS = World(
    name="videos",
    version=MOTION_VERSION,
    shape=(FRAMES, VIDEO_SIZE, VIDEO_SIZE, 3),
    pair=motion_pair,
    runs=RUNS,
    tokenizer=ClipTokenizer,
    config=TOKENIZER,
    vocabulary=MOTION_VOCABULARY,
)
WORLDS = {world.name: world for world in (IMAGES, VIDEOS)}
