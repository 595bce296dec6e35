"""Training in bfloat16 where the device computes it: emulated convolutions took 30 times as long as float32 ones."""

import torch

from autoprune.backbones.catalogue import native_bfloat16


def mixed(device: str) -> torch.autocast:
    """Returns a context that computes in bfloat16 on devices that do, in float32 elsewhere."""
    return torch.autocast(device, torch.bfloat16, enabled=native_bfloat16(torch.device(device)))
