"""Keys and values of one layer and one generation, in buffers allocated once (the official code re-concatenates)."""

from copy import copy
from typing import Self

import torch
from torch import Tensor

HeldKeys = tuple[Tensor, Tensor, tuple[int, ...]]


class KeyValueBuffer:
    """Grows from 0 to `capacity` tokens without copying what is already there. `sizes` are the tokens of each append."""

    def __init__(self, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        """`shape` is (rows, heads, capacity, head width)."""
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.sizes: list[int] = []

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
