"""What the user sees while a study runs: one bar per phase, the best speed-up so far and the time left."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from autoprune.search.records import TrialRecord


class NullProgress:
    """Shows nothing; also the base of what does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def phase(self, name: str, total: int) -> None:
        """Begins the next phase (`total` steps) and closes the one before."""

    def step(self) -> None:
        """Counts one finished step of the current phase."""

    def trial_done(self, record: TrialRecord, *, best_speed_up: float, seconds_left: float | None, workers: int = 1) -> None:
        """Counts one finished trial; `seconds_left` is None while it is unknown; `workers` evaluate others."""


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

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def phase(self, name: str, total: int) -> None:
        self._bars.start()  # not before: of several processes only the one that leads has phases
        self._close_phase()
        self._task = self._bars.add_task(name, total=max(total, 1), note="")

    def step(self) -> None:
        if self._task is not None:
            self._bars.advance(self._task)

    def trial_done(self, record: TrialRecord, *, best_speed_up: float, seconds_left: float | None, workers: int = 1) -> None:
        if self._task is not None:
            left = "" if seconds_left is None else f", {clock(seconds_left)} left"
            many = f", {workers} workers" if workers > 1 else ""
            self._bars.update(self._task, advance=1, note=f"best {best_speed_up:.2f}x{many}{left}")

    def _close_phase(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=max(self._bars.tasks[-1].completed, 1))


def clock(seconds: float) -> str:
    """Returns seconds as `m:ss`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"
