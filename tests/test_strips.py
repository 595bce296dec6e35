"""The decoder in strips against the whole decoder in float64, and what it holds."""

import copy

import pytest
import torch

from autoprune.backbones.allocation_trace import AllocationTrace
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.cnn_autoencoder import Decoder
from autoprune.backbones.official import RELEASED
from autoprune.backbones.strips import decode_in_strips
from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer


def plain() -> Decoder:
    config = TokenizerConfig(bits=6, base=16, channel_multipliers=(2, 3, 4), norm_groups=8, pixel_patch=2)
    return BSQTokenizer(config, with_encoder=False).decoder


def with_attention() -> Decoder:
    return VQTokenizer(VQConfig(channels=6, base=32, channel_multipliers=(1, 1, 2)), with_encoder=False).decoder


def filled(decoder: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    for value in decoder.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5 + (value.dim() == 1))
    return decoder.eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize("build", [plain, with_attention])
def test_strips_of_any_height_are_the_whole_decoder(build, rows: int) -> None:
    decoder = filled(build())
    latent = torch.randn(2, 6, 5, 7)
    before = latent.clone()
    with torch.inference_mode():
        expected = copy.deepcopy(decoder).double()(latent.double())
        ours = decode_in_strips(decoder, latent, rows=rows)
    assert torch.equal(latent, before)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("build", [plain, with_attention])
def test_in_bfloat16_strips_are_as_near_to_the_truth_as_the_whole_decoder(build) -> None:
    decoder, latent = filled(build()), torch.randn(1, 6, 8, 8)
    with torch.inference_mode():
        low = copy.deepcopy(decoder).to(torch.bfloat16, memory_format=torch.channels_last)
        truth = low.double()(latent.bfloat16().double())
        low = low.bfloat16()
        whole, strips = low(latent.bfloat16()), decode_in_strips(low, latent.bfloat16(), rows=5)
    errors = [(image.double() - truth).square().mean().sqrt().item() for image in (whole, strips)]
    assert 0 < errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("name", ["infinity2b", "infinity8b", "hart"])
def test_strips_save_a_quarter_and_more_of_a_large_image(name: str) -> None:
    spec = RELEASED[name]
    with torch.device("meta"):
        tokenizer = spec.family.tokenizer(spec.tokenizer).eval()
        latent = torch.empty(1, tokenizer.channels, *(1024 // spec.tokenizer.stride,) * 2, dtype=torch.bfloat16)
    decoder = tokenizer.decoder.bfloat16()
    peaks = []
    for run in (decoder, lambda latent: decode_in_strips(decoder, latent)):
        with torch.inference_mode(), AllocationTrace() as trace:
            assert run(latent).shape == (1, 3, 1024, 1024)
        peaks.append(trace.peak)
    assert peaks[1] < 0.75 * peaks[0]
