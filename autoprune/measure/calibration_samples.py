"""What a calibration sees of dense generations: energies of hidden states, differences of branches, changes of the latent.

The formulas are in pruning/decisions.py; what is made of the samples is in calibration_fit.py.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.backbones import Backbone
from autoprune.backbones.family import Schedule
from autoprune.clips import clip_ranges
from autoprune.generation import Observer, generate, generate_latent, resolve
from autoprune.measure.calibration_fit import energy_ranks
from autoprune.measure.metrics.similarity import ssim
from autoprune.policy import Policy
from autoprune.pruning.decisions import discrepancy, latent_change, probe_features
from autoprune.pruning.plan import ScalePlan
from autoprune.rules import DISCREPANCIES, LATENT_SCORERS, BranchRule

ENERGIES = (0.999, 0.99, 0.98, 0.97, 0.96, 0.95, 0.92, 0.91, 0.90, 0.85, 0.80, 0.70)
FFT_RADIUS = 0.4  # of half the image, as the official SkipVAR code has it


@dataclass(frozen=True)
class Depths:
    """Where published scales lie on a schedule or in a clip: those of 13 at the same relative position of another one.

    SkipVAR decides after scale `decision` (9) on images as small as scale `probe` (4); `levels` is how many last scales it
    can skip, at most 3 and at most those that follow. StageVAR projects from scale `projected` (10, 40x40) on.
    """

    decision: int
    probe: int
    levels: int
    projected: int

    @staticmethod
    def of(scales: int) -> "Depths":
        """Returns the depths for so many scales."""
        last = scales - 1
        decision = 9 * last // 12
        levels = min(3, last - decision)
        return Depths(decision=decision, probe=(4 * last + 6) // 12, levels=levels, projected=(10 * last + 6) // 12)


@dataclass
class Samples:
    """What was seen so far, one entry a batch and run of a scale: `ranks[chunk]` shares of tokens [B, len(ENERGIES)] at the
    first projected scale, `differences` of the branches [B] and `changes` of the latent, averaged over each token, [B, N] by
    (metric, scale). One entry a batch, none of backbones without a probe: SSIM to the full image with 1, 2, ... last scales
    skipped or run with one branch [B, levels], and the probe's features [B, 2].
    """

    ranks: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    differences: dict[tuple[str, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    changes: dict[tuple[str, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    skipped: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


def probed(backbone: Backbone) -> bool:
    """Returns whether a policy of this backbone may hold a probe: not where scales run clip by clip."""
    return not backbone.model.course(backbone.scale_schedule()).by_clip


def projected_scale(schedule: Schedule) -> int:
    """Returns the first scale that StageVAR projects, of a video in its last clip."""
    clip = clip_ranges(schedule)[-1]
    return clip.start + Depths.of(len(clip)).projected


@torch.inference_mode()
def observe(backbone: Backbone, texts: list[str], samples: Samples, *, seed: int, first: int) -> None:
    """Runs prompts dense, `first` being the number of the first sample, and where there are probes with other endings."""
    sampling = replace(backbone.sampling, first_sample=first)
    policy = Policy(backbone.name, backbone.depth, backbone.scale_schedule(), chunks=backbone.chunks)
    plan = replace(backbone.plan(None), chunks=policy.chunk_ranges())  # a canonical dense policy forgets them
    watch = DenseWatch(backbone, texts, samples)
    generate_latent(backbone, resolve(backbone, texts, plan, seed=seed, sampling=sampling), watch)
    if probed(backbone):
        run = partial(generate, backbone, texts, seed=seed, sampling=sampling)
        _observe_endings(backbone, watch.latents, samples, run)


def _observe_endings(backbone: Backbone, latents: list[Tensor], samples: Samples, run: Callable[..., Tensor]) -> None:
    """Compares images with their last scales skipped or run with one branch to the full ones."""
    schedule = backbone.scale_schedule()
    depths, dense = Depths.of(len(schedule)), backbone.decode(latents[-1])
    skipped, dropped = [], []
    for level in range(1, depths.levels + 1):
        rule = BranchRule("cond", len(schedule) - level)
        alone = Policy(backbone.name, backbone.depth, schedule, guidance=rule)
        skipped.append(ssim(backbone.decode(latents[-1 - level]), dense))
        dropped.append(ssim(run(policy=alone), dense))
    samples.skipped.append(torch.stack(skipped, 1))
    samples.dropped.append(torch.stack(dropped, 1))
    samples.features.append(_features(backbone, latents, depths).cpu())


def _features(backbone: Backbone, latents: list[Tensor], depths: Depths) -> Tensor:
    """Returns the probe's features [B, 2] of the images before and after the decision's scale, as generation decodes them."""
    size = backbone.tokenizer.latent_size(backbone.scale_schedule()[: depths.probe + 1])
    pair = latents[depths.decision - 1 : depths.decision + 1]
    old, new = (backbone.decode(functional.interpolate(latent, size, mode="bilinear")) * 2 - 1 for latent in pair)
    return probe_features(old, new, radius=FFT_RADIUS)


class DenseWatch(Observer):
    """Enters one dense batch into `samples`; keeps its latents [B, bits, (T,) H, W], one after each run of a scale."""

    def __init__(self, backbone: Backbone, texts: list[str], samples: Samples) -> None:
        model, text = backbone.model, backbone.encode_text(texts)
        self._model, self._samples, self._batch = model, samples, len(texts)
        self._conditioning = model.condition(model.with_unconditional(text, None))
        schedule = backbone.scale_schedule()
        self._temperature = backbone.sampling.temperature_for(len(schedule))
        self._projected = projected_scale(schedule)
        self._looking_back = {scale for clip in clip_ranges(schedule) for scale in clip[2:]}
        self._x: Tensor | None = None
        self.latents: list[Tensor] = []

    def scale_started(self, scale: ScalePlan) -> None:
        if scale.index not in self._looking_back:
            return
        previous, latest = (scale.clip(latent) for latent in self.latents[-2:])
        for metric in LATENT_SCORERS:
            change = latent_change(previous, latest, metric=metric)[:, None]
            pooled = functional.interpolate(change, scale.places(latest), mode="area")
            self._samples.changes[metric, scale.index].append(pooled.flatten(1).cpu())

    def chunk_done(self, scale: ScalePlan, chunk: int, x: Tensor) -> None:
        self._x = x = x[:, -scale.tokens :]
        if scale.index == self._projected:
            self._samples.ranks[chunk].append(energy_ranks(x[: self._batch], ENERGIES).cpu() / scale.tokens)

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        self.latents.append(latent)
        if len(self._x) == self._batch:
            return
        each = self._model.logits(self._x, self._conditioning, scale.index) / self._temperature[scale.index]
        pairs = {"hidden": self._x.split(self._batch), "other": each.split(self._batch)}
        for metric in DISCREPANCIES:
            difference = discrepancy(*pairs["hidden" if metric.endswith("hidden") else "other"], metric=metric)
            self._samples.differences[metric, scale.index].append(difference.cpu())
