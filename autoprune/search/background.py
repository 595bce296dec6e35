"""A tracker in a thread of its own: a server that is slow or gone holds up no trial and keeps no study from ending."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from autoprune.search.records import StudyResult, TrialRecord
from autoprune.search.tracking import ANSWER_SECONDS, Dimensions, NullTracker, ReportFiles

TRIAL_SECONDS = 3.0  # waited for at most, until it is too long once: a healthy tracker then never works beside timed trials


class BackgroundTracker(NullTracker):
    """Hands everything to `tracker`, in order. `say` gets the line that it did not end within `patience` seconds."""

    def __init__(self, tracker: NullTracker, *, say: Callable[[str], None], patience: float = 3 * ANSWER_SECONDS) -> None:
        self._tracker, self._say, self._patience = tracker, say, patience
        self.tables_every = tracker.tables_every
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._prompt = True
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def trial_done(self, record: TrialRecord, *, trials: Sequence[TrialRecord], dimensions: Dimensions = ()) -> None:
        self._jobs.put(partial(self._tracker.trial_done, record, trials=tuple(trials), dimensions=tuple(dimensions)))
        done = threading.Event()
        self._jobs.put(done.set)
        self._prompt = self._prompt and done.wait(TRIAL_SECONDS)

    def finish(self, result: StudyResult, files: ReportFiles) -> None:
        self._jobs.put(partial(self._tracker.finish, result, files))

    def close(self) -> None:
        """Waits until everything is recorded, within the limit of patience."""
        self._jobs.put(self._tracker.close)
        self._jobs.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._say(f"tracker: no answer for {self._patience:.0f} s; what it lacks of this study is in the study folder.")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
