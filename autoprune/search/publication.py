"""What the leader of a study shows and leaves while it runs: bars, tracker, trials.csv, front.json."""

import json
import logging
from collections.abc import Mapping, Sequence

from autoprune.search.ablation import dimension_rows
from autoprune.search.export import write_front, write_trials
from autoprune.search.folder import StudyFolder
from autoprune.search.front import search_front
from autoprune.search.progress import NullProgress
from autoprune.search.records import DimensionRow, StudyResult, TrialRecord
from autoprune.search.shared_study import SharedStudy
from autoprune.search.space import SearchSpace
from autoprune.search.tracking import NullTracker

_LOG = logging.getLogger("autoprune")
TABLE_FILE = "latency_table.json"


class Publication:
    """`progress` and `tracker` of the process; both are told of everybody's trials, in the order they were read."""

    def __init__(
        self, folder: StudyFolder, study: SharedStudy, space: SearchSpace, *, tracker: NullTracker, progress: NullProgress
    ) -> None:
        self.progress, self._tracker, self._tracker_broken = progress, tracker, False
        self._folder, self._study, self._space = folder, study, space

    def trial_done(self, record: TrialRecord, trials: Sequence[TrialRecord], *, seconds_left: float) -> None:
        """Shows a record; `trials` are all that were read up to it."""
        best = max((trial.measurement.speed_up for trial in search_front(trials)), default=1.0)
        workers = self._study.workers()
        self.progress.trial_done(record, best_speed_up=best, seconds_left=seconds_left, workers=workers)
        if self._tracker_broken:
            return
        try:
            self._tracker.trial_done(record, trials=trials, dimensions=self._dimensions_so_far(trials))
        except Exception as error:  # a tracker error never loses a trial
            self._tracker_broken = True
            _LOG.warning("tracker: %s: %s; the study goes on without it.", type(error).__name__, error)

    def leave(self, result: StudyResult, table: Mapping[str, object]) -> None:
        """Writes everything known so far into the folder."""
        write_trials(self._folder, result.trials)
        if result.dense is not None:
            write_front(self._folder, result, search_front(result.trials))
        if table:
            self._folder.write(TABLE_FILE, json.dumps(table))

    def dimensions(self, trials: Sequence[TrialRecord]) -> tuple[DimensionRow, ...]:
        """Returns what each dimension of the space did in these trials."""
        vectors = self._study.vectors(trial.number for trial in trials)
        used = [(vectors[trial.number], trial) for trial in trials if trial.number in vectors]
        return tuple(dimension_rows(self._space, used))

    def _dimensions_so_far(self, trials: Sequence[TrialRecord]) -> tuple[DimensionRow, ...]:
        """Returns the dimensions now and then, as often as the tracker wants them."""
        every = self._tracker.tables_every
        return self.dimensions(trials) if every and len(trials) % every == 0 else ()
