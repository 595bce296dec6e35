"""Linear layers in inference on CPUs: oneDNN's own call adds the bias and applies GELU inside the product.

torch's linear copies the bias over the result first, and its GELU (tanh form) is a slow pass of its own. Dense generations
on a Xeon core with AMX become 1.10 (width 512, batch 1) and 1.21 times (embedded backbone, batch 16) as fast in bfloat16,
1.03 and 1.07 times in float32; attention takes most of the rest. oneDNN also brings bfloat16 weights into blocks of its own,
at every call, which takes a third of a product of few tokens: `pack_linears` does it once.
"""

from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKED_BYTES = 2**30  # packing keeps weights twice: not for models above this


@dataclass(frozen=True)
class _Packed:
    """Weights in oneDNN's layout, and what they were made of, held so that no other tensor ever gets its address."""

    weight: Tensor
    source: Tensor
    version: int

    def stands_for(self, weight: Tensor) -> bool:
        """Returns whether a layer still has the values that were packed."""
        return self.source.data_ptr() == weight.data_ptr() and self.version == weight._version


_PACKED: WeakKeyDictionary[nn.Linear, _Packed] = WeakKeyDictionary()


def linear(x: Tensor, layer: nn.Linear, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + b: x [..., I], W [O, I] of the layer, b [O] its own or `bias` -> [..., O], as torch to rounding."""
    bias = layer.bias if bias is None else bias
    if not _usable(x, layer.weight):
        return functional.linear(x, layer.weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, _weight(layer), bias, "none", [], "")


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """Returns GELU(x W^T + b) in its tanh form, shapes as in `linear`."""
    if not _usable(x, layer.weight):
        return functional.gelu(functional.linear(x, layer.weight, layer.bias), approximate="tanh")
    return torch.ops.mkldnn._linear_pointwise(x, _weight(layer), layer.bias, "gelu", [], "tanh")


def pack_linears(model: nn.Module) -> None:
    """Keeps a packed copy of the bfloat16 linear layers of a model on a CPU, unless they exceed PACKED_BYTES.

    New values are noticed (optimisers, `copy_`, `load_state_dict`, `to`) and then used as they are; writing through `.data` is
    not noticed.
    """
    layers = [part for part in model.modules() if isinstance(part, nn.Linear) and _packable(part.weight)]
    if sum(layer.weight.nbytes for layer in layers) > PACKED_BYTES:
        return
    for layer in layers:
        source = layer.weight.detach()
        _PACKED[layer] = _Packed(torch.ops.mkldnn._reorder_linear_weight(source), source, source._version)


def _weight(layer: nn.Linear) -> Tensor:
    packed = _PACKED.get(layer)
    return packed.weight if packed and packed.stands_for(layer.weight) else layer.weight


def _packable(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and not weight.is_inference()
    return plain and _runs_here(weight.dtype)


def _usable(x: Tensor, weight: Tensor) -> bool:
    """Returns whether oneDNN's call can run: it has no gradients and, unlike functional.linear, takes no autocast."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_grad_enabled()
    return plain and not torch.is_autocast_enabled("cpu") and _runs_here(x.dtype)


@lru_cache(maxsize=8)
def _runs_here(dtype: torch.dtype) -> bool:
    """Tries the call once for each precision: the build or the processor may lack it."""
    x, weight, bias = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in ((1, 16), (16, 16), (16,)))
    try:
        torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        if dtype is torch.bfloat16:
            torch.ops.mkldnn._linear_pointwise(x, torch.ops.mkldnn._reorder_linear_weight(weight), bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True
