"""Which workers of a study are alive. On its own host a process is looked up; elsewhere it must count up its own number."""

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

BEATS = 4  # a lease: one lost, one late, and a worker still counts as alive
SIGN = "worker:"
_PRESENT: set[str] = set()  # tokens of this process: it may have led a study before, which ended with an error


class Board(Protocol):
    """What workers write to and read from: the user attributes of a study."""

    outages: int

    def attributes(self) -> Mapping[str, object]:
        """Returns all attributes."""

    def put(self, key: str, value: object, *, at_once: bool = False) -> None:
        """Sets one; `at_once` raises instead of waiting for a server that is gone."""


@dataclass(frozen=True)
class Worker:
    """One process of a study. In `space`, its boot and PID namespace, `pid` and `started` (clock ticks) mean one process."""

    name: str
    host: str
    space: str
    pid: int
    started: int
    token: str = field(default_factory=lambda: secrets.token_hex(6))

    @staticmethod
    def here(name: str) -> "Worker":
        """Returns this process as a worker called `name`."""
        return Worker(name, socket.gethostname(), _space(), os.getpid(), _started(os.getpid()) or 0)

    @property
    def label(self) -> str:
        """Returns who this is, for sentences."""
        return f"{self.name} ({self.host}, process {self.pid})"

    def is_dead(self) -> bool | None:
        """Returns whether its process is gone, or done with the study; None where this cannot be seen from here."""
        if not self.space or (self.host, self.space) != (socket.gethostname(), _space()):
            return None
        alive = _started(self.pid) == self.started
        return not alive or (self.pid == os.getpid() and self.token not in _PRESENT)


class Presence:
    """Context manager: while it is open, `worker` gives a sign on the board every `lease` / BEATS seconds."""

    def __init__(self, worker: Worker, board: Board, *, lease: float) -> None:
        self.worker, self.lease, self._board = worker, lease, board
        self._seen: dict[str, tuple[object, float]] = {}
        self._outages, self._stop = board.outages, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="presence", daemon=True)

    def __enter__(self) -> Self:
        _PRESENT.add(self.worker.token)
        self._board.put(SIGN + self.worker.token, {**asdict(self.worker), "count": 0})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _PRESENT.discard(self.worker.token)
        self._stop.set()
        self._thread.join(self.lease / BEATS)

    def is_gone(self, token: str) -> bool:
        """Returns whether a worker is known to be dead, or its sign has not changed for a lease of looking.

        What passes while the storage does not answer does not count: nobody can give a sign then.
        """
        if token == self.worker.token:
            return False
        if self._board.outages != self._outages:
            self._seen, self._outages = {}, self._board.outages
        sign = self._board.attributes().get(SIGN + token)
        dead = _worker(sign).is_dead() if isinstance(sign, dict) else None
        if dead is not None:
            return dead
        count, now = isinstance(sign, dict) and sign["count"], time.monotonic()
        known, since = self._seen.get(token, (None, now))
        self._seen[token] = (count, since if known == count else now)
        return now - self._seen[token][1] > self.lease

    def label(self, token: str | None) -> str:
        """Returns who a worker is or was; None is one that died before it wrote who it was."""
        sign = self._board.attributes().get(f"{SIGN}{token}")
        return _worker(sign).label if isinstance(sign, dict) else "of unknown name"

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self.lease / BEATS):
            count += 1
            with suppress(Exception):  # the next sign will do; who waits for the storage says so
                self._board.put(SIGN + self.worker.token, {**asdict(self.worker), "count": count}, at_once=True)


def _worker(sign: Mapping[str, object]) -> Worker:
    return Worker(**{name: value for name, value in sign.items() if name != "count"})


def _space() -> str:
    """Returns the boot and the PID namespace, empty where Linux does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Returns when a process began, in clock ticks since the boot; None where there is none or it only waits to be buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
