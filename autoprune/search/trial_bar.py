"""A bar of the search: how much faster a trial of the embedded backbone is when trials share their early scales."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from autoprune.backbones import Backbone
from autoprune.measure.bars import Bar, bar
from autoprune.policy import Policy
from autoprune.rules import BranchRule, ScalePruning
from autoprune.search.evaluator import GenerationEvaluator
from autoprune.search.folders import shipped_folder
from autoprune.search.settings import LatencySettings, QualitySettings, StudySettings
from autoprune.search.space_file import read_space

NAME = "a trial with shared early scales against one without"


@dataclass(frozen=True)
class TrialCase:
    """Trials of `prompts` images in batches of `batch`, sharing at most `megabytes`; each policy is tried `rounds` times."""

    prompts: int = 32
    batch: int = 16
    megabytes: int = 2048
    rounds: int = 3
    least: float = 1.6


def trial_bar(backbone: Backbone, case: TrialCase) -> dict[str, Bar]:
    """Returns the bar: seconds without / with shared early scales, median over policies and rounds.

    A trial is everything the search waits for: images, scores, fidelity, the latency table. Both kinds alternate; each policy
    runs once before, so that what is recorded once a study is not in it.
    """
    shared, alone = (GenerationEvaluator(backbone, _settings(case, limit)) for limit in (case.megabytes, 0))
    for evaluator in (shared, alone):
        evaluator.dense()
    ratios, seconds = [], []
    for policy in _policies(backbone):
        for turn in range(-1, case.rounds):
            with_sharing, without = _trial(shared, policy), _trial(alone, policy)
            if turn >= 0:
                ratios.append(without / with_sharing)
                seconds.append((without, with_sharing))
    slow, fast = (median(column) for column in zip(*seconds, strict=True))
    return {NAME: bar(median(ratios), case.least, lowest=min(ratios), slow_seconds=slow, fast_seconds=fast)}


def _trial(evaluator: GenerationEvaluator, policy: Policy) -> float:
    began = time.perf_counter()
    evaluator.evaluate(policy, stop=lambda first: "")
    return time.perf_counter() - began


def _settings(case: TrialCase, megabytes: int) -> StudySettings:
    return StudySettings(
        Path("unused"),
        "bars",
        read_space(shipped_folder("search_spaces") / "unified.yaml"),
        quality=QualitySettings(prompts=case.prompts),
        latency=LatencySettings(batch=case.batch),
        shared_prefix_mb=megabytes,
    )


def _policies(backbone: Backbone) -> Iterator[Policy]:
    """Yields policies as searches find them: the last scale skipped, the one before cheaper too."""
    schedule = backbone.scale_schedule()
    late = len(schedule) - 2
    for rule in (BranchRule("cond", late), BranchRule("cond", late, replacement="extrapolate")):
        yield Policy(backbone.name, backbone.depth, schedule, guidance=rule, skip_last=1)
    for keep in (0.5, 0.25):
        pruned = {late: ScalePruning(keep, late - 1)}
        yield Policy(backbone.name, backbone.depth, schedule, pruned, BranchRule("cond", late), skip_last=1)
