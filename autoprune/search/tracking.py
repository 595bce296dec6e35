"""Where a study is recorded besides its folder: one Weights & Biases run per study, or nowhere.

A study never depends on its tracker: the first failure is said in one line and the study goes on without it.
"""

import io
import json
import netrc
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.files import write_whole
from autoprune.policy_text import schedule_lines
from autoprune.search.export import HYPERVOLUME_REFERENCE
from autoprune.search.front import hypervolume, objectives, search_front
from autoprune.search.records import DimensionRow, FrontMember, StudyResult, TrialRecord
from autoprune.search.report_page import ScaleTimes

if TYPE_CHECKING:
    from wandb import Image, Run, Table, Video

TABLES_EVERY = 25  # trials, after which the growing tables are sent again
MOST_FAILURES = 5
ANSWER_SECONDS = 30.0  # that a server has to begin a run, and as long again to end it

Dimensions = Sequence[DimensionRow]
_TRIAL = ("number", "source", "state", "feasible", "latency", "speed_up", "loss", "score_drop", "seconds", "schedule")
_MEMBER = ("tier", "trial", "source", "speed_up", "loss", "score_drop", "score_drop_interval", "schedule")
_SCALE = ("policy", "part", "milliseconds", "spread")


@dataclass(frozen=True)
class ReportFiles:
    """The files a finished study is shown by, paths of what was written, and the times of single scales."""

    pareto_image: Path
    page: Path
    dimensions_image: Path
    picture_grids: tuple[Path, ...] = ()
    policies: tuple[Path, ...] = ()
    scale_times: tuple[ScaleTimes, ...] = ()


class NullTracker:
    """Records nothing. `tables_every` says after how many trials it wants the dimensions too, 0 for never."""

    tables_every = 0

    def trial_done(self, record: TrialRecord, *, trials: Sequence[TrialRecord], dimensions: Dimensions = ()) -> None:
        """Records one finished trial; `trials` are all so far, this one included."""

    def finish(self, result: StudyResult, files: ReportFiles) -> None:
        """Records the table of all trials, the front, plots, pictures and policy files."""

    def close(self) -> None:
        """Ends the run, whether or not the study reached its end."""


class WandbTracker(NullTracker):
    """One W&B run whose step counts trials as they end, whoever evaluates them; it begins with the first trial it is told.

    `directory` is the study folder; its name is the run's. `settings` is the configuration as plain data. Without an
    API key (environment or netrc) the run is offline. `say` gets the one line that tells so, or that W&B failed.
    """

    tables_every = TABLES_EVERY

    def __init__(self, directory: Path, *, project: str, settings: Mapping[str, object], say: Callable[[str], None]) -> None:
        self._directory, self._project, self._settings, self._say = directory, project, dict(settings), say
        self._run, self._failures = None, 0

    def trial_done(self, record: TrialRecord, *, trials: Sequence[TrialRecord], dimensions: Dimensions = ()) -> None:
        def send() -> None:
            values = _trial_values(record, trials)
            if len(trials) % TABLES_EVERY == 0:
                values |= {
                    "trials": _table(_TRIAL, map(_row, trials)),
                    "search_front": _table(_TRIAL, map(_row, search_front(trials))),
                }
            if dimensions:
                values["dimensions"] = _dimension_table(dimensions)
            self._started().log(values, step=len(trials) - 1)

        self._guarded(send)

    def finish(self, result: StudyResult, files: ReportFiles) -> None:
        self._guarded(lambda: self._log_result(result, files))
        self._guarded(lambda: self._log_files(result, files))

    def close(self) -> None:
        if self._run is not None:
            self._guarded(self._run.finish)
            self._run = None

    def _guarded(self, action: Callable[[], object]) -> None:
        """Runs an action; the first that fails is told. Without a run, or after MOST_FAILURES, nothing more is tried."""
        if self._failures >= (MOST_FAILURES if self._run else 1):
            return
        try:
            action()
        except Exception as error:  # whatever a third party raises must not cost a trial
            self._failures += 1
            if self._failures == 1:
                reason = (str(error).splitlines() or ["no message"])[0]
                self._say(f"tracker: W&B failed ({type(error).__name__}: {reason}); the study goes on without it.")

    def _started(self) -> "Run":
        if self._run is None:
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
            self._run = wandb.init(
                project=self._project,
                name=self._directory.name,
                id=self._run_id(),
                resume="allow" if mode == "online" else None,
                dir=str(self._directory),
                mode=mode,
                job_type="search",
                config=self._settings,
                settings=wandb.Settings(silent=True, console="off", init_timeout=ANSWER_SECONDS, finish_timeout=ANSWER_SECONDS),
            )
            if mode == "offline":
                where = Path(self._run.dir).parent
                self._say(f"tracker: no W&B key, so the run is offline; upload it with `wandb sync {where}`.")
        return self._run

    def _run_id(self) -> str:
        """Returns the id this study's run has had since its first start, so that a resumed study stays one run."""
        path = self._directory / "wandb_run_id"
        if not path.exists():
            write_whole(path, secrets.token_hex(4))
        return path.read_text().strip()

    def _log_result(self, result: StudyResult, files: ReportFiles) -> None:
        run = self._started()
        tables = {"trials": _table(_TRIAL, map(_row, result.trials)), "front": _table(_MEMBER, map(_member_row, result.front))}
        if result.dimensions:
            tables["dimensions"] = _dimension_table(result.dimensions)
        if files.scale_times:
            rows = ([each.name, *part] for each in files.scale_times for part in each.rows())
            tables["scales"] = _table(_SCALE, rows)
        run.log(tables)
        for member in filter(lambda member: member.tier, result.front):
            run.summary[f"{member.tier}/speed_up"] = member.held_out.speed_up
            run.summary[f"{member.tier}/loss"] = member.held_out.loss

    def _log_files(self, result: StudyResult, files: ReportFiles) -> None:
        import wandb

        shown: dict[str, object] = {f"pictures/{path.stem}": _pictures(path) for path in files.picture_grids}
        shown["pareto"] = wandb.Image(str(files.pareto_image))
        shown["dimensions_plot"] = wandb.Image(str(files.dimensions_image))
        shown["report"] = wandb.Html(files.page.read_text(), inject=False)
        self._started().log(shown)
        for path in files.policies:
            artifact = wandb.Artifact(
                f"{self._directory.name}-policy", type="autoprune-policy", metadata=_held_out(result, path)
            )
            artifact.add_file(str(path))
            self._started().log_artifact(artifact, aliases=[path.stem])


def _pictures(path: Path) -> "Image | Video":
    """Returns a picture grid, one that moves as GIF: wandb.Video takes no WebP, which wandb.Image may show as a still."""
    import wandb
    from PIL import Image

    if path.suffix != ".webp":
        return wandb.Image(str(path))
    packed = io.BytesIO()
    with Image.open(path) as grid:
        grid.save(packed, "GIF", save_all=True, loop=0)
    packed.seek(0)
    return wandb.Video(packed, format="gif")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _numbers(record: TrialRecord) -> dict[str, float]:
    if record.measurement is None:
        return {}
    values = asdict(record.measurement)
    return {key: value for key, value in values.items() if isinstance(value, int | float) and key not in ("seed", "prompts")}


def _trial_values(record: TrialRecord, trials: Sequence[TrialRecord]) -> dict[str, object]:
    """Returns the numbers of a trial, and how far the study has come with it."""
    front = search_front(trials)
    return {f"trial/{key}": value for key, value in _numbers(record).items()} | {
        "trial/number": record.number,
        "trial/feasible": int(record.feasible),
        "study/best_speed_up": max((trial.measurement.speed_up for trial in front), default=1.0),
        "study/front_members": len(front),
        "study/hypervolume": hypervolume((objectives(trial.measurement) for trial in front), HYPERVOLUME_REFERENCE),
    }


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> "Table":
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def _dimension_table(rows: Sequence[DimensionRow]) -> "Table":
    return _table([entry.name for entry in fields(DimensionRow)], (astuple(row) for row in rows))


def _row(record: TrialRecord) -> list[object]:
    measured = record.measurement
    numbers = [None] * 4 if measured is None else [measured.latency, measured.speed_up, measured.loss, measured.score_drop]
    schedule = "; ".join(schedule_lines(record.policy))
    return [record.number, record.source, record.state, record.feasible, *numbers, record.seconds, schedule]


def _member_row(member: FrontMember) -> list[object]:
    held, interval = member.held_out, member.held_out.score_drop_interval
    numbers = [held.speed_up, held.loss, held.score_drop, interval and json.dumps(interval)]
    return [member.tier, member.trial.number, member.trial.source, *numbers, "; ".join(schedule_lines(member.trial.policy))]


def _held_out(result: StudyResult, path: Path) -> dict[str, object]:
    """Returns the held-out numbers of an exported policy."""
    return next(member.held_out.to_plain() for member in result.front if member.policy_path == path)
