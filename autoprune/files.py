"""Files written whole or not at all, and folders tried before any work is done. The one place where files are written."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoprune.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class NoSpace(UserError):
    """A disk that is full, beyond its quota or read-only."""


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path of the same name to write to, for libraries that write files; what is there in the end becomes `path`.

    It lies in a folder of its own beside `path`, so that processes that write the same file at once never meet and nothing is
    left after an error. A device or pipe is written to as it is. Raises NoSpace where there is none.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent, ignore_cleanup_errors=True) as folder:
            temporary = Path(folder) / Path(path).name
            yield temporary
            _to_disk(temporary)
            os.replace(temporary, target)
    except OSError as error:
        raise no_space(error, path) or error from None


def write_whole(path: str | os.PathLike, content: str | bytes) -> Path:
    """Writes a file whole or not at all, text as UTF-8, its folder included, and returns its path."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def no_space(error: OSError, path: str | os.PathLike) -> NoSpace | None:
    """Returns what to raise where an error means that there is no space, None for every other error."""
    if error.errno not in _NO_SPACE:
        return None
    where = os.fspath(path)
    return NoSpace(f"{where!r} must be written, but: {error.strerror}; make space there, and the same command goes on.")


def check_writable(folder: Path, *, what: str, remedy: str) -> None:
    """Raises UserError, before any work, when nothing can be written to the folder: `what` it is, and what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{what} {str(folder)!r} must be writable ({error.strerror}); {remedy}.") from None


def _to_disk(path: Path) -> None:
    """Waits until a file is on the disk: renamed before that, it may be found empty after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
