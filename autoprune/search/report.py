"""What a finished study leaves to look at: the Pareto plot twice, bars of the dimensions, one picture grid per tier."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autoprune.backbones import Backbone
from autoprune.generation import generate
from autoprune.policy import Policy
from autoprune.search.dimension_plot import save_dimension_plot
from autoprune.search.picture_grid import save_picture_grid
from autoprune.search.plots import save_pareto_image, save_pareto_page
from autoprune.search.quality import make_quality
from autoprune.search.records import FrontMember, StudyResult
from autoprune.search.settings import StudySettings
from autoprune.search.tracking import ReportFiles

PICTURES = 7  # held-out prompts that are drawn: one a task of the embedded world


def write_report(result: StudyResult, backbone: Backbone, settings: StudySettings) -> ReportFiles:
    """Writes plots and picture grids into the study folder and returns where they and the policies are."""
    exported = [member for member in result.front if member.policy_path is not None]
    return ReportFiles(
        pareto_image=save_pareto_image(result, result.directory / "pareto.png"),
        pareto_page=save_pareto_page(result, result.directory / "pareto.html"),
        dimensions_image=save_dimension_plot(result.dimensions, result.directory / "dimensions.png"),
        picture_grids=tuple(_picture_grids(exported, backbone, settings, folder=result.directory)),
        policies=tuple(member.policy_path for member in exported),
    )


def _picture_grids(exported: list[FrontMember], backbone: Backbone, settings: StudySettings, *, folder: Path) -> Iterator[Path]:
    """Draws the study's first held-out prompts with the seed the held-out numbers were measured with."""
    if not exported:
        return
    quality = make_quality(settings.quality, settings.prompts)
    texts = quality.texts(quality.prompts("held_out", min(PICTURES, settings.quality.held_out_prompts)))

    def drawn(policy: Policy | None) -> Tensor:
        parts = []
        for first in range(0, len(texts), settings.latency.batch):
            sampling = replace(backbone.sampling, first_sample=first)
            batch, seed = texts[first : first + settings.latency.batch], exported[0].held_out.seed
            parts.append(generate(backbone, batch, policy=policy, seed=seed, sampling=sampling))
        return torch.cat(parts)

    dense = drawn(None)
    for member in exported:
        held = member.held_out
        title = f"{member.tier}: {held.speed_up:.2f}x faster than dense, loss {held.loss:.3f}"
        path = folder / f"pictures-{member.tier}.png"
        yield save_picture_grid(path, dense=dense, pruned=drawn(member.trial.policy), prompts=texts, title=title)
