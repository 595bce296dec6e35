"""What the caption encoder of moving scenes is asked before any video is seen; see train_text.py."""

import numpy as np

from autoprune.backbones.caption_encoder import MOTION_VOCABULARY, tokenize
from autoprune.testbed.captions import COLOURS, RELATIONS, SHAPES, TONES
from autoprune.testbed.motion_captions import MOTIONS, MotionDescription, sample_motion
from autoprune.testbed.train_text import Answers, Exam

PLACES = 5  # alone, left, right, above, below
_NAMES = (SHAPES, COLOURS, MOTIONS, (None, *COLOURS), (None, *TONES))


def _draw(rng: np.random.Generator) -> tuple[list[int], Answers]:
    description = sample_motion(rng)
    words = tokenize(description.text(), MOTION_VOCABULARY)
    return words, motion_answers(description)


def motion_answers(description: MotionDescription) -> Answers:
    """At the shape of each mover its classes of all questions, the background's too, and its place."""
    spots = [index for index, word in enumerate(description.text().split()) if word in SHAPES]
    places = [0]
    if len(description.movers) == 2:
        places = [1, 2] if description.relation in RELATIONS[:2] else [3, 4]
        places = places if description.relation in ("left of", "above") else places[::-1]
    answers: Answers = {}
    for spot, mover, place in zip(spots, description.movers, places, strict=True):
        looks = (mover.shape, mover.colour, mover.motion, mover.becomes, description.tone)
        classes = {question: names.index(look) for question, (names, look) in enumerate(zip(_NAMES, looks, strict=True))}
        answers[spot] = (classes, (place,))
    return answers


MOTION_EXAM = Exam(_draw, tuple(len(names) for names in _NAMES), PLACES)
