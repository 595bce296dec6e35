"""Random numbers addressed by (seed, sample, scale), so that batch split and pruning never shift the stream."""

import hashlib

import torch
from torch import Tensor


def uniform(address: tuple[int, int, int], count: int, *, stream: str) -> Tensor:
    """Returns `count` float32 numbers in [0, 1) that depend on the address (seed, sample, scale) and the stream's name only.

    They are drawn on the CPU, so that every device sees the same ones.
    """
    return torch.rand(count, generator=_generator((stream, *address)), dtype=torch.float32, device="cpu")


def standard_normal(address: tuple[int, int, int], count: int, *, stream: str) -> Tensor:
    """Returns `count` float32 numbers from N(0, 1), addressed as `uniform` and independent of its stream of the same name."""
    return torch.randn(count, generator=_generator(("standard_normal", stream, *address)), dtype=torch.float32, device="cpu")


def placed(drawn: Tensor, device: torch.device) -> Tensor:
    """Returns numbers drawn on the CPU on a device, without waiting for it (a copy of pageable memory to a GPU would)."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def _generator(address: tuple[str | int, ...]) -> torch.Generator:
    digest = hashlib.blake2b(repr(address).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
