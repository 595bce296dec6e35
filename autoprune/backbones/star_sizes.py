"""Configurations of InfinityStar and its tokenizer, read off the authors' objects and their state dicts.

What tensors do not show, repetitions and where detail begins, are attributes of the official class
(`infinity/models/infinity.py`).
"""

import re
from collections.abc import Mapping
from operator import attrgetter

from torch import Tensor, nn

from autoprune.backbones.infinitystar import StarConfig
from autoprune.backbones.sizes import nesting
from autoprune.backbones.star_schedules import SIDES
from autoprune.backbones.video_tokenizer import VideoTokenizerConfig
from autoprune.errors import UserError

State = Mapping[str, Tensor]
SCHEDULE = "infinity_elegant_clip20frames_v2"  # of the released text-to-video models; the interactive one has another loop


def star_config(model: nn.Module, state: State) -> StarConfig:
    """Returns the sizes of the authors' transformer with this state dict.

    Raises UserError for one without the attributes or tensors of the released class, and for another kind of schedule.
    """
    schedule = attribute(model, "other_args.dynamic_scale_schedule")
    if schedule != SCHEDULE:
        raise UserError(
            f"an InfinityStar model must run the schedule {SCHEDULE}, this one runs {schedule}; pass another model."
        )
    repetitions = [tuple(attribute(model, f"{clip}_scale_repetition")) for clip in ("image", "video")]
    if len(repetitions[0]) != len(repetitions[1]) or not 1 <= len(repetitions[0]) <= len(SIDES):
        raise UserError(
            f"image and video clips must have as many scales, 1 to {len(SIDES)}, got {len(repetitions[0])} and "
            f"{len(repetitions[1])} repetitions; pass the authors' model object."
        )
    depth, chunks, first = nesting(state)
    width = _tensor(state, "word_embed.weight").shape[0]
    head_width = len(_tensor(state, f"{first}.attn.q_norm.weight"))
    return StarConfig(
        width=width,
        heads=width // head_width,
        key_heads=len(_tensor(state, f"{first}.attn.k_proj.weight")) // head_width,
        depth=depth,
        chunks=chunks,
        image_repetitions=repetitions[0],
        video_repetitions=repetitions[1],
        semantic_scales=attribute(model, "other_args.semantic_scales"),
        token_bits=_tensor(state, "word_embed.weight").shape[1],
        semantic_bits=len(_tensor(state, "semantic_head2.weight")) // 2,
        text_width=_tensor(state, "cfg_uncond").shape[1],
        text_max_length=attribute(model, "text_maxlen"),
    )


def video_tokenizer_config(state: State, *, detail_places: int) -> VideoTokenizerConfig:
    """Returns the sizes of the video tokenizer with these tensors. Raises UserError for one that lacks them."""
    found = re.findall(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", " ".join(state))
    levels, blocks = (1 + max((int(pair[place]) for pair in found), default=-1) for place in (0, 1))
    widths = [len(_tensor(state, f"decoder.up_blocks.{level}.resnets.0.conv1.conv.weight")) for level in range(levels)]
    return VideoTokenizerConfig(
        bits=len(_tensor(state, "proj_up.weight")),
        semantic_bits=len(_tensor(state, "quantizer.lfq_semantic.mask")),
        detail_places=detail_places,
        widths=(_tensor(state, "decoder.conv_out.conv.weight").shape[1], *reversed(widths)),
        blocks=blocks - 1,
    )


def attribute(model: nn.Module, name: str) -> object:
    """Returns what the authors' object says of itself. Raises UserError for an object that does not."""
    try:
        return attrgetter(name)(model)
    except AttributeError:
        raise UserError(f"an InfinityStar model must have {name}, this one has none; pass the authors' model object.") from None


def _tensor(state: State, key: str) -> Tensor:
    if key not in state:
        raise UserError(f"a model of InfinityStar must have {key}, this one has none; pass the authors' model and vae objects.")
    return state[key]
