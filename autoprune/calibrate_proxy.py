"""`python -m autoprune.calibrate_proxy`: do a study's cheap numbers rank its policies as a benchmark of yours does?"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.arguments import run_command
from autoprune.errors import UserError
from autoprune.files import check_writable, write_whole

if TYPE_CHECKING:
    from autoprune.measure.rank_correlation import RankCorrelation
    from autoprune.search.proxies import ProxyCorrelation

USAGE = "python -m autoprune.calibrate_proxy study=outputs/tiny-unified scores=geneval.csv,dpg.jsonl lower=fid"


@dataclass(frozen=True)
class Choices:
    """The command line. `scores` are CSV or JSONL files, separated by commas: `policy` (a tier, preset or trial number) and
    one column a benchmark. `lower` names the benchmarks, and metrics of the user's own, of which less is better.
    """

    study: str
    scores: str
    lower: str = ""


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, 2 after bad input, 130 after Ctrl-C."""
    return run_command(Choices, arguments, usage=USAGE, command=_calibrate)


def _calibrate(choices: Choices) -> str:
    from autoprune.search.export import CALIBRATION_FILE
    from autoprune.search.proxies import FEW_POLICIES, calibrate, calibration_document, read_policies, read_scores

    study, lower = Path(choices.study), _names(choices.lower)
    policies, scores = read_policies(study), read_scores([Path(name) for name in _names(choices.scores)])
    if not scores:
        raise UserError(f"scores must hold at least one benchmark beside policy, got none in {choices.scores!r}; add a column.")
    correlations = calibrate(policies, scores, lower=lower)
    check_writable(study, what="study folder", remedy="copy it")
    path = write_whole(study / CALIBRATION_FILE, calibration_document(correlations, scores, lower=lower))
    few = min(row.policies for row in correlations)
    if few < FEW_POLICIES:
        print(f"autoprune: {few} policies say little about a rank correlation; score {FEW_POLICIES} or more.", file=sys.stderr)
    return f"{_table(correlations)}\nwritten: {path}"


def _table(correlations: "Sequence[ProxyCorrelation]") -> str:
    """Returns one line a pair; 1 says that the proxy ranks the policies exactly as the benchmark does."""
    lines = [f"{'proxy':16} {'benchmark':16} {'policies':>8}  {'Spearman [95 %]':22}  {'Kendall [95 %]':22}"]
    for row in correlations:
        numbers = f"{_text(row.spearman):22}  {_text(row.kendall):22}".rstrip()
        lines.append(f"{row.proxy:16} {row.benchmark:16} {row.policies:8}  {numbers}")
    return "\n".join(lines)


def _text(found: "RankCorrelation") -> str:
    if found.value is None:
        return "- (all equal)"
    low, high = found.interval
    return f"{found.value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
