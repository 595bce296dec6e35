"""Files written whole or not at all, and folders tried before any work is done."""

import os
import tempfile
from pathlib import Path

from autoprune.errors import UserError


def write_whole(path: str | os.PathLike, text: str) -> Path:
    """Writes a text file whole or not at all, its folder included, and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path


def check_writable(folder: Path, *, what: str, remedy: str) -> None:
    """Raises UserError, before any work, when nothing can be written to the folder: `what` it is, and what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{what} {str(folder)!r} must be writable ({error.strerror}); {remedy}.") from None
