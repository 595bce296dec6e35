"""Select, run, restore: the one place where tokens are pruned, around a sublayer or around all blocks of a scale."""

from collections.abc import Callable

from torch import Tensor

from autoprune.pruning import RESTORERS, SCORERS
from autoprune.pruning.plan import WHOLE_SCALE, ScalePlan
from autoprune.pruning.scorers import ScoreContext

Change = Callable[[Tensor, Tensor | None], Tensor]
OnKept = Callable[[int, int, Tensor], None]


class Sandwich:
    """The pruning state of one generation: outputs of cache scales by site, and the scale at hand."""

    def __init__(self, *, seed: int, samples: tuple[int, ...], on_kept: OnKept | None = None) -> None:
        """`samples` number the batch for random scorers; `on_kept(scale, site, kept [R, M])` is told every selection."""
        self.seed, self.samples, self.on_kept = seed, samples, on_kept
        self.scale: ScalePlan | None = None
        self.caches: dict[tuple[int, int], tuple[Tensor, tuple[int, int, int]]] = {}

    def add(self, x: Tensor, change: Change, *, site: int) -> Tensor:
        """Returns x + change(x), the change computed for kept tokens and restored for the others.

        x [R, N, C]; change(y [R, M, C], kept [R, M] or None for all tokens) -> [R, M, C].
        """
        if site in self.scale.pruned_sites:
            return self._pruned(x, change, site)
        delta = change(x, None)
        if site in self.scale.stores:
            self._store(site, delta)
        return x + delta

    def around_blocks(self, x: Tensor, blocks: Change) -> Tensor:
        """Returns blocks(x), pruned as a whole if the plan says so.

        Here the cached quantity is what all blocks add together, blocks(x) - x.
        """
        if WHOLE_SCALE in self.scale.pruned_sites:
            return self._pruned(x, lambda y, kept: blocks(y, kept) - y, WHOLE_SCALE)
        out = blocks(x, None)
        if WHOLE_SCALE in self.scale.stores:
            self._store(WHOLE_SCALE, out - x)
        return out

    def keep_rows(self, rows: slice) -> None:
        """Forgets the rows of a dropped guidance branch."""
        self.caches = {key: (cache[rows], grid) for key, (cache, grid) in self.caches.items()}

    def _store(self, site: int, delta: Tensor) -> None:
        self.caches[self.scale.index, site] = (delta, self.scale.grid)

    def _pruned(self, x: Tensor, change: Change, site: int) -> Tensor:
        rule = self.scale.pruning
        kept = self._select(x, site)
        rows = kept[..., None].expand(-1, -1, x.shape[-1])
        fresh = change(x.gather(1, rows), kept)
        cache, grid = self.caches[rule.cache_scale, site]
        restored = RESTORERS[rule.restorer](cache, grid, target=self.scale.grid, interpolation=rule.interpolation)
        return x + restored.scatter(1, rows, fresh)

    def _select(self, x: Tensor, site: int) -> Tensor:
        rule = self.scale.pruning
        context = ScoreContext(self.scale.index, self.scale.grid, site, self.seed, self.samples)
        score = SCORERS[rule.scorer](x, context)
        if rule.rows == "shared" and len(score) > len(self.samples):
            score = score.unflatten(0, (-1, len(self.samples))).mean(0).repeat(len(score) // len(self.samples), 1)
        kept = score.topk(self.scale.kept, dim=1).indices
        if self.on_kept is not None:
            self.on_kept(self.scale.index, site, kept)
        return kept
