"""What every scale computes, from the plan alone: 2 FLOPs a multiply-accumulate of every matrix product, on any family.

Sums follow the loop as it runs (embedding once a sample, attention over the keys really held, text keys and values once a
generation). Norms, rotations, scores, resizing, sampling and the tokenizer are not counted, nor is what is computed of the
text before the first scale besides its keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import nn

from autoprune.backbones import Backbone
from autoprune.backbones.family import Features, Transformer
from autoprune.backbones.infinitystar import InfinityStar
from autoprune.backbones.layers import CrossAttention
from autoprune.measure.held_keys import key_counts
from autoprune.pruning.plan import WHOLE_SCALE, Plan, ScalePlan, chunk_site, site
from autoprune.rules import SUBLAYERS

MACS = 2  # FLOPs of a multiply-accumulate


@dataclass(frozen=True)
class Refinement:
    """Weights of the head that adds a residual to the last scale, by how often they are met: `once` a row's token, then
    in each of `steps` steps by every row's token (`rows`), every sample's token (`samples`), and once (`shared`)."""

    steps: int
    once: int
    rows: int
    samples: int
    shared: int


@dataclass(frozen=True)
class TransformerShape:
    """What decides the products of a transformer of `width` C and `depth` blocks, whatever its family.

    `feed_forward` are the weights of that sublayer (gated or not), `crosses` whether blocks attend to the text, `embedding` and
    `head` the weights that a sample's and a row's token meet, `level` those that number a scale, `prefix` the tokens in front
    of the first scale. `projections` are the weights of self-attention where they are not 4 C^2, `key_width` the channels of
    keys where they are not C; of every `clip` scales `early_scales` meet `early_head`; `prefixed`: whether the text runs
    through the blocks before the first scale.
    """

    width: int
    depth: int
    feed_forward: int
    crosses: bool
    embedding: int
    head: int
    level: int = 0
    prefix: int = 0
    refinement: Refinement | None = None
    projections: int = 0
    key_width: int = 0
    prefixed: bool = False
    early_head: int = 0
    early_scales: int = 0
    clip: int = 0

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Returns the sublayers that its blocks have."""
        return SUBLAYERS if self.crosses else tuple(name for name in SUBLAYERS if name != "ca")

    def head_at(self, scale: int) -> int:
        """Returns the weights of the head that a scale's tokens meet."""
        return self.early_head if self.clip and scale % self.clip < self.early_scales else self.head


@dataclass(frozen=True)
class Workload:
    """`batch` samples guided by one weight a scale (all 1: one row a sample), `text_tokens` as cross-attention sees them,
    padding included, `prefix` those that run through the blocks before the first scale. `at_logits`: whether guidance combines
    logits, or hidden states inside the blocks."""

    batch: int
    guidance: tuple[float, ...]
    text_tokens: int = 0
    at_logits: bool = True
    prefix: int = 0

    @property
    def guided(self) -> bool:
        """Returns whether there are rows of an unconditional branch."""
        return any(weight != 1 for weight in self.guidance)

    def rows(self, scale: ScalePlan) -> int:
        """Returns the rows that run at a scale: samples times branches."""
        return self.batch * (2 if self.guided and scale.branch == "both" else 1)

    def head_rows(self, scale: ScalePlan) -> int:
        """Returns the rows whose logits are computed: with weight 1 those of the conditional branch alone."""
        needless = self.guidance[scale.index] == 1 or not self.at_logits
        return self.batch if needless else self.rows(scale)


@dataclass(frozen=True)
class ScaleFlops:
    """FLOPs of one scale and all samples, by part: `projections` of self-attention, `attention` over held keys,
    `cross_attention` with its projections, `feed_forward`, `embedding`, `head`, `reducing` tokens by merging or projection,
    `refinement` of the last scale."""

    projections: int
    attention: int
    cross_attention: int
    feed_forward: int
    embedding: int
    head: int
    reducing: int
    refinement: int

    @property
    def total(self) -> int:
        """Returns the sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def transformer_shape(model: Transformer) -> TransformerShape:
    """Reads the shape off a model's modules; a model on the meta device has one too."""
    block = model.layers()[0]
    clips = isinstance(model, InfinityStar)
    return TransformerShape(
        width=model.head.in_features,
        depth=model.depth,
        feed_forward=_weights(block.mlp if clips else block.ffn),
        crosses=any(isinstance(part, CrossAttention) for part in block.children()),
        embedding=_weights(model.word_embed),
        head=_weights(model.head),
        level=0 if clips else _weights(model.lvl_embed),
        prefix=model.prefix_tokens,
        refinement=_refinement(model.diffloss) if model.refines else None,
        projections=_weights(block.attn) if clips else 0,
        key_width=block.attn.k_proj.out_features if clips else 0,
        prefixed=clips,
        early_head=_weights(model.semantic_head2) if clips else 0,
        early_scales=model.config.semantic_scales if clips else 0,
        clip=len(model.config.image_repetitions) if clips else 0,
    )


def workload(backbone: Backbone, features: Features) -> Workload:
    """Returns the work of these features with the backbone's sampling."""
    sampling, shape = backbone.sampling, transformer_shape(backbone.model)
    return Workload(
        batch=len(features),
        guidance=sampling.guidance_for(len(backbone.scale_schedule())),
        text_tokens=features.values.shape[1] if shape.crosses else 0,
        at_logits=0 in sampling.guidance_layers,
        prefix=features.values.shape[1] if shape.prefixed else 0,
    )


def scale_flops(plan: Plan, shape: TransformerShape, work: Workload) -> tuple[ScaleFlops, ...]:
    """Returns the FLOPs of every scale that runs, in order; of a plan that decides on the way the most they can be."""
    seen = key_counts(plan, prefix=shape.prefix + work.prefix).seen
    return tuple(_scale(plan, scale, shape, work, keys) for scale, keys in zip(plan.scales, seen, strict=True))


def text_flops(plan: Plan, shape: TransformerShape, work: Workload) -> int:
    """Returns the FLOPs of the text's keys and values, computed once a generation before the first scale: for families that
    run it through the blocks, all of that."""
    rows = work.batch * (2 if work.guided else 1)
    if shape.prefixed:
        token = shape.projections + shape.feed_forward + 2 * shape.width * work.prefix
        return MACS * rows * work.prefix * plan.depth * token
    return MACS * rows * work.text_tokens * plan.depth * 2 * shape.width**2 if shape.crosses else 0


def computed_tokens(scale: ScalePlan, layer: int, chunk: int, sublayer: str) -> int:
    """Returns how many tokens of a scale one sublayer (sa, ca or ffn) runs on."""
    if chunk_site(chunk) in scale.pruned_sites:
        return scale.kept_chunks[chunk]
    return scale.kept if scale.whole or site(layer, sublayer) in scale.pruned_sites else scale.tokens


def _scale(plan: Plan, scale: ScalePlan, shape: TransformerShape, work: Workload, keys: tuple[int, ...]) -> ScaleFlops:
    width, rows, prefix = shape.width, work.rows(scale), shape.prefix if scale.step == 0 else 0
    sums = {"projections": 0, "attention": 0, "cross_attention": 0, "feed_forward": 0}
    for chunk, layers in enumerate(plan.chunks):
        for layer in layers:
            own, text, mlp = (prefix + computed_tokens(scale, layer, chunk, name) for name in ("sa", "ca", "ffn"))
            sums["projections"] += own * (shape.projections or 4 * width**2)
            sums["attention"] += own * keys[layer] * 2 * width
            sums["cross_attention"] += text * (2 * width**2 + 2 * work.text_tokens * width) if shape.crosses else 0
            sums["feed_forward"] += mlp * shape.feed_forward
    embedding = work.batch * scale.tokens * shape.embedding if scale.step else 0
    return ScaleFlops(
        **{name: MACS * rows * value for name, value in sums.items()},
        embedding=MACS * (embedding + shape.level),
        head=MACS * work.head_rows(scale) * scale.tokens * shape.head_at(scale.index),
        reducing=MACS * rows * sum(_reducing(plan, scale, shape)),
        refinement=MACS * _refining(plan, scale, shape, work),
    )


def _reducing(plan: Plan, scale: ScalePlan, shape: TransformerShape) -> Iterator[int]:
    """Yields the multiply-accumulates a row spends on similarities of merging, or on projections, at every pruned site."""
    rule = scale.pruning
    if rule is None or rule.reducer == "gather":
        return
    if rule.reducer == "project":
        counts = [scale.kept] if WHOLE_SCALE in scale.pruned_sites else scale.kept_chunks
        yield from (scale.tokens * count * shape.width for count in counts if count < scale.tokens or scale.whole)
        return
    frames, height, width = scale.grid
    cells = frames * -(-height // rule.cell) * -(-width // rule.cell)
    for layer in range(plan.depth):
        for name in shape.sublayers:
            if site(layer, name) in scale.pruned_sites:
                yield (scale.tokens - cells) * cells * shape.width


def _refining(plan: Plan, scale: ScalePlan, shape: TransformerShape, work: Workload) -> int:
    head = shape.refinement
    if head is None or scale.index < len(plan.schedule) - 1:
        return 0
    samples = work.batch * scale.tokens
    rows = samples if work.guidance[scale.index] == 1 else work.rows(scale) * scale.tokens
    steps = head.steps * (rows * head.rows + samples * head.samples + head.shared)
    return samples * shape.embedding + rows * head.once + steps


def _refinement(head: nn.Module) -> Refinement:
    net = head.net
    once, samples, shared = (_weights(part) for part in (net.cond_embed, net.input_proj, net.time_embed))
    return Refinement(head.steps, once, _weights(net) - once - samples - shared, samples, shared)


def _weights(module: nn.Module) -> int:
    """Returns the elements of all matrices of linear layers in a module."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
