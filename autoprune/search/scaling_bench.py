"""What many workers find together: simulated workers of one study in virtual time, with real asks of the real samplers.

Each worker asks, works for a while and tells; what the others still run is pending in the storage. What a policy costs and
loses is a formula (synthetic.py). Asks take no virtual time, so a worker sees every trial that began before its own.
"""

import heapq
import math
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median

import numpy as np
import optuna

from autoprune.search.front import Point, hypervolume, hypervolume_curve, reference_of
from autoprune.search.sampler import make_sampler
from autoprune.search.settings import PENDING, SamplerSettings
from autoprune.search.synthetic import measured, outcome, synthetic_space

RANDOM = "random"


@dataclass(frozen=True)
class ScalingCase:
    """Studies of `trials` trials, or `each` a worker where that is more. A trial takes `seconds` in the median, lognormal with
    `spread`. `random` is the control.
    """

    workers: tuple[int, ...] = (1, 4, 16, 64, 256)
    samplers: tuple[str, ...] = (*PENDING, RANDOM)
    trials: int = 256
    each: int = 2
    seeds: int = 2
    seconds: float = 60.0
    spread: float = 0.4
    space: str = "unified"

    def count(self, workers: int) -> int:
        """Returns the number of trials of a study."""
        return max(self.trials, self.each * workers)


@dataclass(frozen=True)
class Simulated:
    """One simulated study: `sampler` names what gp takes running trials for, or `random`."""

    sampler: str
    workers: int
    seed: int


@dataclass(frozen=True)
class Run:
    """The trials of a study in the order in which they ended: true objectives, None where the drop is truly too large; the
    virtual second of their end; and the processor seconds of every ask."""

    points: tuple[Point | None, ...]
    ends: tuple[float, ...]
    asks: tuple[float, ...]


def measure_scaling(case: ScalingCase) -> dict[str, object]:
    """Returns for every sampler and number of workers the hypervolume after each trial relative to all that was found here,
    median over seeds with the lowest and highest, the virtual minutes until then, and the processor seconds of an ask."""
    studies = [Simulated(*each) for each in product(case.samplers, case.workers, range(case.seeds))]
    studies.sort(key=lambda study: -case.count(study.workers))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context) as pool:
        runs = dict(zip(studies, pool.map(simulate, [case] * len(studies), studies), strict=True))
    found = [point for run in runs.values() for point in run.points if point]
    corner = reference_of(found)
    whole = hypervolume(found, corner)
    rows = {
        name: {
            str(workers): _summary([runs[Simulated(name, workers, seed)] for seed in range(case.seeds)], corner, whole)
            for workers in case.workers
        }
        for name in case.samplers
    }
    what = "hypervolume after each trial / that of all trials here, virtual minutes until then, processor seconds of an ask"
    return {"what": what, "case": asdict(case), "hypervolume": whole, "scaling": rows}


def simulate(case: ScalingCase, simulated: Simulated) -> Run:
    """Runs one study in virtual time."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = synthetic_space(case.space)
    settings = SamplerSettings(RANDOM) if simulated.sampler == RANDOM else SamplerSettings(pending=simulated.sampler)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=make_sampler(space, settings, simulated.seed))
    for preset in space.presets():
        if preset.vector is not None and not preset.control:
            study.enqueue_trial(dict(preset.vector))
    running, now, count = [], 0.0, case.count(simulated.workers)
    points, ends, asks = [], [], []
    while len(ends) < count:
        while len(running) < simulated.workers and len(asks) < count:
            began = time.process_time()
            trial = study.ask(fixed_distributions=space.distributions)
            asks.append(time.process_time() - began)
            lasts = np.random.default_rng((simulated.seed, trial.number)).lognormal(math.log(case.seconds), case.spread)
            heapq.heappush(running, (now + lasts, trial.number, trial))
        now, _, trial = heapq.heappop(running)
        policy = space.policy(trial.params)
        told, true = measured(policy, simulated.seed), outcome(policy)
        trial.set_constraint("score_drop", told.constraint)
        study.tell(trial, list(told.point))
        points.append(true.point if true.constraint <= 0 else None)
        ends.append(now)
    return Run(tuple(points), tuple(ends), tuple(asks))


def _summary(runs: list[Run], corner: Point, whole: float) -> Mapping[str, object]:
    curves = [hypervolume_curve(run.points, corner, whole) for run in runs]
    asks = [seconds for run in runs for seconds in run.asks]
    return {
        "trials": [round(median(values), 4) for values in zip(*curves, strict=True)],
        "lowest": [round(min(values), 4) for values in zip(*curves, strict=True)],
        "highest": [round(max(values), 4) for values in zip(*curves, strict=True)],
        "minutes": [round(median(values) / 60, 2) for values in zip(*(run.ends for run in runs), strict=True)],
        "ask": {"median": median(asks), "mean": sum(asks) / len(asks), "most": max(asks)},
    }
