"""What selecting and restoring costs beside the pruned scale it shortens, on random weights of a chosen size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.schedules import scale_schedule
from autoprune.backbones.text import TextFeatures
from autoprune.generation import Observer, Request, run_blocks
from autoprune.measure.latency import interleaved
from autoprune.policy import Policy
from autoprune.pruning.plan import ScalePlan, compile_plan
from autoprune.rules import ScalePruning
from autoprune.sampling import likeliest
from autoprune.state import GenerationState

RULES = {
    "dc, cached": ScalePruning(0.5, 8, "dc", "scale"),
    "structure + texture, nearest": ScalePruning(
        0.5, None, {"structure": 1.0, "texture": 1.0}, "scale", restorer="nearest", normalise="zscore"
    ),
    "latent_cos, zero_residual": ScalePruning(0.5, None, "latent_cos", "scale", restorer="zero_residual"),
    "delta, anchor": ScalePruning(0.5, None, "delta", "scale", restorer="anchor", anchors=4),
}


@dataclass(frozen=True)
class OverheadCase:
    """A random-weight transformer and the scale that is pruned; by default 40x40 of the 1M schedule."""

    width: int = 1024
    depth: int = 8
    heads: int = 8
    scale: int = 10
    pixel_budget: str = "1M"
    batch: int = 1


def measure_overhead(
    case: OverheadCase, *, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, float]]:
    """Returns for each rule the seconds of select + restore, of the whole pruned scale, and their ratio, in one run."""
    config = TransformerConfig(case.width, case.heads, case.depth, chunks=1, token_bits=32, text_width=256)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = Infinity(config).to(device, dtype).eval()
        rows = {}
        for name, rule in RULES.items():
            whole, alone = _runs(model, case, rule)
            timings = interleaved({"whole": whole, "alone": alone}, rounds=rounds, warm_up=1, device=device)
            seconds, scale = timings["alone"].median, timings["whole"].median
            rows[name] = {"seconds": seconds, "scale_seconds": scale, "ratio": seconds / scale}
    return rows


def _runs(model: Infinity, case: OverheadCase, rule: ScalePruning) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Returns the pruned scale with all its blocks, and with none: the same selection and restoration around nothing."""
    schedule = scale_schedule(1.0, case.pixel_budget)[: case.scale + 1]
    plan = compile_plan(Policy("random", case.depth, schedule, {case.scale: rule}), schedule, case.depth)
    text = TextFeatures.from_rows([torch.randn(16, model.config.text_width).to(model.pos_start)] * case.batch)
    weights = (2.0,) * len(schedule)
    request = Request(text, plan, likeliest, weights, (1.0,) * len(schedule), samples=tuple(range(case.batch)))
    state, scale = GenerationState(model, request, Observer()), plan.scales[-1]
    state.enter([scale])
    _fill(state, plan.scales, model)
    x = torch.randn(2 * case.batch, scale.tokens, case.width).to(model.pos_start)

    def run(blocks: Callable[..., Tensor]) -> Tensor:
        for buffer in state.buffers:
            buffer.length, buffer.sizes = 0, []
        return state.sandwich.around_scales([scale], [x], blocks)[0]

    return partial(run, partial(run_blocks, state, (scale,), Observer())), partial(run, lambda y, positions, sizes: y)


def _fill(state: GenerationState, scales: tuple[ScalePlan, ...], model: Infinity) -> None:
    """Gives the state random signals and caches, as the scales before would have left them."""
    signals, sandwich, previous = state.sandwich.signals, state.sandwich, scales[-2]
    rows, device, dtype = 2 * state.batch, model.pos_start.device, model.compute_dtype
    signals.latents = [torch.randn(state.batch, 32, 64, 64, device=device) for _ in range(2)]
    signals.delta, signals.delta_grid = torch.rand(rows, previous.tokens, device=device), previous.grid
    signals.logits, signals.logits_grid = torch.randn(state.batch, previous.tokens, 32, 2, device=device), previous.grid
    for scale in scales:
        for site, restorer in scale.stores:
            cache = torch.randn(rows, scale.tokens, model.config.width, device=device, dtype=dtype)
            sandwich.caches[scale.index, site, restorer] = (cache, scale.grid)
