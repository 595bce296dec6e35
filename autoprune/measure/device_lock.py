"""One measurement at a time: whoever generates and times on a device holds its lock, in every process of the machine."""

import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_LOG = logging.getLogger("autoprune")
SAID_AFTER = 5.0  # seconds of waiting


class DeviceLock:
    """Context manager, not to be nested; the kernel frees the lock of a process that dies."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self._path = (folder or Path(tempfile.gettempdir())) / f"autoprune-{_name(device)}.lock"
        self.is_processor = device.type == "cpu"
        self._file: int | None = None

    def __enter__(self) -> Self:
        self._file, began = _opened(self._path), time.monotonic()
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if time.monotonic() - began > SAID_AFTER:
            _LOG.info("waited %.0f s for the device, which another process was measuring on.", time.monotonic() - began)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
        self._file = None


def _opened(path: Path) -> int:
    """Opens the file, also one of another user, which Linux forbids to open for creation in a shared folder."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        before = os.umask(0)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        finally:
            os.umask(before)


def _name(device: torch.device) -> str:
    """Returns the device in words that every process of the machine uses, whatever part of the GPUs it sees."""
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)
