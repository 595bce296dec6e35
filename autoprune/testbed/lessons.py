"""How the generator of each world is taught: its models, its teacher forcing, and how many scales a step trains on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.backbones.embedded import TINY, TINY_VIDEO, EmbeddedSpec
from autoprune.testbed.generator_recipe import BATCH, CURRICULUM, Curriculum, initialise, initialise_star
from autoprune.testbed.latents import TeacherForcing, teacher_forcing
from autoprune.testbed.motion_text import MOTION_EXAM
from autoprune.testbed.star_training import star_logits, star_teacher
from autoprune.testbed.train_text import SCENE_EXAM, Exam
from autoprune.testbed.worlds import IMAGES, VIDEOS, World


@dataclass(frozen=True)
class Lessons:
    """`runs` are the runs of scales of a whole sample, of which a step trains on the first few.

    `teacher(tokenizer, features, count, max_flip=, generator=)` quantises; `logits(model, text, inputs, dropped=)` predicts.
    """

    world: World
    spec: EmbeddedSpec
    runs: int
    batch: Mapping[int, int]
    curriculum: Curriculum
    initialise: Callable[[nn.Module], None]
    teacher: Callable[..., TeacherForcing]
    logits: Callable[..., list[Tensor]]
    exam: Exam


def _image_teacher(
    tokenizer: nn.Module, features: Tensor, count: int, *, max_flip: float, generator: torch.Generator
) -> TeacherForcing:
    return teacher_forcing(tokenizer, features, IMAGES.runs[:count], max_flip=max_flip, generator=generator)


def _image_logits(model: nn.Module, text: object, inputs: Sequence[Tensor], *, dropped: Tensor | None = None) -> list[Tensor]:
    return model.forward_training(text, list(inputs), IMAGES.runs[: len(inputs) + 1], dropped=dropped)


IMAGE_LESSONS = Lessons(
    world=IMAGES,
    spec=TINY,
    runs=len(IMAGES.runs),
    batch=BATCH,
    curriculum=CURRICULUM,
    initialise=initialise,
    teacher=_image_teacher,
    logits=_image_logits,
    exam=SCENE_EXAM,
)
# The image clip alone has a quarter of the tokens and all of the layout: 105 and 420 tokens a sample.
_CLIP = len(VIDEOS.runs)
VIDEO_LESSONS = Lessons(
    world=VIDEOS,
    spec=TINY_VIDEO,
    runs=_CLIP * 2,
    batch={_CLIP: 48, 2 * _CLIP: 16},
    curriculum=((0.25, {_CLIP: 0.8, 2 * _CLIP: 0.2}), (0.45, {_CLIP: 0.3, 2 * _CLIP: 0.7}), (1.0, {2 * _CLIP: 1.0})),
    initialise=initialise_star,
    teacher=star_teacher,
    logits=star_logits,
    exam=MOTION_EXAM,
)
LESSONS = {lessons.world.name: lessons for lessons in (IMAGE_LESSONS, VIDEO_LESSONS)}
