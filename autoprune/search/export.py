"""The files of a study that people and programs read: trials.csv, front.json, policies/*.json."""

import csv
import io
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import autoprune
from autoprune.policy import Policy
from autoprune.search.folder import StudyFolder
from autoprune.search.front import hypervolume, objectives
from autoprune.search.prompt_files import texts_sha256
from autoprune.search.records import FrontMember, Measurement, StudyResult, TrialRecord
from autoprune.search.tiers import TIER_RULES

FRONT_SCHEMA = "autoprune.front/1"
CALIBRATION_FILE = "proxy_calibration.json"
HYPERVOLUME_REFERENCE = (0.0, 1.0)
_MEASURED = (
    "latency",
    "latency_spread",
    "dense_latency",
    "speed_up",
    "loss",
    "ssim",
    "psnr",
    "score_dense",
    "score",
    "score_drop",
    "score_drop_interval",
    "peak_memory_mb",
    "prompts",
    "seed",
    "batch",
    "latency_source",
    "loss_interval",
    "speed_up_interval",
    "score_flips",
    "drift",
    "repeats",
)
_AFTER = ("seconds", "sampler_seconds", "worker", "note", "schedule")


def write_trials(folder: StudyFolder, trials: Sequence[TrialRecord]) -> Path:
    """Writes trials.csv: one row a trial, latencies in seconds per batch, the schedule as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["number", "source", "state", "feasible", *_MEASURED, "seconds", "sampler_seconds", "worker", "note", "schedule"]
    )
    for trial in trials:
        plain = trial.measurement.to_plain() if trial.measurement else {}
        measured = [json.dumps(value) if isinstance(value, list) else value for value in (plain.get(key) for key in _MEASURED)]
        head = [trial.number, trial.source, trial.state, trial.feasible]
        took = [round(trial.seconds, 3), round(trial.sampler_seconds, 4), trial.worker]
        writer.writerow([*head, *measured, *took, trial.note, json.dumps(_decisions(trial.policy))])
    return folder.write("trials.csv", text.getvalue())


def write_front(folder: StudyFolder, result: StudyResult, candidates: Sequence[TrialRecord]) -> Path:
    """Writes front.json: the search's front, the validated members and the presets timed beside them.

    `validated` is false while a study runs or was stopped; then only search numbers are there. The hypervolume is of
    (log relative latency, loss) below (0, 1): dense latency and an unrelated image. Members carry Holm-adjusted p-values
    (FrontMember); `proxy_calibration` is what `python -m autoprune.calibrate_proxy` left in the folder.
    """
    points = [objectives(trial.measurement) for trial in candidates]
    document = {
        "schema": FRONT_SCHEMA,
        "study": folder.path.name,
        "backbone": result.backbone,
        "space": result.space,
        "device": dict(result.device),
        "validated": bool(result.front),
        "loss": result.loss_text,
        "table_error": result.table_error,
        "hypervolume": hypervolume(points, HYPERVOLUME_REFERENCE),
        "dense": result.dense.to_plain(),
        "search_front": [_trial(trial) for trial in candidates],
        "members": [_member(member) for member in result.front],
        "rejected": [_member(member) for member in result.rejected],
        "presets": {name: measured.to_plain() for name, measured in result.presets.items()},
        "rivalry": result.rivalry and asdict(result.rivalry),
        "dimensions": [asdict(row) for row in result.dimensions],
        "proxy_calibration": folder.read_json(CALIBRATION_FILE),
    }
    return folder.write("front.json", json.dumps(document, indent=2) + "\n")


def export_policy(folder: StudyFolder, trial: TrialRecord, measured: Mapping[str, object], *, tier: str, rule: str) -> Path:
    """Writes policies/TIER.json. `measured` holds the device and the held-out numbers, nothing from the search."""
    study = folder.read_json("study.json") or {}
    provenance = {
        "autoprune": autoprune.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "study": folder.path.name,
        "trial": trial.number,
        "source": trial.source,
        "space": study.get("space"),
        "space_sha256": study.get("space_sha256"),
        "weights_sha256": study.get("weights"),
        "sampling": study.get("sampling"),
        "seed": study.get("settings", {}).get("seed"),
        "rule": rule,
    }
    policy = replace(trial.policy, name=f"{folder.path.name}-{tier}", tier=tier, measured=dict(measured), provenance=provenance)
    return policy.save(folder.file(f"policies/{tier}.json"))


def remove_policies(folder: StudyFolder) -> None:
    """Deletes the tiers of an earlier validation, so that no file outlives the numbers it was chosen by."""
    for rule in TIER_RULES:
        folder.file(f"policies/{rule.tier}.json").unlink(missing_ok=True)


def measured_fields(measurement: Measurement, device: Mapping[str, object], texts: Sequence[str]) -> dict[str, object]:
    """Returns the `measured` section of a policy: where, which held-out numbers, and on which of the held-out `texts`, the
    first ones where time ran out."""
    hashed = texts_sha256(texts[: measurement.prompts])
    return {**device, **measurement.to_plain(), "split": "held_out", "prompts_sha256": hashed}


def _commit() -> str | None:
    """Returns the commit of the code, with `-dirty` after it where files differ; None outside a git checkout."""
    root = Path(autoprune.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _trial(trial: TrialRecord) -> dict[str, object]:
    return {
        "trial": trial.number,
        "source": trial.source,
        "search": trial.measurement.to_plain(),
        "schedule": _decisions(trial.policy),
    }


def _member(member: FrontMember) -> dict[str, object]:
    path = member.policy_path and f"policies/{member.policy_path.name}"
    holm = {"drop_p": member.drop_p, "promise_p": member.promise_p}
    return {**_trial(member.trial), "tier": member.tier, "policy": path, "held_out": member.held_out.to_plain(), "holm": holm}


def _decisions(policy: Policy) -> dict[str, object]:
    document = json.loads(policy.key())
    taken = [name for name in ("stop", "probe", "group_from", "keys", "fewer_repetitions") if document.get(name)]
    return {name: document[name] for name in ("scales", "guidance", "skip_last", *taken)}
