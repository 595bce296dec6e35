"""Peak memory of a stretch of work: allocated device memory on CUDA, resident memory of the process elsewhere."""

import contextlib
import resource
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from autoprune.backbones.allocator import release_freed_memory

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Context manager; afterwards `megabytes` holds the peak inside it.

    On Linux CPUs freed memory is given back and the resident peak reset at entry (clear_refs 5), which slows the next
    run a little: do not time it. Where that is not possible it is the peak since the process started, an upper bound.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.megabytes = device, 0.0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            release_freed_memory()
            _reset_resident_peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._device.type == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated(self._device) / 2**20
        else:
            self.megabytes = _resident_peak()


def _reset_resident_peak() -> None:
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


def _resident_peak() -> float:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
