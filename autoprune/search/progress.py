"""What the user sees while a study runs: one bar per phase, the best speed-up so far and the time left."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from autoprune.search.records import StudyResult, TrialRecord


class NullProgress:
    """Shows nothing; also the base of what does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def phase(self, name: str, total: int) -> None:
        """Begins the next phase (`total` steps) and closes the one before."""

    def advance(self, count: int = 1) -> None:
        """Counts finished steps of the current phase."""

    def trial_done(self, record: TrialRecord, best_speed_up: float, seconds_left: float) -> None:
        """Counts one finished trial."""

    def finish(self, result: StudyResult) -> None:
        """Closes the last phase of a study that ran to its end."""


class RichProgress(NullProgress):
    """Bars on `console`, by default standard error, so that standard output keeps only the result."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console or Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def phase(self, name: str, total: int) -> None:
        self._close_phase()
        self._task = self._bars.add_task(name, total=max(total, 1), note="")

    def advance(self, count: int = 1) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)

    def trial_done(self, record: TrialRecord, best_speed_up: float, seconds_left: float) -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=1, note=f"best {best_speed_up:.2f}x, {clock(seconds_left)} left")

    def finish(self, result: StudyResult) -> None:
        self._close_phase()

    def _close_phase(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=self._bars.tasks[-1].total)


def clock(seconds: float) -> str:
    """Returns seconds as `m:ss`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"
