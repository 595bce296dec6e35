"""The vector-quantising tokenizer against naive loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer, phi_index

CONFIG = VQConfig(vocabulary=24, channels=4, base=32, channel_multipliers=(1, 2), blocks=1, scales=4)
SCHEDULE = ((1, 1, 1), (1, 2, 3), (1, 4, 5), (1, 6, 8))


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(CONFIG).eval().requires_grad_(False)


@pytest.mark.parametrize("count", range(2, 40))
def test_phi_takes_the_convolution_of_the_nearest_tick(count: int) -> None:
    ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
    expected = [int(np.argmin(np.abs(ticks - scale / (count - 1)))) for scale in range(count)]
    assert [phi_index(scale, count) for scale in range(count)] == expected


def test_codes_are_rows_of_the_codebook(tokenizer: VQTokenizer) -> None:
    numbers = torch.randint(24, (2, 3, 5))
    codes = tokenizer.codes(numbers, 1)
    assert codes.shape == (2, 4, 3, 5)
    assert torch.equal(codes, tokenizer.codes(numbers[..., None], 1))
    for sample, y, x in np.ndindex(2, 3, 5):
        assert torch.equal(codes[sample, :, y, x], tokenizer.quantize.embedding.weight[numbers[sample, y, x]])


@pytest.mark.parametrize("scale", range(4))
def test_accumulate_adds_half_of_the_resized_codes_and_half_of_their_convolution(tokenizer: VQTokenizer, scale: int) -> None:
    latent, codes = torch.randn(2, 4, 6, 8), torch.randn(2, 4, *SCHEDULE[scale][1:])
    up = codes if scale == 3 else functional.interpolate(codes, (6, 8), mode="bicubic")
    convolution = tokenizer.quantize.quant_resi.qresi_ls[phi_index(scale, 4)]
    padded, smooth = functional.pad(up, (1, 1, 1, 1)), torch.empty_like(up)
    for y, x in np.ndindex(6, 8):
        window = padded[:, None, :, y : y + 3, x : x + 3]
        smooth[:, :, y, x] = (window * convolution.weight).sum((2, 3, 4)) + convolution.bias
    expected = latent + 0.5 * up + 0.5 * smooth
    torch.testing.assert_close(tokenizer.accumulate(latent, codes, scale, 4), expected, rtol=0, atol=1e-5)


def test_the_last_scale_can_be_added_as_it_is(tokenizer: VQTokenizer) -> None:
    plain = VQTokenizer(replace(CONFIG, phi_at_last=False), with_encoder=False)
    plain.load_state_dict({key: tokenizer.state_dict()[key] for key in plain.state_dict()})
    latent, codes = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    assert torch.equal(plain.accumulate(latent, codes, 3, 4), latent + codes)
    small = torch.randn(1, 4, 2, 3)
    assert torch.equal(plain.accumulate(latent, small, 1, 4), tokenizer.accumulate(latent, small, 1, 4))


def test_next_tokens_are_area_means_in_row_order(tokenizer: VQTokenizer) -> None:
    latent = torch.randn(2, 4, 6, 8)
    tokens = tokenizer.next_tokens(latent, (1, 3, 2))
    for y, x in np.ndindex(3, 2):
        mean = latent[:, :, 2 * y : 2 * y + 2, 4 * x : 4 * x + 4].mean((2, 3))
        torch.testing.assert_close(tokens[:, 2 * y + x], mean)
    assert torch.equal(tokenizer.next_tokens(latent, (1, 6, 8)), latent.flatten(2).transpose(1, 2))


def test_quantising_follows_the_residual_rule(tokenizer: VQTokenizer) -> None:
    features = torch.randn(2, 4, 6, 8) / 24
    numbers, latent = tokenizer.quantise(features, SCHEDULE)
    codebook, so_far = tokenizer.quantize.embedding.weight, torch.zeros(2, 4, 6, 8)
    for scale, (_, height, width) in enumerate(SCHEDULE):
        residual = functional.adaptive_avg_pool2d(features - so_far, (height, width))
        for sample, y, x in np.ndindex(2, height, width):
            distances = (codebook - residual[sample, :, y, x]).square().sum(1)
            assert distances[numbers[scale][sample, y, x]] <= distances.min() + 1e-5
        so_far = tokenizer.accumulate(so_far, tokenizer.codes(numbers[scale], scale), scale, 4)
    torch.testing.assert_close(latent, so_far, rtol=0, atol=0)


def test_the_numbers_of_one_scale_come_back(tokenizer: VQTokenizer) -> None:
    plain = VQTokenizer(replace(CONFIG, phi_at_last=False)).eval().requires_grad_(False)
    numbers = torch.randint(24, (2, 6, 8))
    found, latent = plain.quantise(plain.codes(numbers, 0), SCHEDULE[-1:])
    assert torch.equal(found[0], numbers)
    assert torch.equal(latent, plain.codes(numbers, 0))


def test_images_become_features_numbers_and_images_of_their_size(tokenizer: VQTokenizer) -> None:
    images = torch.rand(2, 3, 12, 16) * 2 - 1
    features = tokenizer.encode(images)
    assert features.shape == (2, 4, 6, 8) == (2, tokenizer.channels, *tokenizer.latent_size(SCHEDULE))
    numbers, latent = tokenizer.quantise(features, SCHEDULE)
    assert [tuple(entry.shape[1:]) for entry in numbers] == [grid[1:] for grid in SCHEDULE]
    decoded = tokenizer.decode(latent)
    assert decoded.shape == images.shape
    assert -1 <= decoded.min() <= decoded.max() <= 1


def test_networks_of_half_precision_take_and_give_float32(tokenizer: VQTokenizer) -> None:
    half = VQTokenizer(CONFIG).eval().requires_grad_(False)
    half.load_state_dict(tokenizer.state_dict())
    latent, images = torch.randn(1, 4, 6, 8), torch.rand(1, 3, 12, 16)
    half.encoder.bfloat16()
    half.decoder.bfloat16()
    decoded, features = half.decode(latent), half.encode(images)
    assert decoded.dtype == features.dtype == torch.float32
    torch.testing.assert_close(decoded, tokenizer.decode(latent), rtol=0, atol=0.05)


def test_attention_lets_every_cell_see_every_cell(tokenizer: VQTokenizer) -> None:
    block = tokenizer.decoder.mid.attn_1
    x = torch.randn(2, 64, 3, 4)
    q, k, v = (part.flatten(2) for part in block.qkv(block.norm(x)).chunk(3, dim=1))
    mixed = torch.zeros_like(q)
    for sample, here in np.ndindex(2, 12):
        weights = torch.stack([q[sample, :, here] @ k[sample, :, there] / 64**0.5 for there in range(12)]).softmax(0)
        mixed[sample, :, here] = v[sample] @ weights
    expected = x + block.proj_out(mixed.view(2, 64, 3, 4))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)
