"""How much memory a generation will need, before it runs: parts that follow from the plan, the rest by a dry run.

The dry run is the generation itself on the meta device (allocation_trace.py), so it knows every family and every policy;
where data decide, it takes the most that can run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from autoprune.backbones import Backbone
from autoprune.backbones.allocation_trace import AllocationTrace, on_meta
from autoprune.backbones.family import Features
from autoprune.generation import generate_latent, resolve
from autoprune.measure.flops import TransformerShape, transformer_shape, workload
from autoprune.measure.held_keys import key_counts
from autoprune.policy import Policy, token_count
from autoprune.pruning.plan import Plan, ScalePlan, compile_plan
from autoprune.rules import SUBLAYERS, BranchRule

FLOAT32, BFLOAT16 = 4, 2  # bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one generation. Of the parts, `weights` (transformer, tokenizer, text encoder) stay for ever, and
    `key_values`, `text_key_values` and `caches` (what restoration reads) until the last scale is done. Where keys and
    values lie in host memory, `host` bytes of it, `key_values` are the two layers of them that the device holds.

    `scales` and `decoding` are the most needed at once besides the weights, parts included, in the loop and in the decoder,
    which decodes the batch whole (where less is free, backbones/decoding.py needs less).
    `unwritten` is the part of the K/V buffers that nothing is ever written to: rows after their branch was dropped, and what
    a key budget leaves free. It is allocated, but on CPUs never resident.
    """

    weights: int
    key_values: int
    text_key_values: int
    caches: int
    host: int
    unwritten: int
    scales: int
    decoding: int

    @property
    def transient(self) -> int:
        """Returns what the loop needs at its peak besides weights and the parts that stay: activations, logits, noise."""
        return self.scales - self.key_values - self.text_key_values - self.caches

    @property
    def allocated(self) -> int:
        """Returns the peak above the loaded model as device allocators count it, host memory left out."""
        return max(self.scales, self.decoding)

    @property
    def resident(self) -> int:
        """Returns the peak above the loaded model as a CPU's memory is filled."""
        return max(self.resident_scales, self.decoding)

    @property
    def resident_scales(self) -> int:
        """Returns the same of the loop alone."""
        return self.scales + self.host - self.unwritten

    def above_loaded(self, device: torch.device) -> int:
        """Returns what autoprune/measure/memory.py would measure on this device above the loaded model."""
        return self.allocated if device.type == "cuda" else self.resident

    def megabytes(self) -> dict[str, float]:
        """Returns all of it in MB, as JSON values."""
        derived = {"transient": self.transient, "allocated": self.allocated, "resident": self.resident}
        return {f"{name}_mb": value / 2**20 for name, value in (asdict(self) | derived).items()}


def predicted_peak(plan: Plan, backbone: Backbone, prompts: Sequence[str]) -> MemoryPlan:
    """Predicts the memory of generating one image a prompt. Memory that libraries take inside an operation is not seen."""
    policy = plan.policy
    if policy.adaptive and policy.batch == "split":
        prompts = prompts[:1]
    plan = compile_plan(_steady(policy), plan.schedule, plan.depth, plan.course)
    dry = _dry(backbone, prompts)
    _fill_caches(dry, plan, prompts)
    with AllocationTrace() as scales:
        latent = _latent(dry, _decisive(plan), prompts)
    with torch.inference_mode(), AllocationTrace() as decoding:
        dry.decode(latent)
    lasting = _lasting(plan, backbone, dry.encode_text(prompts))
    return MemoryPlan(
        weights=sum(map(_tensor_bytes, _modules(backbone))),
        scales=scales.peak - lasting["host"],  # which the trace counts through the whole loop
        decoding=latent.nbytes + decoding.peak,
        **lasting,
    )


def key_value_bytes(plan: Plan, *, width: int, rows: int, itemsize: int, prefix: int = 0) -> int:
    """Returns the bytes of all K/V buffers, which are allocated once for the most keys that each layer ever holds."""
    return sum(_layers(plan, width=width, rows=rows, itemsize=itemsize, prefix=prefix))


def official_key_value_bytes(plan: Plan, *, width: int, rows: int) -> int:
    """Returns the most bytes that keys and values take in the official Infinity code (`infinity/models/basic.py`), dense.

    Keys are float32, values bfloat16, and every scale concatenates first the keys, then the values of one layer after the
    other, old and new copy alive together; the peak is at the last layer of the last scale.
    """
    counts = [token_count(grid) for grid in plan.schedule]
    every, old = sum(counts), sum(counts[:-1])
    others = (plan.depth - 1) * every * (FLOAT32 + BFLOAT16)
    keys = (every + old) * FLOAT32 + old * BFLOAT16
    values = every * FLOAT32 + (every + old) * BFLOAT16
    return rows * width * (others + max(keys, values))


def compared_layouts(plan: Plan, *, width: int, rows: int) -> dict[str, float]:
    """Returns MB of keys and values in the official layout, in ours with bfloat16 blocks, and official / ours."""
    official = official_key_value_bytes(plan, width=width, rows=rows)
    own = key_value_bytes(plan, width=width, rows=rows, itemsize=BFLOAT16)
    return {"official_mb": official / 2**20, "ours_mb": own / 2**20, "ratio": official / own}


def _layers(plan: Plan, *, width: int, rows: int, itemsize: int, prefix: int) -> list[int]:
    """Returns the bytes of each layer's K/V buffer."""
    return [2 * itemsize * rows * width * (prefix + plan.key_capacity(layer)) for layer in range(plan.depth)]


def _lasting(plan: Plan, backbone: Backbone, features: Features) -> dict[str, int]:
    """Returns the bytes of what stays from its making to the last scale."""
    shape, work = transformer_shape(backbone.model), workload(backbone, features)
    rows, token = work.batch * (2 if work.guided else 1), backbone.dtype.itemsize * shape.width
    prefix, wide = shape.prefix + work.prefix, {"width": shape.key_width or shape.width}
    layers, hosted = _layers(plan, rows=rows, itemsize=backbone.dtype.itemsize, prefix=prefix, **wide), backbone.keys == "host"
    keys, stored = key_counts(plan, prefix=prefix), {scale.index: scale for scale in plan.scales}
    counts, key = keys.held if plan.course.by_clip else keys.seen, backbone.dtype.itemsize * wide["width"]
    most: dict[int, list[int]] = {}  # by number of rows: the most keys a layer holds while so many run
    for scale, seen in zip(plan.scales, counts, strict=True):
        most[work.rows(scale)] = list(map(max, seen, most.get(work.rows(scale), seen)))
    if len(most) > 1:
        first, last = max(most), min(most)
        written = (first - last) * sum(most[first]) + last * sum(map(max, most[first], most[last]))
    else:
        ((count, keys),) = most.items()
        written = count * sum(keys)
    return {
        "key_values": 2 * max(layers) if hosted else sum(layers),
        "text_key_values": 2 * key * rows * (work.text_tokens + work.prefix) * plan.depth,
        "caches": token * sum(work.rows(scale) * scale.tokens * _stored(scale, shape) for scale in stored.values()),
        "host": sum(layers) if hosted else 0,
        "unwritten": sum(layers) - 2 * key * written,
    }


def _stored(scale: ScalePlan, shape: TransformerShape) -> int:
    """Returns how many outputs a scale leaves for later ones; where there is no cross-attention, that leaves none."""
    absent = () if shape.crosses else (SUBLAYERS.index("ca"),)
    return sum(place < 0 or place % len(SUBLAYERS) not in absent for place, _ in scale.stores)


def _steady(policy: Policy) -> Policy:
    """Returns the policy that runs the most which one that decides on data can."""
    cut = {index: replace(rule, select="top") for index, rule in policy.scales.items() if rule.select == "threshold"}
    guidance = BranchRule() if policy.guidance.branch == "adaptive" else policy.guidance
    return replace(policy, scales={**policy.scales, **cut}, guidance=guidance, stop=None, probe=None)


def _decisive(plan: Plan) -> Plan:
    """Returns a plan of clips without the runs that need no more than a later one: a dry run of all takes minutes.

    Clips see one context, so that what dense runs need grows with their tokens, and a repeated run needs what it needed. What
    is left of the run before is part of it.
    """
    if not plan.course.by_clip:
        return plan
    runs = [group[0] for group in plan.groups]
    kept = {place for place, run in enumerate(runs) if not any(_covers(later, run) for later in runs[place + 1 :])}
    return replace(plan, groups=tuple((run,) for place, run in enumerate(runs) if {place, place + 1} & kept))


def _covers(later: ScalePlan, run: ScalePlan) -> bool:
    plain = run.pruning is None and not (run.stores or run.records or run.context)
    larger = later.pruning is None and not later.context and later.branch == run.branch and later.tokens >= run.tokens
    return (plain and larger) or replace(run, step=later.step) == later


def _dry(backbone: Backbone, prompts: Sequence[str]) -> Backbone:
    """Returns a backbone on the meta device that knows the features of these prompts and of the negative one."""
    negative = backbone.sampling.negative
    own = _without_values(backbone.encode_text(prompts))
    other = _without_values(backbone.text_encoder([negative] * len(prompts))) if negative else None
    return replace(
        backbone,
        model=on_meta(backbone.model),
        tokenizer=on_meta(backbone.tokenizer),
        graphs=None,
        caption=None,
        text_encoder=lambda wanted: own if list(wanted) == list(prompts) else other,
    )


@torch.inference_mode()
def _fill_caches(dry: Backbone, plan: Plan, prompts: Sequence[str]) -> None:
    """Computes the rotary factors that outlive a generation, so that the dry run finds them as a second real one would."""
    conditioning = dry.model.condition(dry.encode_text(prompts))
    for scale in plan.scales:
        dry.model.rotation(scale.step, plan.schedule, conditioning)


def _without_values(features: Features) -> Features:
    assert is_dataclass(features)
    tensors = {entry.name: getattr(features, entry.name) for entry in fields(features)}
    return replace(features, **{name: value.to("meta") for name, value in tensors.items() if isinstance(value, Tensor)})


@torch.inference_mode()
def _latent(dry: Backbone, plan: Plan, prompts: Sequence[str]) -> Tensor:
    return generate_latent(dry, resolve(dry, prompts, plan, seed=0, sampling=dry.sampling))


def _modules(backbone: Backbone) -> list[nn.Module]:
    parts = (backbone.model, backbone.tokenizer, backbone.text_encoder)
    return [part for part in parts if isinstance(part, nn.Module)]


def _tensor_bytes(module: nn.Module) -> int:
    storages = {id(tensor): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}
    return sum(storages.values())
