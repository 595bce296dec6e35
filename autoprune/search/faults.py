"""What goes wrong in one trial, and what becomes of it.

A policy that runs out of memory, or whose images are not images, breaks a constraint as one beyond the quality budget does: its
trial is told as finished and infeasible, and the sampler learns to stay away. It has no latency and no loss that a model could
be fitted to, so it counts in the model of the constraint only. Every other error is a failed trial, unknown to the sampler.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from autoprune.errors import UserError
from autoprune.files import NoSpace, no_space

MEMORY, IMAGES = "memory", "images"
VIOLATION = 1.0  # by how much either constraint is broken, as samplers of Optuna want to know: more than any score drop
VALUES = (0.0, 1.0)  # the objectives they want as well: dense latency, an unrelated image
MOST_FAILURES, MOST_FAULTS = 3, 30  # in a row; alike presets may all need too much memory, and spaces have up to 24
_ALLOCATORS = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
_REMEDIES = {
    MEMORY: "free memory on the device, or lower latency.batch",
    IMAGES: "give other weights, or set backbone.dtype=float32",
}


class Fault(Exception):
    """A trial that ended without numbers: the `constraint` it broke (MEMORY or IMAGES) and a `note` for its record."""

    def __init__(self, constraint: str, note: str) -> None:
        super().__init__(note)
        self.constraint, self.note = constraint, note


class Streak:
    """The trials in a row that did not finish. MOST_FAILURES errors or MOST_FAULTS faults end a study."""

    def __init__(self) -> None:
        self._errors = self._faults = 0

    def add(self, error: Exception, fault: Fault | None) -> None:
        """Counts a trial. Raises its error, UserError for a fault, where it is the last one too many."""
        if fault is None:
            self._errors += 1
            if self._errors >= MOST_FAILURES:
                raise error
            return
        self._faults += 1
        if self._faults >= MOST_FAULTS:
            remedy = f"{_REMEDIES[fault.constraint]}, and the same command goes on"
            raise UserError(f"{MOST_FAULTS} trials in a row did not finish, the last with: {fault.note}; {remedy}.") from None


def fault_of(error: BaseException) -> Fault | None:
    """Returns the fault that an error of a trial, or one behind it, stands for, None for any other error.

    Raises NoSpace for a full disk: no trial is to blame.
    """
    if isinstance(error, OSError) and (full := no_space(error, error.filename or "the temporary folder")):
        raise full
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, Fault | NoSpace):
            break
        if _is_out_of_memory(behind):
            return Fault(MEMORY, f"out of memory ({(str(behind).splitlines() or [type(behind).__name__])[0][:160]})")
        behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)
    if isinstance(behind, NoSpace):
        raise behind
    return behind


def broke(constraints: dict[str, float]) -> bool:
    """Returns whether the constraints of a told trial say that it ended with a fault."""
    return MEMORY in constraints or IMAGES in constraints


def check_images(images: Tensor) -> None:
    """Raises Fault for images [B, 3, H, W] of which one has a value that is not finite, or one colour only."""
    low, high = images.flatten(1).aminmax(dim=1)
    broken = ~(low.isfinite() & high.isfinite() & (low < high))
    if broken.any():
        kind = "one colour only" if (low.isfinite() & high.isfinite())[broken].all() else "values that are not finite"
        raise Fault(IMAGES, f"{int(broken.sum())} of {len(images)} images have {kind}")


@contextmanager
def dense_runs(backbone: str) -> Iterator[None]:
    """Turns a fault of the dense model into the UserError that ends a study: there is nothing to compare with."""
    try:
        yield
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            raise
        raise UserError(
            f"every policy is compared with dense {backbone}, but: {fault.note}; {_REMEDIES[fault.constraint]}."
        ) from None


def release_memory(device: torch.device) -> None:
    """Frees what a failed generation left; to be called when no exception holds its frames any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _ALLOCATORS)
