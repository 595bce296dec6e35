"""`python -m autoprune.verify`: a policy's speed-up and quality measured here and now, beside what its file says.

Exit code 0 says that the file's numbers hold here, 1 that one does not, 2 that they cannot be compared.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.arguments import Answer, run_command
from autoprune.backbones import Backbone, LoadArguments, Sampling
from autoprune.errors import UserError
from autoprune.measure.device import device_conditions
from autoprune.measure.metrics.similarity import IDENTICAL_PSNR
from autoprune.measure.placement import with_fitting_keys
from autoprune.measure.reproduction import Agreement, Estimate, agreement
from autoprune.policy import Policy
from autoprune.policy_text import QUANTITIES, estimate_text, place_text

if TYPE_CHECKING:
    from autoprune.search.comparison_records import Comparison
    from autoprune.search.prompt_files import PromptFile

USAGE = "python -m autoprune.verify policy=outputs/tiny-unified/policies/balanced.json"
RUN_TO_RUN = 0.05  # README: runs on one machine repeat within 5 % (of 9 schedules timed in two published runs, 1.7 to 5.2 %)
LEAST_PROMPTS = 16  # below, bootstrap intervals of a mean are too narrow
LEAST_ROUNDS = 6  # the fewest whose extremes hold the median in 95 % of cases (1 - 2 / 2^6)
_SUMMARIES = {
    0: "inside: what was compared agrees with the file.",
    1: "outside: the file's numbers do not hold here.",
    2: "nothing could be compared.",
}
_NOTE = f"explained: by chance, 95 % for all rows together; two runs of a speed-up may differ by {100 * RUN_TO_RUN:g} % more."
_NEEDED = ("prompts", "batch", "seed", "speed_up", "loss")


@dataclass(frozen=True, kw_only=True)
class Choices(LoadArguments):
    """The command line. `prompts`, `batch` and `backbone` are the file's unless they are given.

    Prompts are held out, from `prompts_file` where the file was measured on a user's own. `rounds` is the least number of
    timed rounds, and `seed` chooses prompts and noise; a study measures on seed 0 (ComparisonSettings).
    """

    policy: str
    backbone: str = ""
    prompts: int = 0
    prompts_file: str = ""
    batch: int = 0
    rounds: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompts", 0), ("batch", 0), ("rounds", LEAST_ROUNDS), ("seed", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Row:
    """One quantity: its name in QUANTITIES, how file and machine agree (None: not compared), and that or why in words."""

    name: str
    agreement: Agreement | None
    reason: str

    @property
    def verdict(self) -> str:
        """Returns PASS, outside or -."""
        return "-" if self.agreement is None else "PASS" if self.agreement.inside else "outside"


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0 inside, 1 outside, 2 when the policy or the comparison cannot apply, 130 after Ctrl-C."""
    return run_command(Choices, arguments, usage=USAGE, command=_verify)


def compared_rows(there: Mapping[str, object], here: Mapping[str, object], *, incomparable: Mapping[str, str]) -> list[Row]:
    """Compares the quantities that the file has; `incomparable` gives a reason by quantity not to.

    Speed-ups are compared by their logarithms and may differ by RUN_TO_RUN, which rounds of one run do not show.
    """
    reasons = {name: incomparable.get(name) or _missing(there, here, name) for name in QUANTITIES}
    looks = sum(not reason for reason in reasons.values())
    rows = []
    for name, reason in reasons.items():
        if there.get(name) is None:
            continue
        if reason:
            rows.append(Row(name, None, f"not compared: {reason}"))
            continue
        ratio = name == "speed_up"
        estimates = [_estimate(measured, name, math.log if ratio else float) for measured in (there, here)]
        found = agreement(*estimates, tolerance=math.log(1 + RUN_TO_RUN) if ratio else 0.0, looks=looks)
        rows.append(Row(name, found, _explained(found, name)))
    return rows


def _verify(choices: Choices) -> Answer:
    policy = Policy.load(choices.policy)
    choices = replace(choices, backbone=choices.backbone or policy.backbone)
    _check(policy, choices.backbone)
    choices = replace(choices, **_from_file(choices, policy.measured))
    try:
        return _answer(choices, policy)
    except ModuleNotFoundError as error:
        rule = f"verifying needs {str(error.name).partition('.')[0]}, not installed here"
        raise UserError(f'{rule}; run: pip install "autoprune[search]".') from None


def _check(policy: Policy, backbone: str) -> None:
    policy.check_fits(backbone, policy.depth, policy.scale_schedule)
    policy.check_prunes()
    if any(policy.measured.get(name) is None for name in _NEEDED):
        raise UserError(
            f"a policy must carry held-out measurements to be verified, {policy.name or 'this one'!r} has none; export it from "
            "a study, or measure it with python -m autoprune.compare policies=FILE."
        )


def _from_file(choices: Choices, measured: Mapping[str, object]) -> dict[str, object]:
    prompts, batch = choices.prompts or measured["prompts"], choices.batch or measured["batch"]
    if prompts < max(LEAST_PROMPTS, batch):
        raise UserError(f"prompts must be at least {LEAST_PROMPTS} and a batch ({batch}), got {prompts}; raise prompts.")
    return {"prompts": prompts, "batch": batch}


def _answer(choices: Choices, policy: Policy) -> Answer:
    prompts = _prompts(choices, policy.measured)
    backbone = _sampled(choices.load(), policy.provenance.get("sampling") or {})
    backbone = with_fitting_keys(backbone, batch=choices.batch)
    backbone.check_policy(policy)
    conditions = device_conditions(backbone.device, backbone.dtype)
    elsewhere = policy.mismatches(conditions | {"batch": choices.batch})
    for sentence in _warnings(policy, backbone, elsewhere):
        print(f"autoprune: {sentence}", file=sys.stderr)
    comparison = _compared(choices, policy, backbone, prompts)
    here = comparison.policies[1].measurement.to_plain() | conditions
    incomparable = {"speed_up": "other conditions"} if elsewhere else {}
    if not _same_prompts(policy.measured, backbone, prompts):
        incomparable |= dict.fromkeys(("loss", "score_drop"), "other prompts than the file's")
    rows = compared_rows(policy.measured, here, incomparable=incomparable)
    return _told(rows, policy, here, comparison)


def _prompts(choices: Choices, measured: Mapping[str, object]) -> "PromptFile | None":
    from autoprune.search.prompt_files import read_prompts

    if not choices.prompts_file:
        if measured.get("score_drop") is None:
            raise UserError("the policy was measured on prompts of its user's own, got none; give prompts_file=FILE.")
        return None
    prompts = read_prompts(Path(choices.prompts_file))
    prompts.take("held_out", choices.prompts, setting="prompts")
    return prompts


def _sampled(backbone: Backbone, sampling: Mapping[str, object]) -> Backbone:
    """Returns the backbone with the sampling that the policy was measured with, as far as its file says."""
    plain = {entry.name: sampling[entry.name] for entry in fields(Sampling) if entry.name in sampling}
    return backbone.sampled(**{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()})


def _warnings(policy: Policy, backbone: Backbone, elsewhere: list[str]) -> Iterator[str]:
    if elsewhere:
        yield (
            f"speed-ups cannot be compared, the file's are of other conditions ({'; '.join(elsewhere)}); "
            f"python -m autoprune backbone={backbone.name} searches here."
        )
    there = policy.provenance.get("weights_sha256")
    if there is not None and there != backbone.revision:
        found = ", here ".join(weights[:12] or "random ones" for weights in (there, backbone.revision))
        yield f"the file's numbers are of other weights ({found}); load those to compare."


def _same_prompts(measured: Mapping[str, object], backbone: Backbone, prompts: "PromptFile | None") -> bool:
    """Returns whether the file's held-out prompts come from where ours do: then they are two samples of one kind."""
    from autoprune.search.prompt_files import texts_sha256
    from autoprune.search.quality import make_quality
    from autoprune.search.settings import default_quality

    if (prompts is None) != (measured.get("score_drop") is not None):
        return False
    quality = make_quality(default_quality(backbone.name, prompts), prompts)
    try:
        texts = quality.texts(quality.prompts("held_out", measured["prompts"]))
    except UserError:  # a file with fewer prompts
        return False
    return measured.get("prompts_sha256") in (None, texts_sha256(texts))


def _compared(choices: Choices, policy: Policy, backbone: Backbone, prompts: "PromptFile | None") -> "Comparison":
    """Measures the policy beside dense, on other noise than the file's."""
    import torchmetrics  # noqa: F401 (a missing package must show before any work)

    from autoprune.search.comparison import compare
    from autoprune.search.comparison_records import Candidate, ComparisonSettings
    from autoprune.search.progress import RichProgress
    from autoprune.search.settings import QualitySettings

    repeated = choices.seed + QualitySettings().held_out_seed == policy.measured["seed"]
    settings = ComparisonSettings(choices.prompts, choices.batch, choices.rounds, per_prompt=0, seed=choices.seed + repeated)
    candidate = Candidate(policy.name or "policy", policy, choices.policy, "file")
    with RichProgress() as progress:
        comparison = compare(backbone, [candidate], settings, progress=progress, prompts=prompts)
    if comparison.interrupted:
        raise KeyboardInterrupt
    row = comparison.policies[1]
    if policy.adaptive and row.share_computed >= 1 and row.measurement.psnr >= IDENTICAL_PSNR:
        raise UserError(f"a policy must change something, {candidate.name!r} pruned nothing here; lower its thresholds.")
    return comparison


def _missing(there: Mapping[str, object], here: Mapping[str, object], name: str) -> str:
    for measured, where in ((there, "the file has"), (here, "this run has")):
        if measured.get(name) is None or measured.get(f"{name}_interval") is None:
            return f"{where} no interval of it"
    return ""


def _estimate(measured: Mapping[str, object], name: str, scale: Callable[[float], float]) -> Estimate:
    return Estimate(*map(scale, (measured[name], *measured[f"{name}_interval"])))


def _explained(found: Agreement, name: str) -> str:
    if name == "speed_up":
        difference, margin = f"{100 * math.expm1(found.difference):+.1f} %", f"{100 * math.expm1(found.margin):.1f} %"
        return f"{difference}, explained: {margin}"
    unit = 100 if name == "score_drop" else 1
    digits = 1 if name == "score_drop" else 3
    return f"{unit * found.difference:+.{digits}f}, explained: {unit * found.margin:.{digits}f}"


def _told(rows: list[Row], policy: Policy, here: Mapping[str, object], comparison: "Comparison") -> Answer:
    lines = [
        f"{policy.name or 'policy'} on {comparison.backbone}: {here['prompts']} held-out prompts and noise of seed "
        f"{comparison.settings.seed}, batch {here['batch']}, {comparison.rounds} rounds interleaved with dense",
        f"here: {place_text(here)}",
        "",
        f"{'95 % intervals':<20}{'file':<22}{'here':<22}{'':<9}difference",
    ]
    for row in rows:
        there, now = estimate_text(policy.measured, row.name), estimate_text(here, row.name)
        lines.append(f"{QUANTITIES[row.name][0]:<20}{there:<22}{now:<22}{row.verdict:<9}{row.reason}")
    verdicts = [row.verdict for row in rows]
    code = 1 if "outside" in verdicts else 0 if "PASS" in verdicts else 2
    return Answer("\n".join([*lines, "", _NOTE, _SUMMARIES[code]]), code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
