"""A metric that another program measures in an environment of its own, where its packages conflict with these."""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from autoprune.errors import UserError
from autoprune.files import write_whole
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.external_program import Scores, read_scores, run_program
from autoprune.measure.metrics.external_recipe import Recipe
from autoprune.measure.metrics.picture_input import eight_bits
from autoprune.video_files import check_video_name, write_video

RECIPE = WeightNeed("external", "the recipe of a program that scores images, a YAML file", "conf/quality/external or your own")
FILES = {"images": "images", "prompts": "prompts.jsonl", "output": "scores.jsonl"}
_log = logging.getLogger(__name__)


class External:
    """Scores of the program in weights.external; images it gives none have nan, and a warning says how many and why.

    `measure` only keeps images as PNG files, or videos as files of the recipe's kind, and returns their numbers, so that the
    program starts once, in `resolved`.
    """

    info = MetricInfo("external", "absolute", lower=False, source="an external program", needs=(RECIPE,))

    def __init__(self, context: MetricContext) -> None:
        """Raises UserError for a broken recipe, for weights it names that are not given or not there, for no program, and where
        nothing is installed that writes its videos.
        """
        self._recipe = recipe = Recipe.read(context.path(self.info.name, RECIPE))
        name = f"external ({recipe.name})"
        needs = [WeightNeed(key, what, recipe.source) for key, what in recipe.weights.items()]
        self._paths = {need.key: context.path(name, need).absolute() for need in needs} | {"here": recipe.here}
        of_videos = {"videos": bool(recipe.videos), "least_frames": 2 if recipe.videos else 1}
        told = {name: getattr(recipe, name) for name in ("lower", "source", "unit", "passes")}
        self.info = replace(self.info, **told, **of_videos, needs=(RECIPE, *needs))
        program = recipe.arguments(self._paths | dict.fromkeys(FILES, Path()))[0]
        if shutil.which(program) is None:
            raise UserError(f"external program {program!r} of {recipe.name} must be there to run; correct its path.")
        if recipe.videos:
            check_video_name(f"{recipe.name}{recipe.videos}")
        self._folder = tempfile.TemporaryDirectory(prefix="autoprune-external-")
        self._asked: list[Mapping[str, object]] = []
        self._known: dict[int, float | tuple[float, ...]] = {}

    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns numbers, float64 [B], that `resolved` turns into scores."""
        first = len(self._asked)
        details = batch.details or [{}] * len(batch.prompts)
        for image, prompt, detail in zip(batch.images, batch.prompts, details, strict=True):
            name = f"{len(self._asked):06}{self._recipe.videos or '.png'}"
            self._write(Path(self._folder.name) / name, image)
            self._asked.append({**detail, "prompt": prompt, "image": name})
        return np.arange(first, len(self._asked), dtype=float)

    def resolved(self, numbers: np.ndarray) -> np.ndarray:
        """Returns scores, float64 [n], or [n, 1 + K] with the K dimensions of the recipe, of images that `measure` kept.

        Runs the program on those it has not seen.
        """
        wanted = [int(number) for number in numbers]
        new = sorted(set(wanted) - self._known.keys())
        if new:
            self._known |= dict(zip(new, self._scored([self._asked[number] for number in new]), strict=True))
        return np.array([self._known[number] for number in wanted])

    def _write(self, path: Path, image: Tensor) -> None:
        """Writes an image [3, H, W] or a video [3, F, H, W] in [0, 1]."""
        if self._recipe.videos:
            write_video(path, image, self._recipe.fps, full_colour=True)
            return
        from PIL import Image

        pixels = eight_bits(image).mul(255).byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(path)

    def _scored(self, asked: Sequence[Mapping[str, object]]) -> list[float | tuple[float, ...]]:
        """Runs the program on images, which are deleted after."""
        names = [one["image"] for one in asked]
        with tempfile.TemporaryDirectory(prefix="autoprune-external-") as folder:
            paths = {name: Path(folder) / file for name, file in FILES.items()}
            paths["images"].mkdir()
            for name in names:
                (Path(self._folder.name) / name).rename(paths["images"] / name)
            write_whole(paths["prompts"], "".join(json.dumps(one) + "\n" for one in asked))
            ended = run_program(
                self._recipe.arguments(self._paths | paths),
                paths["output"],
                seconds=self._recipe.seconds,
                progress=lambda lines: _log.info("external %s: %d of %d images", self._recipe.name, lines, len(names)),
            )
            scores = read_scores(paths["output"], names)
        values = [self._value(scores, name) for name in names]
        self._report(ended, scores, np.array(values).reshape(len(names), -1))
        return values

    def _value(self, scores: Scores, name: str) -> float | tuple[float, ...]:
        """Returns an image's score, or (score, part, ...); what is missing is nan."""
        parts = tuple(scores.parts[name].get(dimension, np.nan) for dimension in self._recipe.dimensions)
        whole = scores.whole.get(name, float(np.mean(parts)) if parts else np.nan)
        return (whole, *parts) if parts else whole

    def _report(self, ended: str, scores: Scores, values: np.ndarray) -> None:
        """Says what went wrong; a study goes on without these numbers."""
        missing = int(np.isnan(values[:, 0]).sum())
        wrong = f"{len(scores.wrong)} lines were no scores of these images, first {scores.wrong[0]!r}" if scores.wrong else ""
        reasons = "; ".join(filter(None, [ended and f"the program {ended}", wrong])) or "the program did not write them"
        if missing or ended or wrong:
            _log.warning("external %s: %d of %d images have no score; %s", self._recipe.name, missing, len(values), reasons)
