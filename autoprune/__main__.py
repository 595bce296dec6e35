"""`python -m autoprune`: searches pruning schedules of a backbone and leaves plots and policy files in the study folder."""

import os
import shlex
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from autoprune.errors import UserError
from autoprune.files import check_writable

if TYPE_CHECKING:
    from autoprune.search.config import RunSettings
    from autoprune.search.crew import Crew
    from autoprune.search.records import StudyResult
    from autoprune.search.settings import StudySettings
    from autoprune.search.tracking import NullTracker, ReportFiles

_SEARCH_EXTRA = (
    "hydra",
    "omegaconf",
    "optuna",
    "torchmetrics",
    "wandb",
    "pydantic",
    "rich",
    "PIL",
    "matplotlib",
    "scipy",
    "yaml",
)


def main() -> int:
    """Runs the command; returns 0, 2 after bad input, 130 after Ctrl-C. Every error is one sentence on standard error."""
    missing = [name for name in _SEARCH_EXTRA if find_spec(name) is None]
    if missing:
        return _refuse(f'the search needs {", ".join(missing)}, not installed here; run: pip install "autoprune[search]"')
    from autoprune.search.config import run_composed

    try:
        run_composed(_search)
    except UserError as error:
        return _refuse(str(error))
    except BaseException as error:
        if not _comes_from_ctrl_c(error):
            raise
        print("autoprune: stopped; finished trials are kept and the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _comes_from_ctrl_c(error: BaseException | None) -> bool:
    """Returns whether Ctrl-C is this error or behind it: cleaning up after it, a library may raise an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _refuse(sentence: str) -> int:
    print(f"autoprune: {sentence}", file=sys.stderr)
    return 2


def _search(run: "RunSettings") -> None:
    check_writable(run.study.folder, what="output folder", remedy="set study.dir to another")
    from autoprune.search.crew import SUPERVISED, crew_here, use_own_device
    from autoprune.search.workers import run_workers

    crew = crew_here(os.environ, join=run.join)
    if run.workers == 1 or SUPERVISED in os.environ:
        use_own_device(crew, os.environ)
        _take_part(run, crew)
        return
    if crew.name or run.several_jobs:
        what = "a multirun" if run.several_jobs else "torchrun or Slurm"
        raise UserError(f"workers must be 1 under {what}, which starts processes itself, got {run.workers}.")
    import torch

    on_gpus = torch.cuda.is_available() and not (run.backbone.device or "").startswith("cpu")
    run_workers(run.workers, sys.argv[1:], folder=run.study.folder, on_gpus=on_gpus)


def _take_part(run: "RunSettings", crew: "Crew") -> None:
    """Loads the backbone and runs this process's part of the study; who leads it writes and prints the report."""
    from rich.console import Console

    from autoprune.search.fitting import fitted, with_keys_placed
    from autoprune.search.progress import RichProgress
    from autoprune.search.report import write_page, write_report
    from autoprune.search.study import of_device, run_study
    from autoprune.search.worker_log import log_apart, terminal

    screen = terminal(os.environ)
    log_apart(crew, run.study.folder, screen)
    backbone = with_keys_placed(run.study, run.backbone.load())
    settings = fitted(of_device(run.study, backbone) if run.per_device else run.study, backbone)
    tracker, command = _tracker(run, settings.folder, screen), _command(settings)
    try:
        with RichProgress(Console(file=screen)) as progress:
            result = run_study(settings, backbone=backbone, tracker=tracker, progress=progress, crew=crew)
            if result is None:
                return
            if result.interrupted:
                if result.trials and result.dense:
                    write_page(result, backbone, settings, command=command)
                raise KeyboardInterrupt
            progress.phase("plots and pictures", 1)
            files = write_report(result, backbone, settings, command=command)
            progress.step()
        tracker.finish(result, files)
    finally:
        tracker.close()
    _print(result, files)


def _print(result: "StudyResult", files: "ReportFiles") -> None:
    from rich.console import Console

    from autoprune.search.tables import findings, metric_tables, relative, result_table

    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(result_table(result))
    for table in metric_tables(result):
        console.print(table)
    for sentence in findings(result):
        console.print(sentence)
    console.print(f"report: {relative(files.page)}; Pareto plot: {relative(files.pareto_image)}")


def _command(settings: "StudySettings") -> str:
    """Returns the command line, without a password in it."""
    from autoprune.search.storage import shown

    line = shlex.join(["python", "-m", "autoprune", *sys.argv[1:]])
    return line.replace(settings.storage.url, shown(settings.storage)) if settings.storage.url else line


def _tracker(run: "RunSettings", folder: Path, screen: TextIO) -> "NullTracker":
    from autoprune.search.background import BackgroundTracker
    from autoprune.search.tracking import NullTracker, WandbTracker

    if run.tracker.name == "none":
        return NullTracker()
    project, say = run.tracker.project or "autoprune", partial(print, file=screen)
    return BackgroundTracker(WandbTracker(folder, project=project, settings=run.composed, say=say), say=say)


if __name__ == "__main__":
    sys.exit(main())
