"""Weights in the precision in which checkpoints keep them."""

import hashlib

import torch
from torch import Tensor, nn

FULL_PRECISION = ("magnitudes", "mask")  # small or integer tensors that stay as they are


def weights_hash(module: nn.Module) -> str:
    """sha256 over names and float16 values, the same before and after saving."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(stored(key, value).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored(key: str, value: Tensor) -> Tensor:
    """A tensor as its checkpoint holds it, on the CPU."""
    value = value.detach().cpu()
    keep = not value.is_floating_point() or key.rsplit(".", 1)[-1] in FULL_PRECISION
    return value if keep else value.half()
