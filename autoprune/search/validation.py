"""The end of a study: front members measured again where the search never looked, and the tiers exported from that."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from autoprune.policy import Policy
from autoprune.search.evaluator import Evaluator
from autoprune.search.export import export_policy, measured_fields, remove_policies
from autoprune.search.folder import StudyFolder
from autoprune.search.front import may_lead, most_valuable, non_dominated, objectives, search_front
from autoprune.search.records import FrontMember, Measurement, StudyResult, TrialRecord
from autoprune.search.rivalry import rivalry
from autoprune.search.settings import StudySettings
from autoprune.search.tiers import TIER_RULES, choose_tiers

_LOG = logging.getLogger("autoprune")
REPORT_SECONDS = 25.0


def validate_front(
    result: StudyResult, *, settings: StudySettings, folder: StudyFolder, evaluator: Evaluator, step: Callable[[], bool]
) -> StudyResult:
    """Returns the result with its front, presets and table error filled in, and writes policies/*.json.

    Members and presets run interleaved with dense on held-out prompts and seeds; presets may be exported too. The front
    holds the members that no other one beats there, and those a tier chose, `rejected` the rest; the search's own numbers
    go into no policy.
    `step` is called after each round and says whether there is time for another.
    """
    shown = _shown(result.trials, settings)
    chosen = _candidates(result.trials, settings)
    chosen += [trial for trial in shown if may_lead(trial) and trial not in chosen]
    policies = {trial.policy.key(): trial.policy for trial in [*chosen, *shown]}
    remove_policies(folder)
    if not policies:
        return result
    measured = evaluator.validate(policies, step=step)
    held_out = {trial.number: measured[trial.policy.key()] for trial in chosen}
    check = _TableCheck(evaluator, result.trials[0].policy)
    tiers = choose_tiers([held_out[trial.number] for trial in chosen], settings.quality.max_drop)
    for rule in TIER_RULES:
        if rule.tier not in tiers:
            _LOG.warning("no validated policy keeps the promise of tier %s; it is not exported.", rule.tier)
    front, rejected, errors = [], [], []
    for index, trial in enumerate(chosen):
        numbers = held_out[trial.number]
        for rule in (rule for rule in TIER_RULES if tiers.get(rule.tier) == index):
            checked = check.fields(trial.policy, numbers)
            errors += checked.values()
            fields = {**measured_fields(numbers, result.device), **checked}
            promise = rule.text(settings.quality.max_drop, scored=numbers.scored, loss=settings.quality.loss_text)
            path = export_policy(folder, trial, fields, tier=rule.tier, rule=promise)
            front.append(FrontMember(trial, numbers, rule.tier, path))
        if index not in tiers.values():
            (front if _survives(trial, held_out, settings) else rejected).append(FrontMember(trial, numbers, "", None))
    front.sort(key=lambda member: member.held_out.speed_up)
    presets = {trial.preset: measured[trial.policy.key()] for trial in shown}
    error = max(errors, default=None)
    compared = rivalry([member.held_out for member in front], presets, max_drop=settings.quality.max_drop)
    return replace(result, front=tuple(front), rejected=tuple(rejected), presets=presets, table_error=error, rivalry=compared)


def _shown(trials: Sequence[TrialRecord], settings: StudySettings) -> list[TrialRecord]:
    """Returns the presets measured beside the front: those no other preset beats, and the first one of the space."""
    presets = [trial for trial in trials if trial.source.startswith("preset:") and not trial.policy.is_dense()]
    best = non_dominated([trial for trial in presets if trial.state == "complete"], lambda trial: objectives(trial.measurement))
    first = settings.space.presets[0].name if settings.space.presets else ""
    return [trial for trial in presets if trial.measurement and (trial in best or trial.preset == first)]


def _candidates(trials: Sequence[TrialRecord], settings: StudySettings) -> list[TrialRecord]:
    """Returns what is worth measuring again: half from the front, the rest from the front at half the quality budget.

    The search's few prompts flatter its fastest policies; the second half is there for when those fail.
    """
    count, half = settings.budget.front, settings.quality.max_drop / 2
    careful = [trial for trial in trials if trial.measurement and trial.measurement.drop <= half]
    chosen = most_valuable(search_front(trials), -(-count // 2))
    others = [trial for trial in search_front(careful) if trial not in chosen]
    return chosen + most_valuable(others, count - len(chosen))


def _survives(trial: TrialRecord, held_out: Mapping[int, Measurement], settings: StudySettings) -> bool:
    """Returns whether a member still is feasible, faster than dense, and not beaten by another one."""
    measured = held_out[trial.number]
    if measured.drop > settings.quality.max_drop or measured.speed_up <= 1:
        return False
    return trial.number in non_dominated(held_out, lambda number: objectives(held_out[number]))


class _TableCheck:
    """Compares the latency table's speed-up with the measured one."""

    def __init__(self, evaluator: Evaluator, dense: Policy) -> None:
        self._evaluator, self._dense = evaluator, dense

    def fields(self, policy: Policy, measured: Measurement) -> dict[str, float]:
        """Returns the relative error of the estimated latency (relative to dense); nothing without a table."""
        estimate, dense = self._evaluator.estimated_latency(policy), self._evaluator.estimated_latency(self._dense)
        if estimate is None or dense is None:
            return {}
        return {"table_error": abs(estimate / dense * measured.speed_up - 1)}
