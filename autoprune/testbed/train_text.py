"""Teach the caption encoder to bind words before any image is seen: `pretrain_text`, part of train_generator.

At every noun it predicts shape, colour, texture and places, at "background" its tone and ground, from captions alone.
In the feasibility run this replaced most of the generator's time to first correct layouts.
"""

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
_CLASSES = tuple(len(names) for names in _NAMES)
_IGNORED = -100


@dataclass(frozen=True)
class TextBatch:
    """`words` [B, T], `lengths`; `classes` [B, T, 5] class per question or -100; `places` [B, T, 12], NaN off nouns."""

    words: Tensor
    lengths: tuple[int, ...]
    classes: Tensor
    places: Tensor


def pretrain_text(team: Team, encoder: CaptionEncoder, *, steps: int, seed: int) -> float:
    """Trains `encoder` in place; returns the share of nouns whose places are all right over the last tenth of steps."""
    torch.manual_seed(seed)
    device = encoder.positions.device
    reader = nn.Linear(encoder.config.width, sum(_CLASSES) + PLACES).to(device)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.01)
    accuracies = []
    for step in range(steps):
        rng = np.random.default_rng([seed, step, team.rank])
        batch = text_batch([sample_description(rng) for _ in range(BATCH // team.size)])
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / steps)
        with mixed(device.type):
            answers = reader(encoder.encode(batch.words.to(device), batch.lengths).values)
        loss, accuracy = _grade(answers.float(), batch)
        optimiser.zero_grad()
        loss.backward()
        shared = team.average_gradients(parameters, torch.tensor([accuracy]))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        accuracies.append(float(shared[0]))
        if team.leads and (step + 1) % 100 == 0:
            print(f"text step {step + 1}  loss {loss.item():.3f}  place accuracy {accuracies[-1]:.3f}", flush=True)
    return float(np.mean(accuracies[-max(1, steps // 10) :])) if steps else 0.0


def text_batch(descriptions: list[Description]) -> TextBatch:
    """Captions with their answers, all attributes as the words say them."""
    rows = [tokenize(description.text()) for description in descriptions]
    width = max(map(len, rows))
    words = torch.zeros(len(rows), width, dtype=torch.long)
    classes = torch.full((len(rows), width, len(_NAMES)), _IGNORED)
    places = torch.full((len(rows), width, PLACES), float("nan"))
    for index, (row, description) in enumerate(zip(rows, descriptions, strict=True)):
        words[index, : len(row)] = torch.tensor(row)
        spots = _noun_positions(description)
        for noun, spot, taken in zip(description.nouns, spots, _noun_places(description), strict=True):
            looks = (noun.shape, noun.colour, noun.texture)
            classes[index, spot, :3] = torch.tensor([_NAMES[i].index(look) for i, look in enumerate(looks)])
            places[index, spot] = 0.0
            places[index, spot, list(taken)] = 1.0
        if description.tone or description.ground:
            ground = (_NAMES[3].index(description.tone), _NAMES[4].index(description.ground))
            classes[index, len(row) - 1, 3:] = torch.tensor(ground)
    return TextBatch(words, tuple(map(len, rows)), classes, places)


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


def _grade(answers: Tensor, batch: TextBatch) -> tuple[Tensor, float]:
    """Loss, and the share of nouns with every place right. `answers` [B, T, sum of classes + 12]."""
    parts = answers.split([*_CLASSES, PLACES], dim=-1)
    classes = batch.classes.to(answers.device)
    loss = answers.new_zeros(())
    for question, part in enumerate(parts[:-1]):
        loss = loss + F.cross_entropy(part.flatten(0, 1), classes[..., question].flatten(), ignore_index=_IGNORED)
    places = batch.places.to(answers.device)
    asked = ~places[..., 0].isnan()
    loss = loss + PLACES / 4 * F.binary_cross_entropy_with_logits(parts[-1][asked], places[asked])
    right = ((parts[-1][asked] > 0) == (places[asked] > 0.5)).all(-1)
    return loss, float(right.float().mean())
