"""The sizes at which the runtime's bars are measured: an Infinity with random weights, its requests, and the policies."""

from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.linear import pack_linears
from autoprune.backbones.schedules import pixel_budget_schedules, scale_schedule
from autoprune.backbones.text import TextFeatures
from autoprune.generation import Request
from autoprune.policy import Policy
from autoprune.pruning.plan import compile_plan
from autoprune.rules import ScalePruning
from autoprune.sampling import GridNoise

NAME = "bars"
TEXT_TOKENS = 40
FEW = 0.1  # share of the tokens of the last two scales that the policy "few" keeps


@dataclass(frozen=True)
class BarsCase:
    """An Infinity with random weights, one image a sample under guidance, and the bars it must reach.

    `dtypes` are the precisions of our dense runs, the reference's first, and `faster` how many times as fast as the reference
    each must be; policies run in the last one. FastVAR's preset: `fastvar_keep` from `fastvar_from` on, in `fastvar_layers`,
    `fastvar_skip` last scales left out. `fastvar` and `few` are the least shares of a policy's FLOP ratio, `ceiling` how many
    times what its FLOPs take at the measured ceiling of matrix products a whole dense generation may last (None: no bar);
    `decoder` is the base width of the tokenizer it ends with.
    """

    width: int = 512
    depth: int = 8
    heads: int = 8
    pixel_budget: str = "0.25M"
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    faster: tuple[float, ...] = (1.0, 2.0)
    fastvar_from: int = 7
    fastvar_keep: tuple[float, ...] = (0.6, 0.5)
    fastvar_skip: int = 1
    fastvar_layers: tuple[int, int] = (1, 6)
    fastvar: float = 0.85
    few: float | None = 0.75
    ceiling: float | None = None
    decoder: int = 128


INFINITY_2B_CASE = BarsCase(
    width=2048,
    depth=32,
    heads=16,
    pixel_budget="1M",
    batches=(1, 4),
    dtypes=(torch.bfloat16,),
    faster=(2.0,),
    fastvar_from=9,
    fastvar_skip=2,
    fastvar_layers=(3, 27),
    fastvar=0.8,
    few=None,
    ceiling=2.0,
)


def bars_case(device: torch.device, dtype: torch.dtype) -> BarsCase:
    """Returns Infinity-2B on GPUs; elsewhere a size for two cores, in float32 and in `dtype` if that is another."""
    if device.type == "cuda":
        return INFINITY_2B_CASE
    return BarsCase() if dtype is not torch.float32 else BarsCase(dtypes=(torch.float32,), faster=(1.0,))


def plain_case(case: BarsCase) -> dict[str, object]:
    """Returns a case as JSON values."""
    return asdict(case) | {"dtypes": [dtype_name(dtype) for dtype in case.dtypes]}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def random_infinity(case: BarsCase, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Builds the same weights in every precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TransformerConfig(case.width, case.heads, case.depth, chunks=min(8, case.depth), token_bits=32)
        model = Infinity(config).to(device)
        tokenizer = BSQTokenizer(TokenizerConfig(bits=32, base=case.decoder), with_encoder=False).to(device, dtype)
    for block in model.layers():
        block.to(dtype)
    parts = [part.eval().requires_grad_(False) for part in (model, tokenizer)]
    tokenizer.decoder.to(memory_format=torch.channels_last)
    pack_linears(model)
    return Backbone(NAME, *parts, None, Sampling(), pixel_budget_schedules(case.pixel_budget))


def fixed_request(case: BarsCase, backbone: Backbone, batch: int, policy: Policy | None = None) -> Request:
    """Guidance 4, temperature 0.5 and a prompt of TEXT_TOKENS random features, as the official 2B settings."""
    schedule, config = backbone.scale_schedule(), backbone.model.config
    words = torch.randn(TEXT_TOKENS, config.text_width, generator=torch.Generator().manual_seed(1)).to(backbone.device)
    samples = tuple(range(batch))
    return Request(
        text=TextFeatures.from_rows([words] * batch),
        plan=compile_plan(policy, schedule, case.depth),
        draw=GridNoise(0, samples),
        guidance=(4.0,) * len(schedule),
        temperature=(0.5,) * len(schedule),
        samples=samples,
    )


def barred_policies(case: BarsCase) -> dict[str, tuple[Policy, float]]:
    """Returns FastVAR's preset and, where it has a bar, FEW of the tokens of the last two scales, with their bars."""
    schedule = scale_schedule(1.0, case.pixel_budget)
    dense, end = Policy(NAME, case.depth, schedule), len(schedule) - 1
    cut = partial(ScalePruning, cache_scale=case.fastvar_from - 1, layers=case.fastvar_layers)
    scales = {scale: cut(keep) for scale, keep in enumerate(case.fastvar_keep, start=case.fastvar_from)}
    policies = {"FastVAR": (replace(dense, scales=scales, skip_last=case.fastvar_skip), case.fastvar)}
    if case.few is not None:
        rule = ScalePruning(FEW, end - 2, granularity="scale")
        policies["10 % of the last two scales"] = (replace(dense, scales={end - 1: rule, end: rule}), case.few)
    return policies
