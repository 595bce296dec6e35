"""The state of one generate call: buffers, caches, conditioning, and what the data decided so far. Nothing outlives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.backbones.attention import attend
from autoprune.backbones.family import Conditioning, Transformer
from autoprune.backbones.graphs import GraphCache, layout
from autoprune.backbones.guidance import projected_difference
from autoprune.backbones.infinity import Step
from autoprune.backbones.kv_buffer import HeldKeys, KeyStream, KeyValueBuffer
from autoprune.backbones.rope import gather_rotation
from autoprune.noise import placed, standard_normal
from autoprune.policy import Grid, token_count
from autoprune.pruning.decisions import changed_share, discrepancy, probe_decision, probe_features
from autoprune.pruning.key_budget import importance, select_keys, window_positions
from autoprune.pruning.plan import ScalePlan, forgotten
from autoprune.pruning.restorers import cached
from autoprune.pruning.sandwich import Sandwich
from autoprune.pruning.signals import HIDDEN, LATENT, LOGITS, Signals

if TYPE_CHECKING:
    from autoprune.backbones import Backbone
    from autoprune.generation import Observer, Request

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a generation knows when `scales` runs of scales are done; shares memory with it, is never written to.

    `branch` is the one that ran last, `single_from` and `end` what the data decided on the scales to come.
    """

    scales: int
    branch: str
    single_from: int
    end: int
    latent: Tensor
    conditioning: Conditioning
    keys: tuple[HeldKeys, ...]
    caches: dict[tuple[int, int, str], tuple[Tensor, Grid]]
    signals: Signals
    difference: tuple[Tensor, Grid] | None


class GenerationState:
    """Rows are [cond x B] and, under guidance, [uncond x B]."""

    def __init__(
        self,
        model: Transformer,
        request: Request,
        observer: Observer,
        start: Snapshot | None = None,
        graphs: GraphCache | None = None,
    ) -> None:
        """Begins with nothing done, or where the snapshot of a generation of the same prompts and seed was taken."""
        self.model, self.request, self.plan = model, request, request.plan
        self.blocks, self.batch = model.layers(), len(request.text)
        guided = any(weight != 1 for weight in request.guidance)
        text = model.with_unconditional(request.text, request.negative) if guided else request.text
        self.conditioning = start.conditioning if start else model.condition(text)
        self.ran = (0, 0)  # rows and tokens of what the last chunk of blocks ran on
        self.branch = start.branch if start else "both" if guided else "cond"
        self.graphs, self.buffers = self._borrow(graphs, len(start.keys[0][0]) if start else len(text))
        for buffer, (keys, values) in zip(self.buffers, () if start else model.prefix_keys(self.conditioning), strict=False):
            buffer.append(keys, values)
        self.sandwich = Sandwich(seed=request.seed, samples=request.samples, on_kept=observer.kept)
        self._difference: tuple[Tensor, Grid] | None = None
        self._done, self._single_from, self._end = 0, len(self.plan.schedule), len(self.plan.schedule)
        if start is not None:
            self._resume(start)

    def snapshot(self, latent: Tensor) -> Snapshot:
        """Returns what is known when all scales of a forward are settled."""
        return Snapshot(
            scales=self._done,
            branch=self.branch,
            single_from=self._single_from,
            end=self._end,
            latent=latent,
            conditioning=self.conditioning,
            keys=tuple(buffer.held() for buffer in self.buffers),
            caches=dict(self.sandwich.caches),
            signals=replace(self.sandwich.signals),
            difference=self._difference,
        )

    def _resume(self, start: Snapshot) -> None:
        self._done, self._difference = start.scales, start.difference
        self._single_from, self._end = start.single_from, start.end
        self.sandwich.caches, self.sandwich.signals = dict(start.caches), replace(start.signals)
        for buffer, held in zip(self.buffers, start.keys, strict=True):
            buffer.fill(held)

    def _borrow(self, graphs: GraphCache | None, rows: int) -> tuple[GraphCache | None, list[KeyValueBuffer]]:
        """Takes memory that stays in place, of dense size, or where there is none to borrow as much as the plan needs."""
        model, text = self.model, self.model.prefix_keys(self.conditioning)
        prefix = model.prefix_tokens + (text[0].shape[3] if text else 0)
        if graphs is not None:
            dense = self.plan.key_capacity(0) if self.plan.course.by_clip else sum(map(token_count, self.plan.schedule))
            buffers = graphs.buffers(model, rows, prefix + dense)
            if buffers is not None:
                self.conditioning = graphs.hold("conditioning", self.conditioning)
                self.layout = layout(self.conditioning)
                return graphs, buffers
        capacities = [prefix + self.plan.key_capacity(layer) for layer in range(self.plan.depth)]
        return None, model.buffers_for(rows, capacities, KeyStream() if self.request.hosts_keys else KeyValueBuffer)

    def ends_before(self, scale: ScalePlan) -> bool:
        """Returns whether the data said that this scale and later ones need not run."""
        rule = self.plan.policy.stop
        if rule is not None and rule.from_scale <= scale.index < self._end:
            previous, latest = self.sandwich.signals.latents
            share = changed_share(previous, latest, metric=rule.metric, threshold=rule.threshold)
            if bool((share < rule.share).all()):
                self._end = scale.index
        return scale.index >= self._end

    def enter(self, group: Sequence[ScalePlan]) -> None:
        """Prepares for scales that run together: a dropped branch loses all its rows, scales out of view their keys."""
        branch = group[0].branch if group[0].index < self._single_from else "cond"
        if self.branch == "both" and branch != "both":
            rows = slice(0, self.batch) if branch == "cond" else slice(self.batch, None)
            self.conditioning = self.conditioning.keep_rows(rows)
            self.sandwich.keep_rows(rows)
            for buffer in self.buffers:
                buffer.keep_rows(rows)
            self.branch = branch
        for buffer in self.buffers:
            gone = self._out_of_view(group[0], len(buffer.sizes))
            if gone:
                buffer.forget(gone)
        if group[0].opens:
            self.sandwich.signals.open_clip()

    def _out_of_view(self, scale: ScalePlan, held: int) -> range:
        """Returns which earlier appends of keys a scale no longer sees: by clips, all between the text and the newest."""
        if self.plan.course.by_clip:
            return range(1, held - 1) if scale.opens else range(0)
        return forgotten(self.plan.keys, held)

    def step(self, group: Sequence[ScalePlan], positions: Sequence[Tensor | None], sizes: Sequence[int]) -> Step:
        """Returns what the blocks need: rotary factors of the tokens of all scales and how they attend."""
        factors = [self.model.rotation(scale.step, self.plan.schedule, self.conditioning) for scale in group]
        if any(index is not None for index in positions):
            factors = [self._gathered(each, index) for each, index in zip(factors, positions, strict=True)]
        rotation = factors[0] if len(factors) == 1 or factors[0] is None else torch.cat(factors, dim=-2)
        return Step(rotation=rotation, add=self.sandwich.add, attention=lambda layer: self._attention(layer, group, sizes))

    def rows(self, x: Tensor) -> Tensor:
        """Repeats samples for the guidance branches that still run."""
        return x.repeat(2, 1, 1) if self.branch == "both" else x

    def guided(self, x: Tensor, scale: ScalePlan) -> Tensor:
        """Returns logits [B, N, ...] with temperature, then guidance w * cond + (1 - w) * uncond; decides on branches.

        Projected guidance adds w - 1 times another difference of the branches (backbones/guidance.py).
        """
        index = scale.index
        weight, temperature = self.request.guidance[index], self.request.temperature[index]
        at_logits = 0 in self.request.guidance_layers
        if self.branch == "both" and (weight == 1 or not at_logits):
            conditioning = self.conditioning.keep_rows(slice(0, self.batch))
            return self.model.logits(x[: self.batch], conditioning, index) / temperature
        logits = self.model.logits(x, self.conditioning, index) / temperature
        if self.branch == "both":
            cond, uncond = logits[: self.batch], logits[self.batch :]
            self._compare_branches(x, cond, uncond, scale)
            if self.request.projected is not None:
                return cond + (weight - 1) * self._apart(cond, uncond)
            return weight * cond + (1 - weight) * uncond
        if self._difference is not None and self.branch == "cond" and weight != 1:
            return logits + (weight - 1) * self._resized_difference(scale.grid, logits.shape[2:])
        return logits

    def refined(self, codes: Tensor, x: Tensor, scale: ScalePlan) -> Tensor:
        """Returns the codes of a scale with the continuous residual that some families add to the last one."""
        if not self.model.refines or scale.index < len(self.plan.schedule) - 1:
            return codes
        draw = partial(self._residual_noise, scale.index)
        return self.model.refined(codes, x, draw, weight=self.request.guidance[scale.index])

    def settle(self, scale: ScalePlan, latent: Tensor, x: Tensor, logits: Tensor) -> None:
        """Records what later scales look at."""
        self._done += 1
        signals = self.sandwich.signals
        if LATENT in scale.records:
            signals.record_latent(scale.clip(latent))
        if HIDDEN in scale.records:
            signals.hidden, signals.hidden_grid = x, scale.grid
        if LOGITS in scale.records:
            signals.logits, signals.logits_grid = logits, scale.grid

    def probe(self, scale: ScalePlan, backbone: Backbone) -> None:
        """Decides after the probe's scale how many last scales are skipped or run the conditional branch alone."""
        rule = self.plan.policy.probe
        if rule is None or scale.index != rule.scale:
            return
        size = backbone.tokenizer.latent_size(self.plan.schedule[: rule.probe_scale + 1])
        old, new = (
            backbone.decode(functional.interpolate(latent, size, mode="bilinear")) * 2 - 1
            for latent in self.sandwich.signals.latents
        )
        skip, drop = probe_decision(probe_features(old, new, radius=rule.radius), rule)
        count = len(self.plan.schedule)
        self._end = min(self._end, count - int(skip.min()))
        self._single_from = min(self._single_from, count - int(drop.min()))

    def _compare_branches(self, x: Tensor, cond: Tensor, uncond: Tensor, scale: ScalePlan) -> None:
        rule = self.plan.guidance
        if rule.branch == "adaptive" and scale.index >= rule.from_scale:
            pair = (x[: self.batch], x[self.batch :]) if rule.metric.endswith("hidden") else (cond, uncond)
            if bool((discrepancy(*pair, metric=rule.metric) < rule.threshold).all()):
                self._single_from = scale.index + 1
        if rule.replacement == "extrapolate":
            self._difference = (self._apart(cond, uncond), scale.grid)

    def _apart(self, cond: Tensor, uncond: Tensor) -> Tensor:
        limit = self.request.projected
        return cond - uncond if limit is None else projected_difference(cond, uncond, limit=limit)

    def _resized_difference(self, grid: Grid, shape: Sequence[int]) -> Tensor:
        """Returns the last difference of the branches on a grid, repeated where tokens have more bits than there, the mean of
        neighbours where they have fewer."""
        difference, source = self._difference
        resized = cached(difference.flatten(2), source, target=grid, interpolation="bilinear")
        resized = resized.unflatten(-1, difference.shape[2:])
        if shape[0] < resized.shape[2]:
            return resized.unflatten(2, (shape[0], -1)).mean(3)
        return resized.repeat_interleave(shape[0] // resized.shape[2], dim=2)

    def _gathered(self, factors: Tensor | None, index: Tensor | None) -> Tensor | None:
        if factors is None:
            return None
        if index is None:
            index = torch.arange(factors.shape[-2], device=factors.device).expand(self._row_count(), -1)
        return gather_rotation(factors, index)

    def _residual_noise(self, scale: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Draws normal noise [B, *shape] of a step of the residual, each sample from its own address."""
        seed, count, device = self.request.seed, math.prod(shape), self.buffers[0].device
        drawn = [standard_normal((seed, sample, scale), count, stream=f"residual:{step}") for sample in self.request.samples]
        return placed(torch.stack(drawn).view(-1, *shape), device)

    def _row_count(self) -> int:
        return 2 * self.batch if self.branch == "both" else self.batch

    def _attention(self, layer: int, group: Sequence[ScalePlan], sizes: Sequence[int]) -> Attention:
        buffer, share = self.buffers[layer], self.plan.keys.budget
        kept = group[-1].context or not self.plan.course.by_clip

        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            keys, values = buffer.append(k, v) if kept else buffer.beside(k, v)
            if mask is not None:  # over the text, which comes first
                return attend(q, keys, values, scale=scale, mask=functional.pad(mask, (0, keys.shape[2] - mask.shape[3])))
            if len(sizes) > 1:
                return _attend_in_order(q, keys, values, sizes)
            out = attend(q, keys, values, scale=scale)
            if share < 1:
                self._shrink(buffer, keys, q, group[0])
            return out

        return attention

    def _shrink(self, buffer: KeyValueBuffer, keys: Tensor, q: Tensor, scale: ScalePlan) -> None:
        """Keeps of a layer's keys the share of the budget that window queries attend to most."""
        rule = self.plan.keys
        seen = self.model.prefix_tokens + sum(token_count(grid) for grid in self.plan.schedule[: scale.index + 1])
        count = max(rule.window, int(rule.budget * seen))
        if count >= buffer.length:
            return
        if q.shape[2] == scale.tokens:
            window = window_positions(scale.grid, rule.window, device=q.device)
        else:
            window = torch.linspace(
                0, q.shape[2] - 1, min(rule.window, q.shape[2]), dtype=torch.float32, device=q.device
            ).long()
        scores = importance(q[:, :, window], keys, scale=1.0)
        buffer.keep(select_keys(scores, count, always=buffer.length - q.shape[2] + window))


def _attend_in_order(q: Tensor, keys: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Attention of scales in one forward: each sees itself, those before it in the group, and all earlier keys."""
    end, outputs = keys.shape[2] - sum(sizes), []
    for part in q.split(list(sizes), dim=2):
        end += part.shape[2]
        outputs.append(attend(part, keys[:, :, :end], values[:, :, :end], scale=1.0))
    return torch.cat(outputs, dim=2)
