"""Select, run, restore: the one place where tokens are pruned, around a sublayer, a chunk of blocks or all of a scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.noise import placed, standard_normal, uniform
from autoprune.policy import Grid
from autoprune.pruning import RESTORERS, SCORERS
from autoprune.pruning.merging import match, merge_mean
from autoprune.pruning.plan import WHOLE_SCALE, ScalePlan, chunk_site
from autoprune.pruning.projection import mixing, project
from autoprune.pruning.restoration import Frame, anchors_of, changes_latent, take_tokens
from autoprune.pruning.restorers import nearest_kept
from autoprune.pruning.scorers import ScoreContext
from autoprune.pruning.selection import combined, draw, threshold_count, top
from autoprune.pruning.signals import DELTA, Signals
from autoprune.rules import ZEROING_RESTORERS, ScalePruning

Change = Callable[[Tensor, Tensor | None], Tensor]
OnKept = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Taken:
    """The tokens a function runs on [R, M, C], where they came from [R, M], which positions they take [R, M], and for
    merging where every token went [R, N]."""

    tokens: Tensor
    kept: Tensor
    positions: Tensor
    target: Tensor | None = None


class Sandwich:
    """The pruning state of one generation: outputs of cache scales by site, signals, and the scale at hand."""

    def __init__(self, *, seed: int, samples: tuple[int, ...], on_kept: OnKept | None = None) -> None:
        """`samples` number the batch for random scorers; `on_kept(scale, site, kept [R, M])` is told every selection."""
        self.seed, self.samples, self.on_kept = seed, samples, on_kept
        self.scale: ScalePlan | None = None
        self.signals = Signals()
        self.caches: dict[tuple[int, int, str], tuple[Tensor, Grid]] = {}
        self._whole: Taken | None = None
        self.settled: dict[int, Tensor] = {}
        self.copies: dict[int, Tensor] = {}

    def add(self, x: Tensor, change: Change, *, site: int) -> Tensor:
        """Returns x + change(x), the change computed for kept tokens and restored for the others.

        x [R, N, C]; change(y [R, M, C], positions [R, M] or None for all tokens) -> [R, M, C].
        """
        if site in self.scale.pruned_sites:
            taken = self._take(x, site, self.scale.kept)
            return x + self._give(x, taken, change(taken.tokens, taken.positions), site)
        delta = change(x, None)
        self._store(site, delta=delta)
        return x + delta

    def around_chunk(self, x: Tensor, blocks: Change, *, chunk: int) -> Tensor:
        """Returns blocks(x) of one chunk, pruned if the plan says so; notes its change if a scorer asks for it."""
        site = chunk_site(chunk)
        if site in self.scale.pruned_sites and self.scale.kept_chunks[chunk] < self.scale.tokens:
            taken = self._take(x, site, self.scale.kept_chunks[chunk])
            out = self._give(x, taken, blocks(taken.tokens, taken.positions), site, residual=False)
        else:
            out = blocks(x, None)
            self._store(site, delta=out - x if (site, "cached") in self.scale.stores else None, state=out)
        if DELTA in self.scale.records and chunk == self.scale.delta_chunk:
            self._record_delta(x, out)
        return out

    def around_scales(self, scales: Sequence[ScalePlan], inputs: list[Tensor], blocks: Callable[..., Tensor]) -> list[Tensor]:
        """Returns the hidden states [R, N, C] after all blocks of scales that run in one forward, usually one.

        blocks(x, positions, sizes) runs the tokens of all scales, `positions` one [R, M] or None a scale.
        """
        takens = [self._take_scale(scale, x) for scale, x in zip(scales, inputs, strict=True)]
        parts = [x if taken is None else taken.tokens for x, taken in zip(inputs, takens, strict=True)]
        positions = [None if taken is None else taken.positions for taken in takens]
        sizes = [part.shape[1] for part in parts]
        out = blocks(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), positions, sizes)
        results = []
        for scale, x, taken, part in zip(scales, inputs, takens, out.split(sizes, dim=1), strict=True):
            self.scale = scale
            if taken is None:
                self._store(WHOLE_SCALE, delta=part - x if (WHOLE_SCALE, "cached") in scale.stores else None, state=part)
                results.append(part)
            else:
                results.append(self._give(x, taken, part, WHOLE_SCALE, residual=False))
        return results

    def settled_codes(self, scale: ScalePlan, codes: Tensor) -> Tensor:
        """Returns the codes [B, d, (t,) h, w] of a scale with those that do not count zeroed or copied."""
        places = scale.places(codes)
        if scale.index in self.settled:
            mask = self.settled.pop(scale.index).view(-1, 1, *places).to(codes)
            return codes * functional.interpolate(mask, codes.shape[2:], mode="nearest")
        if scale.index in self.copies:
            cell = codes.shape[-1] // scale.grid[2]
            tokens = functional.pixel_unshuffle(codes, cell).flatten(2)
            index = self.copies.pop(scale.index)[:, None].expand_as(tokens)
            return functional.pixel_shuffle(tokens.gather(2, index).unflatten(2, places), cell)
        return codes

    def keep_rows(self, rows: slice) -> None:
        """Forgets the rows of a dropped guidance branch."""
        self.caches = {key: (cache[rows], grid) for key, (cache, grid) in self.caches.items()}
        self.signals.keep_rows(rows)

    def _take_scale(self, scale: ScalePlan, x: Tensor) -> Taken | None:
        self.scale = scale
        self._whole = self._take(x, WHOLE_SCALE, scale.kept) if scale.whole else None
        return self._whole

    def _store(self, site: int, *, delta: Tensor | None, state: Tensor | None = None) -> None:
        for restorer, value in (("cached", delta), ("cached_state", state)):
            if (site, restorer) in self.scale.stores:
                own = value[:, -self.scale.tokens :]  # the first scale may run with a prefix in front
                self.caches[self.scale.index, site, restorer] = (own, self.scale.grid)

    def _record_delta(self, x: Tensor, out: Tensor) -> None:
        change = (out.float() - x.float()).square().mean(dim=-1)[:, -self.scale.tokens :]  # without a prefix
        if self._whole is not None:
            full = change.new_zeros(len(change), self.scale.tokens)
            change = full.scatter(1, self._whole.kept, change)
        self.signals.delta, self.signals.delta_grid = change, self.scale.grid

    def _take(self, x: Tensor, site: int, count: int) -> Taken:
        rule = self.scale.pruning
        if rule.reducer == "merge":
            merge = match(x, self.scale.grid, cell=rule.cell, count=count)
            self._told(site, merge.kept)
            return Taken(merge_mean(x, merge), merge.kept, merge.kept, merge.target)
        kept = self._select(x, site, count)
        if rule.reducer == "project":
            noise = placed(self._noise(standard_normal, site, x.shape[0], (x.shape[1], count)), x.device)
            first = torch.arange(count, device=x.device).expand(len(x), -1)
            return Taken(project(x, mixing(noise)), kept, first if rule.positions == "first" else kept)
        return Taken(take_tokens(x, kept), kept, kept)

    def _give(self, x: Tensor, taken: Taken, out: Tensor, site: int, *, residual: bool = True) -> Tensor:
        """Returns the restored residual [R, N, C] of a sublayer, or the hidden state of a chunk or scale."""
        rule = self.scale.pruning
        cache, cache_grid = self.caches.get((rule.cache_scale, site, rule.restorer), (None, self.scale.grid))
        frame = Frame(
            x=x,
            out=out,
            kept=taken.kept,
            grid=self.scale.grid,
            rule=rule,
            residual=residual,
            signals=self.signals,
            target=taken.target,
            cache=cache,
            cache_grid=cache_grid,
        )
        self._note_settled(frame)
        return RESTORERS[rule.restorer](frame)

    def _note_settled(self, frame: Frame) -> None:
        batch = len(self.samples)
        settled = changes_latent(frame)
        if settled is not None:
            self.settled[self.scale.index] = settled[:batch]
        elif frame.rule.restorer == "nearest" and frame.rule.recover_at == "codes":
            index = nearest_kept(frame.kept[:batch], frame.grid)
            self.copies[self.scale.index] = frame.kept[:batch].gather(1, index)

    def _select(self, x: Tensor, site: int, count: int) -> Tensor:
        rule, scale = self.scale.pruning, self.scale
        score = self._score(x, site, rule)
        always = anchors_of(rule, scale.grid, x.device)
        if rule.select == "draw":
            kept = draw(score, count, placed(self._noise(uniform, site, len(score), (score.shape[1],)), x.device))
        else:
            if rule.select == "threshold":
                least = max(1, int(rule.floor * scale.tokens), 0 if always is None else len(always))
                counts = threshold_count(score, threshold=rule.threshold, of=rule.threshold_of, least=least, most=count)
                count = int(counts.max())  # the one host sync an adaptive scale has; the sample that needs most decides
            kept = top(score, count, always)
        self._told(site, kept)
        return kept

    def _score(self, x: Tensor, site: int, rule: ScalePruning) -> Tensor:
        scale, rows = self.scale, len(x)
        context = ScoreContext(scale.step, scale.grid, site, self.seed, self.samples, rule.region, self.signals)
        used = {name: weight for name, weight in rule.scorer.items() if weight}
        score = combined([SCORERS[name](x, context) for name in used], list(used.values()), rule.normalise)
        if (rule.rows == "shared" or rule.restorer in ZEROING_RESTORERS) and rows > len(self.samples):
            score = score.unflatten(0, (-1, len(self.samples))).mean(0).repeat(rows // len(self.samples), 1)
        return score

    def _noise(self, kind: Callable[..., Tensor], site: int, rows: int, shape: tuple[int, ...]) -> Tensor:
        """Draws for each sample from its own address, the same for both branches: [R, *shape]."""
        count, step = torch.Size(shape).numel(), self.scale.step
        drawn = [kind((self.seed, sample, step), count, stream=f"select:{site}") for sample in self.samples]
        return torch.stack(drawn).view(-1, *shape).repeat(rows // len(drawn), *([1] * len(shape)))

    def _told(self, site: int, kept: Tensor) -> None:
        if self.on_kept is not None:
            self.on_kept(self.scale.index, site, kept)
