"""How many tokens a policy draws as dense does: free, as generation draws them anyway, and a scale at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.generation import Observer
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo
from autoprune.pruning.plan import ScalePlan

NOT_DRAWN = -1


class TokenRecorder(Observer):
    """Keeps what a generation draws, from its first scale on, by reference: nothing is copied, no device is waited for."""

    def __init__(self) -> None:
        self._runs: list[dict[int, Tensor]] = []  # one a sample where a policy splits the batch, else one; by run of a scale

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        if scale.step == 0:
            self._runs.append({})
        self._runs[-1][scale.step] = bits

    def tokens(self, dense: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Returns bits [B, N, d] or codes [B, N] of every scale, each time it runs.

        Those that were not drawn are NOT_DRAWN, in the shape that `dense`, the tokens of a whole generation, has there.
        """
        missing = dict(enumerate(torch.full_like(scale, NOT_DRAWN) for scale in dense))
        runs = [{step: scale[: len(run[0])] for step, scale in missing.items()} | run for run in self._runs]
        return tuple(torch.cat([run[step] for run in runs]) for step in sorted(runs[0]))


class TokenAgreement:
    """Share of bits (or codes) equal to those dense draws there; the parts are the shares of each scale.

    Unrelated bits agree half of the time. What was not drawn agrees with nothing.
    """

    info = MetricInfo("tokens", "paired", lower=False, source="equal bits or codes / all")

    def __init__(self, context: MetricContext) -> None:
        pass

    def measure(self, batch: ImageBatch) -> np.ndarray:
        equal = [(own == dense).flatten(1).double() for own, dense in zip(batch.tokens, batch.dense_tokens, strict=True)]
        return torch.stack([torch.cat(equal, 1).mean(1), *(scale.mean(1) for scale in equal)], 1).cpu().numpy()
