"""Teacher forcing of InfinityStar: bits and inputs of every run of a scale, and all runs through the blocks at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.backbones.attention import attend
from autoprune.backbones.clip_tokenizer import ClipTokenizer
from autoprune.backbones.infinity import Step
from autoprune.backbones.infinitystar import InfinityStar
from autoprune.backbones.text import TextFeatures
from autoprune.backbones.tiny_video import RUNS, clip_schedule
from autoprune.clips import clip_frames, clip_ranges
from autoprune.policy import token_count
from autoprune.testbed.latents import TeacherForcing

SCHEDULE = clip_schedule()


def star_teacher(
    tokenizer: ClipTokenizer, features: Tensor, count: int, *, max_flip: float, generator: torch.Generator
) -> TeacherForcing:
    """As latents.teacher_forcing for the first `count` runs; features [B, bits, T, H, W], of whole clips at a time."""
    targets, inputs = [], []
    for clip in clip_frames(SCHEDULE)[: count // len(RUNS)]:
        own = features[:, :, clip.start : clip.stop]
        latent = torch.zeros_like(own)
        for grid in RUNS:
            grid = (len(clip), *grid[1:])
            if targets:
                inputs.append(tokenizer.next_tokens(latent, grid))
            bits = tokenizer.residual(own - latent, grid).movedim(1, -1) > 0
            targets.append(bits.flatten(1, 3))
            rate = torch.rand(len(bits), 1, 1, 1, 1, generator=generator, device=bits.device) * max_flip
            flips = torch.rand(bits.shape, generator=generator, device=bits.device) < rate
            codes = tokenizer.codes(bits ^ flips, tokenizer.config.sides.index(grid[1]))
            latent = tokenizer.accumulate(latent, codes, 0, 0)
    return TeacherForcing(targets, inputs)


def star_logits(
    model: InfinityStar, text: TextFeatures, inputs: Sequence[Tensor], *, dropped: Tensor | None = None
) -> list[Tensor]:
    """Logits [B, N, bits, 2] of as many runs as there are `inputs`, and the first one.

    Each run attends to the text, the last run of the clip before and itself. Samples where `dropped` [B] is true see the
    unconditional text.
    """
    if dropped is not None:
        learned = model.cfg_uncond[: text.values.shape[1]].expand_as(text.values)
        text = TextFeatures(torch.where(dropped[:, None, None], learned, text.values), text.lengths)
    conditioning = model.condition(text)
    scales = model.course(SCHEDULE).by_step(len(SCHEDULE))[: len(inputs) + 1]
    x = torch.cat([model.first_tokens(conditioning), *(model.embed(entry, 0) for entry in inputs)], dim=1)
    sizes = [token_count(SCHEDULE[scale]) for scale in scales]
    step = Step(
        rotation=torch.cat([model.rotation(run, SCHEDULE) for run in range(len(scales))], dim=1),
        add=lambda x, change, site: x + change(x, None),
        attention=lambda layer: _by_run(conditioning.keys[layer], scales, sizes),
    )
    for layer, block in enumerate(model.layers()):
        x = block(x, layer, step, conditioning)
    parts = x.split(sizes, dim=1)
    return [model.logits(part, conditioning, scale) for part, scale in zip(parts, scales, strict=True)]


def _by_run(text: Tensor, scales: Sequence[int], sizes: Sequence[int]) -> Callable[..., Tensor]:
    """The attention of one layer; `text` [2, B, G, T, D] are the keys and values that stand before all runs."""
    last_scales = {clip[-1] for clip in clip_ranges(SCHEDULE)}

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
        outputs, before = [], text
        runs = zip(*(part.split(list(sizes), dim=2) for part in (q, k, v)), scales, strict=True)
        for query, key, value, number in runs:
            own = torch.stack((key, value))
            keys, values = torch.cat((before, own), dim=3)
            padded = None if mask is None else functional.pad(mask, (0, keys.shape[2] - mask.shape[3]))
            outputs.append(attend(query, keys, values, scale=scale, mask=padded))
            if number in last_scales:
                before = torch.cat((text, own), dim=3)
        return torch.cat(outputs, dim=2)

    return attention
