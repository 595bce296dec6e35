"""Presets and policy files under identical conditions: same held-out prompts and seeds, timed beside dense in every round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from autoprune.backbones import Backbone
from autoprune.errors import UserError
from autoprune.generation import Observer, generate
from autoprune.measure.device import device_identity
from autoprune.measure.drift import drift_of
from autoprune.measure.flops import computed_tokens as tokens_at
from autoprune.measure.flops import transformer_shape
from autoprune.measure.latency import Timing, timed
from autoprune.measure.memory import PeakMemory
from autoprune.measure.metrics.similarity import psnr, ssim
from autoprune.measure.statistics import bootstrap_interval, median_and_spread
from autoprune.policy import Policy
from autoprune.pruning.plan import Plan, ScalePlan, compile_plan
from autoprune.rules import SUBLAYERS
from autoprune.search.comparison_records import DENSE, Candidate, ComparedPolicy, Comparison, ComparisonSettings
from autoprune.search.prompt_files import PromptFile
from autoprune.search.quality import check_texts, make_quality
from autoprune.search.records import Measurement
from autoprune.search.settings import default_quality
from autoprune.search.tally import concatenated, score_fields, speed_up_fields

if TYPE_CHECKING:
    from autoprune.search.progress import NullProgress

PICTURES = 7  # prompts that are drawn: one a task of the embedded world


def compare(
    backbone: Backbone,
    candidates: Sequence[Candidate],
    settings: ComparisonSettings,
    *,
    progress: "NullProgress",
    prompts: PromptFile | None = None,
) -> Comparison:
    """Measures dense and every candidate, on `prompts` without scores where they are given; Ctrl-C after the first round
    ends it with the rounds that are done.

    Raises UserError for a policy that does not fit the backbone, a name given twice, and prompts too few or unreadable.
    """
    schedule = backbone.scale_schedule()
    names = [DENSE, *(candidate.name for candidate in candidates)]
    for candidate in candidates:
        backbone.check_policy(candidate.policy)
        if names.count(candidate.name) > 1:
            raise UserError(f"policy names must differ, {candidate.name!r} is given twice; rename one.")
    dense = Candidate(DENSE, Policy(backbone.name, backbone.depth, schedule), "the unpruned model", DENSE)
    run = _Run(backbone, (dense, *candidates), settings, prompts)
    check_texts(run.texts, backbone, batch=settings.batch)
    interrupted = run.measure(progress)
    return Comparison(
        backbone=backbone.name,
        revision=backbone.revision,
        scale_schedule=schedule,
        device=device_identity(backbone.device, backbone.dtype),
        settings=settings,
        prompts_sha256=prompts.sha256() if prompts else "",
        policies=tuple(run.compared(candidate) for candidate in (dense, *candidates)),
        pictures=run.pictures,
        texts=tuple(run.texts[: min(PICTURES, settings.batch)]),
        frame_rate=backbone.frame_rate,
        rounds=len(run.rounds),
        interrupted=interrupted,
    )


def share_computed(plan: Plan, sublayers: Sequence[str] = SUBLAYERS) -> float:
    """Returns computed tokens / those of a dense run: sums over runs of scales, layers, their sublayers and guidance branches.

    Of a plan that depends on the data it is the most that can be computed; ComputedTokens counts what was.
    """
    dense = compile_plan(None, plan.schedule, plan.depth, plan.course)
    return computed_tokens(plan, sublayers) / computed_tokens(dense, sublayers)


def computed_tokens(plan: Plan, sublayers: Sequence[str] = SUBLAYERS) -> int:
    """Returns the tokens that all sublayers of a guided generation of one image compute."""
    return sum(
        (2 if scale.branch == "both" else 1) * tokens_at(scale, layer, chunk, sublayer)
        for scale in plan.scales
        for chunk, layers in enumerate(plan.chunks)
        for layer in layers
        for sublayer in sublayers
    )


class ComputedTokens(Observer):
    """Counts in `tokens` what sublayers compute in real generations of a plan, which may decide on the way."""

    def __init__(self, plan: Plan, sublayers: Sequence[str] = SUBLAYERS) -> None:
        self._plan, self._sublayers, self.tokens = plan, sublayers, 0

    def forward_done(self, scale: ScalePlan, rows: int, tokens: int) -> None:
        group = next(group for group in self._plan.groups if group[0].step == scale.step)
        for layer in range(self._plan.depth):
            chunk = self._plan.chunk_of(layer)
            for sublayer in self._sublayers:
                most = sum(tokens_at(member, layer, chunk, sublayer) for member in group)
                self.tokens += rows * min(tokens, most)


@dataclass(frozen=True)
class _Pairs:
    """Per image [n]: SSIM and PSNR against dense, and the score, None without any."""

    ssim: np.ndarray
    psnr: np.ndarray
    score: np.ndarray | None


@dataclass(frozen=True)
class _Round:
    """One generation of everybody by name: seconds (empty for a smaller last batch) and pairs (empty for a repeated batch)."""

    seconds: dict[str, float]
    pairs: dict[str, _Pairs]


class _Run:
    """The generations of one comparison. A round enters whole or not at all."""

    def __init__(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        settings: ComparisonSettings,
        prompts: PromptFile | None,
    ) -> None:
        quality = default_quality(backbone.name, prompts)
        self._backbone, self._settings = backbone, settings
        self._policies = {candidate.name: candidate.policy for candidate in candidates}
        self._quality = make_quality(quality, prompts)
        self._prompts = self._quality.prompts("held_out", settings.prompts, seed=settings.seed)
        self._seed = settings.seed + quality.held_out_seed
        self._sublayers = transformer_shape(backbone.model).sublayers
        self._peaks: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._alone: list[dict[str, float]] = []
        self.texts = self._quality.texts(self._prompts)
        self.rounds: list[_Round] = []
        self.pictures: dict[str, Tensor] = {}

    def measure(self, progress: "NullProgress") -> bool:
        """Runs everything and returns whether Ctrl-C ended it. Before the first round is done Ctrl-C goes through."""
        try:
            self._measure_memory(progress)
            progress.phase("rounds", self._settings.total_rounds * len(self._policies))
            for turn in range(self._settings.total_rounds):
                self.rounds.append(self._round(turn, progress))
            self._measure_alone(progress)
        except KeyboardInterrupt:
            if not self.rounds:
                raise
            return True
        return False

    def compared(self, candidate: Candidate) -> ComparedPolicy:
        """Returns the row of a policy from the rounds that are done."""
        name = candidate.name
        ratios = [turn.seconds[DENSE] / turn.seconds[name] for turn in self.rounds if turn.seconds]
        timing = self._timing(name)
        return ComparedPolicy(
            candidate=candidate,
            measurement=self._measurement(name, timing),
            speed_up_spread=median_and_spread(ratios)[1],
            batch_quantiles=_quantiles(timing.samples),
            prompt_quantiles=_quantiles([seconds[name] for seconds in self._alone]) if self._alone else None,
            share_computed=self._shares[name],
        )

    def _measure_memory(self, progress: "NullProgress") -> None:
        """Runs everybody once on the first batch, which warms up too, and counts what those compute that decide on the way."""
        progress.phase("warm-up and memory", len(self._policies))
        dense = computed_tokens(self._plan(DENSE), self._sublayers) * len(self.texts[: self._settings.batch])
        for name, policy in self._policies.items():
            plan = self._plan(name)
            counter = ComputedTokens(plan, self._sublayers)
            with PeakMemory(self._backbone.device) as memory:
                self._generate(name, (0, self._settings.batch), observer=counter)
            self._peaks[name] = memory.megabytes
            self._shares[name] = counter.tokens / dense if policy.adaptive else share_computed(plan, self._sublayers)
            progress.step()

    def _round(self, turn: int, progress: "NullProgress") -> _Round:
        batch = self._settings.batch
        batches = -(-len(self._prompts) // batch)
        first = turn % batches * batch
        images, seconds = self._timed_in_turn(turn, (first, batch), progress)
        if turn == 0:
            self.pictures = {name: made[:PICTURES] for name, made in images.items()}
        full = first == 0 or first + batch <= len(self._prompts)
        prompts = self._prompts[first : first + batch]
        pairs = {name: self._pairs(made, images[DENSE], prompts) for name, made in images.items()} if turn < batches else {}
        return _Round(seconds if full else {}, pairs)

    def _measure_alone(self, progress: "NullProgress") -> None:
        """Times prompts one at a time, after one run of everybody that does not count."""
        count = min(self._settings.per_prompt, len(self._prompts))
        if not count:
            return
        progress.phase("prompt by prompt", (count + 1) * len(self._policies))
        self._timed_in_turn(0, (0, 1), progress)
        for first in range(count):
            self._alone.append(self._timed_in_turn(first, (first, 1), progress)[1])

    def _timed_in_turn(
        self, turn: int, work: tuple[int, int], progress: "NullProgress"
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Returns images and seconds by name for `work` (first prompt, count); each turn begins with another policy."""
        names, images, seconds = list(self._policies), {}, {}
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            images[name], seconds[name] = timed(partial(self._generate, name, work), self._backbone.device)
            progress.step()
        return images, seconds

    def _generate(self, name: str, work: tuple[int, int], observer: Observer | None = None) -> Tensor:
        sampling = replace(self._backbone.sampling, first_sample=work[0])
        policy = None if name == DENSE else self._policies[name]
        texts = self.texts[work[0] : sum(work)]
        return generate(self._backbone, texts, policy=policy, seed=self._seed, sampling=sampling, observer=observer)

    def _plan(self, name: str) -> Plan:
        return self._backbone.plan(self._policies[name])

    def _pairs(self, images: Tensor, dense: Tensor, prompts: Sequence[object]) -> _Pairs:
        near = (measure(images, dense).double().numpy() for measure in (ssim, psnr))
        return _Pairs(*near, self._quality.score(images, prompts))

    def _images(self, name: str, what: str) -> np.ndarray | None:
        return concatenated([getattr(turn.pairs[name], what) for turn in self.rounds if turn.pairs])

    def _timing(self, name: str) -> Timing:
        return Timing.of([turn.seconds[name] for turn in self.rounds if turn.seconds])

    def _measurement(self, name: str, timing: Timing) -> Measurement:
        ssim = self._images(name, "ssim")
        dense = self._timing(DENSE)
        return Measurement(
            latency=timing.median,
            latency_spread=timing.spread,
            dense_latency=dense.median,
            speed_up=dense.median / timing.median,
            loss=float(1 - ssim.mean()),
            ssim=float(ssim.mean()),
            psnr=float(self._images(name, "psnr").mean()),
            **score_fields(self._images(DENSE, "score"), self._images(name, "score")),
            peak_memory_mb=self._peaks[name],
            prompts=len(ssim),
            seed=self._seed,
            batch=min(self._settings.batch, len(self._prompts)),
            latency_source="measured",
            loss_interval=bootstrap_interval(1 - ssim),
            **speed_up_fields(dense.samples, timing.samples, drift_of(dense.samples)),
        )


def _quantiles(samples: Sequence[float]) -> tuple[float, float]:
    """Returns p50 and p95."""
    p50, p95 = np.quantile(samples, (0.5, 0.95))
    return float(p50), float(p95)
