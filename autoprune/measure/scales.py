"""Where a generation's time goes: FLOPs, milliseconds and memory of every scale, for dense and policies in one run.

A backbone on the meta device has shapes only: all but times and measured memory follows from its plans.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from autoprune.backbones import Backbone
from autoprune.backbones.infinity import Infinity
from autoprune.clips import clip_ranges
from autoprune.generation import Observer, generate
from autoprune.measure.ceiling import matmul_ceiling
from autoprune.measure.device import synchronise
from autoprune.measure.flops import (
    ScaleFlops,
    TransformerShape,
    Workload,
    scale_flops,
    text_flops,
    transformer_shape,
    workload,
)
from autoprune.measure.held_keys import key_counts
from autoprune.measure.latency import Timing, interleaved
from autoprune.measure.memory import PeakMemory
from autoprune.measure.memory_plan import compared_layouts, predicted_peak
from autoprune.measure.placement import readable_prompt
from autoprune.policy import Policy
from autoprune.pruning.plan import Plan, ScalePlan

DENSE = "dense"
PEAKS = ("peak_memory_mb", "above_loaded_mb")
RATES = ("ms", "spread_ms", "gflops", "share")  # of a forward, and of a whole generation
TIMES = ("text_ms", "decoding_ms", "scales_ms", "speed_up")


@dataclass(frozen=True)
class ForwardRun:
    """One forward that ran: the scales in it (more than one where scales are decoded together), its rows, the tokens of its
    last chunk, and seconds from the scale's start to its codes."""

    scales: tuple[int, ...]
    rows: int
    tokens: int
    seconds: float


class Stopwatch(Observer):
    """Times the parts of one generate call, the device idle at every stamp: `text` before the first scale, `forwards`, and
    `decoding`. A call that splits its batch adds up the parts and has several entries in `generations`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._rows, self._tokens = device, 0, 0
        self._before: list[int] = []
        self.generations: list[list[ForwardRun]] = []
        self.text = self.decoding = 0.0
        self._mark = self._now()

    def scale_started(self, scale: ScalePlan) -> None:
        now = self._now()
        if scale.step == 0:
            self.text += now - self._mark
            self.generations.append([])
        self._mark, self._before = now, []

    def forward_done(self, scale: ScalePlan, rows: int, tokens: int) -> None:
        self._rows, self._tokens = rows, tokens

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        """Adds a forward, or a later scale of the same one to it."""
        now, runs = self._now(), self.generations[-1]
        if self._before:
            runs[-1] = replace(runs[-1], scales=(*runs[-1].scales, scale.step), seconds=now - self._mark)
        else:
            runs.append(ForwardRun((scale.step,), self._rows, self._tokens, now - self._mark))
        self._before.append(scale.step)

    def blocks_done(self) -> None:
        self._mark = self._now()

    def image_done(self) -> None:
        now = self._now()
        self.decoding += now - self._mark
        self._mark = now

    def _now(self) -> float:
        synchronise(self._device)
        return perf_counter()


def ran_plan(plan: Plan, runs: Sequence[ForwardRun], *, batch: int) -> Plan:
    """Returns a plan reduced to what ran: scales that the data ended, branches it dropped, tokens a threshold kept."""
    rows = {index: run for run in runs for index in run.scales}

    def as_run(scale: ScalePlan) -> ScalePlan:
        run = rows[scale.step]
        branch = scale.branch if run.rows > batch or scale.branch != "both" else "cond"
        return replace(scale, branch=branch, kept=run.tokens if scale.whole and not scale.group else scale.kept)

    groups = [tuple(as_run(scale) for scale in group) for group in plan.groups if group[0].step in rows]
    return replace(plan, groups=tuple(groups))


def measure_scales(
    backbone: Backbone, policies: Mapping[str, Policy], *, batch: int, rounds: int, prompt: str
) -> dict[str, object]:
    """Returns for dense and every policy a row a forward and the whole generation's, as JSON values.

    Runs of all alternate; milliseconds are medians. `share` is achieved FLOP/s over the best matrix product of this device
    and precision. On the meta device what would be measured is None, and of a policy that decides on the way the most that it
    can run is reported. Raises UserError for a policy that does not fit.
    """
    prompts, plans = [readable_prompt(backbone, prompt)] * batch, _plans(backbone, policies)
    shape, work = transformer_shape(backbone.model), workload(backbone, backbone.encode_text(prompts))
    reports = {name: _Report(plan, shape, work, backbone.dtype.itemsize) for name, plan in plans.items()}
    if backbone.device.type == "meta":
        rows, ceiling = {name: report.planned() for name, report in reports.items()}, None
    else:
        ceiling = matmul_ceiling(backbone.device, backbone.dtype)
        rows = _measured(backbone, policies, reports, prompts=prompts, rounds=rounds, ceiling=ceiling)
    for name, plan in plans.items():  # after all that is measured: a dry run imports a lot
        rows[name]["predicted"] = predicted_peak(plan, backbone, prompts).megabytes()
    record = {"matmul_ceiling_gflops": ceiling and ceiling / 1e9, "shape": asdict(shape), "workload": asdict(work)}
    record |= {"policies": rows, "decoder": _decoder(backbone, batch)}
    if isinstance(backbone.model, Infinity):
        rows_held = batch * (2 if work.guided else 1)
        record["dense_keys_values"] = compared_layouts(plans[DENSE], width=shape.width, rows=rows_held)
    return record


def _measured(
    backbone: Backbone,
    policies: Mapping[str, Policy],
    reports: Mapping[str, "_Report"],
    *,
    prompts: list[str],
    rounds: int,
    ceiling: float,
) -> dict[str, dict[str, object]]:
    watches = defaultdict(list)

    def run(name: str, *, watched: bool = True) -> Tensor:
        watch = Stopwatch(backbone.device)
        images = generate(backbone, prompts, policy=policies.get(name), observer=watch if watched else None)
        watches[name].append(watch)
        return images

    timings = interleaved({name: partial(run, name) for name in reports}, rounds=rounds, warm_up=1, device=backbone.device)
    rows = {}
    for name, report in reports.items():
        rows[name] = report.row(watches[name][1:], timings[name], ceiling)
        rows[name] |= {"speed_up": timings[DENSE].median / timings[name].median}
        rows[name] |= _peaks(backbone.device, partial(run, name, watched=False))
    return rows


@torch.inference_mode()
def _decoder(backbone: Backbone, batch: int) -> dict[str, object]:
    """Returns how the images of a batch are decoded, and the memory that takes."""
    tokenizer = backbone.tokenizer
    size = (batch, tokenizer.channels, *tokenizer.latent_size(backbone.scale_schedule()))
    latent = torch.zeros(size, device=backbone.device)
    return asdict(backbone.decode_plan(latent)) | _peaks(backbone.device, partial(backbone.decode, latent))


def _peaks(device: torch.device, run: Callable[[], Tensor]) -> dict[str, float | None]:
    """Returns the peak of a run, and how far it lies above what was there before; None on the meta device."""
    if device.type == "meta":
        return dict.fromkeys(PEAKS)
    with PeakMemory(device) as before:
        pass
    with PeakMemory(device) as inside:
        run()
    return dict(zip(PEAKS, (inside.megabytes, inside.megabytes - before.megabytes), strict=True))


@dataclass(frozen=True)
class _Report:
    """What the record says of one plan; `itemsize` are the bytes of a key's element."""

    plan: Plan
    shape: TransformerShape
    work: Workload
    itemsize: int

    def row(self, watches: Sequence[Stopwatch], timing: Timing, ceiling: float) -> dict[str, object]:
        forwards = self._forwards(watches, ceiling)
        text, decoding = (median(getattr(watch, part) for watch in watches) for part in ("text", "decoding"))
        scales = sum(forward["ms"] for forward in forwards)
        work = self._work(forwards)
        return {
            "ms": 1000 * timing.median,
            "spread_ms": 1000 * timing.spread,
            "text_ms": 1000 * text,
            "decoding_ms": 1000 * decoding,
            "scales_ms": scales,
            "gflops": 1000 * work["gflop"] / scales,
            "share": 1e12 * work["gflop"] / scales / ceiling,
            **work,
        }

    def planned(self) -> dict[str, object]:
        """Returns the row of what the plan runs, all that takes a clock or a device None."""
        forwards = [
            ForwardRun(tuple(scale.step for scale in group), self.work.rows(group[0]), group[0].kept, 0.0)
            for group in self.plan.groups
        ]
        rows = [row | dict.fromkeys(RATES) for row in self._ran(forwards, self.work).values()]
        return dict.fromkeys((*RATES, *TIMES, *PEAKS)) | self._work(rows)

    def _work(self, forwards: list[dict[str, object]]) -> dict[str, object]:
        text = text_flops(self.plan, self.shape, self.work) / 1e9
        flops = sum(forward["gflop"] for forward in forwards)
        return {"gflop": flops, "text_keys_values_gflop": text, "forwards": forwards}

    def _forwards(self, watches: Sequence[Stopwatch], ceiling: float) -> list[dict[str, object]]:
        """Returns a row a forward: what ran in the last round, medians of its seconds over all rounds."""
        seconds: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for watch in watches:
            for scales, value in _summed(watch).items():
                seconds[scales].append(value)
        rows: dict[tuple[int, ...], dict[str, object]] = {}
        generations = watches[-1].generations
        for runs in generations:
            work = replace(self.work, batch=self.work.batch // len(generations))
            for scales, row in self._ran(runs, work).items():
                rows[scales] = _added(rows[scales], row) if scales in rows else row
        for scales, row in rows.items():
            timing = Timing.of(seconds[scales])
            row |= {"ms": 1000 * timing.median, "spread_ms": 1000 * timing.spread}
            row |= {"gflops": row["gflop"] / timing.median, "share": 1e9 * row["gflop"] / timing.median / ceiling}
        return list(rows.values())

    def _ran(self, runs: Sequence[ForwardRun], work: Workload) -> dict[tuple[int, ...], dict[str, object]]:
        plan = ran_plan(self.plan, runs, batch=work.batch)
        places = {scale.step: place for place, scale in enumerate(plan.scales)}
        flops, held = scale_flops(plan, self.shape, work), key_counts(plan, prefix=self.shape.prefix + work.prefix).held
        clips, rows = clip_ranges(plan.schedule), {}
        for run in runs:
            scales = [plan.scales[places[index]] for index in run.scales]
            parts = [flops[places[index]] for index in run.scales]
            rows[run.scales] = {
                "scales": list(run.scales),
                "scale": scales[0].index,
                "clip": next(clip for clip, scales_in in enumerate(clips) if scales[0].index in scales_in),
                "repetition": scales[0].step - plan.course.first_step(scales[0].index),
                "tokens": sum(scale.tokens for scale in scales),
                "kept": sum(map(_kept, scales)),
                "rows": run.rows,
                "gflop": sum(part.total for part in parts) / 1e9,
                "gflop_parts": _parts(parts),
                "key_value_mb": 2
                * self.itemsize
                * run.rows
                * (self.shape.key_width or self.shape.width)
                * sum(held[places[run.scales[-1]]])
                / 2**20,
            }
        return rows


def _plans(backbone: Backbone, policies: Mapping[str, Policy]) -> dict[str, Plan]:
    for policy in policies.values():
        backbone.check_policy(policy)
    return {DENSE: backbone.plan(None)} | {name: backbone.plan(policy) for name, policy in policies.items()}


def _summed(watch: Stopwatch) -> dict[tuple[int, ...], float]:
    """Returns the seconds of each forward, those of all samples of a split batch together."""
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for runs in watch.generations:
        for run in runs:
            total[run.scales] += run.seconds
    return total


def _kept(scale: ScalePlan) -> int:
    """Returns the tokens that pruned sites run on, of chunks with ranks of their own the most."""
    return max(scale.kept_chunks, default=scale.kept)


def _parts(flops: Sequence[ScaleFlops]) -> dict[str, float]:
    return {name: sum(getattr(part, name) for part in flops) / 1e9 for name in asdict(flops[0])}


def _added(one: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    """Returns the work of two samples of a split batch: sums, of kept tokens the more; keys are held one sample at a time."""
    parts = {name: value + other["gflop_parts"][name] for name, value in one["gflop_parts"].items()}
    summed = {name: one[name] + other[name] for name in ("rows", "gflop")}
    most = {name: max(one[name], other[name]) for name in ("kept", "key_value_mb")}
    return one | summed | most | {"gflop_parts": parts}
