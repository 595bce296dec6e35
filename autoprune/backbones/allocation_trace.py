"""Which memory a computation needs, found by running it on the meta device: every tensor has a size, none has values."""

import copy
import weakref
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTrace:
    """Context manager; afterwards `peak` holds the most bytes of meta tensors made inside it that were alive at once.

    What an operation takes and frees while it runs is not seen (reordered weights of convolutions, accumulators of fused
    attention). Fused attention counts as its output alone, as it allocates on real devices.
    """

    def __init__(self) -> None:
        self.peak = self.held = 0
        self._modes = (_FusedAttention(), _Storages(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def add(self, nbytes: int) -> None:
        """Notes that so many bytes more (less, if negative) are alive."""
        self.held += nbytes
        self.peak = max(self.peak, self.held)


def on_meta(module: nn.Module) -> nn.Module:
    """Returns a copy of a module on the meta device: same structure and precision, no values."""
    known: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        known[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, known)


class _Storages(TorchDispatchMode):
    """Counts each storage on the meta device once, from the operation that made it until nothing refers to it."""

    def __init__(self, trace: AllocationTrace) -> None:
        super().__init__()
        self._trace, self._alive = trace, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (the signature is torch's)
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta and id(leaf.untyped_storage()) not in given:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._alive:
            self._alive.add(storage)
            self._trace.add(storage.nbytes())
            weakref.finalize(storage, self._trace.add, -storage.nbytes())


class _FusedAttention(TorchFunctionMode):
    """Makes scaled_dot_product_attention return an empty result: on meta tensors it would take the products apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (the signature is torch's)
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return torch.empty_like(args[0], memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))
