"""How much front each sampler finds on a real backbone: hypervolume against trials and against seconds, several seeds.

Policies are measured once and remembered over all runs, so that samplers differ in what they ask, not in noise.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import optuna
from optuna.samplers import BaseSampler, GridSampler

from autoprune.backbones import Backbone
from autoprune.measure.bars import Bar, bar
from autoprune.policy import Policy
from autoprune.search.discard import constraint_values
from autoprune.search.evaluator import GenerationEvaluator
from autoprune.search.folders import shipped_folder
from autoprune.search.front import Point, hypervolume, hypervolume_curve, objectives, reference_of
from autoprune.search.records import Measurement
from autoprune.search.sampler import make_sampler
from autoprune.search.settings import SAMPLERS, LatencySettings, QualitySettings, SamplerSettings, StudySettings
from autoprune.search.space import SearchSpace, space_for
from autoprune.search.space_file import read_space

GRID = "grid"
BARRED = ("gp", "random")
REACHED = 0.9
GRID_KEEPS = (0.25, 0.5, 0.75)
GRID_NAMES = ("skip_last", "single_branch_scales", "pruned_scales")


@dataclass(frozen=True)
class SamplerCase:
    """`trials` of every run of these `samplers`, the presets of the space first, as a study does; `reference` trials of one
    long run of gp. A trial generates `prompts` images in batches of `batch`.
    """

    trials: int = 60
    seeds: int = 3
    reference: int = 150
    prompts: int = 32
    batch: int = 16
    space: str = "unified"
    samplers: tuple[str, ...] = (*SAMPLERS, GRID)


@dataclass(frozen=True)
class Asked:
    """One trial of a run: its objectives, None where it broke the budget or is dense, and its seconds."""

    point: Point | None
    seconds: float


class Memory:
    """Evaluates policies on a backbone, each once and whole."""

    def __init__(self, backbone: Backbone, settings: StudySettings) -> None:
        self._evaluator = GenerationEvaluator(backbone, settings)
        self._dense = self._evaluator.dense()
        self._known: dict[str, tuple[Measurement, float]] = {}

    def measured(self, policy: Policy) -> tuple[Measurement, float]:
        """Returns the measurement of a policy and the seconds it took when it was made."""
        key = policy.key()
        if key not in self._known:
            began = time.perf_counter()
            dense = policy.is_dense()
            measurement = self._dense if dense else self._evaluator.evaluate(policy, stop=lambda first: "").measurement
            self._known[key] = (measurement, time.perf_counter() - began)
        return self._known[key]


def measure_samplers(backbone: Backbone, case: SamplerCase) -> dict[str, object]:
    """Returns for each sampler the hypervolume after every trial, relative to all that was found here, median over seeds with
    the lowest and highest; and the seconds until then, of evaluations and of the sampler."""
    settings = _settings(case)
    space, memory = space_for(settings.space, backbone), Memory(backbone, settings)
    runs, margin = {name: [] for name in case.samplers}, settings.quality.margin
    for seed in range(case.seeds):
        for name in runs:
            runs[name].append(list(_run(space, memory, _sampler(name, space, seed, margin), settings, case.trials)))
    long = list(_run(space, memory, _sampler("gp", space, case.seeds, margin), settings, case.reference))
    found = [asked.point for run in [long, *(run for each in runs.values() for run in each)] for asked in run if asked.point]
    corner = reference_of(found)
    whole = hypervolume(found, corner)
    presets = sum(preset.vector is not None for preset in space.presets())
    return {
        "hypervolume": whole,
        "presets": presets,
        "samplers": {name: _summary(each, corner, whole) for name, each in runs.items()},
    }


def sampler_bars(backbone: Backbone, case: SamplerCase) -> dict[str, Bar]:
    """Returns the bars of the search: gp finds REACHED of the reference hypervolume within the trials of a case, random not."""
    curves = measure_samplers(backbone, case)["samplers"]
    bars = {}
    for name, curve in curves.items():
        first = next((place for place, share in enumerate(curve["trials"], start=1) if share >= REACHED), None)
        text = f"hypervolume of {name} after {case.trials} trials / reference"
        bars[text] = bar(curve["trials"][-1], REACHED, most=name == "random", first_reached=first, seeds=case.seeds)
    return bars


def _settings(case: SamplerCase) -> StudySettings:
    return StudySettings(
        Path("unused"),
        "bench",
        read_space(shipped_folder("search_spaces") / f"{case.space}.yaml"),
        quality=QualitySettings(prompts=case.prompts),
        latency=LatencySettings(batch=case.batch),
    )


def _sampler(name: str, space: SearchSpace, seed: int, margin: float) -> BaseSampler:
    if name != GRID:
        return make_sampler(space, SamplerSettings(name), seed, margin=margin)
    neutral = space.normal({})
    values = {key: [neutral[key]] for key in space.distributions}
    for key, distribution in space.distributions.items():
        if key in GRID_NAMES:
            values[key] = list(range(distribution.low, distribution.high + 1))
        elif key.startswith("keep_"):
            values[key] = list(GRID_KEEPS)
    return GridSampler(values, seed=seed)


def _run(space: SearchSpace, memory: Memory, sampler: BaseSampler, settings: StudySettings, trials: int) -> Iterator[Asked]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    for preset in space.presets():
        if preset.vector is not None and not preset.control:
            study.enqueue_trial(dict(preset.vector))
    for _ in range(trials):
        began = time.perf_counter()
        trial = study.ask(fixed_distributions=space.distributions)
        policy = space.policy(trial.params)
        asking = time.perf_counter() - began
        measurement, seconds = memory.measured(policy)
        constraints = constraint_values(measurement, settings.quality)
        for key, value in constraints.items():
            trial.set_constraint(key, value)
        study.tell(trial, list(objectives(measurement)))
        counts = max(constraints.values()) <= 0 and not policy.is_dense()
        yield Asked(objectives(measurement) if counts else None, asking + seconds)


def _summary(runs: list[list[Asked]], corner: Point, whole: float) -> Mapping[str, object]:
    curves = [hypervolume_curve([asked.point for asked in run], corner, whole) for run in runs]
    seconds = [list(itertools.accumulate(asked.seconds for asked in run)) for run in runs]
    return {
        "trials": [median(values) for values in zip(*curves, strict=True)],
        "lowest": [min(values) for values in zip(*curves, strict=True)],
        "highest": [max(values) for values in zip(*curves, strict=True)],
        "seconds": [median(values) for values in zip(*seconds, strict=True)],
    }
