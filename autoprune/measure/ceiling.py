"""The most FLOP/s that matrix products reach on a device: what achieved FLOP/s are a share of."""

import time

import torch

from autoprune.measure.device import synchronise

SIDES = (1024, 2048, 4096, 8192)
LONGEST = 0.1  # seconds of one product after which larger ones are not tried
REPEATS = 3


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the best FLOP/s of square products of growing size, the fastest of REPEATS each."""
    best = 0.0
    for side in SIDES:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = min(_seconds(a, b, device) for _ in range(REPEATS))
        best = max(best, 2 * side**3 / seconds)
        if seconds > LONGEST:
            break
    return best


@torch.inference_mode()
def _seconds(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    a @ b
    synchronise(device)
    return time.perf_counter() - started
