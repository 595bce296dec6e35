"""The study folder: one leader at a time, one backbone and space for good, every file written whole or not at all."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from autoprune.errors import UserError
from autoprune.files import write_whole
from autoprune.search.storage import JOURNAL_FILE

IDENTITY_FILE = "study.json"
_ASPECTS = {
    "backbone": "backbone",
    "weights": "weights",
    "sampling": "sampling",
    "scale_schedule": "scale schedule",
    "space": "search space",
    "space_sha256": "version of the search space",
    "device": "device, dtype, kernel or torch",
    "settings": "measurement settings",
}


class StudyFolder:
    """Context manager. Raises UserError when the folder is unwritable or another study's."""

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.path, self.identity, self._lock = Path(path), json.loads(json.dumps(identity)), None
        self.leads = False

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "study.lock").open("w")
        except OSError as error:
            raise UserError(f"study folder {str(self.path)!r} cannot be written ({error.strerror}); set study.dir.") from None
        known = self.read_json(IDENTITY_FILE)
        if known is not None:
            self.check(known)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def try_to_lead(self) -> bool:
        """Returns whether this process holds the folder's lock, taking it if nobody does; the kernel frees that of the dead."""
        if not self.leads:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            self.leads = True
        return True

    def stop_leading(self) -> None:
        """Gives the lock to whoever wants it."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.leads = False

    def claim(self) -> None:
        """Writes study.json, once. A journal without study.json is not ours to continue."""
        if self.read_json(IDENTITY_FILE) is not None:
            return
        if self.file(JOURNAL_FILE).exists():
            raise UserError(
                f"study folder {str(self.path)!r} has a journal but no readable study.json; set another study.name."
            )
        self.write(IDENTITY_FILE, json.dumps(self.identity, indent=2) + "\n")

    def check(self, known: Mapping[str, object]) -> None:
        """Raises UserError where a study that is known by this differs from this one."""
        for key, what in _ASPECTS.items():
            if known.get(key) != self.identity.get(key):
                raise UserError(
                    f"study {str(self.path)!r} belongs to another {what} "
                    f"({_short(known.get(key))}, now {_short(self.identity.get(key))}); set another study.name"
                    + (", or study.per_device=true." if key == "device" else ".")
                )

    def file(self, name: str) -> Path:
        """Returns the path of a file of the study."""
        return self.path / name

    def write(self, name: str, text: str) -> Path:
        """Writes a file atomically."""
        return write_whole(self.path / name, text)

    def read_json(self, name: str) -> dict[str, object] | None:
        """Reads a JSON file of the study; None when it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
