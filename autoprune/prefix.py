"""Generations that begin where an earlier one of the same prompts and seed had got to, bit-identical to running in full.

A search changes a few scales at a time, nearly always late ones: what comes before is computed once per prompt and shared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.kv_buffer import HeldKeys
from autoprune.clips import clip_ranges
from autoprune.generation import Observer, generate_latent, resolve
from autoprune.pruning.agreement import agreed_scales, same_decisions
from autoprune.pruning.plan import WHOLE_SCALE, Plan, ScalePlan, chunk_site
from autoprune.pruning.signals import LATENT
from autoprune.rules import BranchRule, KeyRule
from autoprune.state import GenerationState, Snapshot

T = TypeVar("T")


@dataclass(frozen=True)
class Recording:
    """What one generation of a plan knew between its scales: snapshots in order, not necessarily from the first scale on."""

    plan: Plan
    snapshots: tuple[Snapshot, ...]

    def start(self, plan: Plan) -> Snapshot | None:
        """Returns where a generation of this plan may begin, None where it must run in full."""
        agreed, same = agreed_scales(self.plan, plan), same_decisions(self.plan.policy, plan.policy)
        for snapshot in reversed(self.snapshots):
            last = self.plan.scales[snapshot.scales - 1].index
            if snapshot.scales <= agreed and (same or snapshot.single_from > last):
                return _wanted(snapshot, plan, decided=same)
        return None

    @cached_property
    def storages(self) -> dict[int, int]:
        """Returns the bytes that the snapshots keep by address, memory that several tensors share once."""
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        mapped(self.snapshots, note)
        return found

    @property
    def bytes(self) -> int:
        """Returns the memory that the snapshots keep."""
        return sum(self.storages.values())


class Recorder(Observer):
    """Takes a snapshot whenever a later generation might go on from there, none unless it `keeps` them."""

    def __init__(self, *, keeps: bool = True) -> None:
        self._keeps = keeps
        self.snapshots: list[Snapshot] = []

    @property
    def looks_inside(self) -> bool:
        """Returns whether snapshots are kept, whose memory no graph may write to."""
        return self._keeps

    def group_done(self, state: GenerationState, latent: Tensor) -> None:
        if not self._keeps:
            return
        snapshot = state.snapshot(latent)
        if snapshot.scales == len(state.plan.course.by_step(len(state.plan.schedule))):
            return
        if state.plan.keys != KeyRule():  # such a rule moves keys within the buffers
            snapshot = replace(snapshot, keys=mapped(snapshot.keys, Tensor.clone))
        elif len(clip_ranges(state.plan.schedule)) > 2:  # so does a third clip, which no longer sees the first
            snapshot = replace(snapshot, keys=self._copied(snapshot.keys))
        self.snapshots.append(snapshot)

    def _copied(self, keys: tuple[HeldKeys, ...]) -> tuple[HeldKeys, ...]:
        """Returns copies of keys and values, those of the snapshot before where no clip has begun or left any since."""
        before = self.snapshots[-1].keys if self.snapshots else ()
        layouts = [[(held.shape, sizes) for held, _, sizes in each] for each in (before, keys)]
        return before if layouts[0] == layouts[1] else mapped(keys, Tensor.clone)


@torch.inference_mode()
def record_prefix(backbone: Backbone, prompts: Sequence[str], *, seed: int, sampling: Sampling) -> Recording:
    """Runs a dense generation without decoding it and keeps what any policy might start from."""
    plan = _recording(backbone.plan(None, backbone.scale_schedule(sampling.h_div_w, sampling.frames)))
    recorder = Recorder()
    generate_latent(backbone, resolve(backbone, prompts, plan, seed=seed, sampling=sampling), recorder)
    return Recording(plan, tuple(recorder.snapshots))


def mapped(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Returns a value with every tensor in its fields and entries changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(entry, change) for entry in value)
    if isinstance(value, dict):
        return {key: mapped(entry, change) for key, entry in value.items()}
    if is_dataclass(value):
        return replace(value, **{entry.name: mapped(getattr(value, entry.name), change) for entry in fields(value)})
    return value


def moved(value: T, copy: Callable[[Tensor], Tensor]) -> T:
    """Returns a value whose tensors lie in copies of their memory; what they shared they share again."""
    copies: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = copy(tensor.new_empty(0, dtype=torch.uint8).set_(storage))
        whole = copies[storage.data_ptr()].untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype, device=whole.device)
        return view.set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())

    return mapped(value, change)


def _wanted(snapshot: Snapshot, plan: Plan, *, decided: bool) -> Snapshot:
    """Returns the snapshot as a full generation of this plan would have left it, without what only others ask for."""
    stored = {(scale.index, *store) for scale in plan.scales[: snapshot.scales] for store in scale.stores}
    snapshot = replace(snapshot, caches={key: cache for key, cache in snapshot.caches.items() if key in stored})
    if plan.guidance.replacement != "extrapolate":
        snapshot = replace(snapshot, difference=None)
    count = len(plan.schedule)
    return snapshot if decided else replace(snapshot, single_from=count, end=count)


def _recording(plan: Plan) -> Plan:
    """Returns the dense plan that keeps all that later scales of any policy restore from or compare with."""
    sites = [WHOLE_SCALE, *(chunk_site(chunk) for chunk in range(len(plan.chunks)))]
    stores = frozenset({(site, restorer) for site in sites for restorer in ("cached", "cached_state")})
    stores |= {(site, "cached") for site in plan.sublayer_sites}

    def kept(scale: ScalePlan) -> ScalePlan:
        last = scale == plan.scales[-1]
        return replace(scale, records=frozenset({LATENT}), stores=frozenset() if last else stores)

    groups = tuple(tuple(map(kept, group)) for group in plan.groups)
    return replace(plan, groups=groups, policy=replace(plan.policy, guidance=BranchRule(replacement="extrapolate")))
