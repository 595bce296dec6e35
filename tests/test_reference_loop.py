"""The plain loop and the runtime are written apart from each other: on the same weights they must say the same."""

from functools import partial

import pytest
import torch

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.schedules import position_frame, scale_schedule
from autoprune.backbones.text import TextFeatures
from autoprune.generation import Observer, Request, generate_latent
from autoprune.measure.reference_loop import ReferenceRequest, reference_run
from autoprune.pruning.plan import compile_plan
from autoprune.sampling import likeliest

SCHEDULE = scale_schedule(1.25, "0.06M")


class Kept(Observer):
    def __init__(self) -> None:
        self.logits, self.bits = [], []

    def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
        self.logits.append(logits)
        self.bits.append(bits)


def backbone(dtype: torch.dtype = torch.float32) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = TransformerConfig(64, heads=4, depth=4, chunks=2, token_bits=8, text_width=48, text_max_length=16)
        model = Infinity(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.1)  # zero biases would hide one that is left out
        tokenizer = BSQTokenizer(TokenizerConfig(bits=8, base=8, channel_multipliers=(1,), norm_groups=4), with_encoder=False)
    for part in (model, tokenizer):
        part.eval().requires_grad_(False)
    for block in model.layers():
        block.to(dtype)
    return Backbone("small", model, tokenizer, None, Sampling(), partial(scale_schedule, pixel_budget="0.06M"))


def both_runs(loaded: Backbone, guidance: tuple[float, ...]):
    text = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    temperature = tuple(0.5 + 0.1 * scale for scale in range(len(SCHEDULE)))
    plan = compile_plan(None, SCHEDULE, loaded.depth)
    request = Request(TextFeatures(text, (5, 5)), plan, likeliest, guidance, temperature, samples=(0, 1))
    kept = Kept()
    with torch.inference_mode():
        latent = generate_latent(loaded, request, kept)
    asked = ReferenceRequest(text, SCHEDULE, position_frame(SCHEDULE), guidance, temperature, likeliest)
    return latent, kept, reference_run(loaded.model, loaded.model.layers(), asked)


@pytest.mark.parametrize("guidance", [(3.0,) * 7, (1.0, 4.0, 1.0, 2.0, 3.0, 3.0, 1.0), (1.0,) * 7], ids=["all", "some", "none"])
def test_runtime_equals_the_plain_loop(guidance: tuple[float, ...]) -> None:
    latent, kept, reference = both_runs(backbone(), guidance)
    assert len(reference.bits) == len(SCHEDULE)
    for ours, theirs in zip(kept.bits, reference.bits, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(kept.logits, reference.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(latent, reference.latent, rtol=0, atol=1e-5)


def test_lower_precision_agrees_where_both_saw_the_same_bits() -> None:
    _, kept, reference = both_runs(backbone(torch.bfloat16), (3.0,) * 7)
    assert reference.logits[0].dtype == torch.float32
    torch.testing.assert_close(kept.logits[0], reference.logits[0], rtol=0, atol=0.5)
    assert (kept.bits[0] == reference.bits[0]).float().mean() > 0.9
