"""Where a study is recorded besides its folder: one Weights & Biases run per study, or nowhere.

A study never depends on its tracker: the first failure is said in one line and the study goes on without it.
"""

import json
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.search.records import StudyResult, TrialRecord

if TYPE_CHECKING:
    from wandb import Run

_COLUMNS = ("number", "source", "state", "feasible", "latency", "speed_up", "loss", "score_drop", "seconds", "schedule")


@dataclass(frozen=True)
class ReportFiles:
    """The files a finished study is shown by; paths of what was written."""

    pareto_image: Path
    page: Path
    dimensions_image: Path
    picture_grids: tuple[Path, ...] = ()
    policies: tuple[Path, ...] = ()


class NullTracker:
    """Records nothing."""

    def trial_done(self, record: TrialRecord, *, best_speed_up: float) -> None:
        """Records one finished trial."""

    def finish(self, result: StudyResult, files: ReportFiles) -> None:
        """Records the table of all trials, the front, plots, pictures and policy files."""

    def close(self) -> None:
        """Ends the run, whether or not the study reached its end."""


class WandbTracker(NullTracker):
    """One W&B run whose step is the trial number; it begins with the first trial it is told.

    `directory` is the study folder; its name is the run's. `settings` is the configuration as plain data. Without an
    API key (environment or netrc) the run is offline. `say` gets the one line that tells so, or that W&B failed.
    """

    def __init__(self, directory: Path, *, project: str, settings: Mapping[str, object], say: Callable[[str], None]) -> None:
        self._directory, self._project, self._settings, self._say = directory, project, dict(settings), say
        self._run, self._broken = None, False

    def trial_done(self, record: TrialRecord, *, best_speed_up: float) -> None:
        values = {f"trial/{key}": value for key, value in _numbers(record).items()}
        values |= {"trial/feasible": int(record.feasible), "study/best_speed_up": best_speed_up}
        self._guarded(lambda: self._started().log(values, step=record.number))

    def finish(self, result: StudyResult, files: ReportFiles) -> None:
        self._guarded(lambda: self._log_result(result))
        self._guarded(lambda: self._log_files(files))

    def close(self) -> None:
        if self._run is not None:
            self._guarded(self._run.finish)
            self._run = None

    def _guarded(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:  # whatever a third party raises must not cost a trial
            self._broken = True
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
                settings=wandb.Settings(silent=True, console="off"),
            )
            if mode == "offline":
                where = Path(self._run.dir).parent
                self._say(f"tracker: no W&B key, so the run is offline; upload it with `wandb sync {where}`.")
        return self._run

    def _run_id(self) -> str:
        """Returns the id this study's run has had since its first start, so that a resumed study stays one run."""
        path = self._directory / "wandb_run_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        return path.read_text().strip()

    def _log_result(self, result: StudyResult) -> None:
        import wandb

        run, rows = self._started(), [_row(record) for record in result.trials]
        run.log({"trials": wandb.Table(columns=list(_COLUMNS), data=rows)})
        for member in filter(lambda member: member.tier, result.front):
            run.summary[f"{member.tier}/speed_up"] = member.held_out.speed_up
            run.summary[f"{member.tier}/loss"] = member.held_out.loss

    def _log_files(self, files: ReportFiles) -> None:
        import wandb

        shown: dict[str, object] = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in files.picture_grids}
        shown["pareto"] = wandb.Image(str(files.pareto_image))
        shown["dimensions"] = wandb.Image(str(files.dimensions_image))
        shown["report"] = wandb.Html(files.page.read_text(), inject=False)
        self._started().log(shown)
        for path in files.policies:
            artifact = wandb.Artifact(f"{self._directory.name}-{path.stem}", type="autoprune-policy")
            artifact.add_file(str(path))
            self._started().log_artifact(artifact)


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


def _row(record: TrialRecord) -> list[object]:
    measured = record.measurement
    numbers = [None] * 4 if measured is None else [measured.latency, measured.speed_up, measured.loss, measured.score_drop]
    schedule = json.dumps(json.loads(record.policy.key())["scales"])
    return [record.number, record.source, record.state, record.feasible, *numbers, record.seconds, schedule]
