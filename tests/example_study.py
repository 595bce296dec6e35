"""A small finished study, as the search would return it, for the tests of what shows or records studies."""

from dataclasses import replace
from pathlib import Path

from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.search.records import FrontMember, Measurement, StudyResult, TrialRecord

SCHEDULE = tuple((1, side, side) for side in (1, 2, 4, 6, 8, 12, 16))
DENSE = Measurement(
    latency=0.6,
    latency_spread=0.01,
    dense_latency=0.6,
    speed_up=1.0,
    loss=0.0,
    ssim=1.0,
    psnr=100.0,
    score_dense=0.95,
    score=0.95,
    score_drop=0.0,
    score_drop_interval=(0.0, 0.0),
    peak_memory_mb=512.0,
    prompts=48,
    seed=0,
    batch=16,
    latency_source="measured",
)


def policy(keep_12: float, keep_16: float, *, cond_from: int = 7, skip: int = 0) -> Policy:
    scales = {5: ScalePruning(keep_12, 4), 6: ScalePruning(keep_16, 4, layers=(1, 4), interpolation="bicubic")}
    return Policy("tiny", 6, SCHEDULE, scales, BranchRule("cond", cond_from), skip)


def measured(speed_up: float, loss: float, drop: float = 0.01) -> Measurement:
    return replace(
        DENSE,
        latency=0.6 / speed_up,
        speed_up=speed_up,
        loss=loss,
        ssim=1 - loss,
        score_drop=drop,
        score_drop_interval=(drop - 0.02, drop + 0.02),
    )


def study_result(directory: Path) -> StudyResult:
    """Returns a study with every kind of point: dense, presets, a control, trials in and out of bounds, a failed one."""
    points = [
        ("preset:dense", policy(1, 1), DENSE, True),
        ("preset:fastvar", policy(0.6, 0.5, skip=1), measured(1.9, 0.27, 0.08), False),
        ("preset:fastvar-hart", policy(0.5, 0.25), measured(1.45, 0.24), True),
        ("control:fastvar-hart-random", policy(0.5, 0.24), measured(1.44, 0.29, 0.1), False),
        ("sampler", policy(1, 1, cond_from=6), measured(1.32, 0.02), True),
        ("sampler", policy(1, 0.8, cond_from=5), measured(1.55, 0.09), True),
        ("sampler", policy(0.7, 0.4, cond_from=5), measured(1.83, 0.16), True),
        ("sampler", policy(0.3, 0.2, cond_from=4), measured(2.2, 0.22, 0.03), True),
        ("sampler", policy(0.9, 0.9), measured(1.05, 0.2), True),
        ("sampler", policy(0.1, 0.1, cond_from=4), measured(2.4, 0.33, 0.2), False),
    ]
    trials = [
        TrialRecord(number, source, schedule, measurement, feasible, "complete", 1.5)
        for number, (source, schedule, measurement, feasible) in enumerate(points)
    ]
    trials.append(TrialRecord(len(trials), "sampler", policy(0.2, 0.2), None, False, "failed", 0.1, "out of memory"))
    tiers = zip((4, 4, 5, 6, 7), ("lossless", "high", "balanced", "", "fast"), strict=True)
    front = [_member(trials[number], tier, directory) for number, tier in tiers]
    presets = {"fastvar": measured(1.88, 0.28, 0.09), "fastvar-hart": measured(1.47, 0.25)}
    device = {"device_name": "2-core test CPU"}
    return StudyResult("tiny", "unified", device, DENSE, tuple(trials), tuple(front), directory, presets)


def _member(trial: TrialRecord, tier: str, directory: Path) -> FrontMember:
    held_out = replace(trial.measurement, loss=trial.measurement.loss + 0.005, prompts=112, seed=1000003)
    path = trial.policy.save(directory / "policies" / f"{tier}.json") if tier else None
    return FrontMember(trial, held_out, tier, path)
