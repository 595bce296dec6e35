"""Teach the caption encoder to bind words before any image is seen: `pretrain_text`, part of train_generator.

At every noun it predicts shape, colour, texture and places, at "background" its tone and ground, from captions alone.
In the feasibility run this replaced most of the generator's time to first correct layouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.backbones.caption_encoder import CaptionEncoder, tokenize
from autoprune.testbed.captions import COLOURS, GROUNDS, RELATIONS, SHAPES, TEXTURES, TONES, Description, sample_description
from autoprune.testbed.distributed import Team
from autoprune.testbed.precision import mixed

BATCH = 160  # captions a step, all processes together
RATE = 2e-3
# Places as in scenes.SLOTS: one object, a row of two, a column of two, three, four.
PLACES = 12
_FIRST_PLACE = {"one": 0, "row": 1, "column": 3, 3: 5, 4: 8}
_NAMES = (SHAPES, (None, *COLOURS), (None, *TEXTURES), (None, *TONES), (None, *GROUNDS))
_IGNORED = -100


# By the position of a word: its class by question, and its places.
Answers = dict[int, tuple[dict[int, int], tuple[int, ...]]]


@dataclass(frozen=True)
class Exam:
    """`draw(rng)` is a caption as vocabulary indices and its answers; `classes` are the numbers of classes by question."""

    draw: Callable[[np.random.Generator], tuple[list[int], Answers]]
    classes: tuple[int, ...]
    places: int


@dataclass(frozen=True)
class TextBatch:
    """`words` [B, T], `lengths`; `classes` [B, T, questions] class or -100; `places` [B, T, places], NaN off nouns."""

    words: Tensor
    lengths: tuple[int, ...]
    classes: Tensor
    places: Tensor


def pretrain_text(team: Team, encoder: CaptionEncoder, *, steps: int, seed: int, exam: Exam | None = None) -> float:
    """Trains `encoder` in place; returns the share of nouns whose places are all right over the last tenth of steps."""
    exam = exam or SCENE_EXAM
    torch.manual_seed(seed)
    device = encoder.positions.device
    reader = nn.Linear(encoder.config.width, sum(exam.classes) + exam.places).to(device)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.01)
    accuracies = []
    for step in range(steps):
        rng = np.random.default_rng([seed, step, team.rank])
        batch = text_batch([exam.draw(rng) for _ in range(BATCH // team.size)], exam)
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / steps)
        with mixed(device.type):
            answers = reader(encoder.encode(batch.words.to(device), batch.lengths).values)
        loss, accuracy = _grade(answers.float(), batch, exam)
        optimiser.zero_grad()
        loss.backward()
        shared = team.average_gradients(parameters, torch.tensor([accuracy]))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        accuracies.append(float(shared[0]))
        if team.leads and (step + 1) % 100 == 0:
            print(f"text step {step + 1}  loss {loss.item():.3f}  place accuracy {accuracies[-1]:.3f}", flush=True)
    return float(np.mean(accuracies[-max(1, steps // 10) :])) if steps else 0.0


def text_batch(drawn: Sequence[tuple[list[int], Answers]], exam: Exam) -> TextBatch:
    """Captions with their answers, padded to the longest."""
    rows = [row for row, _ in drawn]
    width = max(map(len, rows))
    words = torch.zeros(len(rows), width, dtype=torch.long)
    classes = torch.full((len(rows), width, len(exam.classes)), _IGNORED)
    places = torch.full((len(rows), width, exam.places), float("nan"))
    for index, (row, answers) in enumerate(drawn):
        words[index, : len(row)] = torch.tensor(row)
        for spot, (by_question, taken) in answers.items():
            for question, number in by_question.items():
                classes[index, spot, question] = number
            if taken:
                places[index, spot] = 0.0
                places[index, spot, list(taken)] = 1.0
    return TextBatch(words, tuple(map(len, rows)), classes, places)


def scene_answers(description: Description) -> Answers:
    """At nouns shape, colour, texture and places as the words say them, at the last word tone and ground."""
    answers: Answers = {}
    spots = _noun_positions(description)
    for noun, spot, taken in zip(description.nouns, spots, _noun_places(description), strict=True):
        looks = (noun.shape, noun.colour, noun.texture)
        answers[spot] = ({question: _NAMES[question].index(look) for question, look in enumerate(looks)}, taken)
    if description.tone or description.ground:
        last = len(description.text().split()) - 1
        answers[last] = ({3: _NAMES[3].index(description.tone), 4: _NAMES[4].index(description.ground)}, ())
    return answers


def _draw_scene(rng: np.random.Generator) -> tuple[list[int], Answers]:
    description = sample_description(rng)
    return tokenize(description.text()), scene_answers(description)


SCENE_EXAM = Exam(_draw_scene, tuple(len(names) for names in _NAMES), PLACES)


def _noun_positions(description: Description) -> list[int]:
    nouns = {*SHAPES, *(f"{shape}s" for shape in SHAPES), "crosses"}
    return [index for index, word in enumerate(description.text().split()) if word in nouns]


def _noun_places(description: Description) -> list[tuple[int, ...]]:
    """The places of each noun's objects, indices into scenes.SLOTS."""
    relation = description.relation
    count = description.count if relation == "count" else len(description.nouns)
    layout = count if count > 2 else "one" if count == 1 else "column" if relation in RELATIONS[2:] else "row"
    places = tuple(range(_FIRST_PLACE[layout], _FIRST_PLACE[layout] + count))
    if relation in ("right of", "below"):
        places = places[::-1]
    return [places] if relation == "count" else [(place,) for place in places]


def _grade(answers: Tensor, batch: TextBatch, exam: Exam) -> tuple[Tensor, float]:
    """Loss, and the share of nouns with every place right. `answers` [B, T, sum of classes + places]."""
    parts = answers.split([*exam.classes, exam.places], dim=-1)
    classes = batch.classes.to(answers.device)
    loss = answers.new_zeros(())
    for question, part in enumerate(parts[:-1]):
        loss = loss + F.cross_entropy(part.flatten(0, 1), classes[..., question].flatten(), ignore_index=_IGNORED)
    places = batch.places.to(answers.device)
    asked = ~places[..., 0].isnan()
    loss = loss + exam.places / 4 * F.binary_cross_entropy_with_logits(parts[-1][asked], places[asked])
    right = ((parts[-1][asked] > 0) == (places[asked] > 0.5)).all(-1)
    return loss, float(right.float().mean())
