"""The early scales of a study's prompts, computed once and shared by its trials, within a limit of memory."""

from collections.abc import Callable

from autoprune.prefix import DensePrefix
from autoprune.pruning.plan import Plan
from autoprune.state import Snapshot


class SharedPrefixes:
    """Recorded dense generations by batch. A batch is recorded when first asked for, until one more would pass the limit."""

    def __init__(self, limit_mb: int) -> None:
        """`limit_mb` megabytes at most; 0 shares nothing."""
        self._limit = limit_mb * 2**20
        self._recorded: dict[int, DensePrefix] = {}

    def start(self, batch: int, plan: Plan, record: Callable[[], DensePrefix]) -> Snapshot | None:
        """Returns where a generation of this plan on a batch may start, None where it runs in full."""
        if batch not in self._recorded:
            used = sum(prefix.bytes for prefix in self._recorded.values())
            if used + used / max(1, len(self._recorded)) >= self._limit:
                return None
            self._recorded[batch] = record()
        return self._recorded[batch].start(plan)

    def clear(self) -> None:
        """Frees the memory, for good."""
        self._limit, self._recorded = 0, {}
