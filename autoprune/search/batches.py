"""A study's prompts in batches, and the dense images that policies are compared with."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """One generation's prompts, the number of its first sample and the noise seed."""

    prompts: list[object]
    first_sample: int
    seed: int


@dataclass(frozen=True)
class Batch:
    """A piece of work with the dense images, scores (None without any) and, where recorded, tokens to pair with."""

    work: Work
    images: Tensor
    score: np.ndarray | None
    tokens: tuple[Tensor, ...] = ()
