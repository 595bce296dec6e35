"""CUDA graphs: what the blocks of a scale launch, captured once and replayed, and the memory that stays in place for it.

A graph repeats kernels at the addresses they were captured with. What it reads is therefore copied to slots that every
generation finds at the same place, and a graph is replayed only where all of it lies as it lay then.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from autoprune.backbones.family import Transformer
from autoprune.backbones.kv_buffer import KeyValueBuffer

MOST_GRAPHS = 256  # kept of one backbone; a dense generation has one a scale, and others for every length of text
MOST_MET = 4096
LOG = logging.getLogger(__name__)
Held = TypeVar("Held")
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CudaGraphs:
    """Captures calls as CUDA graphs that share one pool of memory: what a call leaves there, the next ones overwrite."""

    _one_at_a_time = Lock()  # torch captures one graph at a time in a process

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):  # libraries take their workspaces at the first product on a stream
            torch.mm(*(torch.ones(8, 8, device=device) for _ in range(2)))
        self._first = self(partial(torch.zeros, 1, device=device))  # a pool without any graph could not be used again

    def __call__(self, run: Callable[[], object]) -> Callable[[], None]:
        """Captures what `run` launches without running it and returns its replay."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.stream(torch.cuda.current_stream(self._stream.device))
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with self._one_at_a_time, here, torch.cuda.graph(graph, **options):
            run()
        return graph.replay


class GraphCache:
    """The graphs of one backbone and the memory they use, which one generation at a time borrows.

    Keys and values have room for a dense generation. New weights are noticed where their tensors are others; forward hooks
    run while capturing only.
    """

    def __init__(self, device: torch.device, *, capturing: Callable[[torch.device], Capture] = CudaGraphs) -> None:
        """`capturing(device)` makes, at the first use, what turns a call into its replay."""
        self.device, self._capturing = device, capturing
        self._lock = Lock()
        self._last: torch.cuda.Event | None = None
        self.clear()

    def clear(self) -> None:
        """Frees everything."""
        self._capture: Capture | None = None
        self._graphs: OrderedDict[Hashable, tuple[Callable[[], None], object]] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._slots: dict[Hashable, Tensor] = {}
        self._buffers: list[KeyValueBuffer] = []
        self._weights: tuple[int, ...] = ()

    @property
    def key_bytes(self) -> int:
        """Returns the bytes of the K/V buffers, which generations without graphs find taken."""
        return sum(buffer.keys.nbytes + buffer.values.nbytes for buffer in self._buffers)

    @contextmanager
    def borrowed(self) -> Iterator["GraphCache | None"]:
        """Lends all this to one generation; yields None to another that runs meanwhile, and outside of inference mode."""
        plain = torch.is_inference_mode_enabled() and not torch.is_autocast_enabled(self.device.type)
        if not plain or not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            with self._in_order():
                yield self
        finally:
            self._lock.release()

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Makes the device wait for the last borrower, since threads may use streams of their own."""
        if self.device.type != "cuda":
            yield
            return
        if self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)
        try:
            yield
        finally:
            self._last = torch.cuda.current_stream(self.device).record_event()

    def buffers(self, model: Transformer, rows: int, capacity: int) -> list[KeyValueBuffer] | None:
        """Returns an empty K/V buffer a layer, always in the same memory; None where there is not enough of it."""
        weights = tuple(tensor.data_ptr() for layer in model.layers() for tensor in (*layer.parameters(), *layer.buffers()))
        held = self._buffers[0].keys.shape if self._buffers else (0, 0, 0)
        if weights != self._weights or rows > held[0] or capacity > held[2]:
            self.clear()
            try:
                self._buffers = model.buffers_for(rows, [capacity] * model.depth)
            except torch.OutOfMemoryError:
                return None
            self._weights = weights
        return [buffer.emptied(rows) for buffer in self._buffers]

    def hold(self, name: Hashable, value: Held) -> Held:
        """Returns a tensor, or a tuple or dataclass of some, in the slots of this name, copied unless it is there already."""
        if isinstance(value, Tensor):
            return self._held(name, value)
        if isinstance(value, tuple):
            return tuple(self.hold((name, place), part) for place, part in enumerate(value))
        if is_dataclass(value):
            parts = {entry.name: getattr(value, entry.name) for entry in fields(value)}
            return replace(value, **{key: self.hold((name, key), part) for key, part in parts.items()})
        return value

    def meets(self, description: Hashable) -> bool:
        """Returns whether a call was described so before: the first runs as it is, which costs least if no other follows."""
        known = description in self._met
        self._met[description] = None
        self._met.move_to_end(description)
        if len(self._met) > MOST_MET:
            self._met.popitem(last=False)
        return known

    def __contains__(self, key: Hashable) -> bool:
        """Returns whether something was captured under this key."""
        return key in self._graphs

    def capture(self, key: Hashable, run: Callable[[], object]) -> None:
        """Captures what `run` launches, and keeps what it returns; nothing where it cannot be captured."""
        results: list[object] = []
        try:
            self._capture = self._capture or self._capturing(self.device)
            self._graphs[key] = self._capture(lambda: results.append(run())), results[0]
        except RuntimeError as error:
            LOG.warning("a scale runs without a CUDA graph: %s", error)
            self._graphs[key] = (lambda: None), None
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def replay(self, key: Hashable) -> object | None:
        """Does again what was captured and returns what it returned then, with new values; None where nothing was captured."""
        self._graphs.move_to_end(key)
        replay, result = self._graphs[key]
        replay()
        return result

    def _held(self, name: Hashable, value: Tensor) -> Tensor:
        memory = self._slots.get(name)
        if memory is None or memory.nbytes < value.nbytes:
            memory = self._slots[name] = torch.empty(value.nbytes, dtype=torch.uint8, device=value.device)
        dense = value if value.is_contiguous() else torch.empty_like(value, device="meta")
        slot = memory[: value.nbytes].view(value.dtype).as_strided(dense.shape, dense.stride())
        if layout(slot) == layout(value):
            return value
        inside = value.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        return slot.copy_(value.clone() if inside else value)


def layout(value: object) -> Hashable:
    """Returns where every tensor of a nested tuple or dataclass lies and how."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    if is_dataclass(value):
        return tuple(layout(getattr(value, entry.name)) for entry in fields(value))
    return tuple(map(layout, value)) if isinstance(value, tuple | list) else value
