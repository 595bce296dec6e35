"""A study whose evaluator computes its numbers instead of generating images, for the tests of what surrounds evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from autoprune.policy import Policy, token_count
from autoprune.search.crew import Crew
from autoprune.search.evaluation import Evaluation, Stop
from autoprune.search.progress import NullProgress
from autoprune.search.records import Measurement, StudyResult
from autoprune.search.settings import BudgetSettings, SamplerSettings, StudySettings
from autoprune.search.space_file import read_space
from autoprune.search.study import run_study
from autoprune.search.tracking import NullTracker

SPACES = Path(__file__).parent.parent / "search_spaces"


class FormulaEvaluator:
    """Latency is the number of kept tokens times branches; loss grows with what is left out. Counts what it was asked."""

    def __init__(self, depth: int, *, interrupt_at: int = 0, fail_at: tuple[int, ...] = ()) -> None:
        self.depth, self.interrupt_at, self.fail_at = depth, interrupt_at, fail_at
        self.asked: list[str] = []
        self.validated: list[str] = []

    def measure(self, policy: Policy | None, prompts: int = 48) -> Measurement:
        kept = full = loss = 0.0
        policy = policy or Policy("tiny", self.depth, ((1, 1, 1),))
        for index, grid in enumerate(policy.scale_schedule):
            tokens, rule = token_count(grid), policy.scales.get(index)
            full += 2 * tokens
            if index >= len(policy.scale_schedule) - policy.skip_last:
                loss += 0.15
                continue
            single = policy.guidance.branch != "both" and index >= policy.guidance.from_scale
            keep = rule.keep if rule else 1.0
            kept += tokens * keep * (1 if single else 2)
            loss += 0.2 * (1 - keep) ** 1.5 * (2.0 if rule and rule.scorer == "random" else 1.0)
            loss += (0.01 if policy.guidance.branch == "cond" else 0.2) * single
        drop = max(0.0, loss - 0.2) / 2
        return Measurement(
            latency=kept / 500,
            latency_spread=0.0,
            dense_latency=full / 500,
            speed_up=full / kept,
            loss=loss,
            ssim=1 - loss,
            psnr=30.0,
            score_dense=1.0,
            score=1 - drop,
            score_drop=drop,
            score_drop_interval=(drop - 0.03, drop + 0.03),
            loss_interval=(loss - 0.004, loss + 0.004),
            peak_memory_mb=100.0,
            prompts=prompts,
            seed=0,
            batch=16,
            latency_source="table",
        )

    def dense(self) -> Measurement:
        return replace(self.measure(None), latency=2 * 521 / 500, dense_latency=2 * 521 / 500)

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        self.asked.append(policy.key())
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        if len(self.asked) in self.fail_at:
            raise RuntimeError("out of memory")
        first = self.measure(policy, prompts=16)
        reason = stop(first)
        return Evaluation(first, first if reason else self.measure(policy), reason)

    def validate(self, policies: Mapping[str, Policy], *, step: Callable[[], bool]) -> dict[str, Measurement]:
        self.validated = list(policies)
        step()
        return {name: replace(self.measure(policy), latency_source="measured", seed=7) for name, policy in policies.items()}

    def validation_steps(self) -> int:
        return 1

    def planned_memory(self, policy: Policy) -> float:
        return 50.0

    def estimated_latency(self, policy: Policy) -> float | None:
        return self.measure(policy).latency * (1.1 if not policy.is_dense() else 1.0)

    def state(self) -> dict[str, object]:
        return {}


def settings(
    folder: Path, *, trials: int = 26, sampler: str = "tpe", space: str = "fastvar", **changes: object
) -> StudySettings:
    made = StudySettings(
        directory=folder,
        name="study",
        space=read_space(SPACES / f"{space}.yaml"),
        sampler=SamplerSettings(sampler),
        budget=BudgetSettings(trials=trials, minutes=None, front=6),
    )
    return replace(made, **changes)


def search(  # noqa: ANN201
    config: StudySettings,
    backbone,  # noqa: ANN001
    evaluator: FormulaEvaluator,
    tracker: NullTracker | None = None,
    crew: Crew | None = None,
) -> StudyResult | None:
    observers = {"tracker": tracker or NullTracker(), "progress": NullProgress()}
    return run_study(config, backbone=backbone, evaluator=evaluator, crew=crew, **observers)
