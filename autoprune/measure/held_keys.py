"""How many keys every layer holds while a plan runs: the buffers' rules (autoprune/state.py) without any tensor."""

from dataclasses import dataclass

from autoprune.policy import token_count
from autoprune.pruning.plan import Plan, forgotten

Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class KeyCounts:
    """For every scale that runs, one count a layer: keys its queries attend to, and keys held once it is done."""

    seen: Counts
    held: Counts


def key_counts(plan: Plan, *, prefix: int = 0) -> KeyCounts:
    """Counts the keys of a plan whose first scale has `prefix` more tokens in front of it, or by clips such text before it."""
    if plan.course.by_clip:
        return _by_clip(plan, prefix)
    sizes: list[list[int]] = [[] for _ in range(plan.depth)]
    chunks = [plan.chunk_of(layer) for layer in range(plan.depth)]
    seen, held = [], []
    for group in plan.groups:
        for layer in sizes:
            gone = forgotten(plan.keys, len(layer))
            del layer[gone.start : gone.stop]
        for scale in group:
            front = prefix if scale.index == 0 else 0
            for layer, chunk in enumerate(chunks):
                sizes[layer].append(front + scale.kept_at(layer, chunk))
            seen.append(tuple(map(sum, sizes)))
            if len(group) == 1 and plan.keys.budget < 1:
                _shrink(sizes, plan, prefix + sum(map(token_count, plan.schedule[: scale.index + 1])))
            held.append(tuple(map(sum, sizes)))
    return KeyCounts(tuple(seen), tuple(held))


def _by_clip(plan: Plan, prefix: int) -> KeyCounts:
    """Counts the text, the last scale of the clip before, and of the scale itself what it sees of or leaves."""
    seen, held, context, visible = [], [], 0, 0
    for scale in plan.scales:
        visible = context if scale.opens else visible
        own = [scale.kept_at(layer, plan.chunk_of(layer)) for layer in range(plan.depth)]
        context = scale.tokens if scale.context else context
        seen.append(tuple(prefix + visible + kept for kept in own))
        held.append((prefix + visible + scale.context * scale.tokens,) * plan.depth)
    return KeyCounts(tuple(seen), tuple(held))


def _shrink(sizes: list[list[int]], plan: Plan, tokens: int) -> None:
    """Keeps a layer's share of the budget, which is one of all tokens so far."""
    count = max(plan.keys.window, int(plan.keys.budget * tokens))
    for layer in sizes:
        if count < sum(layer):
            layer[:] = [count]
