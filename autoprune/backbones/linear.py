"""Linear layers in inference on CPUs: oneDNN's own call adds the bias and applies GELU inside the product.

torch's linear copies the bias over the result first, and its GELU (tanh form) is a slow pass of its own. Dense generations
on a Xeon core with AMX become 1.10 (width 512, batch 1) and 1.21 times (embedded backbone, batch 16) as fast in bfloat16,
1.03 and 1.07 times in float32; attention takes most of the rest.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns x W^T + b: x [..., I], weight [O, I], bias [O] -> [..., O], as functional.linear to rounding."""
    if not _usable(x, weight):
        return functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns GELU(x W^T + b) in its tanh form, shapes as in `linear`."""
    if not _usable(x, weight):
        return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")


def _usable(x: Tensor, weight: Tensor) -> bool:
    """Returns whether oneDNN's call can run: it has no gradients and, unlike functional.linear, takes no autocast."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_grad_enabled()
    return plain and not torch.is_autocast_enabled("cpu") and _runs_here(x.dtype)


@lru_cache(maxsize=8)
def _runs_here(dtype: torch.dtype) -> bool:
    """Tries the call once for each precision: the build or the processor may lack it."""
    x, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((1, 16), (16, 16), (16,)))
    try:
        torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
    except (AttributeError, RuntimeError):
        return False
    return True
