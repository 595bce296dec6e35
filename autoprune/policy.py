"""The policy: every per-scale decision of a pruned generation, as frozen data and as one JSON file.

Production reads policies with this file alone, so it needs nothing beyond the standard library.
Rules and vocabulary follow FastVAR (arXiv 2503.23367) and its peers, keyed by scale index, never by token count.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from autoprune.errors import UserError, unknown_name

SCHEMA = "autoprune.policy/1"
SCORERS = ("dc", "random")
RESTORERS = ("cached",)
INTERPOLATIONS = ("area", "nearest", "bilinear", "bicubic")
GRANULARITIES = ("sublayer", "scale")
ROWS = ("per_branch", "shared")
BRANCHES = ("both", "cond", "uncond")

Grid = tuple[int, int, int]


def kept_count(tokens: int, keep: float) -> int:
    """Returns how many of `tokens` survive a keep ratio: the removed count is truncated (FastVAR), at least one stays."""
    return max(1, tokens - int((1.0 - keep) * tokens + 1e-9))


def fingerprint(schedule: tuple[Grid, ...]) -> str:
    """Returns the short identity of a scale schedule, the same on every machine."""
    return hashlib.sha256(json.dumps([list(grid) for grid in schedule]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ScalePruning:
    """How the tokens of one scale are pruned.

    `keep` is the share of tokens kept. `cache_scale` is the earlier dense scale whose outputs fill the removed tokens.
    `layers` is the inclusive range of pruned blocks, None for all; it applies to sublayer granularity only.
    """

    keep: float
    cache_scale: int
    scorer: str = "dc"
    granularity: str = "sublayer"
    layers: tuple[int, int] | None = None
    rows: str = "per_branch"
    restorer: str = "cached"
    interpolation: str = "area"

    def __post_init__(self) -> None:
        if not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise UserError(
                f"keep ratio must be above 0 and at most 1, got {self.keep}; to keep nothing of the last scales use skip_last."
            )
        for kind, value, choices in (
            ("scorer", self.scorer, SCORERS),
            ("granularity", self.granularity, GRANULARITIES),
            ("row rule", self.rows, ROWS),
            ("restorer", self.restorer, RESTORERS),
            ("interpolation", self.interpolation, INTERPOLATIONS),
        ):
            if value not in choices:
                raise unknown_name(kind, value, choices)


@dataclass(frozen=True)
class BranchRule:
    """From `from_scale` on only one guidance branch runs (`cond` or `uncond`); `both` never drops one."""

    branch: str = "both"
    from_scale: int = 0

    def __post_init__(self) -> None:
        if self.branch not in BRANCHES:
            raise unknown_name("branch", self.branch, BRANCHES)


@dataclass(frozen=True)
class Policy:
    """A schedule of decisions for one backbone and one scale schedule, with what was measured about it.

    `scales` maps a scale index to its pruning; a scale that is not named runs dense. The last `skip_last` scales do
    not run at all. Raises UserError when a rule of a valid schedule is broken.
    """

    backbone: str
    depth: int
    scale_schedule: tuple[Grid, ...]
    scales: Mapping[int, ScalePruning] = field(default_factory=dict)
    guidance: BranchRule = BranchRule()
    skip_last: int = 0
    name: str = ""
    tier: str = ""
    measured: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.scale_schedule)
        if not 0 <= self.skip_last < count:
            raise UserError(f"skip_last must be between 0 and {count - 1} for {count} scales, got {self.skip_last}.")
        if not 0 <= self.guidance.from_scale <= count:
            raise UserError(f"a branch is dropped from a scale between 0 and {count}, got {self.guidance.from_scale}.")
        for index, pruning in self.scales.items():
            self._check_scale(index, pruning)

    def _check_scale(self, index: int, pruning: ScalePruning) -> None:
        count, first = len(self.scale_schedule), min(self.scales)
        if not 0 <= index < count:
            raise UserError(f"scale {index} does not exist; this schedule has scales 0 to {count - 1}.")
        if not 0 <= pruning.cache_scale < first:
            raise UserError(
                f"cache scale must be a dense scale before the first pruned scale ({first}), "
                f"got {pruning.cache_scale} at scale {index}."
            )
        if pruning.layers is not None and not 0 <= pruning.layers[0] <= pruning.layers[1] < self.depth:
            found = f"{list(pruning.layers)} at scale {index}"
            raise UserError(f"layers must be first <= last within 0 to {self.depth - 1}, got {found}.")

    def canonical(self) -> "Policy":
        """Returns the same schedule in its one normal form: no inactive field, ratios snapped to whole tokens."""
        run = len(self.scale_schedule) - self.skip_last
        scales = {}
        for index in sorted(self.scales):
            pruning, tokens = self.scales[index], token_count(self.scale_schedule[index])
            kept = kept_count(tokens, pruning.keep)
            if index < run and kept < tokens:
                scales[index] = self._canonical_scale(pruning, kept / tokens)
        drops = self.guidance.branch != "both" and self.guidance.from_scale < run
        return replace(self, scales=scales, guidance=self.guidance if drops else BranchRule())

    def _canonical_scale(self, pruning: ScalePruning, keep: float) -> ScalePruning:
        every_layer = pruning.granularity != "sublayer" or pruning.layers == (0, self.depth - 1)
        return replace(pruning, keep=keep, layers=None if every_layer else pruning.layers)

    def key(self) -> str:
        """Returns a text that is equal for two policies exactly when they run the same computation."""
        normal = self.canonical()
        names = ("backbone", "depth", "scale_schedule", "scales", "guidance", "skip_last")
        return json.dumps({name: _plain(getattr(normal, name)) for name in names}, sort_keys=True)

    def is_dense(self) -> bool:
        """Returns whether this policy changes nothing."""
        normal = self.canonical()
        return not normal.scales and not normal.skip_last and normal.guidance.branch == "both"

    def check_fits(self, backbone: str, depth: int, schedule: tuple[Grid, ...]) -> None:
        """Raises UserError unless the policy was made for this backbone, depth and scale schedule."""
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
        """Reads a policy file's text. Raises UserError when it is truncated, edited, or of another schema."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{source} is not complete JSON (line {error.lineno}); copy the file again.") from None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, dict) else type(document).__name__
            raise UserError(f"{source} must have schema {SCHEMA!r}, got {found!r}; export it again with this version.")
        digest = document.pop("digest", None)
        if digest != _digest(document):
            raise UserError(f"{source} was edited or damaged: its digest does not match; use the exported file.")
        return _from_document(document, source)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the policy file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(self.to_json())
        os.replace(temporary, path)
        return path

    @staticmethod
    def load(path: str | os.PathLike) -> "Policy":
        """Reads a policy file. Raises UserError when it cannot be read or is not valid."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.__class__.__name__
            raise UserError(f"policy file {os.fspath(path)!r} cannot be read ({reason}); check the path.") from None
        return Policy.from_json(text, source=os.fspath(path))


def token_count(grid: Grid) -> int:
    """Returns t * h * w."""
    return grid[0] * grid[1] * grid[2]


def _plain(value: object) -> object:
    if isinstance(value, ScalePruning | BranchRule):
        return {key: _plain(entry) for key, entry in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _document(policy: Policy) -> dict[str, object]:
    plain = {entry.name: _plain(getattr(policy, entry.name)) for entry in fields(policy)}
    plain["scales"] = {str(index): _plain(policy.scales[index]) for index in sorted(policy.scales)}
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
        raise UserError(f"{source} has an unknown field {unknown[0]!r}; fields are {', '.join(sorted(expected))}.")
    values = {name: document[name] for name in document if name not in ("schema", "fingerprint")}
    try:
        values["scale_schedule"] = tuple(tuple(int(side) for side in grid) for grid in values["scale_schedule"])
        values["scales"] = {int(index): _pruning(entry) for index, entry in values["scales"].items()}
        values["guidance"] = BranchRule(**values["guidance"])
        return Policy(**values)
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{source} does not have the fields of {SCHEMA} ({error}); export it again.") from None


def _pruning(entry: dict[str, object]) -> ScalePruning:
    layers = entry.get("layers")
    return ScalePruning(**(entry | {"layers": tuple(layers) if layers is not None else None}))
