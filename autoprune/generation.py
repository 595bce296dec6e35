"""The scale loop every backbone generates with, and the state of one call. Nothing outlives the call."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.attention import attend
from autoprune.backbones.infinity import Infinity, Step
from autoprune.backbones.text import TextFeatures
from autoprune.errors import UserError
from autoprune.policy import Policy
from autoprune.pruning.plan import Plan, ScalePlan, compile_plan
from autoprune.pruning.sandwich import Sandwich
from autoprune.sampling import Draw, GridNoise


class Observer:
    """Watches a generation; override what you need. The base class does nothing."""

    def scale_started(self, scale: ScalePlan) -> None:
        """Called before a scale's blocks run."""

    def kept(self, scale: int, site: int, index: Tensor) -> None:
        """Called with the kept positions [R, M] of every selection, best score first."""

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        """Called with guided logits [B, N, d, 2], bits [B, N, d] and the latent [B, bits, H, W] so far."""

    def blocks_done(self) -> None:
        """Called when the loop has ended, before the latent is decoded."""

    def image_done(self) -> None:
        """Called when the images are decoded."""


@dataclass(frozen=True)
class Request:
    """One generation, everything resolved: texts, plan, one guidance weight and temperature a scale.

    `guidance_layers`: 0 guides the logits, -n the hidden state after the n-th block from the end (official
    cfg_insertion_layer). `given_bits[s]` [B, N, d] replace what scale s draws (official gt_leak).
    """

    text: TextFeatures
    plan: Plan
    draw: Draw
    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    negative: TextFeatures | None = None
    guidance_layers: tuple[int, ...] = (0,)
    given_bits: tuple[Tensor, ...] = ()
    seed: int = 0
    samples: tuple[int, ...] = field(default=(0,))


class GenerationState:
    """Buffers, caches and conditioning of one call; rows are [cond x B] and, under guidance, [uncond x B]."""

    def __init__(self, model: Infinity, request: Request, observer: Observer) -> None:
        self.model, self.request = model, request
        self.batch = len(request.text.lengths)
        guided = any(weight != 1 for weight in request.guidance)
        text = model.with_unconditional(request.text, request.negative) if guided else request.text
        self.conditioning = model.condition(text)
        self.branch = "both" if guided else "cond"
        plan = request.plan
        self.buffers = model.buffers_for(len(text.lengths), [plan.key_capacity(layer) for layer in range(plan.depth)])
        self.sandwich = Sandwich(seed=request.seed, samples=request.samples, on_kept=observer.kept)

    def enter(self, scale: ScalePlan) -> None:
        """Prepares for a scale: the sandwich follows the plan, and a dropped branch loses all its rows."""
        self.sandwich.scale = scale
        if self.branch == "both" and scale.branch != "both":
            rows = slice(0, self.batch) if scale.branch == "cond" else slice(self.batch, None)
            self.conditioning = self.conditioning.keep_rows(rows)
            self.sandwich.keep_rows(rows)
            for buffer in self.buffers:
                buffer.keep_rows(rows)
            self.branch = scale.branch

    def step(self, scale: ScalePlan) -> Step:
        """Returns what the blocks need at this scale."""

        def attention(layer: int):  # noqa: ANN202 (a closure over the layer's buffer)
            return lambda q, k, v: attend(q, *self.buffers[layer].append(k, v), scale=1.0)

        rotation = self.model.rotation(scale.grid, self.request.plan.schedule)
        return Step(rotation=rotation, add=self.sandwich.add, attention=attention)

    def rows(self, x: Tensor) -> Tensor:
        """Repeats samples for the guidance branches that still run."""
        return x.repeat(2, 1, 1) if self.branch == "both" else x


def generate_latent(backbone: Backbone, request: Request, observer: Observer | None = None) -> Tensor:
    """Runs the scale loop and returns the latent [B, bits, H, W] that the tokenizer decodes."""
    model, tokenizer = backbone.model, backbone.tokenizer
    observer = observer or Observer()
    state = GenerationState(model, request, observer)
    schedule = request.plan.schedule
    latent = request.text.values.new_zeros(state.batch, tokenizer.config.bits, *tokenizer.latent_size(schedule))
    for scale in request.plan.scales:
        observer.scale_started(scale)
        state.enter(scale)
        x = _scale_input(state, scale, latent, tokenizer)
        x = state.sandwich.around_blocks(x, partial(_run_blocks, state, state.step(scale)))
        logits = _guided_logits(state, x, scale.index)
        bits = request.draw(logits, scale.index)
        if scale.index < len(request.given_bits):
            bits = request.given_bits[scale.index].to(bits)
        codes = tokenizer.codes(bits.view(state.batch, *scale.grid[1:], -1), scale.index)
        latent = tokenizer.accumulate(latent, codes, scale.index == len(schedule) - 1)
        observer.scale_done(scale, logits, bits, latent)
    observer.blocks_done()
    return latent


def _scale_input(state: GenerationState, scale: ScalePlan, latent: Tensor, tokenizer: torch.nn.Module) -> Tensor:
    if scale.index == 0:
        return state.model.first_tokens(state.conditioning)
    return state.rows(state.model.embed(tokenizer.next_tokens(latent, scale.grid), scale.index))


def _run_blocks(state: GenerationState, step: Step, x: Tensor, kept: Tensor | None) -> Tensor:
    if kept is not None:
        step = replace(step, rotation=step.rotation_of(kept))
    depth = state.request.plan.depth
    for layer, block in enumerate(state.model.layers()):
        x = block(x, layer, step, state.conditioning)
        if layer - depth in state.request.guidance_layers and state.branch == "both":
            weight = state.request.guidance[state.sandwich.scale.index]
            x = state.rows(torch.lerp(x[state.batch :], x[: state.batch], weight))
    return x


def _guided_logits(state: GenerationState, x: Tensor, scale: int) -> Tensor:
    """Applies temperature, then guidance w * cond + (1 - w) * uncond; -> [B, N, d, 2]."""
    weight, temperature = state.request.guidance[scale], state.request.temperature[scale]
    guided = state.branch == "both" and weight != 1 and 0 in state.request.guidance_layers
    conditioning = state.conditioning
    if state.branch == "both" and not guided:
        x, conditioning = x[: state.batch], conditioning.keep_rows(slice(0, state.batch))
    logits = state.model.logits(x, conditioning) / temperature
    if guided:
        logits = weight * logits[: state.batch] + (1 - weight) * logits[state.batch :]
    return logits.unflatten(-1, (-1, 2))


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    policy: Policy | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    observer: Observer | None = None,
) -> Tensor:
    """Generates one image a prompt: float32 [B, 3, H, W] in [0, 1] on the backbone's device.

    Noise of sample i depends on (seed, sampling.first_sample + i, scale) only. Raises UserError for a policy made for
    another backbone or schedule, and for prompts the text encoder cannot read.
    """
    if isinstance(prompts, str) or not prompts:
        raise UserError("prompts must be a list with at least one text; wrap a single prompt in a list.")
    sampling = sampling or backbone.sampling
    schedule = backbone.scale_schedule(sampling.h_div_w)
    if policy is not None:
        policy.check_fits(backbone.name, backbone.depth, schedule)
    observer = observer or Observer()
    samples = tuple(range(sampling.first_sample, sampling.first_sample + len(prompts)))
    request = Request(
        text=backbone.encode_text(prompts),
        plan=compile_plan(policy, schedule, backbone.depth),
        draw=GridNoise(seed, samples),
        guidance=sampling.guidance_for(len(schedule)),
        temperature=sampling.temperature_for(len(schedule)),
        seed=seed,
        samples=samples,
    )
    images = backbone.decode(generate_latent(backbone, request, observer))
    observer.image_done()
    return images
