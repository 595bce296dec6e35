"""The study folder: one owner at a time, one backbone and space for good, every file written whole or not at all."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from autoprune.errors import UserError
from autoprune.files import write_whole

IDENTITY_FILE = "study.json"
_ASPECTS = {
    "backbone": "backbone",
    "weights": "weights",
    "sampling": "sampling",
    "scale_schedule": "scale schedule",
    "space": "search space",
    "space_sha256": "version of the search space",
    "device": "device or dtype",
    "settings": "measurement settings",
}


class StudyFolder:
    """Context manager holding the folder's lock. Raises UserError when it is unwritable, in use, or another study's."""

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.path, self._identity, self._lock = Path(path), json.loads(json.dumps(identity)), None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "study.lock").open("w")
        except OSError as error:
            raise UserError(f"study folder {str(self.path)!r} cannot be written ({error.strerror}); set study.dir.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"study folder {str(self.path)!r} is in use by another run; wait for it or set study.name."
            ) from None
        self._check_identity()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

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

    def _check_identity(self) -> None:
        """Compares with study.json, or writes it. A journal without study.json is not ours to continue."""
        known = self.read_json(IDENTITY_FILE)
        if known is None and self.file("study.journal").exists():
            raise UserError(
                f"study folder {str(self.path)!r} has a journal but no readable study.json; set another study.name."
            )
        for key, what in _ASPECTS.items() if known is not None else ():
            if known.get(key) != self._identity.get(key):
                raise UserError(
                    f"study folder {str(self.path)!r} belongs to another {what} "
                    f"({_short(known.get(key))}, now {_short(self._identity.get(key))}); set another study.name."
                )
        if known is None:
            self.write(IDENTITY_FILE, json.dumps(self._identity, indent=2) + "\n")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
