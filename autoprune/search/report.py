"""What a finished study leaves to look at: the Pareto plot twice, bars of the dimensions, one picture grid per tier."""

from collections.abc import Iterator
from pathlib import Path

from autoprune.backbones import Backbone
from autoprune.generation import generate
from autoprune.search.dimension_plot import save_dimension_plot
from autoprune.search.picture_grid import save_picture_grid
from autoprune.search.plots import save_pareto_image, save_pareto_page
from autoprune.search.records import FrontMember, StudyResult
from autoprune.search.tracking import ReportFiles
from autoprune.testbed.captions import TASKS, prompt_set


def write_report(result: StudyResult, backbone: Backbone) -> ReportFiles:
    """Writes plots and picture grids into the study folder and returns where they and the policies are."""
    exported = [member for member in result.front if member.policy_path is not None]
    return ReportFiles(
        pareto_image=save_pareto_image(result, result.directory / "pareto.png"),
        pareto_page=save_pareto_page(result, result.directory / "pareto.html"),
        dimensions_image=save_dimension_plot(result.dimensions, result.directory / "dimensions.png"),
        picture_grids=tuple(_picture_grids(exported, backbone, folder=result.directory)),
        policies=tuple(member.policy_path for member in exported),
    )


def _picture_grids(exported: list[FrontMember], backbone: Backbone, *, folder: Path) -> Iterator[Path]:
    """Draws held-out prompts, one a task, with the seed the held-out numbers were measured with."""
    if not exported:
        return
    prompts = [prompt.text for prompt in prompt_set("held_out", len(TASKS))]
    seed = exported[0].held_out.seed
    dense = generate(backbone, prompts, seed=seed)
    for member in exported:
        pruned = generate(backbone, prompts, policy=member.trial.policy, seed=seed)
        held = member.held_out
        title = f"{member.tier}: {held.speed_up:.2f}x faster than dense, loss {held.loss:.3f}"
        path = folder / f"pictures-{member.tier}.png"
        yield save_picture_grid(path, dense=dense, pruned=pruned, prompts=prompts, title=title)
