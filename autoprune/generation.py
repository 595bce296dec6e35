"""The scale loop every backbone generates with."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.family import Features, Tokenizer
from autoprune.backbones.forks import check_process
from autoprune.backbones.infinity import Step
from autoprune.backbones.layers import without_autocast
from autoprune.errors import UserError
from autoprune.policy import Policy
from autoprune.pruning.plan import Plan, ScalePlan
from autoprune.replay import run_or_replay
from autoprune.sampling import Draw, GridNoise
from autoprune.state import GenerationState, Snapshot


class Observer:
    """Watches a generation; override what you need. The base class does nothing.

    One that overrides `kept`, `chunk_done` or `group_done` looks inside, and what it watches runs without CUDA graphs.
    """

    @property
    def looks_inside(self) -> bool:
        """Returns whether it wants to see what graphs do not show, or keeps memory that they write to again."""
        names = ("kept", "chunk_done", "group_done")
        return any(getattr(type(self), name) is not getattr(Observer, name) for name in names)

    def scale_started(self, scale: ScalePlan) -> None:
        """Called before a scale's blocks run, each time where that is several."""

    def kept(self, scale: int, site: int, index: Tensor) -> None:
        """Called with the kept positions [R, M] of every selection, best score first."""

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        """Called with guided logits [B, N, d, 2], bits [B, N, d] (of codes: [B, N, V], [B, N]) and the latent so far."""

    def chunk_done(self, scale: ScalePlan, chunk: int, x: Tensor) -> None:
        """Called with the hidden state [R, L, C] after each chunk of blocks."""

    def forward_done(self, scale: ScalePlan, rows: int, tokens: int) -> None:
        """Called when all blocks ran, with the first scale in them and the rows and tokens that the last chunk left."""

    def group_done(self, state: GenerationState, latent: Tensor) -> None:
        """Called when nothing is left to do of the scales that ran together, with the latent so far."""

    def blocks_done(self) -> None:
        """Called when the loop has ended, before the latent is decoded."""

    def image_done(self) -> None:
        """Called when the images are decoded."""


@dataclass(frozen=True)
class Request:
    """One generation, everything resolved: texts, plan, one guidance weight and temperature a scale.

    `guidance_layers`: 0 guides the logits, -n the hidden state after the n-th block from the end (official
    cfg_insertion_layer). `projected` is the limit of projected guidance (backbones/guidance.py), None for the plain one.
    `given_bits[s]` [B, N, d] or code numbers [B, N] replace what run s of a scale draws (official gt_leak). `hosts_keys` says
    that keys and values stay in host memory (backbones/kv_buffer.py).
    """

    text: Features
    plan: Plan
    draw: Draw
    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    negative: Features | None = None
    guidance_layers: tuple[int, ...] = (0,)
    projected: float | None = None
    given_bits: tuple[Tensor, ...] = ()
    seed: int = 0
    samples: tuple[int, ...] = field(default=(0,))
    hosts_keys: bool = False


def generate_latent(
    backbone: Backbone, request: Request, observer: Observer | None = None, *, start: Snapshot | None = None
) -> Tensor:
    """Runs the scale loop, from a snapshot on if one is given, and returns the latent [B, d, (T,) H, W] to decode."""
    observer = observer or Observer()
    usable = backbone.graphs is not None and not observer.looks_inside and not request.hosts_keys
    with backbone.graphs.borrowed() if usable else nullcontext() as graphs:
        return _run_scales(backbone, GenerationState(backbone.model, request, observer, start, graphs), observer, start)


def _run_scales(backbone: Backbone, state: GenerationState, observer: Observer, start: Snapshot | None) -> Tensor:
    request, tokenizer, schedule = state.request, backbone.tokenizer, state.plan.schedule
    size = (state.batch, tokenizer.channels, *tokenizer.latent_size(schedule))
    latent = torch.zeros(size, dtype=torch.float32, device=backbone.device)
    if start is not None:
        latent = start.latent
    for group in request.plan.groups[start.scales if start else 0 :]:
        if state.ends_before(group[0]):
            break
        observer.scale_started(group[0])
        state.enter(group)
        inputs = [_scale_input(state, scale, latent, tokenizer) for scale in group]
        blocks = partial(run_blocks, state, group, observer)
        outputs = run_or_replay(state, group, inputs, partial(state.sandwich.around_scales, group, blocks=blocks))
        observer.forward_done(group[0], *state.ran)
        for scale, x in zip(group, outputs, strict=True):
            x = x[:, -scale.tokens :]
            logits = state.guided(x, scale)
            bits = request.draw(logits, scale.step)
            if scale.step < len(request.given_bits):
                bits = request.given_bits[scale.step].to(bits)
            codes = tokenizer.codes(bits.view(state.batch, *scale.places(latent), -1), scale.index)
            codes = state.sandwich.settled_codes(scale, state.refined(codes, x, scale))
            clip = tokenizer.accumulate(scale.clip(latent), codes, scale.index, len(schedule))
            latent = scale.with_clip(latent, clip)
            state.settle(scale, latent, x, logits)
            observer.scale_done(scale, logits, bits, latent)
        state.probe(group[-1], backbone)
        observer.group_done(state, latent)
    observer.blocks_done()
    return latent


def _scale_input(state: GenerationState, scale: ScalePlan, latent: Tensor, tokenizer: Tokenizer) -> Tensor:
    if scale.step == 0:
        return state.model.first_tokens(state.conditioning)
    return state.rows(state.model.embed(tokenizer.next_tokens(scale.clip(latent), scale.grid), scale.index))


def run_blocks(
    state: GenerationState,
    group: Sequence[ScalePlan],
    observer: Observer,
    x: Tensor,
    positions: Sequence[Tensor | None],
    sizes: Sequence[int],
) -> Tensor:
    """Runs all blocks on the tokens [R, L, C] of scales in one forward: `sizes` tokens each, at `positions` [R, M] or all."""
    step = state.step(group, positions, sizes)
    for chunk, layers in enumerate(state.plan.chunks):
        x = state.sandwich.around_chunk(x, partial(_run_chunk, state, layers, step), chunk=chunk)
        observer.chunk_done(group[0], chunk, x)
    state.ran = tuple(x.shape[:2])
    return x


def _run_chunk(state: GenerationState, layers: range, step: Step, x: Tensor, positions: Tensor | None) -> Tensor:
    if positions is not None:
        step = replace(step, rotation=step.rotation_of(positions))
    request = state.request
    for layer in layers:
        x = state.blocks[layer](x, layer, step, state.conditioning)
        if layer - state.plan.depth in request.guidance_layers and state.branch == "both":
            weight = request.guidance[state.sandwich.scale.index]
            x = state.rows(torch.lerp(x[state.batch :], x[: state.batch], weight))
    return x


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    policy: Policy | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    observer: Observer | None = None,
    start: Snapshot | None = None,
) -> Tensor:
    """Generates one image a prompt: float32 [B, 3, H, W] in [0, 1] on the backbone's device, or videos [B, 3, F, H, W].

    Noise of sample i depends on (seed, sampling.first_sample + i, scale) only. A policy whose batch rule is `split` lets
    each sample follow its own data-dependent decisions, one after the other. `start` is where a recorded generation of the
    same prompts, seed and sampling agrees with this policy so far (autoprune/prefix.py). Raises UserError for a policy made
    for another backbone or schedule, and for prompts the text encoder cannot read. What the host program set for itself,
    autocast, default dtype and device, gradients, random state, is neither used nor changed.
    """
    check_process()
    if isinstance(prompts, str) or not prompts:
        raise UserError("prompts must be a list with at least one text; wrap a single prompt in a list.")
    sampling = sampling or backbone.sampling
    schedule = backbone.scale_schedule(sampling.h_div_w, sampling.frames)
    if policy is not None:
        backbone.check_policy(policy, schedule)
    observer = observer or Observer()
    if policy is not None and policy.adaptive and policy.batch == "split" and len(prompts) > 1:
        alone = [sampling.alone(number) for number in range(len(prompts))]
        options = {"policy": policy, "seed": seed, "observer": observer}
        parts = zip(prompts, alone, strict=True)
        return torch.cat([generate(backbone, [prompt], sampling=each, **options) for prompt, each in parts])
    with without_autocast(backbone.device):
        request = resolve(backbone, prompts, backbone.plan(policy, schedule), seed=seed, sampling=sampling)
        images = backbone.decode(generate_latent(backbone, request, observer, start=start))
    observer.image_done()
    return images


def resolve(backbone: Backbone, prompts: Sequence[str], plan: Plan, *, seed: int, sampling: Sampling) -> Request:
    """Returns the request of a compiled plan with this sampling."""
    samples = tuple(range(sampling.first_sample, sampling.first_sample + len(prompts)))
    limits = sampling.limits_for(len(plan.schedule))
    return Request(
        text=backbone.encode_text(prompts, sampling),
        plan=plan,
        draw=GridNoise(seed, samples, tuple(limits[scale] for scale in plan.course.by_step(len(limits)))),
        guidance=sampling.guidance_for(len(plan.schedule)),
        temperature=sampling.temperature_for(len(plan.schedule)),
        negative=backbone.text_encoder([sampling.negative] * len(prompts)) if sampling.negative else None,
        guidance_layers=sampling.guidance_layers,
        projected=sampling.projected,
        given_bits=sampling.given,
        seed=seed,
        samples=samples,
        hosts_keys=backbone.keys == "host",
    )
