"""Who leads a study: opens and closes its runs, queues presets, takes trials from dead workers, validates and reports.

The leader holds the lock of the study folder, which the kernel frees when it dies, and is named in the storage, for workers
whose folder is another one.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from autoprune.errors import UserError
from autoprune.search.crew import Crew
from autoprune.search.folder import IDENTITY_FILE, StudyFolder
from autoprune.search.presence import BEATS, Presence
from autoprune.search.settings import StorageSettings
from autoprune.search.shared_study import SharedStudy
from autoprune.search.space import Preset
from autoprune.search.study_board import Run

_LOG = logging.getLogger("autoprune")
POLL_SECONDS = 0.5
CLAIM_SECONDS = 2.0  # in which two machines that claim at once hear of each other
PATIENCE_SECONDS = 1800.0  # that a worker waits for somebody who leads: models take their time to load


def await_folder(folder: StudyFolder, crew: Crew, storage: StorageSettings) -> None:
    """Returns when the folder is this study's: claimed here, or by another worker. Raises UserError where it is in use."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        if crew.may_lead and folder.try_to_lead():
            folder.claim()
            return
        if not crew.shared:
            raise UserError(
                f"study folder {str(folder.path)!r} is in use by another run; wait for it, set study.name, or help it with "
                "join=true."
            )
        known = folder.read_json(IDENTITY_FILE)
        if known is not None:
            folder.check(known)
            return
        if storage.name != "journal":
            return
        time.sleep(POLL_SECONDS)
    raise UserError(f"study folder {str(folder.path)!r} has no study to help; start one without join=true, on this storage.")


class Leadership:
    """What a process knows of its run, and whether it leads it."""

    def __init__(
        self, folder: StudyFolder, study: SharedStudy, presence: Presence, *, crew: Crew, presets: Sequence[Preset]
    ) -> None:
        """`study` has been read once: what was before is told from what comes."""
        self.folder, self.study, self.crew, self.worker = folder, study, crew, presence.worker
        self._presence, self._presets, self._before = presence, presets, study.board.run()
        self.leads = False

    def join(self) -> Self:
        """Waits until there is a run, opening one if it is this worker's to do so; `over` where it came and went.

        Raises UserError when the study is of something else, is led by another command, or nobody leads it.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            known = self.study.board.identity()
            if known is not None:
                self.folder.check(known)
            if self.take() or self.study.board.run().is_open or self.over:
                return self
            if time.monotonic() > until:
                raise UserError("nobody leads this study; start it once without join=true, on the same storage.")
            time.sleep(POLL_SECONDS)
            self.study.sync()

    @property
    def over(self) -> bool:
        """Returns whether the run that this worker belongs to has been closed."""
        run = self.study.board.run()
        mine = bool(self.crew.token) and run.token == self.crew.token
        return not run.is_open and (mine or run.number > self._before.number)

    def take(self) -> bool:
        """Returns whether this worker leads, taking the lead if it may and nobody else does."""
        if not self.leads and not self.over and self.crew.may_lead and self.folder.try_to_lead():
            self.leads = self._claimed()
            if self.leads:
                self._open()
            else:
                self.folder.stop_leading()
        return self.leads

    def reclaim(self) -> bool:
        """Takes the trials of dead workers back; returns whether there were any."""
        said = self.study.reclaim(self._presence)
        for sentence in said:
            _LOG.warning("%s", sentence)
        return bool(said)

    def close(self) -> None:
        """Ends the run for every worker, if this one leads it."""
        if self.leads:
            self.study.board.set_run(replace(self.study.board.run(), is_open=False))
            self.leads = False

    def _claimed(self) -> bool:
        """Returns whether the storage names this worker; raises UserError where another command's does and none may share."""
        while self._is_led():
            if self.crew.shared:
                return False
            self._wait_for_sign()
        self.study.board.set_leader(self.worker)
        if self.crew.shared and self.study.board.is_remote:  # else the folder's lock is enough
            time.sleep(CLAIM_SECONDS)
            self.study.sync()
        return self.study.board.leader() == self.worker.token

    def _is_led(self) -> bool:
        leader = self.study.board.leader()
        mine = leader in ("", self.worker.token)
        return self.study.board.run().is_open and not mine and not self._presence.is_gone(leader)

    def _wait_for_sign(self) -> None:
        """Waits as long as a lease takes to be broken; raises UserError where the leader is alive."""
        who, until = self._presence.label(self.study.board.leader()), time.monotonic() + self._presence.lease * (1 + 2 / BEATS)
        _LOG.warning("this study was led by %s; waiting to see whether it still is.", who)
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            self.study.sync()
            if not self._is_led():
                return
        raise UserError(f"this study is led by {who}; wait for it, set study.name, or help it with join=true.")

    def _open(self) -> None:
        """Takes what the leader before left. A run that is taken over has its presets: one that failed is not tried again."""
        self.study.sync()
        run = self.study.board.run()
        if self.study.board.identity() is None:
            self.study.board.set_identity(self.folder.identity)
        if self.reclaim():
            self.study.sync()
        if not (run.is_open and self.crew.token and run.token == self.crew.token):
            self.study.enqueue_presets(self._presets)
            self.study.board.set_run(Run(run.number + 1, True, time.time(), self.crew.token))
