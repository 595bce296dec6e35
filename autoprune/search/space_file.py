"""The format of search_spaces/*.yaml as checked, frozen data: which dimensions are free and the papers' own settings."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from autoprune.errors import UserError, unknown_name
from autoprune.search.dimensions import KNOBS
from autoprune.search.folders import shipped_folder
from autoprune.search.knobs import Value

_BY_POSITION = ("keep", "skip_last", "exempt_layers")  # presets state these by `keep` and `layers`
_CALIBRATED = ("drop_threshold", "stop_threshold", "threshold")
_KEYS = ("name", "paper", "dimensions", "presets_of", "presets")


@dataclass(frozen=True)
class PresetSetting:
    """A hand-picked setting as published.

    `keep` lists the keep ratios of the last scales, the last one last; 0 skips a scale. With `of_scales` they and
    every number of scales are meant for a schedule of that many and move to the same relative position of another one;
    without, they count from the end. `layers` is the inclusive range of pruned layers of `of_layers`, None for all.
    `values` holds the other decisions by the names of dimensions.KNOBS; a threshold may be `{quantile: q}` of what
    calibration measures at the first scale it decides on. Thresholds of differences and changes count in their calibrated
    medians, where there is a calibration. `inferred` marks what the source does not state; a `control`
    is measured to compare with, never exported. One for `videos` has no place where there is a single frame.
    """

    name: str
    source: str
    keep: tuple[float, ...] = ()
    of_scales: int | None = None
    of_layers: int | None = None
    layers: tuple[int, int] | None = None
    inferred: bool = False
    control: bool = False
    videos: bool = False
    values: Mapping[str, Value | Mapping[str, float]] = field(default_factory=dict)

    @property
    def skips(self) -> bool:
        """Returns whether it leaves the last scale out."""
        return self.keep[-1:] == (0,)

    def __post_init__(self) -> None:
        for keep in self.keep:
            if not 0 <= keep <= 1:
                raise UserError(f"keep ratio must be in [0, 1], got {keep} in preset {self.name}.")
        if self.layers is not None and self.of_layers is None:
            raise UserError(f"preset {self.name} names layers, so it must name `of_layers`, the depth they refer to.")
        for key, value in self.values.items():
            try:
                _check_value(key, value)
            except UserError as error:
                raise UserError(f"preset {self.name}: {error}") from None


@dataclass(frozen=True)
class SpaceDefinition:
    """One space: a name, the paper, what is free (by the names of dimensions.KNOBS), and the presets (controls included)."""

    name: str
    paper: str
    dimensions: Mapping[str, object]
    presets: tuple[PresetSetting, ...]

    def sha256(self) -> str:
        """Returns the identity of everything the file says, presets of other files included."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def read_space(path: Path) -> SpaceDefinition:
    """Reads a search-space file. Raises UserError when it cannot be read or breaks a rule."""
    return space_from_document(_parsed(Path(path)), folder=Path(path).parent)


def space_from_document(document: Mapping[str, object], *, folder: Path | None = None) -> SpaceDefinition:
    """Returns the checked space of a parsed file; `presets_of` names files of `folder`, by default of the shipped ones.

    Raises UserError naming the first unknown key or broken rule.
    """
    _known_keys("search space", document, _KEYS)
    dimensions = _mapping("dimensions", document.get("dimensions"))
    _known_keys("dimensions", dimensions, KNOBS)
    presets = (*_presets_of(document.get("presets_of") or [], folder), *_presets(document))
    names = [preset.name for preset in presets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"preset {name} is written twice; each one belongs to one file.")
    return SpaceDefinition(
        name=str(document.get("name")),
        paper=str(document.get("paper", "")),
        dimensions={key: KNOBS[key].setting(given) for key, given in dimensions.items()},
        presets=presets,
    )


def _presets_of(names: object, folder: Path | None) -> tuple[PresetSetting, ...]:
    folder = folder or shipped_folder("search_spaces")
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    presets: list[PresetSetting] = []
    for name in names if isinstance(names, list | tuple) else (names,):
        if name not in known:
            raise unknown_name("search space in presets_of", name, known)
        presets += _presets(_parsed(folder / f"{name}.yaml"))
    return tuple(presets)


def _presets(document: Mapping[str, object]) -> tuple[PresetSetting, ...]:
    return tuple(_preset(str(name), entry) for name, entry in _mapping("presets", document.get("presets") or {}).items())


def _preset(name: str, entry: object) -> PresetSetting:
    entry = _mapping(f"preset {name}", entry)
    own = [key for key in _names(PresetSetting) if key not in ("name", "values")]
    free = [key for key in KNOBS if key not in _BY_POSITION]
    _known_keys(f"preset {name}", entry, (*own, *free))
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    try:
        return PresetSetting(
            name=name,
            values={key: value for key, value in given.items() if key in free},
            **{key: value for key, value in given.items() if key in own},
        )
    except TypeError as error:
        raise UserError(f"preset {name} of the search space is not valid ({error}); see search_spaces/fastvar.yaml.") from None


def _check_value(key: str, value: Value | Mapping[str, float]) -> None:
    if not isinstance(value, Mapping):
        KNOBS[key].placed(value)
    elif key not in _CALIBRATED or set(value) != {"quantile"} or not 0 <= value["quantile"] <= 1:
        raise UserError(f"only {', '.join(_CALIBRATED)} may be a quantile in [0, 1], got {dict(value)} for {key}.")


def _parsed(path: Path) -> Mapping[str, object]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"search space {str(path)!r} cannot be read ({error.__class__.__name__}); check the file.") from None
    return _mapping(path.name, document)


def _mapping(where: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} of the search space must be a mapping, got {value!r}; see search_spaces/unified.yaml.")
    return value


def _known_keys(where: str, given: Mapping[str, object], known: object) -> None:
    for key in given:
        if key not in known:
            raise unknown_name(f"key of {where}", key, known)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(kind))
