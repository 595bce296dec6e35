"""The embedded video backbone: InfinityStar in small with a caption encoder of its own, its weights in the package."""

from autoprune.backbones.clip_tokenizer import TIME, ClipTokenizerConfig
from autoprune.backbones.infinitystar import StarConfig
from autoprune.errors import UserError
from autoprune.policy import Grid

FRAMES = 13
TOKENIZER = ClipTokenizerConfig()
_REPETITIONS = (1, 2, 2, 1)
TRANSFORMER = StarConfig(
    width=192,
    heads=3,
    key_heads=3,
    depth=5,
    chunks=1,
    image_repetitions=_REPETITIONS,
    video_repetitions=_REPETITIONS,
    semantic_scales=len(TOKENIZER.sides) - 1,
    token_bits=TOKENIZER.bits,
    semantic_bits=TOKENIZER.semantic_bits,
    text_width=128,
    text_max_length=32,
)
RUNS: tuple[Grid, ...] = tuple(
    (1, side, side) for side, times in zip(TOKENIZER.sides, _REPETITIONS, strict=True) for _ in range(times)
)
"""The grids of all runs of a clip."""


def clip_schedule(h_div_w: float = 1.0, frames: int = FRAMES) -> tuple[Grid, ...]:
    """Returns the grids (t, h, w): an image clip, then one of the remaining frames, four to a latent frame.

    Raises UserError for other sizes than it has learnt.
    """
    if h_div_w != 1:
        raise UserError(f"h_div_w must be 1 for a backbone that makes square videos only, got {h_div_w}.")
    if frames not in (1, FRAMES):
        raise UserError(f"frames must be 1 for an image or {FRAMES} for a video, got {frames}.")
    clips = (1, (frames - 1) // TIME) if frames > 1 else (1,)
    return tuple((clip, side, side) for clip in clips for side in TOKENIZER.sides)
