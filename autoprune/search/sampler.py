"""The samplers by name, all seeded. GP is the default: best by far at a hundred trials on a flat, constrained space."""

import warnings
from collections.abc import Callable

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from autoprune.search.settings import SamplerSettings

NSGA2_POPULATION = 20


def _gp(settings: SamplerSettings, seed: int) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=settings.startup)


def _tpe(settings: SamplerSettings, seed: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=settings.startup)


def _nsga2(settings: SamplerSettings, seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=NSGA2_POPULATION)


def _random(settings: SamplerSettings, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


_SAMPLERS: dict[str, Callable[[SamplerSettings, int], BaseSampler]] = {
    "gp": _gp,
    "tpe": _tpe,
    "nsga2": _nsga2,
    "random": _random,
}


def make_sampler(settings: SamplerSettings, seed: int) -> BaseSampler:
    """Returns a fresh sampler; a resumed study passes another seed, or its first draws would repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _SAMPLERS[settings.name](settings, seed)
