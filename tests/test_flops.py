"""FLOPs computed from plans equal those that torch counts in real generations of every family, scale by scale."""

from collections.abc import Callable
from dataclasses import replace

import hart_goldens
import pytest
import torch
import var_goldens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.hart import Hart, HartConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.official import RELEASED
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.t5_text import RandomTextEncoder
from autoprune.backbones.var import VAR, VARConfig
from autoprune.backbones.vq_tokenizer import VQConfig
from autoprune.generation import Observer, generate
from autoprune.measure.flops import Workload, scale_flops, text_flops, transformer_shape
from autoprune.measure.held_keys import key_counts
from autoprune.policy import BranchRule, KeyRule, Policy, ScalePruning
from autoprune.pruning.plan import compile_plan
from autoprune.state import GenerationState

TEXT_TOKENS, BATCH = 6, 2
SIDES = (1, 2, 3, 4, 6, 8)


def infinity() -> Backbone:
    model = Infinity(TransformerConfig(width=64, heads=2, depth=4, chunks=2, token_bits=8, text_width=32, text_max_length=8))
    tokenizer = BSQTokenizer(TokenizerConfig(bits=8, base=8, channel_multipliers=(1, 1), norm_groups=4), with_encoder=False)
    text = RandomTextEncoder(32, device=torch.device("cpu"), length=TEXT_TOKENS)
    return Backbone("infinity", model.eval(), tokenizer.eval(), text, Sampling(), pixel_budget_schedules("0.06M"))


def var(*, shared: bool = False) -> Backbone:
    config = VARConfig(width=64, heads=2, depth=4, sides=SIDES, shared_aln=shared, classes=10, channels=8, vocabulary=48)
    vae = VQConfig(vocabulary=48, channels=8, base=32, channel_multipliers=(1, 1), blocks=1, scales=len(SIDES))
    return var_goldens.backbone_of(config, vae, {})


def hart() -> Backbone:
    config = HartConfig(
        width=64,
        heads=2,
        depth=4,
        sides=SIDES,
        context_tokens=7,
        context_width=12,
        vocabulary=48,
        channels=8,
        numbered_levels=True,
        diffusion_width=16,
        diffusion_depth=2,
    )
    vae = VQConfig(vocabulary=48, channels=8, base=32, channel_multipliers=(1, 1), blocks=1, scales=6, phi_at_last=False)
    return hart_goldens.backbone_of(config, vae, {})


FAMILIES: dict[str, Callable[[], Backbone]] = {"infinity": infinity, "var": var, "hart": hart}


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


class Counted(Observer):
    """FLOPs of every forward by the counter, convolutions left out: those are the tokenizer's."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter, self._before = counter, 0
        self.flops: list[int] = []

    def scale_started(self, scale) -> None:  # noqa: ANN001
        self._before = self._so_far()

    def group_done(self, state: GenerationState, latent: torch.Tensor) -> None:
        self.flops.append(self._so_far() - self._before)

    def _so_far(self) -> int:
        counts = self._counter.get_flop_counts().get("Global", {})
        return sum(value for operation, value in counts.items() if "conv" not in str(operation))


def linear_flops(x: torch.Size, weight: torch.Size, *others: object, out_shape: object = None, **options: object) -> int:
    return 2 * x.numel() * weight[0]


def counted(backbone: Backbone, policy: Policy | None) -> list[int]:
    """Torch counts no fused attention on CPUs, so attention runs as the two products it is made of, and no linear layer of
    oneDNN's own, so it is told how. It sees no norm, rotation, softmax, sorting or resizing: those are counted nowhere."""
    fused = {torch.ops.mkldnn._linear_pointwise: linear_flops} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        observer = Counted(counter)
        generate(backbone, ["1", "2"], policy=policy, observer=observer)
    return observer.flops


def work_of(backbone: Backbone) -> Workload:
    guidance = backbone.sampling.guidance_for(len(backbone.scale_schedule()))
    return Workload(BATCH, guidance, TEXT_TOKENS)


def rules(granularity: str, **fields: object) -> dict[int, ScalePruning]:
    return {scale: ScalePruning(0.5, 3, granularity=granularity, **fields) for scale in (4, 5)}


MERGED = {4: ScalePruning(0.5, reducer="merge", restorer="merged"), 5: ScalePruning(0.3, reducer="merge", restorer="merged")}
GROUPED = {5: ScalePruning(0.5, granularity="scale", restorer="zero_residual")}
PROJECTED = {"reducer": "project", "restorer": "cached_state"}
POLICIES = {
    "dense": {},
    "sublayer": {"scales": rules("sublayer")},
    "exempt layers and one sublayer": {"scales": rules("sublayer", layers=(1, 2), sublayers=("sa", "ffn"))},
    "chunk": {"scales": rules("chunk"), "chunks": 4},
    "ranks": {"scales": rules("chunk", ranks=(0.3, 0.5, 0.6, 1.0), **PROJECTED), "chunks": 4},
    "scale": {"scales": rules("scale")},
    "projected scale": {"scales": rules("scale", **PROJECTED)},
    "merged": {"scales": MERGED},
    "one branch": {"scales": rules("scale"), "guidance": BranchRule("cond", 4)},
    "skip": {"scales": {4: ScalePruning(0.5, 3)}, "skip_last": 1},
    "scales out of view": {"keys": KeyRule(first=1, last=2)},
    "key budget": {"keys": KeyRule(budget=0.4, window=4)},
    "group": {"scales": GROUPED, "group_from": 4},
}


@pytest.mark.parametrize("name", POLICIES)
def test_flops_of_every_scale_are_those_that_torch_counts(backbone: Backbone, name: str) -> None:
    fields = POLICIES[name]
    if fields.get("skip_last") and not backbone.skippable:
        pytest.skip("the last scale of this family always runs")
    schedule = backbone.scale_schedule()
    policy = Policy(backbone.name, backbone.depth, schedule, **fields)
    plan = compile_plan(policy, schedule, backbone.depth)
    computed = scale_flops(plan, transformer_shape(backbone.model), work_of(backbone))
    by_scale = {scale.index: flops.total for scale, flops in zip(plan.scales, computed, strict=True)}
    forwards = [sum(by_scale[scale.index] for scale in group) for group in plan.groups]
    assert forwards == pytest.approx(counted(backbone, policy), rel=0.01)


def test_guidance_decides_rows_and_logits() -> None:
    torch.manual_seed(0)
    tiny = infinity()
    schedule = tiny.scale_schedule()
    plan, shape = compile_plan(None, schedule, tiny.depth), transformer_shape(tiny.model)
    for guidance, layers in ((1.0, (0,)), ((1.0,) * 3 + (3.0,) * 4, (0,)), (3.0, (-1,))):
        sampled = tiny.sampled(guidance=guidance, guidance_layers=layers)
        work = replace(work_of(sampled), at_logits=0 in layers)
        computed = [flops.total for flops in scale_flops(plan, shape, work)]
        assert computed == pytest.approx(counted(sampled, None), rel=0.01)


def test_text_keys_and_values_are_counted_once_a_generation() -> None:
    tiny = infinity()
    plan, shape = compile_plan(None, tiny.scale_schedule(), tiny.depth), transformer_shape(tiny.model)
    text = torch.randn(2 * BATCH, TEXT_TOKENS, 64)
    with FlopCounterMode(display=False) as counter:
        for block in tiny.model.layers():
            block.ca.text_keys_values(text)
    assert text_flops(plan, shape, work_of(tiny)) == counter.get_total_flops()
    assert text_flops(plan, transformer_shape(var().model), work_of(tiny)) == 0


def test_shapes_are_read_off_models_without_values() -> None:
    shapes = {}
    with torch.device("meta"):
        for name, kind in (("infinity2b", Infinity), ("var_d16", VAR), ("hart", Hart)):
            shapes[name] = transformer_shape(kind(RELEASED[name].transformer))
    assert (shapes["infinity2b"].width, shapes["infinity2b"].depth, shapes["infinity2b"].crosses) == (2048, 32, True)
    assert shapes["infinity2b"].feed_forward == 8 * 2048**2 and shapes["infinity2b"].head == 2048 * 64
    assert not shapes["var_d16"].crosses and shapes["var_d16"].feed_forward == 8 * 1024**2
    assert (
        shapes["hart"].feed_forward == 3 * 1536 * 4096 and shapes["hart"].prefix == 299 and shapes["hart"].refinement.steps == 8
    )


def dense_totals(name: str) -> list[float]:
    spec = RELEASED[name]
    schedule, config = spec.schedule_for(1.0), spec.transformer
    with torch.device("meta"):
        shape = transformer_shape(spec.family.transformer(config))
    plan = compile_plan(None, schedule, config.depth)
    work = Workload(1, spec.sampling.guidance_for(len(schedule)), text_tokens=40)
    return [flops.total / 1e12 for flops in scale_flops(plan, shape, work)]


def test_infinity_2b_at_1m_takes_115_tflop_most_of_them_at_the_last_scales() -> None:
    totals = dense_totals("infinity2b")
    assert sum(totals) == pytest.approx(115, rel=0.01)
    shares = [100 * value / sum(totals) for value in totals]
    assert shares[-5:] == pytest.approx([4.2, 7.9, 13.5, 21.8, 46.4], abs=0.1)


@pytest.mark.parametrize(("name", "tera"), [("infinity8b", 382), ("infinity8b_512", 77), ("var_d16", 0.60), ("var_d36", 22.8)])
def test_totals_of_other_released_models(name: str, tera: float) -> None:
    assert sum(dense_totals(name)) == pytest.approx(tera, rel=0.01)


def test_keys_are_those_the_buffers_hold() -> None:
    torch.manual_seed(0)
    tiny, held = hart(), []

    class Watch(Observer):
        def group_done(self, state: GenerationState, latent: torch.Tensor) -> None:
            held.append(tuple(buffer.length for buffer in state.buffers))

    for fields in POLICIES.values():
        if "skip_last" in fields:
            continue
        policy = Policy(tiny.name, tiny.depth, tiny.scale_schedule(), **fields)
        held.clear()
        generate(tiny, ["a cat"], policy=policy, observer=Watch())
        plan = compile_plan(policy, policy.scale_schedule, policy.depth)
        counts = dict(zip((scale.index for scale in plan.scales), key_counts(plan, prefix=6).held, strict=True))
        assert [counts[group[-1].index] for group in plan.groups] == held
