"""The samplers by name, all seeded. `gp` is ours and the default; the others are Optuna's."""

import warnings
from collections.abc import Callable

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from autoprune.search.model_sampler import ModelSampler
from autoprune.search.settings import SamplerSettings
from autoprune.search.space import SearchSpace

NSGA2_POPULATION = 20


def _gp(space: SearchSpace, settings: SamplerSettings, seed: int, margin: float) -> BaseSampler:
    return ModelSampler(space, startup=settings.startup, seed=seed, pending=settings.pending, margin=margin)


def _tpe(space: SearchSpace, settings: SamplerSettings, seed: int, margin: float) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=settings.startup, constant_liar=settings.pending != "none")


def _nsga2(space: SearchSpace, settings: SamplerSettings, seed: int, margin: float) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=NSGA2_POPULATION)


def _random(space: SearchSpace, settings: SamplerSettings, seed: int, margin: float) -> BaseSampler:
    return RandomSampler(seed=seed)


_SAMPLERS: dict[str, Callable[[SearchSpace, SamplerSettings, int, float], BaseSampler]] = {
    "gp": _gp,
    "tpe": _tpe,
    "nsga2": _nsga2,
    "random": _random,
}


def make_sampler(space: SearchSpace, settings: SamplerSettings, seed: int, *, margin: float = 0.0) -> BaseSampler:
    """Returns a fresh sampler; a resumed study passes another seed, or its first draws would repeat.

    `margin` of the score budget is what `gp` keeps in a part of its asks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _SAMPLERS[settings.name](space, settings, seed, margin)
