"""The one attention function: flash-attn where it is installed and usable, PyTorch's fused attention (SDPA) elsewhere.

`python -m autoprune.bench` times explicit products against SDPA on a backbone's own shapes; SDPA wins on CPUs too.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Returns softmax(scale * q k^T + mask) v.

    q [R, H, L, D]; k, v [R, H, K, D]; mask is additive and broadcasts to [R, H, L, K]. Result [R, H, L, D].
    """
    if attention_backend(q, mask) == "flash":
        return _flash_function()(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale).transpose(1, 2)
    return sdpa_attention(q, k, v, scale=scale, mask=mask)


def attention_backend(q: Tensor, mask: Tensor | None) -> str:
    """Returns which implementation `attend` uses for these inputs: flash or sdpa."""
    return attention_kernel(q.device, q.dtype) if mask is None and q.shape[-1] <= 256 else "sdpa"


def attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Returns what `attend` uses on a device for heads of at most 256 channels without a mask: flash or sdpa."""
    usable = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return "flash" if usable and _flash_function() is not None else "sdpa"


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Two products around a softmax, as `attend`: what fused attention is compared with."""
    scores = (q * scale if scale != 1.0 else q) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention, as `attend`."""
    mask = None if mask is None else mask.to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@lru_cache(maxsize=1)
def _flash_function():  # noqa: ANN202 (an optional package has no type here)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func
