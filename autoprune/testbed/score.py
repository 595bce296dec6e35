"""The scene score: the share of prompts whose objects, counts, colours, places and textures the detector finds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from autoprune.testbed.captions import RELATIONS, SHAPES, Noun, Prompt
from autoprune.testbed.detector import Finding, detect

MAIN_THRESHOLD = 0.75  # least IoU of a shape, of 128 pixels a side


@dataclass(frozen=True)
class SceneScores:
    """Per image: is it right (bool [B]), and the mean IoU of the objects that its prompt asks for ([B], in [0, 1])."""

    tasks: tuple[str, ...]
    correct: np.ndarray
    iou: np.ndarray

    @property
    def per_task(self) -> dict[str, float]:
        """Share of right images of each task that has prompts."""
        tasks = np.array(self.tasks)
        return {task: float(self.correct[tasks == task].mean()) for task in dict.fromkeys(self.tasks)}

    @property
    def overall(self) -> float:
        """Mean over GenEval's six tasks, which is the headline; texture is reported beside it."""
        return float(np.mean([share for task, share in self.per_task.items() if task != "texture"] or [np.nan]))

    @property
    def mean_iou(self) -> float:
        """Mean IoU over all images."""
        return float(self.iou.mean())


def score_images(images: Tensor, prompts: Sequence[Prompt], *, threshold: float = MAIN_THRESHOLD) -> SceneScores:
    """Scores `images` [B, 3, H, W] in [0, 1] against their prompts; an object counts from IoU `threshold` on."""
    return score_findings(find(images, prompts), prompts, threshold=threshold)


def find(images: Tensor, prompts: Sequence[Prompt]) -> list[list[Finding]]:
    """What the detector sees, once for scores at several thresholds."""
    return detect(images, textured={index for index, prompt in enumerate(prompts) if prompt.task == "texture"})


def score_findings(
    found: Sequence[Sequence[Finding]], prompts: Sequence[Prompt], *, threshold: float = MAIN_THRESHOLD
) -> SceneScores:
    """Scores what `find` returned."""
    pairs = list(zip(found, prompts, strict=True))
    return SceneScores(
        tasks=tuple(prompt.task for prompt in prompts),
        correct=np.array([is_right(findings, prompt, threshold=threshold) for findings, prompt in pairs], dtype=bool),
        iou=np.array([expected_iou(findings, prompt) for findings, prompt in pairs]),
    )


def is_right(findings: Sequence[Finding], prompt: Prompt, *, threshold: float) -> bool:
    """GenEval's rule: what is asked for is there; counts are exact; other objects do not matter."""
    description = prompt.description
    sure = [finding for finding in findings if finding.clean and max(finding.ious) >= threshold]
    matches = [[finding for finding in sure if _is(finding, noun, prompt.task)] for noun in description.nouns]
    if description.relation == "count":
        return len(matches[0]) == description.count
    if description.relation in RELATIONS:
        return any(_holds(description.relation, ours, theirs) for ours in matches[0] for theirs in matches[1])
    return all(matches)


def expected_iou(findings: Sequence[Finding], prompt: Prompt) -> float:
    """Mean over the objects asked for of the IoU with their shape of the best object left; a missing one is 0."""
    left, ious = list(findings), []
    for noun in prompt.description.nouns * prompt.description.count:
        shape = SHAPES.index(noun.shape)
        best = max(left, key=lambda finding: finding.ious[shape], default=None)
        ious.append(best.ious[shape] if best else 0.0)
        if best:
            left.remove(best)
    return float(np.mean(ious))


def offset(relation: str, ours: Finding, theirs: Finding) -> float:
    """How far in px `ours` is from `theirs` in the named direction, negative on the other side."""
    across, down = theirs.x - ours.x, theirs.y - ours.y
    return {"left of": across, "right of": -across, "above": down, "below": -down}[relation]


def _is(finding: Finding, noun: Noun, task: str) -> bool:
    return (
        finding.shape == noun.shape
        and noun.colour in (None, finding.colour)
        and (task != "texture" or noun.texture in (None, finding.texture))
    )


def _holds(relation: str, ours: Finding, theirs: Finding) -> bool:
    """The named direction is the larger offset of the two."""
    toward = offset(relation, ours, theirs)
    return toward > 0 and toward == max(abs(theirs.x - ours.x), abs(theirs.y - ours.y))
