"""The one attention function: flash-attn 3 or 2 where installed and usable, PyTorch's fused attention (SDPA) elsewhere.

`python -m autoprune.bench` times explicit products against SDPA on a backbone's own shapes; SDPA wins on CPUs too.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

SDPA = "sdpa"
# By name, best first: the module, and the least and the first unsupported compute capability. 3 is for Hopper alone.
FLASH = {"flash_attn_3": ("flash_attn_interface", (9, 0), (9, 1)), "flash_attn_2": ("flash_attn", (8, 0), (100, 0))}


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Returns softmax(scale * q k^T + mask) v.

    q [R, H, L, D]; k, v [R, G, K, D], H a multiple of G, of which each serves H / G queries in a row; mask is additive and
    broadcasts to [R, H, L, K]. Result [R, H, L, D].
    """
    name = attention_backend(q, mask)
    return sdpa_attention(q, k, v, scale=scale, mask=mask) if name == SDPA else flash_attention(q, k, v, scale=scale, name=name)


def attention_backend(q: Tensor, mask: Tensor | None) -> str:
    """Returns which implementation `attend` uses for these inputs: a name of FLASH, or sdpa."""
    fits = mask is None and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return device_backend(q.device, q.dtype) if fits else SDPA


def device_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the implementation for unmasked attention on a device, in a precision."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return SDPA
    return installed_backend(torch.cuda.get_device_capability(device))


@cache
def installed_backend(capability: tuple[int, int]) -> str:
    """Returns the best implementation that is installed and supports a compute capability."""
    usable = (name for name, (_, least, end) in FLASH.items() if least <= capability < end)
    return next((name for name in usable if _flash_function(name) is not None), SDPA)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, name: str) -> Tensor:
    """The implementation of that name in FLASH, as `attend` without a mask. Heads come after positions there, and releases of
    version 3 differ in returning the output alone or a pair with the log-sum-exp."""
    out = _flash_function(name)(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Two products around a softmax, as `attend`: what fused attention is compared with."""
    scores = (q * scale if scale != 1.0 else q) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention, as `attend`."""
    mask = None if mask is None else mask.to(q.dtype)
    grouped = k.shape[1] != q.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


@cache
def _flash_function(name: str) -> Callable | None:
    try:
        return import_module(FLASH[name][0]).flash_attn_func
    except (ImportError, AttributeError):
        return None
