"""The end of a study: front members measured again where the search never looked, and the tiers exported from that."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from autoprune.policy import Policy
from autoprune.search.evaluation import Evaluator
from autoprune.search.export import export_policy, measured_fields, remove_policies
from autoprune.search.folder import StudyFolder
from autoprune.search.front import may_lead, most_valuable, non_dominated, objectives, search_front
from autoprune.search.quality import held_out_texts
from autoprune.search.records import FrontMember, Measurement, StudyResult, TrialRecord
from autoprune.search.rivalry import rivalry
from autoprune.search.settings import StudySettings
from autoprune.search.tiers import TIER_RULES, choose_tiers, drop_p

_LOG = logging.getLogger("autoprune")
REPORT_SECONDS = 25.0


def validate_front(
    result: StudyResult, *, settings: StudySettings, folder: StudyFolder, evaluator: Evaluator, step: Callable[[], bool]
) -> StudyResult:
    """Returns the result with its front, presets and table error filled in, and writes policies/*.json.

    Members and presets run interleaved with dense on held-out prompts and seeds; presets may be exported too, and what the
    evaluator could not measure there is left out. The front
    holds the members that no other one beats there, and those a tier chose, `rejected` the rest; the search's own numbers
    go into no policy. p-values are corrected for all members measured.
    `step` is called after each round and says whether there is time for another.
    """
    shown = _shown(result.trials, settings)
    chosen = _candidates(result.trials, shown, settings)
    policies = {trial.policy.key(): trial.policy for trial in [*chosen, *shown]}
    measured = evaluator.validate(policies, step=step) if policies else {}
    remove_policies(folder)
    chosen, shown = ([trial for trial in trials if trial.policy.key() in measured] for trials in (chosen, shown))
    if not measured:
        return result
    held_out = {trial.number: measured[trial.policy.key()] for trial in chosen}
    check = _Estimates(evaluator, result.trials[0].policy)
    front = _exported(result, held_out, settings=settings, folder=folder, check=check)
    taken, rejected = {member.trial.number for member in front}, []
    for trial, drop in zip(chosen, drop_p(list(held_out.values())), strict=True):
        if trial.number not in taken:
            kept = front if _survives(trial, held_out, settings) else rejected
            kept.append(FrontMember(trial, held_out[trial.number], "", None, drop_p=drop))
    front.sort(key=lambda member: member.held_out.speed_up)
    presets = {trial.preset: measured[trial.policy.key()] for trial in shown}
    compared = rivalry([member.held_out for member in front], presets, max_drop=settings.quality.max_drop)
    found = {"presets": presets, "table_error": check.largest, "rivalry": compared}
    return replace(result, front=tuple(front), rejected=tuple(rejected), **found)


def _exported(
    result: StudyResult,
    held_out: Mapping[int, Measurement],
    *,
    settings: StudySettings,
    folder: StudyFolder,
    check: "_Estimates",
) -> list[FrontMember]:
    """Writes the policy of every tier and returns them as members; `held_out` are the candidates by trial number."""
    trials = {trial.number: trial for trial in result.trials}
    numbers, measured, max_drop = list(held_out), list(held_out.values()), settings.quality.max_drop
    tiers, drops, members = choose_tiers(measured, max_drop), drop_p(measured), []
    for rule in TIER_RULES:
        index = tiers.get(rule.tier)
        if index is None:
            _LOG.warning("no validated policy is shown to keep the promise of tier %s; it is not exported.", rule.tier)
            continue
        trial, own = trials[numbers[index]], measured[index]
        holm = {"drop_p": drops[index], "promise_p": rule.promise_p(measured, max_drop)[index]}
        fields = {**measured_fields(own, result.device, held_out_texts(settings)), **check.fields(trial.policy, own)}
        fields["holm"] = {"members": len(measured), **holm}
        promise = rule.text(max_drop, scored=own.scored, loss=settings.quality.loss_text)
        path = export_policy(folder, trial, fields, tier=rule.tier, rule=promise)
        members.append(FrontMember(trial, own, rule.tier, path, **holm))
    return members


def _shown(trials: Sequence[TrialRecord], settings: StudySettings) -> list[TrialRecord]:
    """Returns the presets measured beside the front: those no other preset beats, and the first one of the space."""
    presets = [trial for trial in trials if trial.source.startswith("preset:") and not trial.policy.is_dense()]
    best = non_dominated([trial for trial in presets if trial.state == "complete"], lambda trial: objectives(trial.measurement))
    first = settings.space.presets[0].name if settings.space.presets else ""
    return [trial for trial in presets if trial.measurement and (trial in best or trial.preset == first)]


def _candidates(trials: Sequence[TrialRecord], beside: Sequence[TrialRecord], settings: StudySettings) -> list[TrialRecord]:
    """Returns what is worth measuring again, and what is measured `beside` it in any case.

    Half are the fastest that leave a quarter of a score budget, more, and all of it, as the search's few prompts flatter who
    uses it up (without scores the fastest alone); the rest adds most hypervolume among trials that leave half of it.
    """
    count, quality = settings.budget.front, settings.quality
    leading = sorted(filter(may_lead, trials), key=lambda trial: objectives(trial.measurement))
    limits = np.linspace(0.75 * quality.max_drop, 0, -(-count // 2)) if quality.margin else [quality.max_drop]
    chosen = {trial.policy.key(): trial for trial in beside if may_lead(trial)}
    most = len(chosen) + count
    for limit in limits:
        fits = (trial for trial in leading if trial.measurement.drop <= limit and trial.policy.key() not in chosen)
        chosen |= {trial.policy.key(): trial for trial in islice(fits, 1)}
    careful = [trial for trial in leading if trial.measurement.drop <= quality.careful_drop]
    others = [trial for trial in search_front(careful) if trial.policy.key() not in chosen]
    return most_valuable(others, most, chosen=list(chosen.values()))


def _survives(trial: TrialRecord, held_out: Mapping[int, Measurement], settings: StudySettings) -> bool:
    """Returns whether a member still is feasible, faster than dense, and not beaten by another one."""
    measured = held_out[trial.number]
    if measured.drop > settings.quality.max_drop or measured.speed_up <= 1:
        return False
    return trial.number in non_dominated(held_out, lambda number: objectives(held_out[number]))


class _Estimates:
    """What is known of a policy without measuring it, and how far off it was; `largest` is the table's largest error so far."""

    def __init__(self, evaluator: Evaluator, dense: Policy) -> None:
        self._evaluator, self._dense = evaluator, dense
        self.largest: float | None = None

    def fields(self, policy: Policy, measured: Measurement) -> dict[str, float]:
        """Returns MB by plan, and the relative error of the estimated latency (relative to dense), if there is a table."""
        planned = {"planned_memory_mb": self._evaluator.planned_memory(policy)}
        estimate, dense = self._evaluator.estimated_latency(policy), self._evaluator.estimated_latency(self._dense)
        if estimate is None or dense is None:
            return planned
        error = abs(estimate / dense * measured.speed_up - 1)
        self.largest = max(error, self.largest or 0.0)
        return {**planned, "table_error": error}
