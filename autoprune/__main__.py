"""`python -m autoprune`: searches pruning schedules of a backbone and leaves plots and policy files in the study folder."""

import shlex
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from autoprune.errors import UserError
from autoprune.files import check_writable

if TYPE_CHECKING:
    from autoprune.search.config import RunSettings
    from autoprune.search.tracking import NullTracker

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
    from rich.console import Console

    from autoprune.search.fitting import fitted
    from autoprune.search.progress import RichProgress
    from autoprune.search.report import write_page, write_report
    from autoprune.search.study import run_study
    from autoprune.search.tables import findings, metric_tables, relative, result_table

    backbone = run.backbone.load()
    settings = fitted(run.study, backbone)
    tracker, command = _tracker(run), shlex.join(["python", "-m", "autoprune", *sys.argv[1:]])
    try:
        with RichProgress() as progress:
            result = run_study(settings, backbone=backbone, tracker=tracker, progress=progress)
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
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(result_table(result))
    for table in metric_tables(result):
        console.print(table)
    for sentence in findings(result):
        console.print(sentence)
    console.print(f"report: {relative(files.page)}; Pareto plot: {relative(files.pareto_image)}")


def _tracker(run: "RunSettings") -> "NullTracker":
    from autoprune.search.background import BackgroundTracker
    from autoprune.search.tracking import NullTracker, WandbTracker

    if run.tracker.name == "none":
        return NullTracker()
    project, folder = run.tracker.project or "autoprune", run.study.folder
    return BackgroundTracker(WandbTracker(folder, project=project, settings=run.composed, say=_say), say=_say)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
