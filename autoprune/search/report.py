"""What a finished study leaves to look at: the report page, the Pareto plot, bars of the dimensions, picture grids of tiers."""

import json
import platform
import shlex
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from autoprune import __version__
from autoprune.backbones import Backbone
from autoprune.generation import generate
from autoprune.measure.device import device_conditions
from autoprune.measure.latency import LatencyTable
from autoprune.policy import Policy
from autoprune.search.dimension_plot import save_dimension_plot
from autoprune.search.picture_grid import save_picture_grid
from autoprune.search.plots import save_pareto_image
from autoprune.search.prompt_files import texts_sha256
from autoprune.search.publication import TABLE_FILE
from autoprune.search.quality import make_quality
from autoprune.search.records import StudyResult
from autoprune.search.report_page import PageDetails, Pictures, ScaleTimes, save_report_page, scale_times
from autoprune.search.settings import StorageSettings, StudySettings
from autoprune.search.storage import JOURNAL_FILE, shown
from autoprune.search.study_points import study_points
from autoprune.search.tables import relative
from autoprune.search.tracking import ReportFiles

PICTURES = 7  # held-out prompts that are drawn: one a task of the embedded world


def write_report(result: StudyResult, backbone: Backbone, settings: StudySettings, *, command: str) -> ReportFiles:
    """Writes page, plots and picture grids into the study folder and returns where they and the policies are.

    `command` is the command line of the study, which the page tells.
    """
    pictures = _pictures(result, backbone, settings)
    return ReportFiles(
        pareto_image=save_pareto_image(result, result.directory / "pareto.png"),
        page=write_page(result, backbone, settings, command=command, pictures=pictures),
        dimensions_image=save_dimension_plot(result.dimensions, result.directory / "dimensions.png"),
        picture_grids=_picture_grids(result, pictures),
        policies=tuple(member.policy_path for member in result.front if member.policy_path),
        scale_times=_scale_times(result, backbone),
    )


def write_page(
    result: StudyResult, backbone: Backbone, settings: StudySettings, *, command: str, pictures: Pictures | None = None
) -> Path:
    """Writes report.html, also for a study that was stopped after its first trial, and returns its path."""
    conditions, commands = _conditions(result, backbone, settings), _commands(result, command, settings.storage)
    details = PageDetails(conditions, commands, _scale_times(result, backbone), pictures)
    return save_report_page(result, details, result.directory / "report.html")


def _scale_times(result: StudyResult, backbone: Backbone) -> tuple[ScaleTimes, ...]:
    return scale_times(result, _table(result), backbone.model.course(backbone.scale_schedule()))


def _pictures(result: StudyResult, backbone: Backbone, settings: StudySettings) -> Pictures | None:
    """Draws the study's first held-out prompts with the seed the held-out numbers were measured with, None without tiers."""
    tiers = {member.trial.number: member for member in result.front if member.policy_path}
    if not tiers:
        return None
    quality, count = make_quality(settings.quality, settings.prompts), min(PICTURES, settings.quality.held_out_prompts)
    texts, seed = quality.texts(quality.prompts("held_out", count)), result.front[0].held_out.seed

    def drawn(policy: Policy | None) -> Tensor:
        parts = []
        for first in range(0, len(texts), settings.latency.batch):
            sampling, batch = replace(backbone.sampling, first_sample=first), texts[first : first + settings.latency.batch]
            parts.append(generate(backbone, batch, policy=policy, seed=seed, sampling=sampling))
        return torch.cat(parts)

    policies = {number: drawn(member.trial.policy) for number, member in tiers.items()}
    return Pictures(texts, drawn(None), policies, backbone.frame_rate)


def _picture_grids(result: StudyResult, pictures: Pictures | None) -> tuple[Path, ...]:
    grids = []
    for member in (member for member in result.front if member.policy_path):
        held, path = member.held_out, result.directory / f"pictures-{member.tier}.png"
        title = f"{member.tier}: {held.speed_up:.2f}x faster than dense, loss {held.loss:.3f}"
        images = {"dense": pictures.dense, "pruned": pictures.policies[member.trial.number]}
        grids.append(save_picture_grid(path, **images, prompts=pictures.prompts, title=title, rate=pictures.frame_rate))
    return tuple(grids)


def _conditions(result: StudyResult, backbone: Backbone, settings: StudySettings) -> dict[str, str]:
    """Returns where, with what and on which prompts the study measured."""
    quality, budget = settings.quality, settings.budget
    limit = "loss" if settings.prompts else "score drop"
    return {
        **{name.replace("_", " "): str(value) for name, value in device_conditions(backbone.device, backbone.dtype).items()},
        "python": platform.python_version(),
        "autoprune": __version__,
        "optuna": version("optuna"),
        "backbone": f"{backbone.name}, weights {backbone.revision}",
        "search space": f"{settings.space.name}, sha256 {settings.space.sha256()}",
        "sampler": f"{settings.sampler.name}, seed {settings.seed}",
        "batch": str(settings.latency.batch),
        "search prompts": _prompts(settings, "search", settings.seed),
        "held-out prompts": _prompts(settings, "held_out", settings.seed + quality.held_out_seed),
        "quality budget": f"{quality.name}: {limit} of at most {quality.max_drop:g}",
        "budget": ", ".join(f"{name} {value}" for name, value in asdict(budget).items() if value is not None),
        "trials": ", ".join(f"{count} {state}" for state, count in _states(result).items()),
    } | ({} if result.table_error is None else {"error of the table of scales": f"at most {100 * result.table_error:.1f} %"})


def _prompts(settings: StudySettings, split: str, seed: int) -> str:
    quality = make_quality(settings.quality, settings.prompts)
    texts = quality.texts(quality.prompts(split, settings.quality.counts[split]))
    source = settings.prompts.source if settings.prompts else "rendered scenes"
    return f"{len(texts)} from {source}, seed {seed}, sha256 {texts_sha256(texts)}"


def _states(result: StudyResult) -> dict[str, int]:
    states = [trial.state for trial in result.trials]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def _commands(result: StudyResult, command: str, storage: StorageSettings) -> dict[str, str]:
    folder = shlex.quote(relative(result.directory))
    commands = {"Search again, or go on with a stopped search (set study.name for a new one)": command}
    for point in (point for point in study_points(result) if point.tiers):
        file = f"{folder}/policies/{point.tiers[-1]}.json"
        commands[f"Measure {point.label} here, beside the numbers of its file"] = f"python -m autoprune.verify policy={file}"
        moving = any(frames > 1 for frames, _, _ in point.trial.policy.scale_schedule)
        what = "A video" if moving else "An image"
        commands[f"{what} with {point.label}"] = f'python -m autoprune.generate policy={file} prompt="..."'
    place = f"{folder}/{JOURNAL_FILE}" if storage.url is None else shown(storage)
    watch = {"Watch its trials (pip install optuna-dashboard)": f"optuna-dashboard {place}"}
    return commands if storage.name == "grpc" else commands | watch


def _table(result: StudyResult) -> LatencyTable | None:
    try:
        saved = json.loads((result.directory / TABLE_FILE).read_text())
    except (OSError, ValueError):
        return None
    return LatencyTable.from_plain(saved) if saved else None
