"""A policy compiled against a schedule: per scale what runs, how many tokens, what is stored. The hot path only reads it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from autoprune.clips import ONCE_EACH, Course, clip_frames, clip_ranges
from autoprune.policy import Grid, Policy, kept_count, token_count
from autoprune.pruning.projection import rank_count
from autoprune.pruning.signals import DELTA, HIDDEN, LATENT, LOGITS
from autoprune.rules import OF_LATENTS, SUBLAYERS, BranchRule, KeyRule, ScalePruning

WHOLE_SCALE = -1


@dataclass(frozen=True)
class ScalePlan:
    """One scale that runs, once: where scales run several times there is one for each time.

    `step` numbers these runs, those that a policy leaves out included. `frames` are those of its clip, which it `opens`, or
    whose `context` for the next clip it leaves. `kept` equals `tokens` when nothing is pruned, with a threshold it is the most
    that is kept.

    `kept_chunks` are the tokens each chunk works on at chunk granularity. `stores` are (site, restorer) pairs that later
    scales restore from, `records` the signals they score with. `group` holds the kept tokens of all scales decoded in the
    same forward, empty for one alone.
    """

    index: int
    grid: Grid
    tokens: int
    kept: int
    branch: str
    pruning: ScalePruning | None
    pruned_sites: frozenset[int]
    kept_chunks: tuple[int, ...] = ()
    stores: frozenset[tuple[int, str]] = frozenset()
    records: frozenset[str] = frozenset()
    delta_chunk: int = 0
    group: tuple[int, ...] = ()
    step: int = 0
    frames: range = range(1)
    opens: bool = False
    context: bool = False

    def places(self, latent: Tensor) -> tuple[int, ...]:
        """Returns the axes of its grid that a latent or its codes have: (h, w) of images [B, d, H, W], (t, h, w) of videos."""
        return self.grid[5 - latent.dim() :]

    def clip(self, latent: Tensor) -> Tensor:
        """Returns the part of a latent that belongs to its clip: all of an image."""
        return latent if latent.dim() == 4 else latent[:, :, self.frames.start : self.frames.stop]

    def with_clip(self, latent: Tensor, clip: Tensor) -> Tensor:
        """Returns a latent with that part changed."""
        if latent.dim() == 4 or clip.shape == latent.shape:
            return clip
        return latent.slice_scatter(clip, 2, self.frames.start, self.frames.stop)

    @property
    def whole(self) -> bool:
        """Returns whether all blocks run on kept tokens."""
        return WHOLE_SCALE in self.pruned_sites

    def kept_at(self, layer: int, chunk: int) -> int:
        """Returns how many tokens self-attention of this layer sees, and adds to its K/V buffer."""
        if chunk_site(chunk) in self.pruned_sites:
            return self.kept_chunks[chunk]
        return self.kept if self.whole or site(layer, "sa") in self.pruned_sites else self.tokens


@dataclass(frozen=True)
class Plan:
    """The scales that run, in groups decoded in one forward (nearly always of one), of a schedule.

    A dense plan has no pruning, store or dropped branch anywhere. `policy` is canonical and holds what is decided while
    generating.
    """

    schedule: tuple[Grid, ...]
    depth: int
    groups: tuple[tuple[ScalePlan, ...], ...]
    chunks: tuple[range, ...]
    policy: Policy
    course: Course = ONCE_EACH

    @property
    def scales(self) -> tuple[ScalePlan, ...]:
        """Returns the scales in order."""
        return tuple(scale for group in self.groups for scale in group)

    @property
    def guidance(self) -> BranchRule:
        """Returns which branches run."""
        return self.policy.guidance

    @property
    def keys(self) -> KeyRule:
        """Returns which keys later scales see."""
        return self.policy.keys

    @property
    def sublayer_sites(self) -> Iterator[int]:
        """Yields the sites of all sublayers of all layers."""
        return (site(layer, name) for layer in range(self.depth) for name in SUBLAYERS)

    def chunk_of(self, layer: int) -> int:
        """Returns the chunk a block belongs to."""
        return next(index for index, blocks in enumerate(self.chunks) if layer in blocks)

    def key_capacity(self, layer: int) -> int:
        """Returns the most keys the layer ever holds, those of the running scales included unless they are not kept."""
        if self.course.by_clip:
            contexts = [scale.tokens for scale in self.scales if scale.context]
            return max((sum(contexts[max(0, last - 1) : last + 1]) for last in range(len(contexts))), default=0)
        chunk, most = self.chunk_of(layer), 0
        sizes = [[scale.kept_at(layer, chunk) for scale in group] for group in self.groups]
        seen: list[int] = []
        for group in sizes:
            seen = [size for index, size in enumerate(seen) if index not in forgotten(self.keys, len(seen))]
            most = max(most, sum(seen) + sum(group))
            seen += group
        return most if self.keys.budget == 1 else sum(size for group in sizes for size in group)


def forgotten(rule: KeyRule, held: int) -> range:
    """Returns which of `held` earlier scales, in order, the next scale no longer sees."""
    if rule.first is None or held <= rule.first + rule.last:
        return range(0)
    return range(rule.first, held - rule.last)


def site(layer: int, sublayer: str) -> int:
    """Returns the number of a sublayer among all sites of a model; chunks and the whole scale have negative ones."""
    return layer * len(SUBLAYERS) + SUBLAYERS.index(sublayer)


def chunk_site(chunk: int) -> int:
    """Returns the number of a chunk among all sites."""
    return WHOLE_SCALE - 1 - chunk


def compile_plan(policy: Policy | None, schedule: tuple[Grid, ...], depth: int, course: Course = ONCE_EACH) -> Plan:
    """Compiles a policy (None: dense) that fits this schedule and depth, for a backbone of this course."""
    policy = (policy or Policy("", depth, schedule)).canonical()
    stored, records = _stored(policy), _records(policy, course)
    scales = [
        scale for index in range(policy.run) for scale in _runs(_scale_plan(policy, index, stored, records), policy, course)
    ]
    first = len(scales) - 1 if policy.group_from is None else policy.group_from
    together = scales[first:]
    if len(together) > 1:
        kept = tuple(scale.kept for scale in together)
        together = [replace(scale, group=kept) for scale in together]
    groups = [(scale,) for scale in scales[:first]] + [tuple(together)]
    return Plan(schedule, depth, tuple(groups), policy.chunk_ranges(), policy, course)


def _runs(scale: ScalePlan, policy: Policy, course: Course) -> Iterator[ScalePlan]:
    """Yields one plan for each time a scale runs, the last ones dense if its rule says so."""
    times, first = course.times(scale.index) - policy.fewer_repetitions.get(scale.index, 0), course.first_step(scale.index)
    clips = clip_ranges(policy.scale_schedule)
    clip, frames = next(each for each in zip(clips, clip_frames(policy.scale_schedule), strict=True) if scale.index in each[0])
    dense = min(scale.pruning.dense_repetitions, times - 1) if scale.pruning else 0
    for repetition in range(times):
        last = repetition == times - 1
        run = replace(
            scale,
            step=first + repetition,
            frames=frames,
            opens=repetition == 0 and scale.index == clip.start,
            context=last and scale.index == clip.stop - 1 and clip != clips[-1],
            delta_chunk=scale.delta_chunk if last or scale.pruning is None else scale.pruning.chunk,
        )
        yield run if repetition < times - dense else _dense(run)


def _dense(scale: ScalePlan) -> ScalePlan:
    return replace(scale, kept=scale.tokens, pruning=None, pruned_sites=frozenset(), kept_chunks=())


def _scale_plan(policy: Policy, index: int, stored: dict[int, set], records: dict[int, set]) -> ScalePlan:
    grid, rule = policy.scale_schedule[index], policy.scales.get(index)
    tokens, guidance = token_count(grid), policy.guidance
    drops = guidance.branch in ("cond", "uncond") and index >= guidance.from_scale
    following = policy.scales.get(index + 1)
    return ScalePlan(
        index=index,
        grid=grid,
        tokens=tokens,
        kept=_kept(rule, grid) if rule else tokens,
        branch=guidance.branch if drops else "both",
        pruning=rule,
        pruned_sites=frozenset(_sites(rule, policy)) if rule else frozenset(),
        kept_chunks=tuple(_rank(rule, share, grid) for share in _shares(rule, policy)) if rule else (),
        stores=frozenset(stored.get(index, ())),
        records=frozenset(records.get(index, ())),
        delta_chunk=following.chunk if following else 0,
    )


def _kept(rule: ScalePruning, grid: Grid) -> int:
    """Returns the kept count, at least what anchors or merging cells need."""
    tokens = token_count(grid)
    if rule.reducer == "project":
        return rank_count(rule.keep, tokens)
    return min(tokens, max(kept_count(tokens, rule.keep), _least(rule, grid)))


def _least(rule: ScalePruning, grid: Grid) -> int:
    frames, height, width = grid
    if rule.reducer == "merge":
        return frames * -(-height // rule.cell) * -(-width // rule.cell)
    if rule.anchors:
        return frames * (-(-(height - 1) // rule.anchors) + 1) * (-(-(width - 1) // rule.anchors) + 1)
    return 1


def _shares(rule: ScalePruning, policy: Policy) -> tuple[float, ...]:
    if rule.granularity != "chunk":
        return ()
    return rule.ranks or (rule.keep,) * len(policy.chunk_ranges())


def _rank(rule: ScalePruning, share: float, grid: Grid) -> int:
    """Returns the tokens a chunk works on; projections and rank tables count as the official code, int(share * tokens) + 1."""
    tokens = token_count(grid)
    count = rank_count(share, tokens) if rule.reducer == "project" or rule.ranks else kept_count(tokens, share)
    return min(tokens, max(count, _least(rule, grid)))


def _sites(rule: ScalePruning, policy: Policy) -> Iterator[int]:
    if rule.granularity == "scale":
        yield WHOLE_SCALE
    elif rule.granularity == "chunk":
        yield from (chunk_site(chunk) for chunk in range(len(policy.chunk_ranges())))
    else:
        first, last = rule.layers or (0, policy.depth - 1)
        yield from (site(layer, name) for layer in range(first, last + 1) for name in rule.sublayers)


def _stored(policy: Policy) -> dict[int, set[tuple[int, str]]]:
    """Returns for each cache scale what it stores."""
    stored: dict[int, set[tuple[int, str]]] = {}
    for rule in policy.scales.values():
        if rule.cached:
            stored.setdefault(rule.cache_scale, set()).update((place, rule.restorer) for place in _sites(rule, policy))
    return stored


def _records(policy: Policy, course: Course) -> dict[int, set[str]]:
    """Returns for each scale the signals that later decisions look at; one that runs several times looks at itself too."""
    records: dict[int, set[str]] = {}
    for index, rule in policy.scales.items():
        back = {name for name, weight in rule.scorer.items() if weight}
        end = index + (course.times(index) > 1)
        if back & set(OF_LATENTS):
            for earlier in range(max(0, min(index, policy.group_from or index) - 2), end):
                records.setdefault(earlier, set()).add(LATENT)
        if "spatiotemporal" in back:
            for clip in clip_ranges(policy.scale_schedule)[:-1]:
                records.setdefault(clip.stop - 1, set()).add(LATENT)
        for name, wanted in ((DELTA, "delta" in back), (HIDDEN, "cond_uncond" in back), (LOGITS, rule.restorer == "anchor")):
            for earlier in range(index - 1, end) if wanted else ():
                records.setdefault(earlier, set()).add(name)
    if policy.stop or policy.probe:
        for index in range(policy.run):
            records.setdefault(index, set()).add(LATENT)
    return records
