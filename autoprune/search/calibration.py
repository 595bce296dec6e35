"""What presets and thresholds need to know about one set of weights: measured once, kept as one JSON file a backbone.

Ranks follow FasterVAR/StageVAR (arXiv 2512.16483, energy of the centred chunk features), the probe SkipVAR (2506.08908),
discrepancies and changes LD-Pruning (2606.00310). Files lie in search_spaces/calibrations/BACKBONE.json.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from autoprune.errors import UserError, unknown_name
from autoprune.files import write_whole
from autoprune.rules import DISCREPANCIES, LATENT_SCORERS, ProbeRule
from autoprune.search.folders import shipped_folder

SCHEMA = "autoprune.calibration/1"
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
Quantiles = Mapping[str, Mapping[int, tuple[float, ...]]]


@dataclass(frozen=True)
class Calibration:
    """Measurements of one backbone with one set of weights on one scale schedule.

    `scale_schedule` is its fingerprint, `weights` their revision. `ranks` maps an energy share (alpha, as text such as
    "0.96") to the share of tokens each chunk needs at `rank_scale`, the first scale that is projected; the number of chunks
    is that of the backbone. `probe` is the fitted decision, None also where scales run clip by clip.
    `discrepancies[metric][scale]` are quantiles over prompts (at LEVELS) of the difference of the branches at that scale;
    `changes[metric][scale]` over prompts and positions of the change of the latent of its clip known before that scale (by
    the last run before it). A scale that runs several times counts each time.
    """

    backbone: str
    scale_schedule: str
    weights: str
    prompts: int
    rank_scale: int = 0
    ranks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    probe: ProbeRule | None = None
    discrepancies: Quantiles = field(default_factory=dict)
    changes: Quantiles = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_ranks(self.ranks)
        for kind, quantiles, metrics in (
            ("discrepancy", self.discrepancies, DISCREPANCIES),
            ("change", self.changes, LATENT_SCORERS),
        ):
            _check_quantiles(kind, quantiles, metrics)

    def digest(self) -> str:
        """Returns the identity of what was measured."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def discrepancy(self, metric: str, scale: int, level: float = 0.5) -> float | None:
        """Returns the quantile at `level` of the branches' difference at the nearest measured scale; None if not measured."""
        return _quantile(self.discrepancies.get(metric), scale, level)

    def change(self, metric: str, scale: int, level: float = 0.5) -> float | None:
        """Returns the quantile at `level` of the latent's change before the nearest measured scale; None if not measured."""
        return _quantile(self.changes.get(metric), scale, level)

    def fits(self, *, scale_schedule: str, weights: str) -> bool:
        """Returns whether the measurements hold for this schedule (its fingerprint) and these weights (their revision)."""
        return (self.scale_schedule, self.weights) == (scale_schedule, weights)

    def to_json(self) -> str:
        """Returns the file's text: one top-level field a line."""
        document = {"schema": SCHEMA} | asdict(self)
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()) + "\n}\n"

    @staticmethod
    def from_json(text: str, *, source: str = "calibration") -> "Calibration":
        """Reads a file's text. Raises UserError when it is not complete, of another schema or breaks a rule."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{source} is not complete JSON (line {error.lineno}); calibrate again.") from None
        found = document.pop("schema", None) if isinstance(document, dict) else type(document).__name__
        if found != SCHEMA:
            raise UserError(f"{source} must have schema {SCHEMA!r}, got {found!r}; calibrate again.")
        try:
            return _from_document(document)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"{source} does not have the fields of {SCHEMA} ({error}); calibrate again.") from None

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the file, whole or not at all."""
        return write_whole(path, self.to_json())

    @staticmethod
    def load(path: str | os.PathLike) -> "Calibration":
        """Reads a calibration file. Raises UserError when it cannot be read or is not valid."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.__class__.__name__
            raise UserError(f"calibration {os.fspath(path)!r} cannot be read ({reason}); check the path.") from None
        return Calibration.from_json(text, source=f"calibration {os.fspath(path)!r}")


def calibration_path(backbone: str, folder: Path | None = None) -> Path:
    """Returns where a backbone's calibration lies: `folder`, by default the shipped search_spaces/calibrations."""
    return (folder or shipped_folder("search_spaces") / "calibrations") / f"{backbone}.json"


def find_calibration(backbone: str, *, scale_schedule: str, weights: str, folder: Path | None = None) -> Calibration | None:
    """Returns a backbone's calibration, None when there is none or it is of other weights or another schedule.

    `scale_schedule` is a fingerprint, `weights` the backbone's revision. Raises UserError for a file that is not valid.
    """
    path = calibration_path(backbone, folder)
    if not path.is_file():
        return None
    calibration = Calibration.load(path)
    return calibration if calibration.fits(scale_schedule=scale_schedule, weights=weights) else None


def _from_document(document: Mapping[str, object]) -> Calibration:
    known = {entry.name: entry for entry in fields(Calibration)}
    for key in document:
        if key not in known:
            raise unknown_name("field of a calibration", key, known)
    for name, entry in known.items():
        if name not in document and entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"a calibration names {name}; calibrate again.")
    values = dict(document)
    values["ranks"] = {alpha: tuple(shares) for alpha, shares in document.get("ranks", {}).items()}
    for name in ("discrepancies", "changes"):
        values[name] = {
            metric: {int(scale): tuple(row) for scale, row in rows.items()} for metric, rows in document.get(name, {}).items()
        }
    if document.get("probe") is not None:
        entries = document["probe"].items()
        values["probe"] = ProbeRule(**{key: tuple(value) if isinstance(value, list) else value for key, value in entries})
    return Calibration(**values)


def _check_ranks(ranks: Mapping[str, tuple[float, ...]]) -> None:
    if len({len(shares) for shares in ranks.values()}) > 1:
        raise UserError(f"ranks of every alpha name as many chunks, got {[len(shares) for shares in ranks.values()]}.")
    for alpha, shares in ranks.items():
        if not 0 < float(alpha) < 1 or not shares or not all(0 < share <= 1 for share in shares):
            raise UserError(f"ranks are shares above 0 and at most 1 for an alpha in (0, 1), got {list(shares)} for {alpha}.")


def _check_quantiles(kind: str, quantiles: Quantiles, metrics: tuple[str, ...]) -> None:
    for metric, rows in quantiles.items():
        if metric not in metrics:
            raise unknown_name(f"{kind} metric", metric, metrics)
        for scale, row in rows.items():
            if len(row) != len(LEVELS) or list(row) != sorted(row) or not all(map(math.isfinite, row)):
                raise UserError(
                    f"{kind} quantiles must be {len(LEVELS)} ascending numbers, got {list(row)} for {metric} at scale {scale}."
                )


def _quantile(rows: Mapping[int, tuple[float, ...]] | None, scale: int, level: float) -> float | None:
    if not rows:
        return None
    nearest = min(rows, key=lambda measured: (abs(measured - scale), measured))
    return float(np.interp(level, LEVELS, rows[nearest]))
