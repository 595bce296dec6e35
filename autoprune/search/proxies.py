"""Whether a study's cheap numbers rank policies as a benchmark does. No paper says so for pruned generators: measure it."""

import csv
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from autoprune.errors import UserError, unknown_name
from autoprune.measure.metrics import METRICS
from autoprune.measure.rank_correlation import RankCorrelation, correlated, kendall, spearman

CALIBRATION_SCHEMA = "autoprune.proxy_calibration/1"
LEAST_POLICIES = 3
FEW_POLICIES = 8  # below, two unrelated rankings often agree by chance: a quarter of them have |rho| above 0.5 at 7 policies
_LOWER = ("loss", "score_drop")
_HIGHER = ("psnr",)

Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ProxiedPolicy:
    """A validated policy: the names a score may give it (trial number, tiers, preset), and held-out numbers by proxy."""

    names: tuple[str, ...]
    proxies: Mapping[str, float]


@dataclass(frozen=True)
class ProxyCorrelation:
    """How alike a proxy and a benchmark rank `policies` policies; 1 says that better in one is better in the other."""

    proxy: str
    benchmark: str
    policies: int
    spearman: RankCorrelation
    kendall: RankCorrelation


def read_policies(study: Path) -> list[ProxiedPolicy]:
    """Returns the validated members and presets in a study's front.json, without dense.

    Raises UserError for a folder without a readable one, and for a study that was not validated.
    """
    file = study / "front.json"
    try:
        document = json.loads(file.read_text())
        members = [*document["members"], *document["rejected"]]
        found: dict[str, ProxiedPolicy] = {}
        for member in members:
            number, kind = str(member["trial"]), member["source"].partition(":")
            names = found[number].names if number in found else (number, *([kind[2]] if kind[0] == "preset" else []))
            names += (member["tier"],) if member["tier"] else ()
            found[number] = ProxiedPolicy(names, _proxies(member["held_out"]))
        taken = {name for policy in found.values() for name in policy.names}
        presets = {name: held_out for name, held_out in document["presets"].items() if name not in taken}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"study must be a folder with the front.json of a search, got {str(study)!r}; give study=DIR."
        ) from None
    found |= {name: ProxiedPolicy((name,), _proxies(held_out)) for name, held_out in presets.items()}
    if not found:
        raise UserError(f"study {str(study)!r} has no validated policies yet; let the search end first.")
    return list(found.values())


def read_scores(files: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Returns scores by benchmark and policy name from CSV files with a header or JSONL files of objects.

    The column or key `policy` names the policy, every other one is a benchmark. Empty values are left out. Raises UserError
    for what cannot be read, a row without a policy, a value that is no finite number and a score given twice.
    """
    scores: dict[str, dict[str, float]] = {}
    for file in files:
        for where, row in _rows(file):
            name = row.pop("policy", None)
            if name in (None, ""):
                raise UserError(f"every row must name its policy, got none in {where}; add the column policy.")
            for benchmark, value in row.items():
                if value in (None, ""):
                    continue
                known = scores.setdefault(benchmark, {})
                if str(name) in known:
                    raise UserError(f"a policy must have one {benchmark}, got another one of {name!r} in {where}; remove it.")
                known[str(name)] = _number(value, benchmark, where)
    return scores


def calibrate(policies: Sequence[ProxiedPolicy], scores: Scores, *, lower: Collection[str]) -> list[ProxyCorrelation]:
    """Returns every proxy against every benchmark; `lower` names those of either kind of which less is better.

    Raises UserError for an unknown policy, for names in `lower` that nothing has, and below LEAST_POLICIES scored policies.
    """
    by_name = {name: index for index, policy in enumerate(policies) for name in policy.names}
    known = {proxy for policy in policies for proxy in policy.proxies}
    for name in lower:
        if name not in known | scores.keys():
            raise unknown_name("benchmark or proxy", name, sorted(known | scores.keys()))
    found = []
    for benchmark, given in scores.items():
        scored = _by_policy(given, by_name, benchmark)
        for proxy in sorted(known):
            both = [index for index in scored if proxy in policies[index].proxies]
            if len(both) >= LEAST_POLICIES:
                x = [_better(proxy, policies[index].proxies[proxy], lower) for index in both]
                y = [_better(benchmark, scored[index], lower) for index in both]
                rho, tau = correlated(spearman, x, y), correlated(kendall, x, y)
                found.append(ProxyCorrelation(proxy, benchmark, len(both), rho, tau))
    return found


def calibration_document(correlations: Sequence[ProxyCorrelation], scores: Scores, *, lower: Collection[str]) -> str:
    """Returns the text of proxy_calibration.json: the correlations and what they were computed from."""
    rows = [asdict(row) for row in correlations]
    document = {"schema": CALIBRATION_SCHEMA, "correlations": rows, "scores": scores, "lower": sorted(lower)}
    return json.dumps(document, indent=2) + "\n"


def _proxies(held_out: Mapping[str, object]) -> dict[str, float]:
    """Returns the numbers of a Measurement that could stand for quality."""
    found = {name: held_out[name] for name in (*_LOWER, *_HIGHER) if held_out[name] is not None}
    metrics = {name: of["value"] if isinstance(of, dict) else of for name, of in held_out.get("metrics", {}).items()}
    return metrics | found


def _rows(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields where each row stands and what it holds."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"scores {str(file)!r} cannot be read ({type(error).__name__}); give CSV or JSONL files.") from None
    if text.lstrip().startswith("{"):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{file}, line {number}", _object(line, f"{file}, line {number}")
        return
    reader = csv.DictReader(text.splitlines())
    for row in reader:
        if None in row:
            raise UserError(f"every row must have as many values as the header, got more in {file}, line {reader.line_num}.")
        yield f"{file}, line {reader.line_num}", row


def _object(line: str, where: str) -> dict[str, object]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UserError(f"every line must be one JSON object, got {line[:40]!r} in {where}; mend it.")
    return document


def _number(value: object, benchmark: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{benchmark} must be a finite number, got {value!r} in {where}; mend or empty it.")
    return number


def _by_policy(given: Mapping[str, float], by_name: Mapping[str, int], benchmark: str) -> dict[int, float]:
    """Returns the scores by policy index; a policy under two of its names counts once, dense not at all."""
    scored: dict[int, float] = {}
    for name, value in given.items():
        if name == "dense":
            continue
        if name not in by_name:
            raise unknown_name("policy", name, by_name)
        if scored.setdefault(by_name[name], value) != value:
            raise UserError(f"a policy must have one {benchmark}, got another one of {name!r} under its other name; remove it.")
    if len(scored) < LEAST_POLICIES:
        raise UserError(f"{benchmark} must have at least {LEAST_POLICIES} scored policies, got {len(scored)}; score more.")
    return scored


def _better(name: str, value: float, lower: Collection[str]) -> float:
    """Returns the value with the sign that makes more better."""
    less = name in lower or name in _LOWER or (name in METRICS and METRICS[name].info.lower)
    return -value if less else value
