"""A policy in words: its schedule one line a decision, what was measured of it, and how two policies differ.

Standard library only, so that `python -m autoprune.policy` answers at once.
"""

import json
from collections.abc import Callable, Iterator, Mapping

from autoprune.policy import Policy, fingerprint

QUANTITIES: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "speed_up": ("speed-up", lambda value: f"{value:.2f}x"),
    "loss": ("loss (1 - SSIM)", lambda value: f"{value:.3f}"),
    "score_drop": ("score drop, points", lambda value: f"{100 * value:+.1f}"),
}
_PLACE = ("device_name", "instructions", "threads", "dtype", "attention", "torch", "capability", "driver")


def schedule_lines(policy: Policy) -> list[str]:
    """Returns what a policy changes, one line a decision; `dense` alone when it changes nothing."""
    normal = policy.canonical()
    lines = [_scale_line(normal, index) for index in normal.scales]
    if normal.guidance.branch != "both":
        lines.append(_branch_line(normal))
    if normal.skip_last:
        lines.append(f"last {normal.skip_last} scale{'s' * (normal.skip_last > 1)} skipped")
    if normal.stop:
        lines.append(f"from scale {normal.stop.from_scale}: stop when less than {100 * normal.stop.share:g} % still changes")
    if normal.probe:
        lines.append(f"after scale {normal.probe.scale}: a probe decides on skips and branches")
    if normal.group_from is not None:
        lines.append(f"scales {normal.group_from} to {normal.run - 1} in one forward")
    if normal.keys.first is not None:
        lines.append(f"keys of the first {normal.keys.first} and the last {normal.keys.last} scales only")
    if normal.keys.budget < 1:
        lines.append(f"{100 * normal.keys.budget:g} % of the keys")
    for scale, fewer in normal.fewer_repetitions.items():
        lines.append(f"scale {scale} runs {fewer} time{'s' * (fewer > 1)} less")
    return lines or ["dense"]


def policy_lines(policy: Policy) -> list[str]:
    """Returns everything a policy file says, by section: schedule, measured, place, provenance."""
    grids = " ".join("x".join(map(str, grid if grid[0] > 1 else grid[1:])) for grid in policy.scale_schedule)
    lines = [f"{policy.name or 'unnamed'}{policy.tier and f', tier {policy.tier}'}"]
    lines += [f"  for {policy.backbone}, {policy.depth} layers, scales {grids} ({fingerprint(policy.scale_schedule)})"]
    lines += ["schedule", *(f"  {line}" for line in schedule_lines(policy))]
    lines += ["measured", *(f"  {line}" for line in _measured_lines(policy.measured))]
    provenance = {name: value for name, value in policy.provenance.items() if value not in (None, "")}
    lines += ["provenance"] * bool(provenance)
    return lines + [f"  {name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in provenance.items()]


def estimate_text(measured: Mapping[str, object], name: str) -> str:
    """Returns one of QUANTITIES with its 95 % interval where there is one, `-` where it was not measured."""
    value, interval, form = measured.get(name), measured.get(f"{name}_interval"), QUANTITIES[name][1]
    if value is None:
        return "-"
    return form(value) + (f" [{form(interval[0])}, {form(interval[1])}]" if interval else "")


def place_text(measured: Mapping[str, object]) -> str:
    """Returns the machine and the conditions that latencies depend on, as far as they are known."""
    return ", ".join(f"{name.removesuffix('_name')} {measured[name]}" for name in _PLACE if name in measured)


def differences(one: Policy, other: Policy) -> dict[str, tuple[object, object]]:
    """Returns what differs by field, such as `scales.6.keep`: both values, None where one policy has no such field."""
    left, right = dict(_flat("", json.loads(one.to_json()))), dict(_flat("", json.loads(other.to_json())))
    names = [*left, *(name for name in right if name not in left)]
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def _measured_lines(measured: Mapping[str, object]) -> Iterator[str]:
    if not measured:
        yield "never"
        return
    for name, (title, _) in QUANTITIES.items():
        yield f"{title}: {estimate_text(measured, name)}"
    if measured.get("latency") is not None:
        milliseconds = " against dense ".join(f"{1000 * measured[name]:.0f} ms" for name in ("latency", "dense_latency"))
        yield f"{milliseconds}, batch {measured.get('batch')}"
    if measured.get("planned_memory_mb") is not None:
        yield f"memory by plan, weights included: {measured['planned_memory_mb']:.0f} MB"
    yield f"{measured.get('prompts')} {str(measured.get('split', '')).replace('_', '-')} prompts, seed {measured.get('seed')}"
    yield place_text(measured)


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    """Yields the leaves of nested objects by dotted name; the digest, which covers the others, is none."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, entry in value.items():
        if prefix or name != "digest":
            yield from _flat(f"{prefix}.{name}" if prefix else name, entry)


def _branch_line(policy: Policy) -> str:
    rule = policy.guidance
    how = f"{rule.branch} branch only"
    if rule.branch == "adaptive":
        how = f"unconditional branch dropped when {rule.metric} is below {rule.threshold:.3g}"
    return f"from scale {rule.from_scale}: {how}" + (", its effect extrapolated" if rule.replacement == "extrapolate" else "")


def _scale_line(policy: Policy, index: int) -> str:
    pruning, (_, height, width) = policy.scales[index], policy.scale_schedule[index]
    layers = "" if pruning.layers is None else f", layers {pruning.layers[0]}-{pruning.layers[1]}"
    scored = " + ".join(name if len(pruning.scorer) == 1 else f"{weight:g} {name}" for name, weight in pruning.scorer.items())
    restored = f"{pruning.interpolation} from scale {pruning.cache_scale}" if pruning.cached else pruning.restorer
    extras = [pruning.reducer] * (pruning.reducer != "gather") + [pruning.select] * (pruning.select != "top")
    how = ", ".join([scored, f"{pruning.granularity}{layers}", *extras, restored])
    return f"scale {index} ({height}x{width}): keep {100 * pruning.keep:.0f} % ({how})"
