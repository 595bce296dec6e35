"""The policy: every per-scale decision of a pruned generation, as frozen data and as one JSON file.

Production reads policies with this file alone, so it needs nothing beyond the standard library. Run as a module it shows,
validates, compares and migrates policy files (policy_command.py).
Rules and vocabulary follow FastVAR (arXiv 2503.23367) and its peers, keyed by scale index, never by token count.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path

from autoprune.clips import Course
from autoprune.errors import UserError
from autoprune.files import write_whole
from autoprune.policy_reading import check_measured, made, read_object, read_text, scale_index, sentence
from autoprune.rules import BranchRule, KeyRule, ProbeRule, ScalePruning, StopRule
from autoprune.validity import check_course, check_schedule

SCHEMA = "autoprune.policy/1"
LABELS = ("name", "tier", "measured", "provenance")  # what a policy says about itself; the rest is what it does
CONDITIONS = ("device", "device_name", "instructions", "capability", "threads", "dtype", "attention", "torch", "batch")
Grid = tuple[int, int, int]


def kept_count(tokens: int, keep: float) -> int:
    """Returns how many of `tokens` survive a keep ratio: the removed count is truncated (FastVAR), at least one stays."""
    return max(1, tokens - int((1.0 - keep) * tokens + 1e-9))


def fingerprint(schedule: tuple[Grid, ...]) -> str:
    """Returns the short identity of a scale schedule, the same on every machine."""
    return hashlib.sha256(json.dumps([list(grid) for grid in schedule]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Policy:
    """A schedule of decisions for one backbone and one scale schedule, with what was measured about it.

    `scales` maps a scale index to its pruning; a scale that is not named runs dense. The last `skip_last` scales do
    not run at all. `chunks` groups of blocks (as many as there are blocks at most) are pruned together at chunk granularity.
    The scales from `group_from` on run in one forward. A batch follows data-dependent decisions together (`all`: the
    sample that needs most decides) or one sample at a time (`split`). `fewer_repetitions` says by scale how many of the
    backbone's own repetitions are left out, where it runs scales several times. Raises UserError when a rule is broken.
    """

    backbone: str
    depth: int
    scale_schedule: tuple[Grid, ...]
    scales: Mapping[int, ScalePruning] = field(default_factory=dict)
    guidance: BranchRule = BranchRule()
    skip_last: int = 0
    chunks: int = 8
    stop: StopRule | None = None
    probe: ProbeRule | None = None
    group_from: int | None = None
    keys: KeyRule = KeyRule()
    batch: str = "all"
    fewer_repetitions: Mapping[int, int] = field(default_factory=dict)
    name: str = ""
    tier: str = ""
    measured: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_schedule(self)

    @property
    def run(self) -> int:
        """Returns how many scales run, unless a data-dependent decision ends them earlier."""
        return len(self.scale_schedule) - self.skip_last

    @property
    def adaptive(self) -> bool:
        """Returns whether what runs depends on the data."""
        thresholds = any(rule.select == "threshold" for rule in self.scales.values())
        return thresholds or self.guidance.branch == "adaptive" or self.stop is not None or self.probe is not None

    def chunk_ranges(self) -> tuple[range, ...]:
        """Returns the blocks of each chunk."""
        count = min(self.chunks, self.depth)
        return tuple(range(-(-chunk * self.depth // count), -(-(chunk + 1) * self.depth // count)) for chunk in range(count))

    def canonical(self) -> "Policy":
        """Returns the same schedule in its one normal form: no inactive field, ratios snapped to whole tokens."""
        scales = {}
        for index in sorted(self.scales):
            rule, tokens = self.scales[index], token_count(self.scale_schedule[index])
            kept = kept_count(tokens, rule.keep)
            if index < self.run and (kept < tokens or rule.ranks):
                scales[index] = rule.canonical(keep=kept / tokens, depth=self.depth)
        group = self.group_from if self.group_from is not None and self.group_from < self.run - 1 else None
        chunked = any(rule.granularity == "chunk" or "delta" in rule.scorer for rule in scales.values())
        changed = replace(
            self,
            scales=scales,
            guidance=self.guidance.canonical(self.run),
            chunks=min(self.chunks, self.depth) if chunked else 8,
            stop=self.stop if self.stop and self.stop.from_scale < self.run else None,
            group_from=group,
            keys=self.keys.canonical(),
            fewer_repetitions={scale: self.fewer_repetitions[scale] for scale in self._repeated_less()},
        )
        return changed if changed.adaptive else replace(changed, batch="all")

    def _repeated_less(self) -> list[int]:
        return [scale for scale in sorted(self.fewer_repetitions) if self.fewer_repetitions[scale] and scale < self.run]

    def key(self) -> str:
        """Returns a text that is equal for two policies exactly when they run the same computation."""
        normal = self.canonical()
        values = {entry.name: _plain(getattr(normal, entry.name)) for entry in fields(normal) if entry.name not in LABELS}
        if not normal.fewer_repetitions:
            del values["fewer_repetitions"]
        return json.dumps(values, sort_keys=True)

    def is_dense(self) -> bool:
        """Returns whether this policy changes nothing."""
        dense = Policy(self.backbone, self.depth, self.scale_schedule)
        return self.key() == dense.key()

    @property
    def skips(self) -> str:
        """Returns what may keep the last scale from running, empty where it always runs."""
        if self.skip_last:
            return f"skip_last {self.skip_last}"
        if self.stop is not None:
            return f"a stop rule from scale {self.stop.from_scale} on"
        return "a probe with skip cuts" if self.probe is not None and self.probe.skip_cuts else ""

    def check_fits(
        self, backbone: str, depth: int, schedule: tuple[Grid, ...], *, skippable: bool = True, course: Course | None = None
    ) -> None:
        """Raises UserError unless the policy was made for this backbone, depth and scale schedule.

        A backbone is not `skippable` when its last scale must run, as HART's, which adds a continuous residual there.
        `course` is how it runs through the schedule, if that is known.
        """
        if self.backbone != backbone:
            raise UserError(f"the policy is for backbone {self.backbone!r}, not {backbone!r}; search one for {backbone!r}.")
        if self.depth != depth:
            raise UserError(f"the policy is for {self.depth} layers, the backbone has {depth}; search one for this backbone.")
        if self.scale_schedule != tuple(schedule):
            raise UserError(
                f"the policy is for scale schedule {fingerprint(self.scale_schedule)}, "
                f"this run uses {fingerprint(tuple(schedule))}; "
                "use the aspect ratio and pixel budget it was searched for, or Policy.for_schedule."
            )
        if not skippable and self.skips:
            raise UserError(
                f"the last scale of {backbone} must run, because its continuous residual is added there, got {self.skips}; "
                "prune its tokens instead."
            )
        if course is not None:
            check_course(self, course)

    def check_prunes(self) -> None:
        """Raises UserError for a policy that changes nothing on its schedule: applied, it would be a silent no-op."""
        if self.is_dense():
            raise UserError(
                f"a policy must change something on its schedule, {self.name or 'this one'!r} runs every token of "
                f"{fingerprint(self.scale_schedule)}; lower its keep ratios, or generate without a policy."
            )

    def mismatches(self, here: Mapping[str, object]) -> list[str]:
        """Returns what its latencies depend on and differs `here` (measure.device.device_conditions, and the batch), in words.

        Only CONDITIONS that both sides know are compared, and torch by major and minor version.
        """
        pairs = {name: (self.measured[name], here[name]) for name in CONDITIONS if name in self.measured and name in here}
        if "torch" in pairs:
            pairs["torch"] = tuple(".".join(str(version).split(".")[:2]) for version in pairs["torch"])
        return [f"{name} {there}, here {now}" for name, (there, now) in pairs.items() if there != now]

    def for_schedule(self, schedule: tuple[Grid, ...]) -> "Policy":
        """Returns these decisions on another schedule of as many scales (another aspect ratio), without its measurements."""
        if len(schedule) != len(self.scale_schedule):
            raise UserError(f"the other schedule must have {len(self.scale_schedule)} scales too, got {len(schedule)}.")
        return replace(self, scale_schedule=tuple(schedule), measured={}, tier="")

    def to_json(self) -> str:
        """Returns the policy file's text: one top-level field and one scale a line, sealed by a digest."""
        document = _document(self)
        lines = [f"  {json.dumps(key)}: {_field_text(key, value)}" for key, value in document.items()]
        lines.append(f'  "digest": {json.dumps(_digest(document))}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def from_json(text: str, *, source: str = "policy") -> "Policy":
        """Reads a policy file's text. Raises UserError when it is truncated, edited, of another schema, or breaks a rule."""
        document = read_object(text, source)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            found = document if isinstance(document, str) else document.get("schema")
            raise UserError(
                sentence(f"{source} must have schema {SCHEMA!r}, got {found!r}; export it again with this version.")
            )
        digest = document.pop("digest", None)
        if digest != _digest(document):
            raise UserError(f"{source} was edited or damaged: its digest does not match; use the exported file.")
        return _from_document(document, source)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the policy file, whole or not at all."""
        return write_whole(path, self.to_json())

    @staticmethod
    def load(path: str | os.PathLike) -> "Policy":
        """Reads a policy file. Raises UserError when it cannot be read or is not valid."""
        return Policy.from_json(read_text(path), source=os.fspath(path))


def policy_files(source: str | os.PathLike) -> list[Path]:
    """Returns a policy file, or those of a folder by name. Raises UserError for a folder that has none."""
    path = Path(source)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"policies must be a policy file or a folder with some, {str(source)!r} has none.")
    return files


def token_count(grid: Grid) -> int:
    """Returns t * h * w."""
    return grid[0] * grid[1] * grid[2]


def _plain(value: object) -> object:
    if isinstance(value, ScalePruning | BranchRule | StopRule | ProbeRule | KeyRule):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value) if _written(value, entry)}
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _written(rule: object, entry: Field) -> bool:
    """Returns whether a field of a rule is written: those at their default are not."""
    default = {"dc": 1.0} if entry.name == "scorer" else entry.default
    return entry.default is MISSING or getattr(rule, entry.name) != default


def _document(policy: Policy) -> dict[str, object]:
    plain = {entry.name: _plain(getattr(policy, entry.name)) for entry in fields(policy)}
    plain["scales"] = {str(index): _plain(policy.scales[index]) for index in sorted(policy.scales)}
    if not policy.fewer_repetitions:
        del plain["fewer_repetitions"]
    identity = {"schema": SCHEMA, "name": plain.pop("name"), "tier": plain.pop("tier")}
    return identity | {"fingerprint": fingerprint(policy.scale_schedule)} | plain


def _field_text(key: str, value: object) -> str:
    if key == "scales" and value:
        lines = ",\n".join(f"    {json.dumps(index)}: {json.dumps(entry)}" for index, entry in value.items())
        return "{\n" + lines + "\n  }"
    return json.dumps(value)


def _digest(document: Mapping[str, object]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _from_document(document: dict[str, object], source: str) -> Policy:
    expected = {"schema", "fingerprint"} | {entry.name for entry in fields(Policy)}
    unknown = sorted(set(document) - expected)
    if unknown:
        raise UserError(
            sentence(f"{source} has an unknown field {unknown[0][:40]!r}; fields are {', '.join(sorted(expected))}.")
        )
    values = {name: document[name] for name in document if name not in ("schema", "fingerprint")}
    try:
        values["scale_schedule"] = tuple(map(tuple, values["scale_schedule"]))
        values["scales"] = {scale_index(key): made(ScalePruning, entry) for key, entry in values["scales"].items()}
        fewer = values.get("fewer_repetitions", {})
        values["fewer_repetitions"] = {scale_index(key): number for key, number in fewer.items()}
        for name, kind in (("guidance", BranchRule), ("stop", StopRule), ("probe", ProbeRule), ("keys", KeyRule)):
            if values.get(name) is not None:
                values[name] = made(kind, values[name])
        policy = made(Policy, values)
        check_measured(policy.measured)
    except UserError as error:
        raise UserError(sentence(str(error))) from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(sentence(f"{source} does not have the fields of {SCHEMA} ({error}); export it again.")) from None
    if document.get("fingerprint") != fingerprint(policy.scale_schedule):
        raise UserError(f"{source} names another scale schedule than it holds; export it again.")
    return policy


if __name__ == "__main__":
    from autoprune.policy_command import main

    sys.exit(main(sys.argv[1:]))
