"""A CUDA graph as a list of operators, so that its semantics can be tested where there is no GPU.

A replay computes the captured operators again on the very tensors they ran on, into the memory they wrote then, and runs no
Python of ours. All graphs share one pool: what the last one left there is spoilt before the next one runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[Callable, tuple, dict, list[Tensor]]


class RecordedGraphs:
    """Captures calls on any device; counts what was captured and replayed."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.captured = self.replayed = 0
        self._pool: list[Tensor] = []

    def __call__(self, run: Callable[[], object]) -> Callable[[], None]:
        with _Recording() as record:
            run()
        self.captured += 1
        self._pool += record.written()

        def replay() -> None:
            for tensor in self._pool:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
            for call in record.calls:
                _again(*call)
            self._pool = record.written()
            self.replayed += 1

        return replay


class _Recording(TorchDispatchMode):
    """Writes down every operator that computes something; views have their memory already."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs, alias = kwargs or {}, [part.alias_info for part in func._schema.returns]
        view = any(info is not None and not info.is_write for info in alias)
        if view:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:  # such as a reshape, which may be a copy
                return result
        out = func(*args, **kwargs)
        if not view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            written = [] if any(info is not None for info in alias) else [leaf for leaf in tree_leaves(out) if _real(leaf)]
            self.calls.append((func, args, kwargs, written))
        return out

    def written(self) -> list[Tensor]:
        """Returns the memory that the operators allocated and filled."""
        return [tensor for *_, tensors in self.calls for tensor in tensors]


def _again(func: Callable, args: tuple, kwargs: dict, written: list[Tensor]) -> None:
    for old, new in zip(written, filter(_real, tree_leaves(func(*args, **kwargs))), strict=bool(written)):
        old.copy_(new)


def _real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta
