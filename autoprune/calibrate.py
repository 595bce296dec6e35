"""`python -m autoprune.calibrate`: what presets need to know about a backbone's weights, measured and kept as one file.

StageVAR's rank table (arXiv 2512.16483), SkipVAR's decision (2506.08908) fitted again on this backbone, and the
quantiles of what LD-Pruning (2606.00310) puts thresholds on. A developer's command: presets read the file it leaves.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoprune.arguments import run_command
from autoprune.backbones import Backbone, LoadArguments
from autoprune.errors import UserError
from autoprune.files import check_writable
from autoprune.generation import Observer, generate
from autoprune.measure.calibration_fit import (
    energy_ranks,
    faithful_level,
    fit_levels,
    joint_level,
    leave_one_out_accuracy,
    majority_share,
    quantiles,
)
from autoprune.measure.metrics.similarity import ssim
from autoprune.measure.placement import with_fitting_keys
from autoprune.policy import Policy, fingerprint
from autoprune.pruning.decisions import discrepancy, latent_change, probe_features
from autoprune.pruning.plan import ScalePlan
from autoprune.rules import DISCREPANCIES, LATENT_SCORERS, BranchRule, ProbeRule
from autoprune.search.calibration import LEVELS, Calibration, calibration_path
from autoprune.search.prompt_files import read_prompts
from autoprune.testbed.captions import prompt_set

USAGE = "python -m autoprune.calibrate prompts=48 prompts_file=own.txt"
ENERGIES = (0.999, 0.99, 0.98, 0.97, 0.96, 0.95, 0.92, 0.91, 0.90, 0.85, 0.80, 0.70)
_EXTRA = ("torchmetrics", "rich")
_FFT_RADIUS = 0.4  # of half the image, as the official SkipVAR code has it


@dataclass(frozen=True)
class Choices(LoadArguments):
    """The command line. `target_ssim` is the similarity to the full image that a skipped or single-branch run must keep.

    `prompts` counts search prompts; they come from `prompts_file` (as `prompts=FILE` of the search) or are rendered scenes'.
    """

    prompts: int = 32
    prompts_file: str = ""
    batch: int = 8
    seed: int = 0
    target_ssim: float = 0.84
    output: str = ""

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.target_ssim < 1:
            raise UserError(f"target_ssim must be above 0 and below 1, got {self.target_ssim}.")


@dataclass(frozen=True)
class Depths:
    """Where published scales lie on a schedule: those of 13 at the same relative position of another one.

    SkipVAR decides after scale `decision` (9) on images as small as scale `probe` (4); `levels` is how many last scales it
    can skip, at most 3 and at most those that follow. StageVAR projects from scale `projected` (10, 40x40) on.
    """

    decision: int
    probe: int
    levels: int
    projected: int

    @staticmethod
    def of(scales: int) -> "Depths":
        """Returns the depths for a schedule of so many scales."""
        last = scales - 1
        decision = 9 * last // 12
        levels = min(3, last - decision)
        return Depths(decision=decision, probe=(4 * last + 6) // 12, levels=levels, projected=(10 * last + 6) // 12)


@dataclass
class Samples:
    """What was seen so far, one entry a batch: `ranks[scale][chunk]` shares of tokens [B, len(ENERGIES)], `differences` of the
    branches [B] and `changes` of the latent, averaged over each token, [B, N] by (metric, scale), SSIM to the full image with
    1, 2, ... last scales skipped or run with one branch [B, levels], and the probe's features [B, 2].
    """

    ranks: dict[int, dict[int, list[Tensor]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    differences: dict[tuple[str, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    changes: dict[tuple[str, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    skipped: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Decision:
    """The fitted probe, None when no prompt allows anything, and how often it is right: on the prompts of the fit, on
    prompts left out of it, and what the most frequent answer alone reaches. `counts` are the prompts of each answer."""

    probe: ProbeRule | None
    accuracy: float
    left_out: float
    majority: float
    counts: tuple[int, ...]


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, 2 after bad input, 130 after Ctrl-C."""
    return run_command(Choices, arguments, usage=USAGE, command=_calibrate)


def _calibrate(choices: Choices) -> str:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(f'calibration needs {", ".join(missing)}, not installed here; run: pip install "autoprune[search]".')
    from autoprune.search.quality import check_texts
    from autoprune.search.tables import relative

    path = Path(choices.output) if choices.output else calibration_path(choices.backbone)
    texts = _texts(choices)
    backbone = with_fitting_keys(choices.load(), batch=choices.batch)
    if backbone.model.course(backbone.scale_schedule()).by_clip:
        raise UserError(
            f"calibration runs scales once each, as {backbone.name} does not; use policies without thresholds there."
        )
    check_texts(texts, backbone, batch=choices.batch)
    check_writable(path.parent, what="output folder", remedy="choose another file")
    samples = collect(backbone, texts, seed=choices.seed, batch=choices.batch)
    decision = decide(samples, Depths.of(len(backbone.scale_schedule())), target=choices.target_ssim)
    summary(backbone, samples, decision, prompts=choices.prompts).save(path)
    return f"{relative(path)}: {choices.prompts} prompts; {_verdict(decision)}"


def _texts(choices: Choices) -> list[str]:
    if not choices.prompts_file:
        return [prompt.text for prompt in prompt_set("search", choices.prompts, seed=choices.seed)]
    own = read_prompts(Path(choices.prompts_file))
    return [prompt.text for prompt in own.take("search", choices.prompts, seed=choices.seed, setting="prompts")]


def collect(backbone: Backbone, texts: list[str], *, seed: int, batch: int) -> Samples:
    """Runs all prompts dense, with shorter endings and with one branch at the end, and returns what was seen."""
    from autoprune.search.progress import RichProgress

    samples = Samples()
    with RichProgress() as progress:
        progress.phase("calibration", -(-len(texts) // batch))
        for first in range(0, len(texts), batch):
            _observe(backbone, texts[first : first + batch], samples, seed=seed, first=first)
            progress.step()
    return samples


@torch.inference_mode()
def _observe(backbone: Backbone, texts: list[str], samples: Samples, *, seed: int, first: int) -> None:
    schedule = backbone.scale_schedule()
    depths, sampling = Depths.of(len(schedule)), replace(backbone.sampling, first_sample=first)
    run = partial(generate, backbone, texts, seed=seed, sampling=sampling)
    watch = DenseWatch(backbone, texts, samples)
    dense = run(observer=watch)
    single = partial(Policy, backbone.name, backbone.depth, schedule)
    skipped, dropped = [], []
    for level in range(1, depths.levels + 1):
        alone = single(guidance=BranchRule("cond", len(schedule) - level))
        skipped.append(ssim(backbone.decode(watch.latents[-1 - level]), dense))
        dropped.append(ssim(run(policy=alone), dense))
    samples.skipped.append(torch.stack(skipped, 1))
    samples.dropped.append(torch.stack(dropped, 1))
    samples.features.append(_features(backbone, watch.latents, depths).cpu())


def _features(backbone: Backbone, latents: list[Tensor], depths: Depths) -> Tensor:
    """Returns the probe's features [B, 2] of the images before and after the decision's scale, as generation decodes them."""
    size = backbone.tokenizer.latent_size(backbone.scale_schedule()[: depths.probe + 1])
    pair = latents[depths.decision - 1 : depths.decision + 1]
    old, new = (backbone.decode(functional.interpolate(latent, size, mode="bilinear")) * 2 - 1 for latent in pair)
    return probe_features(old, new, radius=_FFT_RADIUS)


class DenseWatch(Observer):
    """Enters one dense batch into `samples`; keeps its latents [B, bits, H, W], one after each scale."""

    def __init__(self, backbone: Backbone, texts: list[str], samples: Samples) -> None:
        model, text = backbone.model, backbone.encode_text(texts)
        self._model, self._samples, self._batch = model, samples, len(texts)
        self._conditioning = model.condition(model.with_unconditional(text, None))
        self._temperature = backbone.sampling.temperature_for(len(backbone.scale_schedule()))
        self._projected = Depths.of(len(backbone.scale_schedule())).projected
        self._x: Tensor | None = None
        self.latents: list[Tensor] = []

    def scale_started(self, scale: ScalePlan) -> None:
        for metric in LATENT_SCORERS if scale.index > 1 else ():
            change = latent_change(self.latents[-2], self.latents[-1], metric=metric)[:, None]
            pooled = functional.interpolate(change, scale.grid[1:], mode="area")
            self._samples.changes[metric, scale.index].append(pooled.flatten(1).cpu())

    def chunk_done(self, scale: ScalePlan, chunk: int, x: Tensor) -> None:
        self._x = x = x[:, -scale.tokens :]
        if scale.index >= self._projected:
            ranks = energy_ranks(x[: self._batch], ENERGIES)
            self._samples.ranks[scale.index][chunk].append(ranks.cpu() / scale.tokens)

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        self.latents.append(latent)
        if len(self._x) == self._batch:
            return
        each = self._model.logits(self._x, self._conditioning, scale.index) / self._temperature[scale.index]
        pairs = {"hidden": self._x.split(self._batch), "other": each.split(self._batch)}
        for metric in DISCREPANCIES:
            difference = discrepancy(*pairs["hidden" if metric.endswith("hidden") else "other"], metric=metric)
            self._samples.differences[metric, scale.index].append(difference.cpu())


def decide(samples: Samples, depths: Depths, *, target: float) -> Decision:
    """Labels every prompt by the most aggressive faithful ending and fits the probe's score and cuts to the labels."""
    skip, drop = (faithful_level(torch.cat(rows), target) for rows in (samples.skipped, samples.dropped))
    levels = joint_level(drop, skip, drops=depths.levels).numpy()
    features = torch.cat(samples.features).double().numpy()
    fit = fit_levels(features, levels)
    probe = None
    if fit.cuts:
        probe = ProbeRule(
            scale=depths.decision,
            probe_scale=depths.probe,
            mean=_short(fit.mean),
            deviation=_short(fit.deviation),
            weights=_short(fit.weights),
            skip_cuts=_short(fit.cuts[depths.levels :]),
            drop_cuts=_short(fit.cuts[: depths.levels]),
            radius=_FFT_RADIUS,
        )
    return Decision(
        probe=probe,
        accuracy=float(np.mean(fit.predict(features) == levels)),
        left_out=leave_one_out_accuracy(features, levels),
        majority=majority_share(levels),
        counts=tuple(np.bincount(levels, minlength=2 * depths.levels + 1).tolist()),
    )


def summary(backbone: Backbone, samples: Samples, decision: Decision, *, prompts: int) -> Calibration:
    """Returns the file's content: mean ranks over prompts, the probe, and quantiles."""
    first = min(samples.ranks)
    means = torch.stack([torch.cat(samples.ranks[first][chunk]).mean(0) for chunk in sorted(samples.ranks[first])])
    return Calibration(
        backbone=backbone.name,
        scale_schedule=fingerprint(backbone.scale_schedule()),
        weights=backbone.revision,
        prompts=prompts,
        rank_scale=first,
        ranks={f"{energy:g}": _short(means[:, index].tolist()) for index, energy in enumerate(ENERGIES)},
        probe=decision.probe,
        discrepancies=_tabulated(samples.differences),
        changes=_tabulated(samples.changes),
    )


def _tabulated(values: dict[tuple[str, int], list[Tensor]]) -> dict[str, dict[int, tuple[float, ...]]]:
    table: dict[str, dict[int, tuple[float, ...]]] = {}
    for (metric, scale), parts in values.items():
        table.setdefault(metric, {})[scale] = _short(quantiles(torch.cat([part.flatten() for part in parts]), LEVELS))
    return table


def _short(values: Sequence[float]) -> tuple[float, ...]:
    """Returns six significant digits of each value: more of a sample of prompts says nothing."""
    return tuple(float(f"{value:.6g}") for value in values)


def _verdict(decision: Decision) -> str:
    if decision.probe is None:
        return "no prompt keeps the target with anything skipped or dropped, so there is no probe"
    return (
        f"the probe is right for {decision.left_out:.0%} of left-out prompts ({decision.accuracy:.0%} of its own), "
        f"the most frequent answer alone for {decision.majority:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
