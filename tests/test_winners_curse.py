"""200 studies of known truth: what validation exports is true, what the search measured of the same policies is not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from autoprune.measure.statistics import bootstrap_interval, ratio_interval
from autoprune.policy import Policy, ScalePruning
from autoprune.search.folder import StudyFolder
from autoprune.search.records import Measurement, StudyResult, TrialRecord
from autoprune.search.settings import StudySettings
from autoprune.search.space_file import read_space
from autoprune.search.tally import score_fields
from autoprune.search.tiers import TIER_RULES
from autoprune.search.validation import validate_front
from tests.example_study import DENSE

STUDIES, TRIALS, ROUNDS = 200, 240, 10
SPREAD, SHARED = 0.5, 0.2  # of log loss over prompts, and which share of that variance all policies have in common
GRIDS = ((1, 1, 1), (1, 16, 16))
POLICIES = [Policy("tiny", 6, GRIDS, {1: ScalePruning(tokens / 256, 0)}) for tokens in range(10, 10 + TRIALS)]
NUMBERS = {policy.key(): number for number, policy in enumerate(POLICIES)}
SPACE = read_space(Path(__file__).parent.parent / "search_spaces" / "skip.yaml")
SETTINGS = StudySettings(Path("unused"), "x", SPACE)
BUDGET = SETTINGS.quality.max_score_drop


class World:
    """True speed-up, loss and score drop of every policy; stands for a backbone, both splits drawn from one truth."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.speed_up = np.exp(rng.uniform(np.log(1.05), np.log(3.5), TRIALS))
        self.loss = 0.05 * (self.speed_up - 1) * np.exp(np.abs(rng.normal(0, 0.03, TRIALS)))
        self.drop = 2 * np.clip(self.loss - 0.04, 0, None)

    def losses(self, prompts: int) -> np.ndarray:
        """Draws the loss of every policy on the same prompts, [T, prompts]: lognormal, its mean the true loss."""
        common, own = self.rng.normal(size=prompts), self.rng.normal(size=(TRIALS, prompts))
        log = SPREAD * (SHARED**0.5 * common + (1 - SHARED) ** 0.5 * own)
        return self.loss[:, None] * np.exp(log - SPREAD**2 / 2)

    def scores(self, prompts: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws right/wrong scores of dense [prompts] and of every policy [T, prompts]: 2 % gained, the drop more lost."""
        chance, dense = self.rng.random((TRIALS, prompts)), (self.rng.random(prompts) < 0.9).astype(float)
        flips = np.where(dense == 1, chance < (0.018 + self.drop[:, None]) / 0.9, chance < 0.18)
        return dense, np.where(flips, 1 - dense, dense)

    def validate(self, policies: Mapping[str, Policy], *, step: Callable[[], bool]) -> dict[str, Measurement]:
        losses, (dense, scores) = self.losses(160), self.scores(160)
        slow = self.rng.lognormal(0, 0.1, ROUNDS)
        seconds = slow * self.rng.lognormal(0, 0.02, ROUNDS)
        found = {}
        for key in policies:
            number = NUMBERS[key]
            own = slow * self.rng.lognormal(0, 0.02, ROUNDS) / self.speed_up[number]
            measured = measurement(np.median(seconds) / np.median(own), losses[number].mean())
            timing = ratio_interval(seconds, own, resamples=1000)
            intervals = {"loss_interval": bootstrap_interval(losses[number]), "speed_up_interval": timing}
            found[key] = replace(measured, prompts=160, **score_fields(dense, scores[number]), **intervals)
        return found

    def planned_memory(self, policy: Policy) -> float:
        return 50.0

    def estimated_latency(self, policy: Policy) -> None:
        return None


def measurement(speed_up: float, loss: float) -> Measurement:
    return replace(DENSE, latency=0.6 / speed_up, speed_up=float(speed_up), loss=float(loss), ssim=float(1 - loss))


@dataclass(frozen=True)
class Exported:
    """One tier of one study: held-out and search interval of the loss and the truth; whether each promise is true."""

    tier: str
    covered: bool
    search_covered: bool
    speed_up_covered: bool
    drop_covered: bool
    optimism: float
    drop_optimism: float
    true_promise: bool


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Exported], list[bool]]:
    """Returns everything exported, and for each study whether the fastest of at most the mean budget truly keeps it."""
    folder, exported, by_mean = StudyFolder(tmp_path_factory.mktemp("curse"), {}), [], []
    for seed in range(STUDIES):
        world = World(np.random.default_rng(seed))
        searched, trials = search(world)
        result = StudyResult("tiny", "skip", {}, DENSE, tuple(trials), (), folder.path, {})
        found = validate_front(result, settings=SETTINGS, folder=folder, evaluator=world, step=lambda: True)
        exported += [judged(world, member, searched[member.trial.number]) for member in found.front if member.tier]
        within_mean = [member for member in (*found.front, *found.rejected) if member.held_out.score_drop <= BUDGET]
        fastest = max(within_mean, key=lambda member: member.held_out.speed_up)
        by_mean.append(bool(world.drop[fastest.trial.number] <= BUDGET))
    return exported, by_mean


def search(world: World) -> tuple[np.ndarray, list[TrialRecord]]:
    """Returns every policy's losses on the search prompts, and the records of those within the budget."""
    searched, (dense, scores) = world.losses(96), world.scores(96)
    drops, losses = dense.mean() - scores.mean(axis=1), searched.mean(axis=1)
    speed_ups = world.speed_up * world.rng.lognormal(0, 0.01, TRIALS)
    trials = []
    for number in np.flatnonzero(drops <= BUDGET).tolist():
        measured = replace(measurement(speed_ups[number], losses[number]), score_drop=float(drops[number]))
        trials.append(TrialRecord(number, "sampler", POLICIES[number], measured, feasible=True, state="complete", seconds=1.0))
    return searched, trials


def judged(world: World, member, searched: np.ndarray) -> Exported:  # noqa: ANN001
    number, held_out = member.trial.number, Policy.load(member.policy_path).measured
    rule = next(rule for rule in TIER_RULES if rule.tier == member.tier)
    return Exported(
        tier=member.tier,
        covered=within(world.loss[number], held_out["loss_interval"]),
        search_covered=within(world.loss[number], bootstrap_interval(searched)),
        speed_up_covered=within(world.speed_up[number], held_out["speed_up_interval"]),
        drop_covered=within(world.drop[number], held_out["score_drop_interval"]),
        optimism=float(1 - searched.mean() / world.loss[number]),
        drop_optimism=float(world.drop[number] - member.trial.measurement.score_drop),
        true_promise=bool(world.loss[number] <= rule.max_loss and world.drop[number] <= BUDGET),
    )


def within(truth: float, interval: tuple[float, float]) -> bool:
    return bool(interval[0] <= truth <= interval[1])


def share(values: list[bool]) -> float:
    return float(np.mean(values))


def test_exported_intervals_cover_the_truth_and_the_searchs_do_not(studies: tuple[list[Exported], list[bool]]) -> None:
    exported, _ = studies
    assert len({entry.tier for entry in exported}) == 4 and len(exported) > 2 * STUDIES
    held_out, search = share([entry.covered for entry in exported]), share([entry.search_covered for entry in exported])
    optimism = float(np.mean([entry.optimism for entry in exported]))
    drop_optimism = float(np.mean([entry.drop_optimism for entry in exported]))
    print(
        f"\nloss intervals cover the truth: held out {held_out:.1%}, search {search:.1%}; search losses {optimism:.1%} "
        f"and drops {100 * drop_optimism:.1f} points too low"
    )
    assert held_out >= 0.9 and search < 0.8 and optimism > 0.03 and drop_optimism > 0.02
    assert share([entry.speed_up_covered for entry in exported]) >= 0.9
    assert share([entry.drop_covered for entry in exported]) >= 0.9


def test_promises_of_exported_tiers_are_true_where_the_mean_alone_is_not(studies: tuple[list[Exported], list[bool]]) -> None:
    exported, by_mean = studies
    broken = {tier: 0 for tier in ("lossless", "high", "balanced", "fast")}
    for entry in exported:
        broken[entry.tier] += not entry.true_promise
    print(f"\nbroken promises in {STUDIES} studies: {broken}; fastest with a mean within the budget: {by_mean.count(False)}")
    assert all(count <= 0.05 * STUDIES for count in broken.values())
    assert by_mean.count(False) > 0.1 * STUDIES
