"""Measures policies of a study on a real backbone: same prompts and seeds for all, dense beside every candidate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from torch import Tensor

from autoprune.backbones import Backbone
from autoprune.generation import generate
from autoprune.measure.latency import LatencyTable, ScaleClock, Timing, interleaved, timed
from autoprune.measure.memory import PeakMemory
from autoprune.measure.quality import similarity
from autoprune.measure.statistics import paired_interval
from autoprune.policy import Policy
from autoprune.pruning.plan import compile_plan
from autoprune.search.quality import make_quality
from autoprune.search.records import Measurement
from autoprune.search.settings import StudySettings

Stop = Callable[[Measurement], str]
_DENSE = ""


@dataclass(frozen=True)
class Evaluation:
    """`first` covers the first batch, `measurement` all that ran; `stopped` says why it ended early, else empty."""

    first: Measurement
    measurement: Measurement
    stopped: str = ""


class Evaluator(Protocol):
    """The seam between a study and what it measures."""

    def dense(self) -> Measurement:
        """Measures the reference; called once, before any other method."""

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        """Measures a policy; after the first batch `stop` may return a reason to end there."""

    def validate(self, policies: Mapping[str, Policy], *, step: Callable[[], bool]) -> dict[str, Measurement]:
        """Measures policies on held-out prompts and seeds, timed together; calls `step` after each round.

        Ends after at most `validation_steps` rounds, or after `latency.rounds` as soon as `step` returns False.
        """

    def validation_steps(self) -> int:
        """Returns how many interleaved rounds `validate` runs at most."""

    def estimated_latency(self, policy: Policy) -> float | None:
        """Returns the table's seconds per batch, None without a table or for unseen scales."""

    def state(self) -> dict[str, object]:
        """Returns, as JSON values, what a resumed study can reuse."""


@dataclass(frozen=True)
class _Work:
    """One generation's prompts, the number of its first sample and the noise seed."""

    prompts: list[object]
    first_sample: int
    seed: int


@dataclass(frozen=True)
class _Batch:
    """A piece of work with the dense images and scores to pair with."""

    work: _Work
    images: Tensor
    score: np.ndarray


@dataclass(frozen=True)
class _Pairs:
    """Per image [n]: SSIM and PSNR against dense, the candidate's score and the dense score."""

    ssim: np.ndarray
    psnr: np.ndarray
    score: np.ndarray
    dense: np.ndarray

    @staticmethod
    def joined(parts: list["_Pairs"]) -> "_Pairs":
        """Concatenates batches."""
        names = ("ssim", "psnr", "score", "dense")
        return _Pairs(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class GenerationEvaluator:
    """Generates, compares and times on a backbone. Holds the dense images of the search prompts in memory.

    `table` continues the latency table of a resumed study.
    """

    def __init__(self, backbone: Backbone, settings: StudySettings, *, table: LatencyTable | None = None) -> None:
        self._backbone, self._settings = backbone, settings
        self._quality = make_quality(settings.quality)
        self._batches: list[_Batch] = []
        self._turn = 0
        self._table = table

    def dense(self) -> Measurement:
        prompts = self._quality.prompts("search", self._settings.quality.prompts)
        works = self._split(prompts, self._settings.seed)
        with PeakMemory(self._backbone.device) as memory:
            self._generate(None, works[0])
        runs = []
        for work in works:
            clock = ScaleClock(self._backbone.device)
            images, seconds = self._timed(None, work, clock)
            self._batches.append(self._paired(work, images))
            if self._full(work):
                runs.append((clock, seconds))
        timing = Timing.of([seconds for _, seconds in runs])
        self._table = self._table or LatencyTable(timing.median)
        for clock, seconds in runs:
            self._table.add(clock, total=seconds, slowness=seconds / self._table.reference)
        pairs = _Pairs.joined([self._compare(batch.images, batch) for batch in self._batches])
        return self._measurement(pairs, timing, timing.median, memory.megabytes)

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        parts, times = [], []
        with PeakMemory(self._backbone.device) as memory:
            for batch in self._batches:
                images, seconds = self._run(policy, batch.work)
                parts.append(self._compare(images, batch))
                times.append(seconds)
                if len(parts) == 1:
                    first = self._estimated(policy, parts, times, 0.0)
                    reason = stop(first)
                    if reason:
                        return Evaluation(first, first, reason)
        if self._settings.latency.name == "table":
            return Evaluation(first, self._estimated(policy, parts, times, memory.megabytes))
        return Evaluation(first, self._measured(policy, parts, memory.megabytes))

    def validate(self, policies: Mapping[str, Policy], *, step: Callable[[], bool]) -> dict[str, Measurement]:
        seed = self._settings.seed + self._settings.quality.held_out_seed
        works = self._split(self._quality.prompts("held_out", self._settings.quality.held_out_prompts), seed)
        tally = _Tally(list(policies))
        self._generate(None, works[0])
        for name, policy in policies.items():
            with PeakMemory(self._backbone.device) as memory:
                self._generate(policy, works[0])
            tally.peaks[name] = memory.megabytes
        for turn in range(self.validation_steps()):
            work = works[turn % len(works)]
            images, seconds = self._timed(None, work)
            batch, times = self._paired(work, images), {_DENSE: seconds}
            for name in tally.order(turn):
                images, times[name] = self._timed(policies[name], work)
                if turn < len(works):
                    tally.parts[name].append(self._compare(images, batch))
            if self._full(work):
                tally.add(times)
            if not step() and turn + 1 >= self._settings.latency.rounds:
                break
        dense = Timing.of(tally.seconds[_DENSE]).median
        return {name: replace(self._tallied(tally, name, dense), seed=seed) for name in policies}

    def validation_steps(self) -> int:
        """Returns the rounds of `validate`: every held-out batch once, and at least `latency.rounds`."""
        return max(-(-self._settings.quality.held_out_prompts // self._settings.latency.batch), self._settings.latency.rounds)

    def estimated_latency(self, policy: Policy) -> float | None:
        if self._settings.latency.name != "table" or policy.adaptive:
            return None
        estimate = self._table.estimate(compile_plan(policy, policy.scale_schedule, policy.depth))
        return estimate and estimate[0]

    def state(self) -> dict[str, object]:
        return self._table.to_plain() if self._table else {}

    def _run(self, policy: Policy, work: _Work) -> tuple[Tensor, float | None]:
        """Returns images and seconds at the table's moment, None for a batch that is not full.

        What an adaptive policy runs depends on the data: it enters no table, and dense runs beside it say how slow it was.
        """
        clock = ScaleClock(self._backbone.device)
        images, seconds = self._timed(policy, work, clock)
        if not self._full(work):
            return images, None
        if policy.adaptive:
            return images, seconds / self._dense_slowness()
        slowness = self._table.slowness(clock, total=seconds) or self._dense_slowness()
        self._table.add(clock, total=seconds, slowness=slowness)
        return images, seconds / slowness

    def _dense_slowness(self) -> float:
        """Times dense on the next search batch and returns how slow it was; the run enters the table too."""
        full = [batch.work for batch in self._batches if self._full(batch.work)]
        work, self._turn = full[self._turn % len(full)], self._turn + 1
        clock = ScaleClock(self._backbone.device)
        _, seconds = self._timed(None, work, clock)
        slowness = seconds / self._table.reference
        self._table.add(clock, total=seconds, slowness=slowness)
        return slowness

    def _estimated(self, policy: Policy, parts: list[_Pairs], times: list[float | None], memory: float) -> Measurement:
        """Returns a measurement whose latencies are sums of the table, for an adaptive policy the corrected runs' own."""
        schedule, depth = policy.scale_schedule, policy.depth
        dense, _ = self._table.estimate(compile_plan(None, schedule, depth))
        if policy.adaptive:
            timing = Timing.of([seconds for seconds in times if seconds is not None])
        else:
            timing = Timing(*self._table.estimate(compile_plan(policy, schedule, depth)), ())
        return replace(self._measurement(_Pairs.joined(parts), timing, dense, memory), latency_source="table")

    def _measured(self, policy: Policy, parts: list[_Pairs], memory: float) -> Measurement:
        work, latency = self._batches[0].work, self._settings.latency
        runs = {_DENSE: partial(self._generate, None, work), "policy": partial(self._generate, policy, work)}
        timings = interleaved(runs, rounds=latency.rounds, warm_up=latency.warm_up, device=self._backbone.device)
        return self._measurement(_Pairs.joined(parts), timings["policy"], timings[_DENSE].median, memory)

    def _tallied(self, tally: "_Tally", name: str, dense: float) -> Measurement:
        return self._measurement(_Pairs.joined(tally.parts[name]), Timing.of(tally.seconds[name]), dense, tally.peaks[name])

    def _measurement(self, pairs: _Pairs, timing: Timing, dense_latency: float, memory: float) -> Measurement:
        ssim = float(pairs.ssim.mean())
        return Measurement(
            latency=timing.median,
            latency_spread=timing.spread,
            dense_latency=dense_latency,
            speed_up=dense_latency / timing.median,
            loss=1 - ssim,
            ssim=ssim,
            psnr=float(pairs.psnr.mean()),
            score_dense=float(pairs.dense.mean()),
            score=float(pairs.score.mean()),
            score_drop=float((pairs.dense - pairs.score).mean()),
            score_drop_interval=paired_interval(pairs.dense, pairs.score),
            peak_memory_mb=memory,
            prompts=len(pairs.score),
            seed=self._settings.seed,
            batch=len(self._batches[0].work.prompts),
            latency_source="measured",
        )

    def _paired(self, work: _Work, images: Tensor) -> _Batch:
        return _Batch(work, images, self._quality.score(images, work.prompts))

    def _compare(self, images: Tensor, batch: _Batch) -> _Pairs:
        near = similarity(images, batch.images)
        score = self._quality.score(images, batch.work.prompts)
        return _Pairs(near.ssim.numpy().astype(float), near.psnr.numpy().astype(float), score, batch.score)

    def _timed(self, policy: Policy | None, work: _Work, clock: ScaleClock | None = None) -> tuple[Tensor, float]:
        return timed(lambda: self._generate(policy, work, clock), self._backbone.device)

    def _generate(self, policy: Policy | None, work: _Work, clock: ScaleClock | None = None) -> Tensor:
        sampling = replace(self._backbone.sampling, first_sample=work.first_sample)
        texts = self._quality.texts(work.prompts)
        return generate(self._backbone, texts, policy=policy, seed=work.seed, sampling=sampling, observer=clock)

    def _split(self, prompts: Sequence[object], seed: int) -> list[_Work]:
        size = self._settings.latency.batch
        return [_Work(list(prompts[start : start + size]), start, seed) for start in range(0, len(prompts), size)]

    def _full(self, work: _Work) -> bool:
        """Returns whether a batch is of the size that latencies refer to; the last one may be smaller."""
        return work.first_sample == 0 or len(work.prompts) == self._settings.latency.batch


class _Tally:
    """What accumulates over the rounds of a validation, by policy name; dense seconds under _DENSE."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self.seconds: dict[str, list[float]] = {name: [] for name in (_DENSE, *names)}
        self.parts: dict[str, list[_Pairs]] = {name: [] for name in names}
        self.peaks = dict.fromkeys(names, 0.0)

    def order(self, turn: int) -> list[str]:
        """Returns the names, beginning with another one each round."""
        shift = turn % len(self._names)
        return self._names[shift:] + self._names[:shift]

    def add(self, times: Mapping[str, float]) -> None:
        """Adds one round of seconds."""
        for name, seconds in times.items():
            self.seconds[name].append(seconds)
