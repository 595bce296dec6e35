"""The points of a study, each with what it is: what the Pareto plot and the report page draw."""

from collections.abc import Iterator
from dataclasses import dataclass

from autoprune.search.front import search_front
from autoprune.search.records import FrontMember, Measurement, StudyResult, TrialRecord

REJECTED, TRIAL, CONTROL = "trial stopped or outside the constraints", "trial", "control"
PRESET, SEARCH_FRONT, FRONT = "preset (hand-picked schedule)", "front of the search prompts", "front (held-out prompts)"
DENSE = "dense"
KINDS = (REJECTED, TRIAL, CONTROL, PRESET, SEARCH_FRONT, FRONT, DENSE)
TOP = 1.2  # times the largest loss that counts: what was stopped or refused above that would squeeze everything else


@dataclass(frozen=True)
class StudyPoint:
    """A trial as it is shown: `kind` of KINDS, the measurement that places it, its tiers where it has any.

    `held_out` is the measurement on held-out prompts, None where there is none.
    """

    kind: str
    trial: TrialRecord
    held_out: Measurement | None = None
    tiers: tuple[str, ...] = ()

    @property
    def measured(self) -> Measurement:
        """Returns the measurement that places the point: on held-out prompts, else on the search's; dense on its own."""
        return self.held_out or self.trial.measurement

    @property
    def label(self) -> str:
        """Returns what is written beside the point, empty for most."""
        return ", ".join(self.tiers) if self.kind == FRONT else self.trial.preset


def study_points(result: StudyResult) -> list[StudyPoint]:
    """Returns every trial with a measurement, by KINDS, the front slowest first; repeats are left out.

    A preset of the front is there twice, dense always once. Without a validated front that of the search takes its place.
    """
    validated = {member.trial.number: member.held_out for member in (*result.rejected, *result.front)}
    leading = [StudyPoint(SEARCH_FRONT, trial) for trial in reversed(search_front(result.trials))]
    leading = list(_front(result.front)) or leading
    members = {point.trial.number for point in leading}
    points = []
    for trial in result.trials:
        if trial.measurement is not None and trial.source != "repeat" and (trial.preset or trial.number not in members):
            held_out = result.presets.get(trial.preset, validated.get(trial.number)) if not trial.policy.is_dense() else None
            points.append(StudyPoint(_kind(trial), trial, held_out))
    return sorted([*points, *leading], key=lambda point: KINDS.index(point.kind))


def _kind(trial: TrialRecord) -> str:
    source = trial.source.partition(":")[0]
    if trial.source == "preset:dense":
        return DENSE
    if source in ("preset", "control"):
        return PRESET if source == "preset" else CONTROL
    return TRIAL if trial.feasible and trial.state == "complete" else REJECTED


def _front(front: tuple[FrontMember, ...]) -> Iterator[StudyPoint]:
    """Yields each member once, with all of its tiers."""
    members = {member.trial.number: member for member in sorted(front, key=lambda member: member.held_out.speed_up)}
    for number, member in members.items():
        tiers = tuple(other.tier for other in front if other.trial.number == number and other.tier)
        yield StudyPoint(FRONT, member.trial, member.held_out, tiers)
