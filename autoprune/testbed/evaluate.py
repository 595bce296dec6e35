"""Scene scores of a generator on held-out prompts: `python -m autoprune.testbed.evaluate --prompts 600`.

`--sweep` also scores guidance and temperature settings on prompts of the other split, from which defaults are chosen.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import autoprune
from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.embedded import EMBEDDED_WEIGHTS
from autoprune.files import whole_file, write_whole
from autoprune.testbed.captions import TASKS, Prompt, prompt_set
from autoprune.testbed.score import MAIN_THRESHOLD, STRICT_THRESHOLD, find, score_findings

THRESHOLDS = (0.70, MAIN_THRESHOLD, STRICT_THRESHOLD)
SWEEP = ((1.0, 0.5), (1.5, 0.5), (2.0, 0.5), (2.5, 0.5), (3.0, 0.5), (2.0, 0.3), (2.0, 0.75), (2.0, 1.0))
GRID_PER_TASK = 6


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
    backbone = autoprune.load_backbone("tiny", weights=options.weights, dtype=options.dtype)
    chosen = Sampling(
        backbone.sampling.guidance if options.guidance is None else options.guidance,
        backbone.sampling.temperature if options.temperature is None else options.temperature,
    )
    results = []
    if options.sweep:
        prompts = prompt_set("search", options.prompts, seed=options.seed)
        for guidance, temperature in SWEEP:
            sampling = Sampling(guidance, temperature)
            results.append(evaluate(backbone, prompts, sampling, seed=options.seed, batch=options.batch)[0])
            print(_row(results[-1]), flush=True)
    prompts = prompt_set("held_out", options.prompts, seed=options.seed)
    evaluation, images = evaluate(backbone, prompts, chosen, seed=options.seed, batch=options.batch)
    print(table(evaluation))
    save_grid(options.out / "grid.png", images, prompts)
    record = {"revision": backbone.revision, "held_out": vars(evaluation), "search": [vars(result) for result in results]}
    write_whole(options.out / "scores.json", json.dumps(record, indent=1))
    if options.record:
        path = Path(options.weights or EMBEDDED_WEIGHTS).with_suffix(".json")
        training = json.loads(path.read_text())
        updated = training | {"sha256": backbone.revision, "scores": record["held_out"]}
        write_whole(path, json.dumps(updated, indent=1) + "\n")


def evaluate(
    backbone: Backbone, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int = 0, batch: int = 16
) -> tuple[Evaluation, Tensor]:
    """Scores one image a prompt at all thresholds; also returns the images [B, 3, H, W] as uint8."""
    started = time.monotonic()
    found, images = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        texts = [prompt.text for prompt in part]
        made = autoprune.generate(backbone, texts, seed=seed, sampling=replace(sampling, first_sample=start)).cpu()
        found += find(made, part)
        images.append((made * 255).round().to(torch.uint8))
    scores = {threshold: score_findings(found, prompts, threshold=threshold) for threshold in THRESHOLDS}
    evaluation = Evaluation(
        guidance=float(np.mean(sampling.guidance)),
        temperature=float(np.mean(sampling.temperature)),
        prompts=len(prompts),
        per_task={threshold: score.per_task for threshold, score in scores.items()},
        overall={threshold: score.overall for threshold, score in scores.items()},
        mean_iou=scores[MAIN_THRESHOLD].mean_iou,
        seconds=time.monotonic() - started,
    )
    return evaluation, torch.cat(images)


def table(evaluation: Evaluation) -> str:
    """The scores as text, one line a threshold."""
    lines = [
        f"guidance {evaluation.guidance:g}, temperature {evaluation.temperature:g}, {evaluation.prompts} prompts, "
        f"mean IoU {evaluation.mean_iou:.3f}, {evaluation.seconds:.0f} s",
        "IoU   overall  " + "  ".join(f"{task:>11}" for task in TASKS),
    ]
    for threshold in THRESHOLDS:
        tasks = evaluation.per_task[threshold]
        shares = "  ".join(f"{tasks.get(task, float('nan')):11.3f}" for task in TASKS)
        lines.append(f"{threshold:.2f}  {evaluation.overall[threshold]:7.3f}  {shares}")
    return "\n".join(lines)


def save_grid(path: Path, images: Tensor, prompts: Sequence[Prompt]) -> None:
    """A picture with one row of samples a task, prompts below; images uint8 [B, 3, H, W]."""
    from PIL import Image, ImageDraw

    side, line = images.shape[-1], 12
    rows = [[i for i, prompt in enumerate(prompts) if prompt.task == task][:GRID_PER_TASK] for task in TASKS]
    height = side + 3 * line
    canvas = Image.new("RGB", (GRID_PER_TASK * (side + 4), len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        for x, index in enumerate(row):
            picture = Image.fromarray(images[index].permute(1, 2, 0).numpy())
            canvas.paste(picture, (x * (side + 4), y * height))
            draw.text((x * (side + 4), y * height + side), _wrapped(prompts[index].text), fill="black", spacing=0)
    with whole_file(path) as temporary:
        canvas.save(temporary)


def _wrapped(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += ("" if not lines[-1] else " ") + word
    return "\n".join(lines[:3])


def _row(evaluation: Evaluation) -> str:
    shares = "  ".join(f"{threshold:.2f}: {share:.3f}" for threshold, share in evaluation.overall.items())
    texture = evaluation.per_task[MAIN_THRESHOLD].get("texture", float("nan"))
    return (
        f"guidance {evaluation.guidance:g}  temperature {evaluation.temperature:g}  {shares}  "
        f"texture {texture:.3f}  mean IoU {evaluation.mean_iou:.3f}  {evaluation.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
