"""The early scales of a study's generations, each computed once and shared by later trials, within limits of memory.

Dense recordings save most: counted on the 209 trials of a study of the embedded backbone, 39 % of the milliseconds in scales.
Those of other trials let 23 trials begin later still (2048 MB), 49 without a limit: 5 and 12 % of what is left, 2 and 4 % of
the study's seconds, of which generating is a third.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.measure.latency import plan_keys
from autoprune.prefix import Recording, moved
from autoprune.pruning.plan import Plan
from autoprune.state import Snapshot


@dataclass(frozen=True)
class Start:
    """Where a generation may begin, and the latency table's keys of the scales that it need not run."""

    snapshot: Snapshot
    keys: tuple[str, ...]


@dataclass(eq=False)
class _Entry:
    """A recording of a batch with the table's keys of its scales as they ran; `far` is in the host's memory."""

    batch: int
    recording: Recording
    keys: tuple[str, ...]
    dense: bool
    used: int = 0
    far: bool = False


class SharedPrefixes:
    """Recorded generations by batch: of each a dense one, made when first asked for, and trials while there is room.

    What there is no room for moves from the device to the host's memory and from there is gone, trials before dense ones,
    the longest unused first. What lies in the host's memory is copied back whenever a generation starts from it.
    """

    def __init__(self, limit_mb: int, *, device: torch.device, host_mb: int = 0) -> None:
        """`limit_mb` megabytes on the device at most, 0 shares nothing; beside them `host_mb` of the host's, pinned."""
        self._device = device
        self._limits = {False: limit_mb * 2**20, True: host_mb * 2**20 if limit_mb else 0}
        self._entries: list[_Entry] = []
        self._dense_bytes = self._turn = 0

    @property
    def active(self) -> bool:
        """Returns whether anything is shared."""
        return self._limits[False] > 0

    def start(self, batch: int, plan: Plan, record: Callable[[], Recording]) -> Start | None:
        """Returns where a generation of this plan on a batch may start, None where it runs in full."""
        if self._wants_dense(batch):
            recording = record()
            self._dense_bytes = max(self._dense_bytes, recording.bytes)
            self._add(_Entry(batch, recording, tuple(plan_keys(recording.plan)), dense=True))
        entries = [entry for entry in self._entries if entry.batch == batch]
        starts = [(entry.recording.start(plan), entry) for entry in entries]
        snapshot, entry = max(starts, key=lambda pair: pair[0].scales if pair[0] else 0, default=(None, None))
        if snapshot is None:
            return None
        self._use(entry)
        return Start(moved(snapshot, self._back) if entry.far else snapshot, entry.keys[: snapshot.scales])

    def keep(self, batch: int, recording: Recording, keys: Sequence[str]) -> None:
        """Keeps what a trial recorded; `keys` are the table's for its scales as they ran, in order."""
        if self.active and recording.snapshots:
            self._add(_Entry(batch, recording, tuple(keys), dense=False))

    def clear(self) -> None:
        """Frees the memory, for good."""
        self._limits = dict.fromkeys(self._limits, 0)
        self.drop()

    def drop(self) -> None:
        """Frees the memory; what is shared again is recorded again."""
        self._entries = []

    def bytes(self, *, far: bool = False) -> int:
        """Returns what is kept on the device or `far` from it, memory that recordings share counted once."""
        storages: dict[int, int] = {}
        for entry in self._entries:
            if entry.far == far:
                storages.update(entry.recording.storages)
        return sum(storages.values())

    def _wants_dense(self, batch: int) -> bool:
        dense = [entry.batch for entry in self._entries if entry.dense]
        room = sum(limit // max(1, self._dense_bytes) for limit in self._limits.values())
        return batch not in dense and len(dense) < room

    def _add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._use(entry)
        for far in (False, True):
            while self.bytes(far=far) > self._limits[far]:
                self._move_out(
                    min((each for each in self._entries if each.far == far), key=lambda each: (each.dense, each.used))
                )

    def _use(self, entry: _Entry) -> None:
        self._turn += 1
        entry.used = self._turn

    def _move_out(self, entry: _Entry) -> None:
        if entry.far or not self._limits[True]:
            self._entries.remove(entry)
        else:
            entry.recording, entry.far = moved(entry.recording, _to_host), True

    def _back(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
