from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoprune.testbed import scenes
from autoprune.testbed.captions import SHAPES, TASKS, Description, Noun, Prompt, task_prompts
from autoprune.testbed.components import connected_components
from autoprune.testbed.detector import detect
from autoprune.testbed.score import SceneScores, find, score_findings, score_images

COUNT = 40


def renders(prompts: list[Prompt], *, seed: int = 0) -> torch.Tensor:
    images = [
        scenes.render(scenes.realise(prompt.description, np.random.default_rng([seed, index])), 1000 * seed + index)
        for index, prompt in enumerate(prompts)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def blurred(images: torch.Tensor, *, sigma: float = 1.0) -> torch.Tensor:
    kernel = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def flood_fill(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    left, groups = set(zip(*map(np.ndarray.tolist, np.nonzero(mask)), strict=True)), []
    while left:
        front, group = [left.pop()], set()
        while front:
            row, column = front.pop()
            group.add((row, column))
            near = {(row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
        groups.append(group)
    return groups


@pytest.mark.parametrize("density", [0.0, 0.15, 0.4, 0.6, 1.0])
def test_components_are_those_of_a_flood_fill(density):
    mask = np.random.default_rng(0).random((3, 20, 31)) < density
    parts = connected_components(mask, min_area=3)
    for image in range(3):
        groups = [group for group in flood_fill(mask[image]) if len(group) >= 3]
        found = [
            set(zip(*map(np.ndarray.tolist, np.nonzero(parts.labels[image] == label)), strict=True))
            for label in np.flatnonzero(parts.images == image)
        ]
        assert sorted(map(sorted, groups)) == sorted(map(sorted, found))
    for label, (top, left, bottom, right) in enumerate(parts.boxes):
        _, rows, columns = np.nonzero(parts.labels == label)
        assert (top, left, bottom, right) == (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
        assert parts.areas[label] == len(rows)


@pytest.mark.parametrize("task", TASKS)
def test_fresh_renders_are_right_and_other_prompts_are_not(task):
    prompts = task_prompts(task, COUNT, seed=11)
    images = renders(prompts)
    found = find(images, prompts)
    for threshold in (0.70, 0.75, 0.80):
        assert score_findings(found, prompts, threshold=threshold).correct.mean() >= 0.98
    assert score_findings(found, prompts).mean_iou > 0.94
    shuffled = prompts[1:] + prompts[:1]
    assert score_images(images, shuffled).correct.mean() <= (0.35 if task == "single" else 0.2)


@pytest.mark.parametrize("degrade", [blurred, lambda images: (0.15 + 0.7 * blurred(images)).clamp(0, 1)])
def test_textures_survive_blur_and_lost_contrast(degrade: Callable[[torch.Tensor], torch.Tensor]):
    prompts = task_prompts("texture", 2 * COUNT, seed=12)
    assert score_images(degrade(renders(prompts, seed=1)), prompts).correct.mean() >= 0.95


def test_findings_are_the_rendered_things():
    scene = scenes.realise(
        Description("left of", (Noun("ring", "green", "checkered"), Noun("cross", "magenta", "plain")), tone="dark"),
        np.random.default_rng(0),
    )
    image = torch.from_numpy(scenes.render(scene, 0)).permute(2, 0, 1)[None] / 255
    (found,) = detect(image, textured={0})
    for finding, thing in zip(sorted(found, key=lambda finding: finding.x), scene.things, strict=True):
        assert (finding.shape, finding.colour, finding.texture) == (thing.shape, thing.colour, thing.texture)
        assert (finding.x, finding.y) == pytest.approx((thing.x, thing.y), abs=0.15 * thing.radius)
        assert finding.clean and finding.ious[SHAPES.index(thing.shape)] > 0.85


def test_an_image_without_objects_has_no_findings_and_scores_zero():
    prompts = task_prompts("two", 3)
    scores = score_images(torch.rand(3, 1, 1, 1).expand(3, 3, 128, 128), prompts)
    assert not scores.correct.any() and scores.mean_iou == 0


def test_results_do_not_depend_on_the_batch():
    prompts = [prompt for task in TASKS for prompt in task_prompts(task, 10)]
    images = renders(prompts)
    together = score_images(images, prompts, threshold=0.9)
    alone = [score_images(images[i : i + 1], prompts[i : i + 1], threshold=0.9) for i in range(len(prompts))]
    assert together.correct.tolist() == [bool(score.correct[0]) for score in alone]
    assert together.iou.tolist() == pytest.approx([score.iou[0] for score in alone])


def test_overall_is_the_mean_of_six_tasks():
    scores = SceneScores(("single", "single", "two", "texture"), np.array([1, 0, 1, 0], dtype=bool), np.ones(4))
    assert scores.per_task == {"single": 0.5, "two": 1.0, "texture": 0.0}
    assert scores.overall == 0.75
