"""Keys and values of one layer and one generation, in buffers allocated once (the official code re-concatenates)."""

import torch
from torch import Tensor


class KeyValueBuffer:
    """Grows from 0 to `capacity` tokens without copying what is already there."""

    def __init__(self, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        """`shape` is (rows, heads, capacity, head width)."""
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v [R, H, L, D] and returns all keys and values so far [R, H, length, D]."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_rows(self, rows: slice) -> None:
        """Forgets the rows of a dropped guidance branch."""
        self.keys, self.values = self.keys[rows], self.values[rows]
