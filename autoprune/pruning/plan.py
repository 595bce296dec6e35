"""A policy compiled against a schedule: per scale what runs, how many tokens, what is stored. The hot path only reads it."""

from dataclasses import dataclass

from autoprune.policy import Grid, Policy, ScalePruning, kept_count, token_count

WHOLE_SCALE = -1
SUBLAYERS = ("sa", "ca", "ffn")


@dataclass(frozen=True)
class ScalePlan:
    """One scale that runs. `kept` equals `tokens` when nothing is pruned; `stores` are the sites later scales restore from."""

    index: int
    grid: Grid
    tokens: int
    kept: int
    branch: str
    pruning: ScalePruning | None
    pruned_sites: frozenset[int]
    stores: frozenset[int]

    def kept_at(self, layer: int) -> int:
        """Returns how many tokens self-attention of this layer sees, and adds to its K/V buffer."""
        pruned = WHOLE_SCALE in self.pruned_sites or site(layer, "sa") in self.pruned_sites
        return self.kept if pruned else self.tokens


@dataclass(frozen=True)
class Plan:
    """The scales that run, in order, of a schedule. A dense plan has no pruning, store or dropped branch anywhere."""

    schedule: tuple[Grid, ...]
    depth: int
    scales: tuple[ScalePlan, ...]

    def key_capacity(self, layer: int) -> int:
        """Returns how many keys the layer holds after the last scale."""
        return sum(scale.kept_at(layer) for scale in self.scales)


def site(layer: int, sublayer: str) -> int:
    """Returns the number of a sublayer among all sites of a model."""
    return layer * len(SUBLAYERS) + SUBLAYERS.index(sublayer)


def compile_plan(policy: Policy | None, schedule: tuple[Grid, ...], depth: int) -> Plan:
    """Compiles a policy (None: dense) that fits this schedule and depth."""
    policy = (policy or Policy("", depth, schedule)).canonical()
    run = len(schedule) - policy.skip_last
    stored: dict[int, set[int]] = {}
    for pruning in policy.scales.values():
        stored.setdefault(pruning.cache_scale, set()).update(_sites(pruning, depth))
    scales = []
    for index, grid in enumerate(schedule[:run]):
        pruning, tokens = policy.scales.get(index), token_count(grid)
        drops = policy.guidance.branch != "both" and index >= policy.guidance.from_scale
        scales.append(
            ScalePlan(
                index=index,
                grid=grid,
                tokens=tokens,
                kept=kept_count(tokens, pruning.keep) if pruning else tokens,
                branch=policy.guidance.branch if drops else "both",
                pruning=pruning,
                pruned_sites=_sites(pruning, depth) if pruning else frozenset(),
                stores=frozenset(stored.get(index, ())),
            )
        )
    return Plan(schedule, depth, tuple(scales))


def _sites(pruning: ScalePruning, depth: int) -> frozenset[int]:
    if pruning.granularity == "scale":
        return frozenset((WHOLE_SCALE,))
    first, last = pruning.layers or (0, depth - 1)
    return frozenset(site(layer, name) for layer in range(first, last + 1) for name in SUBLAYERS)
