"""Measures policies of a study on a real backbone: same prompts and seeds for all, dense beside every candidate."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.generation import Observer, generate
from autoprune.measure.drift import steadiest
from autoprune.measure.latency import LatencyTable, ScaleClock, Timing, interleaved, plan_keys, rest_key, timed
from autoprune.measure.memory import PeakMemory
from autoprune.measure.memory_plan import predicted_peak
from autoprune.measure.metrics.suite import MetricSuite, check_shape
from autoprune.measure.metrics.tokens import TokenRecorder
from autoprune.policy import KeyRule, Policy
from autoprune.prefix import Recorder, Recording, record_prefix
from autoprune.pruning.plan import Plan
from autoprune.search.batches import Batch, Work
from autoprune.search.comparisons import Comparisons
from autoprune.search.evaluation import Evaluation, Stop
from autoprune.search.faults import dense_runs, fault_of, release_memory
from autoprune.search.judge import Judge
from autoprune.search.quality import make_quality
from autoprune.search.records import Measurement
from autoprune.search.settings import StudySettings
from autoprune.search.shared_prefixes import SharedPrefixes, Start
from autoprune.search.tally import DENSE, Pairs, Tally, measurement_of, speed_up_fields

_LOG = logging.getLogger("autoprune")
PROBE_FROM_END = 2  # how slow the machine is now is asked of the scale with so many after it: a tenth of a dense run


class _RecordingClock(ScaleClock, Recorder):
    def __init__(self, device: torch.device, batch: int, *, keeps: bool) -> None:
        ScaleClock.__init__(self, device, batch)
        Recorder.__init__(self, keeps=keeps)


class GenerationEvaluator:
    """Generates, compares and times on a backbone. Holds the dense images of the search prompts in memory.

    `table` continues the latency table of a resumed study. `overlaps`: whether images are compared while the next batch is
    generated, which is then not timed; by default on CUDA only, as on a CPU it would slow down the generation beside it.
    """

    def __init__(
        self, backbone: Backbone, settings: StudySettings, *, table: LatencyTable | None = None, overlaps: bool | None = None
    ) -> None:
        self._backbone, self._settings = backbone, settings
        self._overlaps = backbone.device.type == "cuda" if overlaps is None else overlaps
        self._quality = make_quality(settings.quality, settings.prompts)
        self._judge = Judge(self._quality, settings, backbone.device)
        self._batches: list[Batch] = []
        self._turn = 0
        self._asked: float | None = None
        self._table = table
        limit, host = settings.shared_prefix_mb, settings.shared_prefix_host_mb if backbone.device.type == "cuda" else 0
        self._prefixes = SharedPrefixes(limit if settings.shares_prefixes else 0, device=backbone.device, host_mb=host)

    def dense(self) -> Measurement:
        with dense_runs(self._backbone.name):
            return self._dense()

    def _dense(self) -> Measurement:
        prompts = self._quality.prompts("search", self._settings.quality.prompts)
        works = self._split(prompts, self._settings.seed)
        with PeakMemory(self._backbone.device) as memory:
            images = self._generate(None, works[0])
        quality = self._settings.quality
        check_shape((*quality.metrics, quality.loss), images.shape, self._settings.weights)
        full = []
        for work in works:
            images, runs = self._timed_by_scale(None, work)
            self._batches.append(self._judge.paired(work, images))
            if self._full(work):
                full.append(runs)
        timing = Timing.of([sum(seconds for _, seconds in runs) for runs in full])
        self._table = LatencyTable.begun(full, saved=self._table)
        pairs = Pairs.joined([self._judge.compare(batch.images, batch) for batch in self._batches])
        return replace(measurement_of(pairs, timing, timing.median, self._settings), peak_memory_mb=memory.megabytes)

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        """Measures a policy. Raises Fault where it runs out of memory or makes broken images, and leaves nothing of it."""
        try:
            return self._evaluated(policy, stop)
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
        self._recover()
        raise fault

    def _evaluated(self, policy: Policy, stop: Stop) -> Evaluation:
        ran, compared = [], Comparisons(self._judge.compare, device=self._backbone.device, beside=self._may_overlap(policy))
        self._asked = None
        limited = self._settings.quality.max_memory_mb is not None
        with PeakMemory(self._backbone.device) if limited else nullcontext() as memory, compared:
            for number, batch in enumerate(self._batches):
                images, keys = self._run(policy, batch.work, alone=not compared.busy)
                compared.add(images, batch)
                ran += [keys] if keys else []
                if number == 0:
                    first = self._estimated(compared.results(), ran)
                    reason = stop(first)
                    if reason:
                        return Evaluation(first, first, reason)
            parts = compared.results()
        table = self._settings.latency.name == "table"
        measurement = self._estimated(parts, ran) if table else self._measured(policy, parts)
        return Evaluation(first, replace(measurement, peak_memory_mb=memory and memory.megabytes))

    def validate(self, policies: Mapping[str, Policy], *, step: Callable[[], bool]) -> dict[str, Measurement]:
        seed = self._settings.seed + self._settings.quality.held_out_seed
        works = self._split(self._quality.prompts("held_out", self._settings.quality.held_out_prompts), seed)
        tally = Tally(list(policies))
        self._prefixes.clear()
        with dense_runs(self._backbone.name):
            self._generate(None, works[0])
        for name, policy in policies.items():
            with self._unless_fault(tally, name):
                with PeakMemory(self._backbone.device) as memory:
                    self._generate(policy, works[0])
                tally.peaks[name] = memory.megabytes
        suite = self._judge.held_out_suite()
        for turn in tally.turns(self.validation_steps()):
            work = works[turn % len(works)]
            recorder = TokenRecorder()
            with dense_runs(self._backbone.name):
                images, seconds = self._timed(None, work, recorder)
                batch, times = self._judge.paired(work, images, recorder.tokens()), {DENSE: seconds}
            if turn < len(works):
                tally.dense.append(suite.measure_dense(self._judge.pictures(images, batch, batch.tokens)))
            for name in tally.order(turn):
                recorder = TokenRecorder()
                with self._unless_fault(tally, name):
                    images, times[name] = self._timed(policies[name], work, recorder)
                    if turn < len(works):
                        tally.parts[name].append(self._judge.compare(images, batch, suite, recorder.tokens(batch.tokens)))
            if self._full(work):
                tally.add(times)
            if not step() and turn + 1 >= self._settings.latency.rounds:
                break
        dense = Timing.of(tally.seconds[DENSE]).median
        return {name: replace(self._tallied(tally, name, dense, suite), seed=seed) for name in tally.names}

    def validation_steps(self) -> int:
        """Returns the rounds of `validate`: every held-out batch once, and at least `latency.rounds`."""
        return max(-(-self._settings.quality.held_out_prompts // self._settings.latency.batch), self._settings.latency.rounds)

    def estimated_latency(self, policy: Policy) -> float | None:
        if self._settings.latency.name != "table" or policy.adaptive:
            return None
        estimate = self._table.total(plan_keys(self._plan(policy)))
        return estimate and estimate[0]

    def planned_memory(self, policy: Policy) -> float:
        texts = self._quality.texts(self._batches[0].work.prompts)
        planned = predicted_peak(self._plan(policy), self._backbone, texts)
        return (planned.weights + planned.above_loaded(self._backbone.device)) / 2**20

    def state(self) -> dict[str, object]:
        return self._table.to_plain() if self._table else {}

    def _run(self, policy: Policy, work: Work, *, alone: bool) -> tuple[Tensor, list[str]]:
        """Returns images and the table's keys of everything a whole generation runs, none for a batch that is not full.

        Scales that were taken from a prefix count as the ones that left it, what data decided as what really ran. What does
        not run `alone` is not timed.
        """
        plan, start = self._plan(policy), None
        if not policy.probe:  # it decodes between scales, which only a whole generation times
            start = self._prefixes.start(work.first_sample, plan, partial(self._recorded, work))
        keeps = self._prefixes.active and not (policy.adaptive and policy.batch == "split")
        keeps = keeps and self._backbone.graphs is None  # what is timed runs as it will, and graphs write over snapshots
        if start is None and plan.keys != KeyRule():  # keys are copied then, which would be timed as lying outside scales
            keeps = False
        if alone:
            watch = _RecordingClock(self._backbone.device, len(work.prompts), keeps=keeps)
            images, runs = self._timed_by_scale(policy, work, start, watch)
            keys = [*(start.keys if start else ()), *(key for key, _ in runs), *([rest_key(plan)] if start else [])]
        else:
            watch = Recorder(keeps=keeps)
            images, runs, keys = self._generate(policy, work, watch, start), [], plan_keys(plan)
        self._prefixes.keep(work.first_sample, Recording(plan, tuple(watch.snapshots)), keys)
        if not self._full(work):
            return images, []
        if alone:
            self._table.add(runs, slowness=self._table.slowness(runs) or self._slowness_beside())
        return images, keys

    def _timed_by_scale(
        self, policy: Policy | None, work: Work, start: Start | None = None, clock: ScaleClock | None = None
    ) -> tuple[Tensor, list[tuple[str, float]]]:
        """Returns images and seconds by key; what lies outside the scales only of a generation that ran in full."""
        clock = clock or ScaleClock(self._backbone.device, len(work.prompts))
        images, seconds = timed(partial(self._generate, policy, work, clock, start), self._backbone.device)
        rest = [] if start else [(rest_key(self._plan(policy)), seconds - clock.seconds)]
        return images, clock.runs + rest

    def _recorded(self, work: Work) -> Recording:
        texts = self._quality.texts(work.prompts)
        return record_prefix(self._backbone, texts, seed=work.seed, sampling=self._sampling(work))

    def _may_overlap(self, policy: Policy) -> bool:
        """Returns whether batches may go untimed: not where each may run what the table has never seen, or memory counts."""
        return self._overlaps and not policy.adaptive and self._settings.quality.max_memory_mb is None

    def _slowness_beside(self) -> float:
        """Returns how slow the machine is, asked once a trial: its scales are known after a few batches."""
        self._asked = self._asked or self._slowness()
        return self._asked

    def _slowness(self) -> float:
        """Returns how slow the machine is now: a late scale of a dense run is timed, where its prefix is known, or all."""
        full = [batch.work for batch in self._batches if self._full(batch.work)]
        work, self._turn = full[self._turn % len(full)], self._turn + 1
        skipped = PROBE_FROM_END if self._backbone.skippable else 0
        short = Policy(self._backbone.name, self._backbone.depth, self._backbone.scale_schedule(), skip_last=skipped)
        start = self._prefixes.start(work.first_sample, self._plan(short), partial(self._recorded, work))
        if start is not None:
            slowness = self._table.slowness(self._timed_by_scale(short, work, start)[1])
            if slowness is not None:
                return slowness
        _, runs = self._timed_by_scale(None, work)
        slowness = sum(seconds for _, seconds in runs) / self._table.reference
        self._table.add(runs, slowness=slowness)
        return slowness

    def _plan(self, policy: Policy | None) -> Plan:
        return self._backbone.plan(policy)

    def _estimated(self, parts: list[Pairs], ran: list[list[str]]) -> Measurement:
        """Returns a measurement whose latency is the sum of the table over what ran, the median over batches."""
        dense, _ = self._table.total(plan_keys(self._plan(None)))
        totals = [self._table.total(keys) for keys in ran]
        timing = Timing.of([seconds for seconds, _ in totals])
        timing = replace(timing, spread=max(timing.spread, totals[0][1]))
        return replace(measurement_of(Pairs.joined(parts), timing, dense, self._settings), latency_source="table")

    def _measured(self, policy: Policy, parts: list[Pairs]) -> Measurement:
        work, latency = self._batches[0].work, self._settings.latency
        runs = {DENSE: partial(self._generate, None, work), "policy": partial(self._generate, policy, work)}
        measure = partial(interleaved, runs, rounds=latency.rounds, warm_up=latency.warm_up, device=self._backbone.device)
        timings, drift = steadiest(measure, dense=DENSE, expected=self._table.reference)
        measurement = measurement_of(Pairs.joined(parts), timings["policy"], timings[DENSE].median, self._settings)
        return replace(measurement, **speed_up_fields(timings[DENSE].samples, timings["policy"].samples, drift))

    def _tallied(self, tally: Tally, name: str, dense: float, suite: MetricSuite) -> Measurement:
        parts, seconds = tally.parts[name], tally.seconds
        return replace(
            measurement_of(Pairs.joined(parts), Timing.of(seconds[name]), dense, self._settings),
            **speed_up_fields(seconds[DENSE], seconds[name], tally.drift),
            peak_memory_mb=tally.peaks[name],
            metrics=suite.summed(self._settings.quality.metrics, [part.found for part in parts], tally.dense),
        )

    @contextmanager
    def _unless_fault(self, tally: Tally, name: str) -> Iterator[None]:
        """Leaves a policy out of the rest of a validation where a fault ends it."""
        try:
            yield
            return
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
        _LOG.warning("a policy is left out of the held-out measurement: %s.", fault.note)
        tally.leave_out(name)
        self._recover()

    def _recover(self) -> None:
        """Forgets what trials share, of which a fault may have spoilt some, and frees memory."""
        self._prefixes.drop()
        release_memory(self._backbone.device)

    def _timed(self, policy: Policy | None, work: Work, observer: Observer | None = None) -> tuple[Tensor, float]:
        return timed(partial(self._generate, policy, work, observer), self._backbone.device)

    def _generate(
        self, policy: Policy | None, work: Work, observer: Observer | None = None, start: Start | None = None
    ) -> Tensor:
        texts, sampling, snapshot = self._quality.texts(work.prompts), self._sampling(work), start and start.snapshot
        options = {"seed": work.seed, "sampling": sampling, "observer": observer, "start": snapshot}
        return generate(self._backbone, texts, policy=policy, **options)

    def _sampling(self, work: Work) -> Sampling:
        return replace(self._backbone.sampling, first_sample=work.first_sample)

    def _split(self, prompts: Sequence[object], seed: int) -> list[Work]:
        size = self._settings.latency.batch
        return [Work(list(prompts[start : start + size]), start, seed) for start in range(0, len(prompts), size)]

    def _full(self, work: Work) -> bool:
        """Returns whether a batch is of the size that latencies refer to; the last one may be smaller."""
        return work.first_sample == 0 or len(work.prompts) == self._settings.latency.batch
