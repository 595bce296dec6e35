"""Scene scores of a generator on held-out prompts: `python -m autoprune.testbed.evaluate --prompts 600`.

`--sweep` also scores guidance and temperature settings on prompts of the other split, from which defaults are chosen.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import autoprune
from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.embedded import EMBEDDED, WEIGHTS
from autoprune.files import write_whole
from autoprune.moving_pictures import picture, save_sheets, shown_frames
from autoprune.testbed import motion_score, score
from autoprune.testbed.captions import Prompt, prompt_set
from autoprune.testbed.motion_captions import MotionPrompt, motion_prompts
from autoprune.testbed.motion_score import find_tracks, score_tracks
from autoprune.testbed.score import SceneScores, find, score_findings

SWEEP = ((1.0, 0.5), (1.5, 0.5), (2.0, 0.5), (2.5, 0.5), (3.0, 0.5), (2.0, 0.3), (2.0, 0.75), (2.0, 1.0))
GRID_PER_TASK = 6
SHOWN_WIDTH = 128  # pixels at least, of a sample in the grid
ShownPrompt = Prompt | MotionPrompt


@dataclass(frozen=True)
class Judge:
    """How samples of a backbone are judged: its prompts by split, what the detector finds, and the score of that.

    `thresholds` are the IoUs to score at: a loose one, the main one, a strict one.
    """

    prompts: Callable[..., Sequence[ShownPrompt]]
    find: Callable[[Tensor, Sequence[ShownPrompt]], list]
    score: Callable[..., SceneScores]
    thresholds: tuple[float, float, float]

    @property
    def main(self) -> float:
        """Returns the threshold that a search uses."""
        return self.thresholds[1]


JUDGES = {
    "tiny": Judge(prompt_set, find, score_findings, (0.70, score.MAIN_THRESHOLD, 0.80)),
    "tiny_video": Judge(
        motion_prompts, lambda videos, prompts: find_tracks(videos), score_tracks, (0.50, motion_score.MAIN_THRESHOLD, 0.75)
    ),
}


@dataclass(frozen=True)
class Evaluation:
    """Scores of one setting: by threshold the share right per task and overall; `seconds` generates and scores."""

    guidance: float
    temperature: float
    prompts: int
    per_task: dict[float, dict[str, float]]
    overall: dict[float, float]
    mean_iou: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backbone", choices=EMBEDDED, default="tiny")
    parser.add_argument("--weights", type=Path, help="safetensors file; without it the shipped one")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--guidance", type=float, help="without it the backbone's default, like temperature")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder of scores.json and grid.png")
    parser.add_argument("--record", action="store_true", help="also write scores and hash into the .json beside the weights")
    options = parser.parse_args(arguments)
    backbone = autoprune.load_backbone(options.backbone, weights=options.weights, dtype=options.dtype)
    chosen = Sampling(
        backbone.sampling.guidance if options.guidance is None else options.guidance,
        backbone.sampling.temperature if options.temperature is None else options.temperature,
    )
    judge, results = JUDGES[options.backbone], []
    if options.sweep:
        prompts = judge.prompts("search", options.prompts, seed=options.seed)
        for guidance, temperature in SWEEP:
            sampling = Sampling(guidance, temperature)
            results.append(evaluate(backbone, prompts, sampling, seed=options.seed, batch=options.batch)[0])
            print(_row(results[-1]), flush=True)
    prompts = judge.prompts("held_out", options.prompts, seed=options.seed)
    evaluation, images = evaluate(backbone, prompts, chosen, seed=options.seed, batch=options.batch)
    print(table(evaluation))
    save_grid(options.out / "grid.png", images, prompts, rate=backbone.frame_rate)
    record = {"revision": backbone.revision, "held_out": vars(evaluation), "search": [vars(result) for result in results]}
    write_whole(options.out / "scores.json", json.dumps(record, indent=1))
    if options.record:
        path = Path(options.weights or WEIGHTS / f"{options.backbone}.safetensors").with_suffix(".json")
        training = json.loads(path.read_text())
        updated = training | {"sha256": backbone.revision, "scores": record["held_out"]}
        write_whole(path, json.dumps(updated, indent=1) + "\n")


def evaluate(
    backbone: Backbone, prompts: Sequence[ShownPrompt], sampling: Sampling, *, seed: int = 0, batch: int = 16
) -> tuple[Evaluation, Tensor]:
    """Scores one image or video a prompt at all thresholds; also returns them [B, 3, (F,) H, W] as uint8."""
    started, judge = time.monotonic(), JUDGES[backbone.name]
    found, images = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        texts = [prompt.text for prompt in part]
        made = autoprune.generate(backbone, texts, seed=seed, sampling=replace(sampling, first_sample=start)).cpu()
        found += judge.find(made, part)
        images.append((made * 255).round().to(torch.uint8))
    scores = {threshold: judge.score(found, prompts, threshold=threshold) for threshold in judge.thresholds}
    evaluation = Evaluation(
        guidance=float(np.mean(sampling.guidance)),
        temperature=float(np.mean(sampling.temperature)),
        prompts=len(prompts),
        per_task={threshold: score.per_task for threshold, score in scores.items()},
        overall={threshold: score.overall for threshold, score in scores.items()},
        mean_iou=scores[judge.main].mean_iou,
        seconds=time.monotonic() - started,
    )
    return evaluation, torch.cat(images)


def table(evaluation: Evaluation) -> str:
    """The scores as text, one line a threshold."""
    lines = [
        f"guidance {evaluation.guidance:g}, temperature {evaluation.temperature:g}, {evaluation.prompts} prompts, "
        f"mean IoU {evaluation.mean_iou:.3f}, {evaluation.seconds:.0f} s",
        "IoU   overall  " + "  ".join(f"{task:>11}" for task in next(iter(evaluation.per_task.values()))),
    ]
    for threshold, tasks in evaluation.per_task.items():
        shares = "  ".join(f"{share:11.3f}" for share in tasks.values())
        lines.append(f"{threshold:.2f}  {evaluation.overall[threshold]:7.3f}  {shares}")
    return "\n".join(lines)


def save_grid(path: Path, images: Tensor, prompts: Sequence[ShownPrompt], *, rate: float) -> Path:
    """One row of samples a task, prompts below, of `images` uint8 [B, 3, (F,) H, W]: a PNG, of videos a WebP that moves."""
    from PIL import Image, ImageDraw

    (side, width), line = images.shape[-2:], 12
    scale = -(-SHOWN_WIDTH // width)
    cell, height = scale * width + 4, scale * side + 3 * line
    tasks = dict.fromkeys(prompt.task for prompt in prompts)
    rows = [[i for i, prompt in enumerate(prompts) if prompt.task == task][:GRID_PER_TASK] for task in tasks]
    frames, rate = shown_frames(images[sum(rows, [])] / 255, rate)
    sheets = [Image.new("RGB", (GRID_PER_TASK * cell, len(rows) * height), "white") for _ in frames]
    for sheet, shown in zip(sheets, frames, strict=True):
        draw, samples = ImageDraw.Draw(sheet), iter(shown)
        for y, row in enumerate(rows):
            for x, index in enumerate(row):
                sample = picture(next(samples)).resize((scale * width, scale * side), Image.Resampling.NEAREST)
                sheet.paste(sample, (x * cell, y * height))
                draw.text((x * cell, y * height + scale * side), _wrapped(prompts[index].text), fill="black", spacing=0)
    return save_sheets(path, sheets, rate=rate, lossless=True)


def _wrapped(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += ("" if not lines[-1] else " ") + word
    return "\n".join(lines[:3])


def _row(evaluation: Evaluation) -> str:
    shares = "  ".join(f"{threshold:.2f}: {share:.3f}" for threshold, share in evaluation.overall.items())
    main = list(evaluation.per_task.values())[1]
    texture = f"texture {main['texture']:.3f}  " if "texture" in main else ""
    return (
        f"guidance {evaluation.guidance:g}  temperature {evaluation.temperature:g}  {shares}  "
        f"{texture}mean IoU {evaluation.mean_iou:.3f}  {evaluation.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
