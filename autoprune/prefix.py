"""Generations that begin where a dense one of the same prompts and seed had got to, bit-identical to running in full.

Policies leave early scales alone nearly always, so a search computes those once per prompt and shares them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.generation import Observer, generate_latent, resolve
from autoprune.policy import KeyRule, Policy
from autoprune.pruning.plan import WHOLE_SCALE, Plan, ScalePlan, chunk_site, compile_plan
from autoprune.pruning.signals import LATENT
from autoprune.rules import BranchRule
from autoprune.state import GenerationState, Snapshot


@dataclass(frozen=True)
class DensePrefix:
    """What one dense batch knew before every scale but the first: `snapshots[k - 1]` before scale k."""

    snapshots: tuple[Snapshot, ...]

    def start(self, plan: Plan) -> Snapshot | None:
        """Returns where a generation of this plan may begin, None where it must run in full."""
        agreed = 0 if plan.keys != KeyRule() else min(_dense_scales(plan), _undecided_scales(plan.policy))
        while agreed and not plan.scales[agreed - 1].records <= {LATENT}:
            agreed -= 1  # what a later scale asks of this one is not in the snapshots
        return self.snapshots[agreed - 1] if agreed else None

    @cached_property
    def bytes(self) -> int:
        """Returns the memory that the snapshots keep, tensors that several share counted once."""
        storages = {tensor.untyped_storage() for snapshot in self.snapshots for tensor in snapshot.tensors()}
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.inference_mode()
def record_prefix(backbone: Backbone, prompts: Sequence[str], *, seed: int, sampling: Sampling) -> DensePrefix:
    """Runs a dense generation without decoding it and keeps what any policy might start from."""
    schedule = backbone.scale_schedule(sampling.h_div_w)
    plan = _recording(compile_plan(None, schedule, backbone.depth))
    recorder = _Recorder()
    generate_latent(backbone, resolve(backbone, prompts, plan, seed=seed, sampling=sampling), recorder)
    return DensePrefix(tuple(recorder.snapshots))


@dataclass
class _Recorder(Observer):
    snapshots: list[Snapshot] = field(default_factory=list)

    def group_done(self, state: GenerationState, latent: Tensor) -> None:
        if len(self.snapshots) + 1 < len(state.plan.schedule):
            self.snapshots.append(state.snapshot(latent))


def _dense_scales(plan: Plan) -> int:
    """Returns how many scales from the first run as in a dense plan, at least one fewer than all."""
    changed = (scale.index for scale in plan.scales if scale.pruning or scale.branch != "both" or scale.group)
    return next(changed, len(plan.scales) - 1)


def _undecided_scales(policy: Policy) -> int:
    """Returns how many scales from the first run before anything depends on the data; none where samples are split up."""
    if policy.adaptive and policy.batch == "split":
        return 0
    decides = [len(policy.scale_schedule)]
    if policy.guidance.branch == "adaptive":
        decides.append(policy.guidance.from_scale)
    decides += [rule.from_scale for rule in [policy.stop] if rule]
    decides += [rule.scale for rule in [policy.probe] if rule]
    return min(decides)


def _recording(plan: Plan) -> Plan:
    """Returns the dense plan that keeps all that later scales of any policy restore from or compare with."""
    sites = [WHOLE_SCALE, *(chunk_site(chunk) for chunk in range(len(plan.chunks)))]
    stores = frozenset({(site, restorer) for site in sites for restorer in ("cached", "cached_state")})
    stores |= {(site, "cached") for site in plan.sublayer_sites}

    def kept(scale: ScalePlan) -> ScalePlan:
        last = scale.index == len(plan.schedule) - 1
        return replace(scale, records=frozenset({LATENT}), stores=frozenset() if last else stores)

    groups = tuple(tuple(map(kept, group)) for group in plan.groups)
    return replace(plan, groups=groups, policy=replace(plan.policy, guidance=BranchRule(replacement="extrapolate")))
