"""The format of search_spaces/*.yaml as checked, frozen data: which dimensions are free and the papers' own settings."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from autoprune.errors import UserError, unknown_name
from autoprune.policy import BRANCHES, GRANULARITIES, INTERPOLATIONS, ROWS, SCORERS

_CHOICES = {
    "interpolation": INTERPOLATIONS,
    "rows": ROWS,
    "granularity": GRANULARITIES,
    "scorer": SCORERS,
    "branch": tuple(branch for branch in BRANCHES if branch != "both"),
}


@dataclass(frozen=True)
class KeepRange:
    """Keep ratios of the last `last_scales` (a share of all scales, rounded up): low to high in steps."""

    last_scales: float
    low: float
    step: float
    high: float = 1.0

    def __post_init__(self) -> None:
        _share("keep.last_scales", self.last_scales)
        if not 0 < self.low < self.high <= 1 or self.step <= 0:
            raise UserError(
                f"keep ratios need 0 < low < high <= 1 and a step above 0, got {self.low}, {self.high}, {self.step}."
            )


@dataclass(frozen=True)
class Dimensions:
    """What a space frees. Shares refer to the number of scales or layers and are rounded up.

    `skip_last` and `single_branch_scales` bound how many of the last scales are skipped or run one guidance branch;
    `cache_before` bounds how many scales before the first pruned one the cache scale lies; `exempt_layers` bounds the
    dense layers at either end. The remaining fields list choices; one choice is fixed and not searched.
    """

    keep: KeepRange
    skip_last: float = 0.0
    cache_before: int = 1
    exempt_layers: float = 0.0
    single_branch_scales: float = 0.0
    branch: tuple[str, ...] = ("cond",)
    granularity: tuple[str, ...] = ("sublayer",)
    scorer: tuple[str, ...] = ("dc",)
    rows: tuple[str, ...] = ("per_branch",)
    interpolation: tuple[str, ...] = ("area",)

    def __post_init__(self) -> None:
        for name in ("skip_last", "exempt_layers", "single_branch_scales"):
            _share(name, getattr(self, name))
        if self.cache_before < 1:
            raise UserError(f"cache_before must be at least 1, got {self.cache_before}.")
        for name, choices in _CHOICES.items():
            for choice in getattr(self, name):
                if choice not in choices:
                    raise unknown_name(name, choice, choices)


@dataclass(frozen=True)
class PresetSetting:
    """A hand-picked setting as published.

    `keep` lists the keep ratios of the last scales, the last one last; 0 skips a scale. With `of_scales` they are
    meant for a schedule of that many scales and move to the same relative position of another one; without, they
    count from the end. `layers` is the inclusive range of pruned layers of `of_layers`, None for all. `scorer` other
    than a choice of the space makes the setting a control: it is evaluated, never searched around nor exported.
    """

    name: str
    source: str
    keep: tuple[float, ...] = ()
    of_scales: int | None = None
    of_layers: int | None = None
    layers: tuple[int, int] | None = None
    cache_before: int = 1
    single_branch_scales: int = 0
    branch: str = "cond"
    granularity: str = "sublayer"
    scorer: str = "dc"
    rows: str = "per_branch"
    interpolation: str = "area"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown_name(f"{name} of preset {self.name}", getattr(self, name), choices)
        for keep in self.keep:
            if not 0 <= keep <= 1:
                raise UserError(f"keep ratio must be in [0, 1], got {keep} in preset {self.name}.")
        if self.layers is not None and self.of_layers is None:
            raise UserError(f"preset {self.name} names layers, so it must name `of_layers`, the depth they refer to.")


@dataclass(frozen=True)
class SpaceDefinition:
    """One file of search_spaces/: a name, the paper, what is free, and the presets (controls included)."""

    name: str
    paper: str
    dimensions: Dimensions
    presets: tuple[PresetSetting, ...]

    def sha256(self) -> str:
        """Returns the identity of everything the file says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def read_space(path: Path) -> SpaceDefinition:
    """Reads a search-space file. Raises UserError when it cannot be read or breaks a rule."""
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"search space {str(path)!r} cannot be read ({error.__class__.__name__}); check the file.") from None
    return space_from_document(document)


def space_from_document(document: Mapping[str, object]) -> SpaceDefinition:
    """Returns the checked space of a parsed file. Raises UserError naming the first unknown key or broken rule."""
    _known_keys("search space", document, ("name", "paper", "dimensions", "presets"))
    dimensions = dict(_mapping("dimensions", document.get("dimensions")))
    _known_keys("dimensions", dimensions, _names(Dimensions))
    keep = _mapping("dimensions.keep", dimensions.get("keep"))
    _known_keys("dimensions.keep", keep, _names(KeepRange))
    dimensions["keep"] = _build("dimensions.keep", KeepRange, keep)
    presets = _mapping("presets", document.get("presets") or {})
    return SpaceDefinition(
        name=str(document.get("name")),
        paper=str(document.get("paper", "")),
        dimensions=_build("dimensions", Dimensions, dimensions),
        presets=tuple(_preset(name, entry) for name, entry in presets.items()),
    )


def _preset(name: str, entry: object) -> PresetSetting:
    entry = _mapping(f"preset {name}", entry)
    _known_keys(f"preset {name}", entry, [key for key in _names(PresetSetting) if key != "name"])
    return _build(f"preset {name}", PresetSetting, {"name": str(name), **entry})


def _build(where: str, kind: type, values: Mapping[str, object]) -> object:
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return kind(**frozen)
    except TypeError as error:
        raise UserError(f"{where} of the search space is not valid ({error}); see search_spaces/unified.yaml.") from None


def _mapping(where: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} of the search space must be a mapping, got {value!r}; see search_spaces/unified.yaml.")
    return value


def _known_keys(where: str, given: Mapping[str, object], known: object) -> None:
    for key in given:
        if key not in known:
            raise unknown_name(f"key of {where}", key, known)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name} is a share and must be in [0, 1), got {value}.")
