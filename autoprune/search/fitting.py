"""How many prompts a generation takes at once where the user leaves it open: as many as fill the device, up to a limit."""

import json
from dataclasses import replace

from autoprune.backbones import Backbone
from autoprune.backbones.decoding import free_memory
from autoprune.errors import UserError
from autoprune.measure.memory_plan import predicted_peak
from autoprune.measure.placement import USABLE, with_fitting_keys
from autoprune.search.folder import IDENTITY_FILE
from autoprune.search.quality import make_quality
from autoprune.search.settings import AUTO, StudySettings

MOST_PROMPTS = 16  # beyond which a GPU is full at the late scales, where the time goes


def fitted(settings: StudySettings, backbone: Backbone) -> StudySettings:
    """Returns the settings with the size of a batch decided: that of a study which goes on, or what fits in memory now.

    Raises UserError where not even one image fits.
    """
    if settings.latency.batch != AUTO:
        return settings
    batch = _known(settings) or _fitting(settings, backbone)
    return replace(settings, latency=replace(settings.latency, batch=batch))


def with_keys_placed(settings: StudySettings, backbone: Backbone) -> Backbone:
    """Returns the backbone with keys and values where a batch of the study fits, or where it is open, a single image."""
    batch = _known(settings) or 1 if settings.latency.batch == AUTO else settings.latency.batch
    return with_fitting_keys(backbone, batch=batch)


def _known(settings: StudySettings) -> int | None:
    try:
        known = json.loads((settings.folder / IDENTITY_FILE).read_text())["settings"]["latency"]["batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if isinstance(known, int) and known > 0 else None


def _fitting(settings: StudySettings, backbone: Backbone) -> int:
    """Returns the largest power of two up to MOST_PROMPTS whose dense generation fits; memory grows with the batch."""
    quality = make_quality(settings.quality, settings.prompts)
    texts = quality.texts(quality.prompts("search", 1))
    plan = backbone.plan(None)
    need, free = predicted_peak(plan, backbone, texts).above_loaded(backbone.device), USABLE * free_memory(backbone.device)
    if need > free:
        raise UserError(
            f"one dense image of {backbone.name} needs {need / 2**20:.0f} MB, {free / 2**20:.0f} MB are free on "
            f"{backbone.device}; free memory there, or set latency.batch=1 to try nevertheless."
        )
    batch = MOST_PROMPTS
    while batch * need > free:
        batch //= 2
    return batch
