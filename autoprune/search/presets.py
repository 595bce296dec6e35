"""Published settings on any target: scales move to the same relative position, layers to the same relative depth.

What a setting leaves open for a backbone, thresholds and fitted decisions, comes from its calibration.
"""

import math
from collections.abc import Mapping

from autoprune.errors import UserError
from autoprune.search.calibration import Calibration
from autoprune.search.dimensions import KNOBS
from autoprune.search.knobs import Count, Target, Value
from autoprune.search.space_file import PresetSetting

_FROM_THE_END = ("pruned_scales", "single_branch_scales", "group_scales")  # counted back from the last scale that runs
_BEYOND_CLIPS = {"group": "grouped", "probe": "probed"}  # as validity.py refuses them


class LeftOut(UserError):
    """A preset cannot be placed: the backbone has not been calibrated, or the preset skips what must run there."""


def placed(setting: PresetSetting, target: Target, calibration: Calibration | None) -> dict[str, Value]:
    """Returns a preset's values as entries of a vector; what it does not name is left out.

    Where the last scale must run, skipped scales run in full and everything else begins at the same scale as with them.
    Raises LeftOut for one that refers to measurements of the backbone which do not exist, or that decides where to end.
    """
    entries = _ratios(setting, target)
    if setting.layers is not None:
        share = target.depth / setting.of_layers
        entries["exempt_first"] = nearest(setting.layers[0] * share)
        entries["exempt_last"] = nearest((setting.of_layers - 1 - setting.layers[1]) * share)
    for key, value in setting.values.items():
        knob = KNOBS[key]
        if isinstance(knob, Count) and setting.of_scales:
            value = max(knob.low, min(value, 1), nearest(value * len(target.clip) / setting.of_scales))
        if not isinstance(value, Mapping):
            entries |= knob.placed(value)
    if entries.get("scorer") == "spatiotemporal" and not target.moves:
        entries["scorer"] = "latent_cos"  # which ranks tokens alike where there is one frame
    if target.course.by_clip and entries.get("ending") in _BEYOND_CLIPS:
        raise LeftOut(
            f"preset {setting.name} is left out: scales of {target.backbone} do not see each other, so none are "
            f"{_BEYOND_CLIPS[entries['ending']]}."
        )
    if not target.skippable:
        entries = _run_in_full(setting, entries, target)
    for key, value in setting.values.items():
        if isinstance(value, Mapping):
            entries |= _measured(setting, key, entries, target, calibration)
    if entries.get("ending") == "probe" and (calibration is None or calibration.probe is None):
        raise _missing(setting, target)
    return entries


def only_skips(setting: PresetSetting, target: Target) -> LeftOut:
    """Returns why a preset that does nothing but end early has no place on a target whose last scale must run."""
    return LeftOut(f"preset {setting.name} is left out: it ends early, and the last scale of {target.backbone} must run.")


def nearest(value: float) -> int:
    """Returns the nearest whole number, of two the higher one."""
    return math.floor(value + 0.5)


def _ratios(setting: PresetSetting, target: Target) -> dict[str, Value]:
    """Returns keep ratios, skipped and pruned scales, of a video those of its last clip.

    A schedule too short to hold any of the source's pruned scales prunes its last one that runs, by the last ratio.
    """
    count = len(target.clip)
    stretch = (setting.of_scales or count) / count
    keeps = [_from_end(setting.keep, offset, stretch) for offset in range(1, count + 1)]
    skip = next((index for index, keep in enumerate(keeps) if keep > 0), count - 1)
    pruned = {offset: keep for offset, keep in enumerate(keeps, start=1) if 0 < keep < 1}
    between = [keep for keep in setting.keep if 0 < keep < 1]
    if between and not pruned:
        pruned = {skip + 1: between[-1]}
    entries: dict[str, Value] = {"skip_last": skip, "pruned_scales": max(pruned, default=skip) - skip}
    return entries | {f"keep_{target.count - offset}": keep for offset, keep in pruned.items()}


def _from_end(keep: tuple[float, ...], offset: int, stretch: float) -> float:
    """Returns the ratio for the scale `offset` from the end: that of the nearest relative position in the source."""
    source = max(1, nearest(offset * stretch))
    return keep[-source] if source <= len(keep) else 1.0


def _run_in_full(setting: PresetSetting, entries: dict[str, Value], target: Target) -> dict[str, Value]:
    if entries.get("ending") in ("stop", "probe"):
        raise only_skips(setting, target)
    skipped = int(entries["skip_last"])
    counted = {name: int(entries[name]) for name in _FROM_THE_END if entries.get(name)}
    return entries | {name: number + skipped for name, number in counted.items()} | {"skip_last": 0}


def _measured(
    setting: PresetSetting, key: str, entries: Mapping[str, Value], target: Target, calibration: Calibration | None
) -> dict[str, Value]:
    """Returns a threshold at a quantile of what was measured at the first scale it decides on, in medians of that."""
    if calibration is None:
        raise _missing(setting, target)
    run = target.count - int(entries["skip_last"])
    if key == "drop_threshold":
        known, metric = calibration.discrepancy, "drop_metric"
        scale = max(0, run - int(entries.get("single_branch_scales", 0)) - 1)
    elif key == "stop_threshold":
        known, metric, scale = calibration.change, "stop_metric", target.count - int(entries.get("stop_scales", 1))
    else:
        known, metric, scale = calibration.change, "scorer", run - int(entries["pruned_scales"])
    name = str(entries.get(metric, KNOBS[metric].allowed[0]))
    value, unit = known(name, scale, setting.values[key]["quantile"]), known(name, scale)
    if value is None:
        raise _missing(setting, target)
    knob = KNOBS[key]
    return knob.placed(min(max(value / (unit or 1.0), knob.least), knob.most))


def _missing(setting: PresetSetting, target: Target) -> LeftOut:
    return LeftOut(
        f"preset {setting.name} is left out: it needs a calibration of {target.backbone} with these weights and this "
        f"schedule; run `python -m autoprune.calibrate backbone={target.backbone}`."
    )
