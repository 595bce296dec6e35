"""`python -m autoprune.calibrate`: what presets need to know about a backbone's weights, measured and kept as one file.

StageVAR's rank table (arXiv 2512.16483), SkipVAR's decision (2506.08908) fitted again on this backbone, and the
quantiles of what LD-Pruning (2606.00310) puts thresholds on. Backbones that run clip by clip have no such decision
(validity.py). A developer's command: presets read the file it leaves.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.arguments import run_command
from autoprune.backbones import Backbone, LoadArguments
from autoprune.errors import UserError
from autoprune.files import check_writable
from autoprune.measure.calibration_fit import (
    faithful_level,
    fit_levels,
    joint_level,
    leave_one_out_accuracy,
    majority_share,
    quantiles,
)
from autoprune.measure.calibration_samples import (
    ENERGIES,
    FFT_RADIUS,
    Depths,
    Samples,
    observe,
    probed,
    projected_scale,
)
from autoprune.measure.placement import with_fitting_keys
from autoprune.policy import fingerprint
from autoprune.rules import ProbeRule
from autoprune.search.calibration import LEVELS, Calibration, calibration_path
from autoprune.search.prompt_files import read_prompts

USAGE = "python -m autoprune.calibrate prompts=48 prompts_file=own.txt"
_EXTRA = ("torchmetrics", "rich")


@dataclass(frozen=True)
class Choices(LoadArguments):
    """The command line. `target_ssim` is the similarity to the full image that a skipped or single-branch run must keep.

    `prompts` counts search prompts; they come from `prompts_file` (as `prompts=FILE` of the search) or are those of the
    embedded world. `frames` is the length of a video, 0 for the backbone's own: a file is of one schedule.
    """

    prompts: int = 32
    prompts_file: str = ""
    batch: int = 8
    seed: int = 0
    target_ssim: float = 0.84
    frames: int = 0
    output: str = ""

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("batch", 1), ("frames", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.target_ssim < 1:
            raise UserError(f"target_ssim must be above 0 and below 1, got {self.target_ssim}.")


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
    backbone = choices.load()
    if choices.frames:
        backbone = backbone.sampled(frames=choices.frames)
    backbone = with_fitting_keys(backbone, batch=choices.batch)
    check_texts(texts, backbone, batch=choices.batch)
    check_writable(path.parent, what="output folder", remedy="choose another file")
    samples = collect(backbone, texts, seed=choices.seed, batch=choices.batch)
    depths = Depths.of(len(backbone.scale_schedule()))
    decision = decide(samples, depths, target=choices.target_ssim) if probed(backbone) else None
    summary(backbone, samples, decision, prompts=choices.prompts).save(path)
    return f"{relative(path)}: {choices.prompts} prompts; {_verdict(decision, backbone.name)}"


def _texts(choices: Choices) -> list[str]:
    from autoprune.search.quality import make_quality
    from autoprune.search.settings import default_quality

    if choices.prompts_file:
        own = read_prompts(Path(choices.prompts_file))
        return [prompt.text for prompt in own.take("search", choices.prompts, seed=choices.seed, setting="prompts")]
    quality = make_quality(default_quality(choices.backbone, None), None)
    return quality.texts(quality.prompts("search", choices.prompts, seed=choices.seed))


def collect(backbone: Backbone, texts: list[str], *, seed: int, batch: int) -> Samples:
    """Runs all prompts dense and, where there are probes, with shorter endings and with one branch at the end; returns what
    was seen."""
    from autoprune.search.progress import RichProgress

    samples = Samples()
    with RichProgress() as progress:
        progress.phase("calibration", -(-len(texts) // batch))
        for first in range(0, len(texts), batch):
            observe(backbone, texts[first : first + batch], samples, seed=seed, first=first)
            progress.step()
    return samples


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
            radius=FFT_RADIUS,
        )
    return Decision(
        probe=probe,
        accuracy=float(np.mean(fit.predict(features) == levels)),
        left_out=leave_one_out_accuracy(features, levels),
        majority=majority_share(levels),
        counts=tuple(np.bincount(levels, minlength=2 * depths.levels + 1).tolist()),
    )


def summary(backbone: Backbone, samples: Samples, decision: Decision | None, *, prompts: int) -> Calibration:
    """Returns the file's content: mean ranks over prompts and runs of the scale, the probe if there is one, and quantiles."""
    means = torch.stack([torch.cat(samples.ranks[chunk]).mean(0) for chunk in sorted(samples.ranks)])
    return Calibration(
        backbone=backbone.name,
        scale_schedule=fingerprint(backbone.scale_schedule()),
        weights=backbone.revision,
        prompts=prompts,
        rank_scale=projected_scale(backbone.scale_schedule()),
        ranks={f"{energy:g}": _short(means[:, index].tolist()) for index, energy in enumerate(ENERGIES)},
        probe=decision and decision.probe,
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


def _verdict(decision: Decision | None, backbone: str) -> str:
    if decision is None:
        return f"scales of {backbone} see no other scale of their clip and are not probed, so there is no probe"
    if decision.probe is None:
        return "no prompt keeps the target with anything skipped or dropped, so there is no probe"
    return (
        f"the probe is right for {decision.left_out:.0%} of left-out prompts ({decision.accuracy:.0%} of its own), "
        f"the most frequent answer alone for {decision.majority:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
