"""The blocks of a scale from a CUDA graph: what they read is put where the graph reads it, what they leave is handed on.

Only what the data decide, or what is drawn on the host inside the blocks, runs without (backbones/graphs.py).
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial

from torch import Tensor

from autoprune.backbones.graphs import GraphCache, layout
from autoprune.policy import Grid
from autoprune.pruning.plan import ScalePlan
from autoprune.pruning.signals import Signals
from autoprune.rules import OF_LATENTS, ScalePruning
from autoprune.state import GenerationState

Run = Callable[[list[Tensor]], list[Tensor]]
CacheKey = tuple[int, int, str]


def run_or_replay(state: GenerationState, group: Sequence[ScalePlan], inputs: list[Tensor], run: Run) -> list[Tensor]:
    """Returns run(inputs), the hidden states of scales that run together: replayed from the second time on where possible."""
    graphs = state.graphs
    selects = any(scale.pruning and not _repeatable(scale.pruning) for scale in group)
    if graphs is None or selects or state.plan.keys.budget < 1:
        return run(inputs)
    description = _description(state, group)
    if not graphs.meets(description):
        return run(inputs)
    static = [graphs.hold(("input", scale.index), x) for scale, x in zip(group, inputs, strict=True)]
    caches, signals = state.sandwich.caches, _held_signals(state, group)
    read = [key for key in _caches_read(group) if key in caches]
    caches |= {key: (graphs.hold(("cache", *key), caches[key][0]), caches[key][1]) for key in read}
    key = (description, layout(static), layout([caches[key][0] for key in read]), layout(signals))
    if key not in graphs:
        constants = [state.model.rotation(scale.step, state.plan.schedule, state.conditioning) for scale in group]
        blocks = partial(run, static)
        graphs.capture(key, partial(_outcome, state, group, signals=signals, blocks=blocks, constants=constants))
    outcome = graphs.replay(key)
    if outcome is None:
        return run(inputs)
    _hand_on(state, group, outcome)
    return list(outcome.hidden)


@dataclass(frozen=True)
class _Outcome:
    """What a run of blocks leaves behind, its tensors in slots; `held` is the length and the appends of every K/V buffer,
    `constants` what the graph reads beside them."""

    hidden: list[Tensor]
    caches: dict[CacheKey, tuple[Tensor, Grid]]
    settled: dict[int, Tensor]
    copies: dict[int, Tensor]
    delta: tuple[Tensor, Grid] | None
    held: tuple[tuple[int, tuple[int, ...]], ...]
    ran: tuple[int, int]
    constants: list[Tensor | None]


class _Slots(dict):
    """Caches of one generation that go to slots as they are stored."""

    def __init__(self, graphs: GraphCache, content: dict[CacheKey, tuple[Tensor, Grid]]) -> None:
        super().__init__(content)
        self._graphs = graphs

    def __setitem__(self, key: CacheKey, stored: tuple[Tensor, Grid]) -> None:
        super().__setitem__(key, (self._graphs.hold(("cache", *key), stored[0]), stored[1]))


def _repeatable(rule: ScalePruning) -> bool:
    """Returns whether selecting neither counts what the data say nor draws on the host."""
    drawn = rule.select in ("threshold", "draw") or rule.reducer == "project" or rule.scorer.get("random")
    return rule.reducer == "merge" or not drawn


def _description(state: GenerationState, group: Sequence[ScalePlan]) -> Hashable:
    """Returns all that shapes the work of these scales but where its tensors lie."""
    plan, request = state.plan, state.request
    weights = tuple(request.guidance[scale.index] for scale in group) if any(request.guidance_layers) else ()
    rules = (plan.schedule, plan.chunks, plan.keys, request.guidance_layers, weights)
    return (*rules, state.branch, state.batch, state.layout, _held(state), tuple(map(_hashable, group)))


def _held(state: GenerationState) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((buffer.length, tuple(buffer.sizes)) for buffer in state.buffers)


def _hashable(value: object) -> Hashable:
    if is_dataclass(value):
        return tuple(_hashable(getattr(value, entry.name)) for entry in fields(value))
    return tuple(value.items()) if isinstance(value, Mapping) else value


def _caches_read(group: Sequence[ScalePlan]) -> Iterator[CacheKey]:
    for scale in group:
        if scale.pruning and scale.pruning.cached:
            yield from ((scale.pruning.cache_scale, site, scale.pruning.restorer) for site in sorted(scale.pruned_sites))


def _held_signals(state: GenerationState, group: Sequence[ScalePlan]) -> Signals:
    """Returns the signals that these scales look at, in slots."""
    rules, signals = [scale.pruning for scale in group if scale.pruning], state.sandwich.signals
    asked = {name for rule in rules for name, weight in rule.scorer.items() if weight}
    place, held = group[0].index, Signals()
    if asked & set(OF_LATENTS):
        held.latents = list(state.graphs.hold(("latents", place), tuple(signals.latents)))
        held.before = state.graphs.hold(("before", place), signals.before)
    if "delta" in asked:
        held.delta, held.delta_grid = state.graphs.hold(("delta", place), signals.delta), signals.delta_grid
    if "cond_uncond" in asked:
        held.hidden, held.hidden_grid = state.graphs.hold(("hidden", place), signals.hidden), signals.hidden_grid
    if any(rule.restorer == "anchor" for rule in rules):
        held.logits, held.logits_grid = state.graphs.hold(("logits", place), signals.logits), signals.logits_grid
    return held


def _outcome(
    state: GenerationState,
    group: Sequence[ScalePlan],
    *,
    signals: Signals,
    blocks: Callable[[], list[Tensor]],
    constants: list[Tensor | None],
) -> _Outcome:
    """Runs the blocks, while that is being captured, and copies what others overwrite in the pool of graphs to slots."""
    graphs, sandwich, held, delta = state.graphs, state.sandwich, _held(state), signals.delta
    own = sandwich.signals, sandwich.caches
    sandwich.signals, sandwich.caches = signals, _Slots(graphs, sandwich.caches)
    try:
        hidden = blocks()
        place = group[0].index
        return _Outcome(
            hidden=[graphs.hold(("hidden of", scale.index), x) for scale, x in zip(group, hidden, strict=True)],
            caches={key: stored for key, stored in sandwich.caches.items() if key not in own[1]},
            settled={index: graphs.hold(("settled", index), where) for index, where in sandwich.settled.items()},
            copies={index: graphs.hold(("copies", index), where) for index, where in sandwich.copies.items()},
            delta=None if signals.delta is delta else (graphs.hold(("delta of", place), signals.delta), signals.delta_grid),
            held=_held(state),
            ran=state.ran,
            constants=constants,
        )
    finally:
        sandwich.signals, sandwich.caches = own
        _bring_back(state, held)


def _bring_back(state: GenerationState, held: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
    for buffer, (length, sizes) in zip(state.buffers, held, strict=True):
        buffer.length, buffer.sizes = length, list(sizes)


def _hand_on(state: GenerationState, group: Sequence[ScalePlan], outcome: _Outcome) -> None:
    sandwich = state.sandwich
    sandwich.scale, state.ran = group[-1], outcome.ran
    sandwich.caches |= outcome.caches
    sandwich.settled |= outcome.settled
    sandwich.copies |= outcome.copies
    if outcome.delta is not None:
        sandwich.signals.delta, sandwich.signals.delta_grid = outcome.delta
    _bring_back(state, outcome.held)
