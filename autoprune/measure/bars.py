"""Bars that the runtime must reach, each a ratio of runs that alternate in one process, on random weights of a fixed size.

Dense runs are held against a plain reference loop (reference_loop.py), policies against what their FLOPs promise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from autoprune.backbones import Backbone
from autoprune.backbones.schedules import position_frame
from autoprune.generation import Observer, Request, generate_latent
from autoprune.measure.bars_case import BarsCase, barred_policies, dtype_name, fixed_request, random_infinity
from autoprune.measure.ceiling import matmul_ceiling
from autoprune.measure.flops import TransformerShape, Workload, scale_flops, text_flops, transformer_shape
from autoprune.measure.latency import ScaleClock, Timing, interleaved
from autoprune.measure.reference_loop import ReferenceRequest, ReferenceRun, reference_run
from autoprune.policy import Policy
from autoprune.pruning.plan import ScalePlan
from autoprune.sampling import Draw

REFERENCE, WHOLE = "reference", "whole"
CLOCKED = 5  # dense runs that the times of single scales are medians of
Bar = dict[str, object]
Timings = Mapping[str, Timing]


def measure_bars(case: BarsCase, *, device: torch.device, rounds: int) -> dict[str, Bar]:
    """Returns for each bar {value, bar, ok} and what it was made of; seconds are medians, values medians over rounds."""
    models = {dtype: random_infinity(case, device, dtype) for dtype in case.dtypes}
    bars: dict[str, Bar] = {}
    for batch in case.batches:
        suffix = f", batch {batch}" if len(case.batches) > 1 else ""
        bars |= {name + suffix: entry for name, entry in _bars(_Rig(case, models, batch), rounds).items()}
    return bars


def bar(value: float, limit: float, *, most: bool = False, **parts: object) -> Bar:
    """Returns one bar: ok where the value is at least the limit, or with `most` at most; `parts` go with it."""
    return {"value": value, "bar": limit, "ok": value <= limit if most else value >= limit, **parts}


def bars_table(bars: Mapping[str, Bar]) -> list[str]:
    """Returns the lines of the terminal table."""
    lines = [f"{'bar':74s} {'value':>7s} {'bar':>5s}"]
    for name, entry in bars.items():
        reachable = f"; reachable {entry['reachable']:.3f}" if "reachable" in entry else ""
        lines.append(f"  {name:72s} {entry['value']:7.3f} {entry['bar']:5.2f}  {'ok' if entry['ok'] else 'missed'}{reachable}")
    return lines


@dataclass(frozen=True)
class _Rig:
    """The same weights in every precision, and the requests of one batch size."""

    case: BarsCase
    models: Mapping[torch.dtype, Backbone]
    batch: int

    def request(self, dtype: torch.dtype, policy: Policy | None = None) -> Request:
        return fixed_request(self.case, self.models[dtype], self.batch, policy)

    def run(self, dtype: torch.dtype, policy: Policy | None = None) -> Callable[[], Tensor]:
        return partial(generate_latent, self.models[dtype], self.request(dtype, policy))

    def whole(self) -> Tensor:
        dtype = self.case.dtypes[-1]
        return self.models[dtype].decode(self.run(dtype)())

    def reference(self) -> ReferenceRun:
        dtype = self.case.dtypes[0]
        model, request = self.models[dtype].model, self.request(dtype)
        schedule, frame = request.plan.schedule, position_frame(request.plan.schedule)
        text, weights = request.text.values, (request.guidance, request.temperature)
        return reference_run(model, model.layers(), ReferenceRequest(text, schedule, frame, *weights, request.draw))

    def flops(self, policy: Policy | None = None) -> int:
        """Returns the analytic FLOPs of a generation without its decoder."""
        request, shape, work = self._work(policy)
        return text_flops(request.plan, shape, work) + sum(self.scale_flops(policy))

    def scale_flops(self, policy: Policy | None = None) -> list[int]:
        """Returns the FLOPs of every scale that runs."""
        request, shape, work = self._work(policy)
        return [part.total for part in scale_flops(request.plan, shape, work)]

    def _work(self, policy: Policy | None) -> tuple[Request, TransformerShape, Workload]:
        dtype = self.case.dtypes[-1]
        request, shape = self.request(dtype, policy), transformer_shape(self.models[dtype].model)
        return request, shape, Workload(self.batch, request.guidance, request.text.values.shape[1])


@torch.inference_mode()
def _bars(rig: _Rig, rounds: int) -> dict[str, Bar]:
    case, last = rig.case, rig.case.dtypes[-1]
    policies = barred_policies(case)
    runs: dict[str, Callable[[], Tensor]] = {REFERENCE: lambda: rig.reference().latent}
    runs |= {dtype_name(dtype): rig.run(dtype) for dtype in case.dtypes}
    runs |= {name: rig.run(last, policy) for name, (policy, _) in policies.items()}
    if case.ceiling is not None:
        runs[WHOLE] = rig.whole
    timings = interleaved(runs, rounds=rounds, warm_up=1, device=rig.models[last].device)
    bars = _dense_bars(rig, timings)
    for name, (policy, least) in policies.items():
        bars[f"{name}, {dtype_name(last)}: speed-up / FLOP ratio"] = _policy_bar(rig, timings, name, policy, least)
    if case.ceiling is not None:
        bars["dense and decoder: seconds / FLOPs at the ceiling of matrix products"] = _ceiling_bar(rig, timings[WHOLE])
    return bars


def _dense_bars(rig: _Rig, timings: Timings) -> dict[str, Bar]:
    bars, drawn = {}, rig.reference()
    for dtype, least in zip(rig.case.dtypes, rig.case.faster, strict=True):
        name = f"dense {dtype_name(dtype)} against the reference loop in {dtype_name(rig.case.dtypes[0])}"
        ratio, seconds = _compared(timings, REFERENCE, dtype_name(dtype))
        bars[name] = bar(ratio, least, **seconds, **_agreement(rig, dtype, drawn))
    return bars


def _policy_bar(rig: _Rig, timings: Timings, name: str, policy: Policy, least: float) -> Bar:
    ratio, seconds = _compared(timings, dtype_name(rig.case.dtypes[-1]), name)
    flops = rig.flops() / rig.flops(policy)
    return bar(ratio / flops, least, speed_up=ratio, flop_ratio=flops, reachable=_reachable(rig, policy) / flops, **seconds)


def _reachable(rig: _Rig, policy: Policy) -> float:
    """Returns the speed-up of a policy whose scales took the time of the dense ones times their share of the FLOPs: selection
    and restoration free, few tokens as fast each as many."""
    dtype, clocks = rig.case.dtypes[-1], []
    for _ in range(CLOCKED):
        clocks.append(ScaleClock(rig.models[dtype].device, rig.batch))
        generate_latent(rig.models[dtype], rig.request(dtype), clocks[-1])
    dense = [median(seconds) for seconds in zip(*([each for _, each in clock.runs] for clock in clocks), strict=True)]
    kept = zip(dense, rig.scale_flops(policy), rig.scale_flops(), strict=False)  # skipped scales are the last ones
    return sum(dense) / sum(seconds * own / whole for seconds, own, whole in kept)


def _ceiling_bar(rig: _Rig, whole: Timing) -> Bar:
    backbone = rig.models[rig.case.dtypes[-1]]
    reached = matmul_ceiling(backbone.device, backbone.dtype)
    flops = rig.flops() + _decoder_flops(backbone, rig.batch)
    parts = {"seconds": whole.median, "tflop": flops / 1e12, "ceiling_tflops": reached / 1e12}
    return bar(whole.median * reached / flops, rig.case.ceiling, most=True, **parts)


def _compared(timings: Timings, slow: str, fast: str) -> tuple[float, dict[str, float]]:
    """Returns the median over rounds of how many times as long the first run takes, and both medians."""
    pairs = zip(timings[slow].samples, timings[fast].samples, strict=True)
    return median(one / other for one, other in pairs), {
        "slow_seconds": timings[slow].median,
        "fast_seconds": timings[fast].median,
    }


class _Drawn(Observer):
    """What each scale's own logits would draw, whatever bits were given in their place."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self.bits: list[Tensor] = []

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        self.bits.append(self._draw(logits, scale.index))


def _agreement(rig: _Rig, dtype: torch.dtype, reference: ReferenceRun) -> dict[str, float]:
    """Returns the share of bits drawn as the reference drew them, both having seen its earlier bits, and the latents'
    largest difference where each followed its own."""
    request = rig.request(dtype)
    watched = _Drawn(request.draw)
    generate_latent(rig.models[dtype], replace(request, given_bits=tuple(reference.bits)), watched)
    same = sum(int((ours == theirs).sum()) for ours, theirs in zip(watched.bits, reference.bits, strict=True))
    share = same / sum(bits.numel() for bits in reference.bits)
    difference = (rig.run(dtype)() - reference.latent).abs().max()
    return {"same_bits": share, "latent_difference": float(difference)}


def _decoder_flops(backbone: Backbone, batch: int) -> int:
    """Returns the FLOPs of the decoder's convolutions, counted while it runs once."""
    counted: list[int] = []

    def count(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counted.append(2 * output.numel() * module.weight[0].numel())

    convolutions = (part for part in backbone.tokenizer.decoder.modules() if isinstance(part, nn.Conv2d))
    handles = [part.register_forward_hook(count) for part in convolutions]
    size = backbone.tokenizer.latent_size(backbone.scale_schedule())
    backbone.decode(torch.zeros(batch, backbone.tokenizer.channels, *size, device=backbone.device))
    for handle in handles:
        handle.remove()
    return sum(counted)
