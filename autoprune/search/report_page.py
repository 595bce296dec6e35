"""The report of a study: one HTML page that needs no network and holds everything one asks about a front.

The page is `page/report.html` with its style and script put in, and the study as one JSON text that the script draws.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image
from torch import Tensor

from autoprune.clips import ONCE_EACH, Course
from autoprune.files import write_whole
from autoprune.measure.latency import LatencyTable, plan_keys
from autoprune.measure.statistics import Interval
from autoprune.moving_pictures import LOSSLESS_SIDE, picture, shown_frames
from autoprune.policy import Policy
from autoprune.policy_text import schedule_lines
from autoprune.pruning.plan import compile_plan
from autoprune.search.export import HYPERVOLUME_REFERENCE
from autoprune.search.front import hypervolume, hypervolume_history, may_lead, objectives
from autoprune.search.picture_grid import GAIN, difference
from autoprune.search.plots import study_title
from autoprune.search.records import Measurement, StudyResult
from autoprune.search.study_points import DENSE, FRONT, KINDS, REJECTED, TOP, StudyPoint, study_points
from autoprune.search.tables import drop_text, findings, metric_text, relative

LARGEST_SIDE, CLIP_SIDE = 256, 192  # pixels of images and of videos' frames; larger ones are shrunk
_SLUGS = dict(zip(KINDS, ("rejected", "trial", "control", "preset", "search-front", "front-point", "dense"), strict=True))


@dataclass(frozen=True)
class Pictures:
    """Images [B, 3, H, W] in [0, 1] of the same prompts and seeds, or videos [B, 3, F, H, W] of `frame_rate` frames a second:
    dense, and of policies by trial number."""

    prompts: list[str]
    dense: Tensor
    policies: Mapping[int, Tensor]
    frame_rate: float = 1.0


@dataclass(frozen=True)
class ScaleTimes:
    """What a policy's scales take by the table of a study: `parts` are (label, index or -1, seconds, spread), in order; none
    where they depend on the data."""

    name: str
    parts: tuple[tuple[str, int, float, float], ...]

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """Yields (label, milliseconds, spread)."""
        return ((label, 1e3 * seconds, 1e3 * spread) for label, _, seconds, spread in self.parts)


@dataclass(frozen=True)
class PageDetails:
    """What the page says besides the result: under which conditions it was measured, commands by what they are for.

    `times` are those of single scales, which may be left out, as `pictures` may.
    """

    conditions: Mapping[str, str]
    commands: Mapping[str, str]
    times: tuple[ScaleTimes, ...] = ()
    pictures: Pictures | None = None


def save_report_page(result: StudyResult, details: PageDetails, path: Path) -> Path:
    """Writes the page, of a stopped study with what its search had measured, and returns its path."""
    points = {point.trial.number: point for point in study_points(result)}  # a preset of the front is one of the front
    document = {
        "title": study_title(result),
        "status": _status(result),
        "stopped": result.interrupted,
        "loss": result.loss_text,
        "findings": findings(result),
        "front": _front(sorted(points.values(), key=_order), result.loss_text),
        "history": _history(result),
        "dimensions": [vars(row) for row in result.dimensions],
        "times": [_bars(each) for each in details.times],
        "pictures": details.pictures and _pictures(details.pictures),
        "conditions": dict(details.conditions),
        "commands": dict(details.commands),
        "folder": relative(result.directory),
    }
    data = json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")  # no text of a user can end the script
    parts = {"title": escape(document["title"]), "data": data}
    parts |= {name: _packaged(f"report.{name}") for name in ("css", "js")}
    return write_whole(path, re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _packaged("report.html")))


def _packaged(name: str) -> str:
    return files("autoprune.search").joinpath("page", name).read_text(encoding="utf-8")


def _status(result: StudyResult) -> str:
    """Returns which prompts the numbers are from."""
    if result.interrupted:
        return "This study was stopped: all numbers are from the prompts of the search. The same command goes on with it."
    if not result.front:
        return "No policy kept the quality budget on held-out prompts: all numbers of trials are from the search."
    return "Front and presets: held-out prompts and seeds, timed interleaved with dense. Other trials: prompts of the search."


def _order(point: StudyPoint) -> tuple[int, float]:
    return KINDS.index(point.kind), point.measured.speed_up


def _front(points: list[StudyPoint], loss: str) -> dict[str, object]:
    """Returns the points in drawing order, and the corner beyond which rejected ones are drawn at the edge."""
    counting = [point.measured for point in points if point.kind != REJECTED]
    return {
        "kinds": {_SLUGS[kind]: kind for kind in KINDS if any(point.kind == kind for point in points)},
        "top": TOP * max(measured.loss for measured in counting) or 1.0,
        "right": max(measured.speed_up for measured in counting) * 1.08,
        "points": [_point(point, loss) for point in points],
    }


def _point(point: StudyPoint, loss: str) -> dict[str, object]:
    trial, tiers = point.trial, ", ".join(point.tiers)
    measured = {"search prompts": trial.measurement} | ({"held-out prompts": point.held_out} if point.held_out else {})
    label = " = ".join(filter(None, (tiers, trial.preset)))
    return {
        "trial": trial.number,
        "kind": _SLUGS[point.kind],
        "shape": trial.source.partition(":")[0],
        "x": point.measured.speed_up,
        "y": point.measured.loss,
        "label": label,
        "tiers": point.tiers,
        "title": f"{label or trial.source}, trial {trial.number}",
        "lines": schedule_lines(trial.policy),
        "numbers": {name: _numbers(numbers, loss) for name, numbers in measured.items()},
        "note": trial.note,
    }


def _numbers(measured: Measurement, loss: str) -> dict[str, str]:
    texts = {
        "speed-up [95 %]": f"{measured.speed_up:.2f}x{_interval(measured.speed_up_interval, digits=2)}",
        f"loss ({loss}) [95 %]": f"{measured.loss:.4f}{_interval(measured.loss_interval, digits=4)}",
        "latency, a batch": f"{1000 * measured.latency:.1f} ms ± {1000 * measured.latency_spread:.1f}",
        "dense latency": f"{1000 * measured.dense_latency:.1f} ms",
        "timing": "interleaved runs" if measured.latency_source == "measured" else "sum of the table of scales",
        "PSNR": f"{measured.psnr:.1f} dB",
    }
    if measured.scored:
        texts["score, dense"] = f"{100 * measured.score:.1f}, {100 * measured.score_dense:.1f} of 100"
        texts["score drop [95 %]"] = f"{drop_text(measured)} points"
    if measured.peak_memory_mb is not None:
        texts["peak memory"] = f"{measured.peak_memory_mb:.0f} MB"
    texts |= {f"{name} [95 %]": metric_text(value) for name, value in measured.metrics.items()}
    return texts | {"prompts, seed": f"{measured.prompts}, {measured.seed}"}


def _interval(interval: Interval | None, *, digits: int) -> str:
    """Returns ` [low, high]`, nothing where it was not measured."""
    return "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _history(result: StudyResult) -> dict[str, object]:
    """Returns the hypervolume after each trial, from the corner that front.json uses, and that of the presets alone."""
    presets = [trial for trial in result.trials if trial.source.startswith("preset:") and may_lead(trial)]
    return {
        "trials": [trial.number for trial in result.trials],
        "values": hypervolume_history(result.trials, HYPERVOLUME_REFERENCE),
        "presets": hypervolume((objectives(trial.measurement) for trial in presets), HYPERVOLUME_REFERENCE),
    }


def scale_times(result: StudyResult, table: LatencyTable | None, course: Course = ONCE_EACH) -> tuple[ScaleTimes, ...]:
    """Returns the times by scale of dense and every tier, nothing without a table; all runs of a scale together."""
    if table is None:
        return ()
    points = study_points(result)
    dense = [(DENSE, point.trial.policy) for point in points if point.kind == DENSE]
    tiers = [(point.label, point.trial.policy) for point in points if point.kind == FRONT and point.tiers]
    return tuple(ScaleTimes(name, _parts(policy, table, course)) for name, policy in dense + tiers)


def _parts(policy: Policy, table: LatencyTable, course: Course) -> tuple[tuple[str, int, float, float], ...]:
    plan = compile_plan(policy, policy.scale_schedule, policy.depth, course)
    times = None if policy.adaptive else table.parts(plan_keys(plan))
    if times is None:
        return ()
    parts: dict[int, tuple[str, int, float, float]] = {}
    for scale, (seconds, spread) in zip(plan.scales, times[:-1], strict=True):
        label = f"scale {scale.index} ({scale.grid[1]}x{scale.grid[2]})"
        *_, before, apart = parts.get(scale.index, (0.0, 0.0))
        parts[scale.index] = (label, scale.index, before + seconds, math.hypot(apart, spread))
    return (*parts.values(), ("text and decoding", -1, *times[-1]))


def _bars(times: ScaleTimes) -> dict[str, object]:
    keys = ("label", "scale", "ms", "spread")
    parts = ((label, scale, 1e3 * seconds, 1e3 * spread) for label, scale, seconds, spread in times.parts)
    return {"name": times.name, "parts": [dict(zip(keys, part, strict=True)) for part in parts]}


def _pictures(pictures: Pictures) -> dict[str, object]:
    dense, rate = shown_frames(pictures.dense, pictures.frame_rate)
    height, width = pictures.dense.shape[-2:]
    clip = {"frames": len(dense), "columns": _columns(len(dense)), "rate": rate, "ratio": width / height}

    def policy(images: Tensor) -> dict[str, list[str]]:
        frames, _ = shown_frames(images, pictures.frame_rate)
        return {"policy": _uris(frames), "difference": _uris(list(map(difference, dense, frames)))}

    return {
        "prompts": pictures.prompts,
        "gain": GAIN,
        "dense": _uris(dense),
        "policies": {number: policy(images) for number, images in pictures.policies.items()},
        "clip": clip if len(dense) > 1 else None,
    }


def _uris(frames: list[Tensor]) -> list[str]:
    return [_uri([picture(image) for image in images]) for images in zip(*frames, strict=True)]


def _uri(frames: list[Image.Image]) -> str:
    """Returns an image, or the frames of a video as one: side by side, so that the page shows all videos in step and halts."""
    side, quality = (LARGEST_SIDE, 90) if len(frames) == 1 else (CLIP_SIDE, 80)
    for image in frames:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    (width, height), columns = frames[0].size, _columns(len(frames))
    film = Image.new("RGB", (columns * width, -(-len(frames) // columns) * height))
    for number, image in enumerate(frames):
        film.paste(image, (number % columns * width, number // columns * height))
    packed = io.BytesIO()
    film.save(packed, "WEBP", lossless=max(width, height) <= LOSSLESS_SIDE, quality=quality)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()


def _columns(frames: int) -> int:
    return math.ceil(math.sqrt(frames))
