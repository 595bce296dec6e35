"""The seam between a study and what measures its policies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from autoprune.policy import Policy
from autoprune.search.records import Measurement

Stop = Callable[[Measurement], str]


@dataclass(frozen=True)
class Evaluation:
    """`first` covers the first batch, `measurement` all that ran; `stopped` says why it ended early, else empty."""

    first: Measurement
    measurement: Measurement
    stopped: str = ""


class Evaluator(Protocol):
    """What measures policies."""

    def dense(self) -> Measurement:
        """Measures the reference; called once, before any other method."""

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        """Measures a policy; after the first batch `stop` may return a reason to end there. Raises faults.Fault."""

    def validate(self, policies: Mapping[str, Policy], *, step: Callable[[], bool]) -> dict[str, Measurement]:
        """Measures policies on held-out prompts and seeds, timed together; calls `step` after each round.

        Ends after at most `validation_steps` rounds, or after `latency.rounds` as soon as `step` returns False. Policies that
        could not be measured are missing.
        """

    def validation_steps(self) -> int:
        """Returns how many interleaved rounds `validate` runs at most."""

    def estimated_latency(self, policy: Policy) -> float | None:
        """Returns the table's seconds per batch, None without a table or for unseen scales."""

    def planned_memory(self, policy: Policy) -> float:
        """Returns the MB that the loaded backbone and a batch of this policy take at their peak (measure/memory_plan.py)."""

    def state(self) -> dict[str, object]:
        """Returns, as JSON values, what a resumed study can reuse."""
