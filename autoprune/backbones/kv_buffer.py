"""Keys and values of one layer and one generation, in buffers allocated once (the official code re-concatenates).

They lie on the device, or in host memory, from where each layer's come to the device while the layer before computes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import count
from typing import Self
from weakref import ref

import torch
from torch import Tensor

HeldKeys = tuple[Tensor, Tensor, tuple[int, ...]]


Shape = tuple[int, int, int, int]
BufferKind = Callable[..., "KeyValueBuffer"]


class KeyValueBuffer:
    """Grows from 0 to `capacity` tokens without copying what is already there. `sizes` are the tokens of each append."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> None:
        """`shape` is (rows, heads, capacity, head width)."""
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.sizes: list[int] = []

    @property
    def device(self) -> torch.device:
        """Where it takes keys and values, and hands them out."""
        return self.keys.device

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v [R, H, L, D] and returns all keys and values so far [R, H, length, D]."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        self.sizes.append(k.shape[2])
        return self.keys[:, :, :end], self.values[:, :, :end]

    def beside(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns all keys and values so far with k, v [R, H, L, D] behind them, which are not kept."""
        return torch.cat((self.keys[:, :, : self.length], k), 2), torch.cat((self.values[:, :, : self.length], v), 2)

    def held(self) -> HeldKeys:
        """Returns views of all keys and values so far and the tokens of each append."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], tuple(self.sizes)

    def fill(self, held: HeldKeys) -> None:
        """Copies into an empty buffer what another one held."""
        keys, values, sizes = held
        self.append(keys, values)
        self.sizes = list(sizes)

    def emptied(self, rows: int) -> Self:
        """Returns an empty buffer in the memory of this one's first rows."""
        other = copy(self)
        other.keys, other.values, other.length, other.sizes = self.keys[:rows], self.values[:rows], 0, []
        return other

    def keep_rows(self, rows: slice) -> None:
        """Forgets the rows of a dropped guidance branch."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def forget(self, appends: range) -> None:
        """Forgets the tokens of some appends, by their place among those still held."""
        start = sum(self.sizes[: appends.start])
        end = start + sum(self.sizes[appends.start : appends.stop])
        for held in (self.keys, self.values):
            held[:, :, start : start + self.length - end] = held[:, :, end : self.length].clone()
        self.length -= end - start
        del self.sizes[appends.start : appends.stop]

    def keep(self, index: Tensor) -> None:
        """Keeps the tokens `index` [R, H, K] of each row and head, as one append."""
        rows = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        for held in (self.keys, self.values):
            held[:, :, : index.shape[2]] = held.gather(2, rows)
        self.length = index.shape[2]
        self.sizes = [self.length]


class HostedBuffer(KeyValueBuffer):
    """The same with keys and values in host memory, pinned for CUDA. What it hands out lies in a slot of its KeyStream, which
    the layer after the next one overwrites."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype, device: torch.device, stream: "KeyStream") -> None:
        """`shape` as above; `device` is where attention runs. Heads lie behind tokens, so that those of a row are one piece."""
        rows, heads, capacity, width = shape
        place = {"device": "cpu", "pin_memory": True} if device.type == "cuda" else {"device": device}
        memory = [torch.empty(rows, capacity, heads, width, dtype=dtype, **place) for _ in range(2)]
        self.keys, self.values = (each.transpose(1, 2) for each in memory)
        self.length, self.sizes = 0, []
        self._device, self._stream, self.content = device, stream, stream.new_content()

    @property
    def device(self) -> torch.device:
        """Where it takes keys and values, and hands them out."""
        return self._device

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As above; the copy to host memory is queued."""
        start, end = self.length, self.length + k.shape[2]
        keys, values = self._stream.on_device(self)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.length = end
        self.sizes.append(k.shape[2])
        self._stream.store(self, range(start, end))
        return keys[:, :, :end], values[:, :, :end]

    def beside(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As above."""
        keys, values = self._stream.on_device(self)
        return torch.cat((keys[:, :, : self.length], k), 2), torch.cat((values[:, :, : self.length], v), 2)

    def held(self) -> HeldKeys:
        """As above, in host memory."""
        self._stream.wait()
        return super().held()

    def emptied(self, rows: int) -> Self:
        """As above."""
        other = super().emptied(rows)
        other.content = self._stream.new_content()
        return other

    def keep_rows(self, rows: slice) -> None:
        """As above."""
        super().keep_rows(rows)
        self.content = self._stream.new_content()

    def forget(self, appends: range) -> None:
        """As above, by the host, which waits for queued copies."""
        self._stream.wait()
        super().forget(appends)
        self.content = self._stream.new_content()

    def keep(self, index: Tensor) -> None:
        """As above."""
        rows = index[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        for held in self._stream.on_device(self):
            held[:, :, : index.shape[2]] = held.gather(2, rows)
        self.length = index.shape[2]
        self.sizes = [self.length]
        self._stream.store(self, range(self.length))


class KeyStream:
    """Makes the buffers of one generation's layers in host memory and brings each to the device when its layer attends, those
    of the next on a CUDA stream of their own meanwhile. Two slots of the largest layer's size are all that the device holds."""

    def __init__(self) -> None:
        self._layers: list[ref[HostedBuffer]] = []
        self._slots: list[_Slot] = []
        self._copies: torch.cuda.Stream | None = None
        self._contents = count(1)

    def __call__(self, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> HostedBuffer:
        """Returns the buffer of the next layer."""
        if device.type == "cuda" and self._copies is None:
            self._copies = torch.cuda.Stream(device)
        buffer = HostedBuffer(shape, dtype=dtype, device=device, stream=self)
        self._layers.append(ref(buffer))
        return buffer

    def new_content(self) -> int:
        """Returns a number that no slot knows, so that what they hold of a buffer is not taken for what it holds now."""
        return next(self._contents)

    def on_device(self, buffer: HostedBuffer) -> tuple[Tensor, Tensor]:
        """Returns keys and values [R, H, capacity, D] in a slot, what the buffer holds in place; queues those of the next."""
        if not self._slots:
            size = max(layer.keys.numel() for each in self._layers if (layer := each()) is not None)
            self._slots = [_Slot(buffer, size, self._copies) for _ in range(2)]
        if all(slot.content != buffer.content for slot in self._slots):
            self._load(self._slots[1], buffer)
        if self._slots[0].content != buffer.content:
            self._slots.reverse()
        slot, other = self._slots
        if slot.ready is not None:
            torch.cuda.current_stream(buffer.device).wait_event(slot.ready)
        following = self._after(buffer)
        if following is not None and following.content not in (slot.content, other.content):
            self._load(other, following)
        return slot.views(buffer)

    def store(self, buffer: HostedBuffer, tokens: range) -> None:
        """Queues the copy of some tokens to host memory, from the slot of the buffer that was last asked for."""
        with self._queued(buffer.device):
            for held, own in zip(self._slots[0].views(buffer), (buffer.keys, buffer.values), strict=True):
                _copy(held, own, tokens)

    def wait(self) -> None:
        """Makes the host wait for all queued copies."""
        if self._copies is not None:
            self._copies.synchronize()

    def _load(self, slot: "_Slot", buffer: HostedBuffer) -> None:
        slot.content = buffer.content
        with self._queued(buffer.device):
            for held, own in zip(slot.views(buffer), (buffer.keys, buffer.values), strict=True):
                _copy(own, held, range(buffer.length))
            slot.ready = self._copies.record_event() if self._copies else None

    @contextmanager
    def _queued(self, device: torch.device) -> Iterator[None]:
        """Runs copies behind all that was launched so far, which may use the slots, and beside what comes."""
        if self._copies is None:
            yield
            return
        self._copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._copies):
            yield

    def _after(self, buffer: HostedBuffer) -> HostedBuffer | None:
        """Returns the buffer of the layer that attends next: after the last one the first."""
        places = [place for place, each in enumerate(self._layers) if each() is buffer]
        return self._layers[(places[0] + 1) % len(self._layers)]() if places else None


class _Slot:
    """Device memory for one layer at a time: the number of the content in it, and when that has arrived."""

    def __init__(self, buffer: HostedBuffer, size: int, copies: "torch.cuda.Stream | None") -> None:
        self._memory = [torch.empty(size, dtype=buffer.keys.dtype, device=buffer.device) for _ in range(2)]
        for memory in self._memory if copies else ():
            memory.record_stream(copies)  # copies may be queued when the generation ends
        self.content, self.ready = 0, None

    def views(self, buffer: HostedBuffer) -> tuple[Tensor, Tensor]:
        """Returns keys and values [R, H, capacity, D] in this memory, laid out as the buffer's own."""
        rows, heads, capacity, width = buffer.keys.shape
        size = (rows, capacity, heads, width)
        keys, values = (memory[: buffer.keys.numel()].view(size).transpose(1, 2) for memory in self._memory)
        return keys, values


def _copy(source: Tensor, target: Tensor, tokens: range) -> None:
    """Copies some tokens of [R, H, capacity, D], row by row: in one piece each, which is what can be done in the background."""
    for own, other in zip(source, target, strict=True):
        part = slice(tokens.start, tokens.stop)
        other.transpose(0, 1)[part].copy_(own.transpose(0, 1)[part], non_blocking=True)
