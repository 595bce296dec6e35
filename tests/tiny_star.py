"""A small random InfinityStar with a fraction of a second of video, for tests of everything around the numbers."""

from dataclasses import replace

import torch

from autoprune.backbones import Backbone
from autoprune.backbones.infinitystar import StarConfig
from autoprune.backbones.official import RELEASED
from autoprune.backbones.released import Target, random_backbone
from autoprune.backbones.star_schedules import video_schedules
from autoprune.backbones.video_tokenizer import VideoTokenizerConfig

TRANSFORMER = StarConfig(
    width=64, heads=4, key_heads=2, depth=4, chunks=2, image_repetitions=(2, 1, 2, 1, 1), video_repetitions=(1, 2, 3, 2, 1),
    semantic_scales=3, token_bits=16, semantic_bits=8, text_width=32,
)  # fmt: skip
TOKENIZER = VideoTokenizerConfig(bits=16, semantic_bits=8, detail_places=15, widths=(4, 4, 8, 8, 8), blocks=1)
SPEC = replace(
    RELEASED["infinitystar_480p"], transformer=TRANSFORMER, tokenizer=TOKENIZER, schedule_for=video_schedules(scales=5)
)
CPU = Target(torch.device("cpu"), torch.float32)


def star(frames: int = 17) -> Backbone:
    """An image clip of five scales up to 4 x 7 and, for 17 frames, a video clip of four latent frames."""
    return random_backbone("infinitystar_480p", SPEC, CPU).sampled(frames=frames)
