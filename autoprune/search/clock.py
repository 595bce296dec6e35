"""The wall clock of one run of a study against its budget, part of which is kept for validation and reports."""

import time
from dataclasses import dataclass

from autoprune.search.settings import BudgetSettings
from autoprune.search.validation import REPORT_SECONDS

RESERVE_SHARE = 0.45  # of the budget at most: on a slow machine validation runs fewer rounds
PRESETS_SHOWN = 8  # about as many presets are measured beside the front


@dataclass(frozen=True)
class ValidationCost:
    """What the held-out measurement depends on: dense seconds a batch, and rounds."""

    dense_seconds: float
    rounds: int


class StudyClock:
    """Runs from `began`, in seconds of the epoch: every worker of a run, on whatever machine, reads the same time."""

    def __init__(self, budget: BudgetSettings, began: float) -> None:
        self._budget, self._began, self._round_began = budget, began, 0.0
        self._limit = None if budget.minutes is None else 60 * budget.minutes

    def has_time(self, validation: ValidationCost) -> bool:
        """Returns whether another trial may begin."""
        return self._limit is None or self._elapsed() + self._reserve(validation) < self._limit

    def seconds_left(self, trials: float, validation: ValidationCost) -> float:
        """Returns the seconds to the end, `trials` seconds of them in trials if the limit allows so many."""
        left = trials + self._reserve(validation)
        return left if self._limit is None else max(0.0, min(left, self._limit - self._elapsed()))

    def start_round(self) -> None:
        """Notes that validation begins."""
        self._round_began = self._elapsed()

    def has_another_round(self) -> bool:
        """Notes the end of a round of validation; returns whether there is time for one as long."""
        now = self._elapsed()
        seconds, self._round_began = now - self._round_began, now
        return self._limit is None or now + seconds + REPORT_SECONDS < self._limit

    def _reserve(self, validation: ValidationCost) -> float:
        """Returns the seconds kept for validation and reports, a candidate and its comparison taking as long as dense."""
        policies = self._budget.front + PRESETS_SHOWN
        wanted = validation.rounds * (1 + policies) * validation.dense_seconds + REPORT_SECONDS
        return wanted if self._limit is None else min(wanted, RESERVE_SHARE * self._limit)

    def _elapsed(self) -> float:
        return time.time() - self._began
