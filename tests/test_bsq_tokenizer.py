"""The tokenizer against traces and key lists of the official code, and the rules the transformer relies on."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig, wrapped_keys

GOLDENS = Path(__file__).parent / "data" / "goldens"
NAMES = ("infinity_2b_tiny_shared", "infinity_8b_tiny_shared")
SQUARE = ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 6, 6), (1, 8, 8), (1, 12, 12), (1, 16, 16))
EMBEDDED = TokenizerConfig(
    bits=16, base=16, channel_multipliers=(1, 1, 2, 4), encoder_blocks=1, decoder_blocks=1, norm_groups=8
)
FULL_SIZE = {
    "vae_d16": TokenizerConfig(bits=16),
    "vae_d24": TokenizerConfig(bits=24),
    "vae_d32": TokenizerConfig(bits=32),
    "vae_d64": TokenizerConfig(bits=64),
    "vae_d14_patchify_d56_f8_14": TokenizerConfig(bits=14, channel_multipliers=(1, 2, 4, 4), patchify=True),
}


@cache
def golden(name, *, with_encoder=True):
    weights = np.load(GOLDENS / f"{name}.weights.npz")
    meta = json.loads(bytes(weights["meta_json"]))["config"]
    config = TokenizerConfig(
        bits=meta["vae_dim"],
        base=32,
        channel_multipliers=tuple(meta["vae_ch_mult"]),
        encoder_blocks=1,
        decoder_blocks=2,
        patchify=bool(meta["patchify"]),
    )
    tokenizer = BSQTokenizer(config, with_encoder=with_encoder)
    state = {key[4:]: torch.from_numpy(weights[key]) for key in weights.files if key.startswith("vae.")}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if not with_encoder:
        state = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


@cache
def trace(name):
    return dict(np.load(GOLDENS / f"{name}.trace.npz"))


def schedule_of(name, job):
    jobs = json.loads(bytes(trace(name)["meta_json"]))["jobs"]
    return [tuple(grid) for grid in jobs[job]["schedule"]]


def recorded_bits(name, job, *, scale):
    _, height, width = schedule_of(name, job)[scale]
    packed = trace(name)[f"{job}/bits.s{scale}"]
    token_bits = golden(name).token_bits
    flat = np.unpackbits(packed, axis=-1)[:, : height * width * token_bits]
    return torch.from_numpy(flat.reshape(-1, height, width, token_bits))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_state_dict_keys_and_shapes_are_the_official_ones(name):
    official = json.loads(bytes(np.load(GOLDENS / "key_manifests.npz")[name]))
    with torch.device("meta"):
        state = BSQTokenizer(FULL_SIZE[name]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == official


def test_keys_without_the_wrappers_are_understood():
    expected = BSQTokenizer(EMBEDDED).state_dict()
    bare = {key.replace(".conv.weight", ".weight").replace(".norm.", "."): value for key, value in expected.items()}
    assert bare.keys() != expected.keys()
    assert wrapped_keys(bare, expected).keys() == expected.keys()


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_encoder_and_quantiser_equal_the_official_trace(name):
    tokenizer, arrays = golden(name), trace(name)
    image = torch.from_numpy(arrays["encode/image_lowres_nearest16"])
    image = F.interpolate(image, scale_factor=16, mode="nearest").clamp(-1, 1)
    features = tokenizer.encode(image)
    torch.testing.assert_close(features, torch.from_numpy(arrays["encode/h"]), atol=2e-4, rtol=0)

    bits, latent = tokenizer.quantise(torch.from_numpy(arrays["encode/h"]), SQUARE)
    torch.testing.assert_close(latent, torch.from_numpy(arrays["encode/z"]), atol=1e-5, rtol=0)
    cell = 2 if tokenizer.config.patchify else 1
    for scale, tokens in enumerate(bits):
        planes = F.pixel_shuffle(tokens.permute(0, 3, 1, 2), cell).permute(0, 2, 3, 1)
        np.testing.assert_array_equal(np.packbits(planes.reshape(1, -1), axis=-1), arrays[f"encode/bits.s{scale}"])


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_area_resized_sum_is_the_official_training_input(name):
    tokenizer, arrays = golden(name), trace(name)
    steps = list(tokenizer.quantisation_steps(torch.from_numpy(arrays["encode/h"]), SQUARE))
    for scale in (1, 2, 3):
        expected = torch.from_numpy(arrays[f"encode/var_input.s{scale}"]).squeeze(2)
        resized = F.interpolate(steps[scale - 1].latent, size=expected.shape[-2:], mode="area")
        torch.testing.assert_close(resized, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_generation_side_sums_and_inputs_equal_the_official_trace(name):
    tokenizer, arrays = golden(name), trace(name)
    schedule = schedule_of(name, "greedy_sq")
    latent = torch.zeros(1, tokenizer.config.bits, *tokenizer.latent_size(schedule))
    for scale, grid in enumerate(schedule):
        if scale > 0:
            expected = torch.from_numpy(arrays[f"greedy_sq/tokens.s{scale}"])
            torch.testing.assert_close(tokenizer.next_tokens(latent, grid), expected, atol=1e-5, rtol=0)
        codes = tokenizer.codes(recorded_bits(name, "greedy_sq", scale=scale), scale)
        latent = tokenizer.accumulate(latent, codes, scale, len(schedule))
    torch.testing.assert_close(latent, torch.from_numpy(arrays["greedy_sq/latent"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_encoder", [True, False])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_decoder_equals_the_official_trace_also_without_an_encoder(name, with_encoder):
    tokenizer, arrays = golden(name, with_encoder=with_encoder), trace(name)
    for key in [key for key in arrays if key.endswith("/latent")]:
        job = key.removesuffix("/latent")
        image = tokenizer.decode(torch.from_numpy(arrays[key]))
        statistics = torch.stack([image.mean(), image.std(), (image.abs() == 1).float().mean()])
        expected = torch.from_numpy(arrays[f"{job}/decode_mean_std"])
        torch.testing.assert_close(statistics[:2], expected[:2], atol=5e-4, rtol=0)
        if f"{job}/decode_f32_crop48" in arrays:
            crop = torch.from_numpy(arrays[f"{job}/decode_f32_crop48"])
            torch.testing.assert_close(image[..., :48, :48], crop, atol=5e-4, rtol=0)
        if f"{job}/image_u8_bgr_stride2" in arrays:
            pixels = ((image + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(-1)[:, ::2, ::2]
            recorded = torch.from_numpy(arrays[f"{job}/image_u8_bgr_stride2"])
            assert (pixels.int() - recorded.int()).abs().max() <= 1


@pytest.mark.parametrize("config", [EMBEDDED, TokenizerConfig(**{**vars(EMBEDDED), "scale_magnitudes": True})])
def test_quantised_bits_rebuild_the_latent(config):
    torch.manual_seed(0)
    tokenizer = BSQTokenizer(config)
    if config.scale_magnitudes:
        tokenizer.magnitudes.copy_(torch.linspace(0.6, 0.2, len(tokenizer.magnitudes)))
    bits, expected = tokenizer.quantise(torch.randn(2, 16, 16, 16), SQUARE)
    latent = torch.zeros_like(expected)
    for scale, tokens in enumerate(bits):
        latent = tokenizer.accumulate(latent, tokenizer.codes(tokens, scale), scale, len(SQUARE))
    torch.testing.assert_close(latent, expected)


def test_half_precision_weights_encode_and_decode():
    tokenizer = BSQTokenizer(EMBEDDED).to(torch.bfloat16)
    features = tokenizer.encode(torch.zeros(1, 3, 128, 128))
    assert features.shape == (1, 16, 16, 16)
    assert tokenizer.decode(features).dtype == torch.float32
