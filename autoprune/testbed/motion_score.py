"""Finds the objects of a video and what each does, exactly, and scores videos against prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from autoprune.testbed.captions import RELATIONS, SHAPES
from autoprune.testbed.detector import Finding, detect
from autoprune.testbed.motion import REDUCTION
from autoprune.testbed.motion_captions import TURNING_SHAPES, MotionPrompt, Mover
from autoprune.testbed.score import SceneScores, offset

MAIN_THRESHOLD = 0.6  # least IoU of a shape, of 64 pixels a side
MIN_TRAVEL = 9.0  # px of the image; what stands still moves by less than 2
MIN_GROWTH = 1.25  # of the radius, between the first frame and the last
MAX_JUMP = 20.0  # px of the image from frame to frame
MIN_APART = 14.0  # px of the image between the centres in the direction of a relation; the world keeps 38
MIDDLE = (0.2, 0.8)  # share of a motion that is over half-way
MOST_BACK = 0.15  # share of a motion that one step may undo


@dataclass(frozen=True)
class Track:
    """One object over all frames: what was found in each, in order."""

    findings: tuple[Finding, ...]

    @property
    def motion(self) -> str:
        """What it does, of MOTIONS: a change of colour, then of size, of orientation, of place; "" for none of them cleanly."""
        first, last = self.findings[0], self.findings[-1]
        if last.colour != first.colour:
            return "becoming"
        sizes = 0.5 * np.log(np.array([finding.area for finding in self.findings]) / first.area)
        if abs(sizes[-1]) > np.log(MIN_GROWTH):
            return ("growing" if sizes[-1] > 0 else "shrinking") if _steady(sizes) else ""
        shape = SHAPES.index(first.shape)
        if first.shape in TURNING_SHAPES and last.turned_ious[shape] > last.ious[shape]:
            return "rotating"
        travel = np.array([(finding.x - first.x, finding.y - first.y) for finding in self.findings])
        axis = int(np.abs(travel[-1]).argmax())
        if abs(travel[-1, axis]) > MIN_TRAVEL:
            if not _steady(travel[:, axis]):
                return ""
            return (("left", "right"), ("up", "down"))[axis][int(travel[-1, axis] > 0)]
        return "still"


def find_tracks(videos: Tensor) -> list[list[Track]]:
    """The objects of `videos` [B, 3, F, h, w] in [0, 1] that are there in every frame, followed from the first one on."""
    frames = videos.transpose(1, 2).float()
    return [_tracks(detect(F.interpolate(video, scale_factor=float(REDUCTION), mode="bilinear"))) for video in frames]


def score_videos(videos: Tensor, prompts: Sequence[MotionPrompt], *, threshold: float = MAIN_THRESHOLD) -> SceneScores:
    """Scores `videos` [B, 3, F, h, w] in [0, 1]; an object counts from IoU `threshold` in the first frame on."""
    return score_tracks(find_tracks(videos), prompts, threshold=threshold)


def score_tracks(
    found: Sequence[Sequence[Track]], prompts: Sequence[MotionPrompt], *, threshold: float = MAIN_THRESHOLD
) -> SceneScores:
    """Scores what `find_tracks` returned."""
    pairs = list(zip(found, prompts, strict=True))
    return SceneScores(
        tasks=tuple(prompt.task for prompt in prompts),
        correct=np.array([is_right(tracks, prompt, threshold=threshold) for tracks, prompt in pairs], dtype=bool),
        iou=np.array([_expected_iou(tracks, prompt) for tracks, prompt in pairs]),
    )


def is_right(tracks: Sequence[Track], prompt: MotionPrompt, *, threshold: float) -> bool:
    """Whether there are exactly the objects asked for, each with its motion, in their relation in every frame."""
    movers, relation = prompt.description.movers, prompt.description.relation
    if len(tracks) != len(movers):
        return False
    for order in permutations(tracks):
        placed = relation not in RELATIONS or all(
            offset(relation, *pair) > MIN_APART for pair in zip(*(track.findings for track in order), strict=True)
        )
        if placed and all(_does(track, mover, threshold) for track, mover in zip(order, movers, strict=True)):
            return True
    return False


def _does(track: Track, mover: Mover, threshold: float) -> bool:
    first, last = track.findings[0], track.findings[-1]
    seen = (first.shape, first.colour, track.motion, last.colour)
    if seen != (mover.shape, mover.colour, mover.motion, mover.becomes or mover.colour):
        return False
    ending = last.turned_ious if mover.motion == "rotating" else last.ious
    return first.clean and last.clean and min(max(first.ious), ending[SHAPES.index(mover.shape)]) >= threshold


def _expected_iou(tracks: Sequence[Track], prompt: MotionPrompt) -> float:
    shapes = [SHAPES.index(mover.shape) for mover in prompt.description.movers]
    return float(np.mean([max((track.findings[0].ious[shape] for track in tracks), default=0.0) for shape in shapes]))


def _steady(values: np.ndarray) -> bool:
    """Whether values that begin at 0 go to the last one about evenly, without coming back much."""
    shares = values / values[-1]
    return MIDDLE[0] < shares[len(shares) // 2] < MIDDLE[1] and np.diff(shares).min() > -MOST_BACK


def _tracks(frames: Sequence[Sequence[Finding]]) -> list[Track]:
    """Follows each object of the first frame to the nearest one of every next frame; lost ones are left out."""
    tracks = []
    for finding in frames[0]:
        path = [finding]
        for found in frames[1:]:
            near = min(found, key=lambda other: _distance(path[-1], other), default=None)
            if near is None or _distance(path[-1], near) > MAX_JUMP:
                break
            path.append(near)
        if len(path) == len(frames):
            tracks.append(Track(tuple(path)))
    return tracks


def _distance(one: Finding, other: Finding) -> float:
    return float(np.hypot(one.x - other.x, one.y - other.y))
