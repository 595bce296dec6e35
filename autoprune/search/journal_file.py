"""The journal file of a study: many processes append to it, any of them may be killed at any time, the disk may fill up.

Optuna's own backend takes a symbolic link as its lock, which a killed process leaves behind for everybody to wait 30 s, and
glues the next record to a half-written one, after which nobody can read the study.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from autoprune.errors import UserError
from autoprune.files import no_space, write_whole

_LOG = logging.getLogger("autoprune")
LOCK_SUFFIX = ".flock"  # `.lock` is a link of Optuna's in studies from before


def open_journal(path: str | os.PathLike) -> JournalStorage:
    """Returns the storage in a journal file, made or repaired where that is needed.

    Raises UserError for a file that is damaged before its end, and where there is no space.
    """
    return JournalStorage(JournalFile(Path(path)))


class JournalFile(BaseJournalBackend):
    """One JSON record a line. What follows the last whole record is moved to `NAME.damaged-N` before the next one is written.

    The lock is the kernel's (flock on `NAME.flock`): it is free as soon as its process is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._guard = path, path.with_name(path.name + LOCK_SUFFIX)
        self._offsets = [0]  # of every record that was read, and of what follows the last one
        self._checked = self._checked_lines = 0  # the bytes and lines at the start that hold whole records
        with self._opened():
            pass

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, object]]:
        """Yields records; one that a process is still writing, or died in, is not there yet."""
        number = min(log_number_from, len(self._offsets) - 1)
        with self._path.open("rb") as file:
            file.seek(self._offsets[number])
            lines = file.read().split(b"\n")[:-1]
        for index, line in enumerate(lines):
            record = _record(line)
            if record is None:
                if any(map(_record, lines[index + 1 :])):
                    raise self._damaged(number + 1)
                return
            number += 1
            if number == len(self._offsets):
                self._offsets.append(self._offsets[-1] + len(line) + 1)
            if number > log_number_from:
                yield record

    def append_logs(self, logs: list[dict[str, object]]) -> None:
        """Writes records and waits until they are on the disk; of one that does not fit there, nothing stays."""
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._opened() as file:
            try:
                _write(file, content)
                os.fsync(file.fileno())
            except BaseException:
                self._cut(file, content)
                raise
            self._checked, self._checked_lines = self._checked + len(content), self._checked_lines + len(logs)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """Yields the repaired file, locked, unbuffered and at its end."""
        try:
            with self._guard.open("ab") as guard:
                fcntl.flock(guard, fcntl.LOCK_EX)
                try:
                    with self._path.open("a+b", buffering=0) as file:
                        self._repair(file)
                        yield file
                finally:
                    fcntl.flock(guard, fcntl.LOCK_UN)  # or a child forked meanwhile would keep it
        except OSError as error:
            raise no_space(error, self._path) or error from None

    def _repair(self, file: BinaryIO) -> None:
        """Checks what was added since the last check, and moves what follows the last whole record out of the file."""
        size = os.fstat(file.fileno()).st_size
        if size < self._checked:
            raise UserError(f"journal {str(self._path)!r} lost records while it was in use; put a whole copy of it back.")
        file.seek(self._checked)
        lines = file.read().split(b"\n")
        for index, line in enumerate(lines[:-1]):
            if _record(line) is None:
                if any(map(_record, lines[index + 1 : -1])):
                    raise self._damaged(self._checked_lines + 1)
                break
            self._checked, self._checked_lines = self._checked + len(line) + 1, self._checked_lines + 1
        if size > self._checked:
            self._set_aside(file, size)

    def _set_aside(self, file: BinaryIO, size: int) -> None:
        file.seek(self._checked)
        number = 1
        while (aside := self._path.with_name(f"{self._path.name}.damaged-{number}")).exists():
            number += 1
        write_whole(aside, file.read())
        os.ftruncate(file.fileno(), self._checked)
        os.fsync(file.fileno())
        _LOG.warning("journal: %d bytes of a record that was not finished are in %s now.", size - self._checked, aside.name)

    def _cut(self, file: BinaryIO, content: bytes) -> None:
        """Takes back what was written of `content` after its last whole record."""
        written = os.fstat(file.fileno()).st_size - self._checked
        os.ftruncate(file.fileno(), self._checked + content[:written].rfind(b"\n") + 1)

    def _damaged(self, line: int) -> UserError:
        return UserError(
            f"line {line} of journal {str(self._path)!r} is damaged, and records follow it; put a whole copy of the file back, "
            f"or keep the trials before it with `head -n {line - 1}`."
        )


def _record(line: bytes) -> dict[str, object] | None:
    """Returns the record in a line, None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("op_code"), int) else None


def _write(file: BinaryIO, content: bytes) -> None:
    """Writes everything; a disk that fills up takes a part first and refuses the rest."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
