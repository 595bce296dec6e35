"""Decoding within memory: what is decided, that it changes nothing, and that nothing of a generation is in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoprune.backbones import Backbone, LoadArguments, load_backbone
from autoprune.backbones import decoding as module
from autoprune.backbones.decoding import DecodePlan, Decoding, decode, decode_need, decode_plan, free_memory
from autoprune.backbones.official import RELEASED
from autoprune.errors import UserError

UNCOMPILED = """
import logging, sys, torch
from autoprune.backbones import decoding, load_backbone
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
tokenizer = load_backbone("tiny", weights="random", device="cpu").tokenizer
latent, keys = torch.randn(1, 16, 8, 8), list(tokenizer.state_dict())
with torch.inference_mode():
    images = [tokenizer.decode(latent, decoding._COMPILED) for _ in range(2)]
    print("equal", all(torch.equal(image, tokenizer.decode(latent)) for image in images), keys == list(tokenizer.state_dict()))
"""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("tiny", device="cpu", dtype="float32")


def megabytes(samples: float, backbone: Backbone, latent: torch.Tensor) -> float:
    return samples * decode_need(backbone.tokenizer, latent.shape[1:]) / 2**20


@pytest.mark.parametrize(
    ("fits", "plan"),
    [
        (7.0, DecodePlan(7, strips=False, compiled=False)),
        (6.9, DecodePlan(4, strips=False, compiled=False)),
        (2.5, DecodePlan(2, strips=False, compiled=False)),
        (1.0, DecodePlan(1, strips=False, compiled=False)),
        (0.9, DecodePlan(1, strips=True, compiled=False)),
    ],
)
def test_a_limit_cuts_the_batch_evenly_and_moves_rounding_only(backbone: Backbone, fits: float, plan: DecodePlan) -> None:
    latent = torch.randn(7, 16, 16, 16)
    options = Decoding(memory_mb=megabytes(fits, backbone, latent))
    assert decode_plan(backbone.tokenizer, latent, options) == plan
    with torch.inference_mode():
        whole, ours = backbone.tokenizer.decode(latent), decode(backbone.tokenizer, latent, options)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5 if plan.samples < 7 else 0)


def test_the_need_is_what_the_widest_step_holds_by_hand() -> None:
    spec = RELEASED["infinity2b"]
    with torch.device("meta"):
        tokenizer = spec.family.tokenizer(spec.tokenizer).eval()
    tokenizer.decoder.to(torch.bfloat16)
    channels = 256 + 256 + 128  # a block's input, its norm, what the convolution makes of it; besides, the latent twice
    assert decode_need(tokenizer, (32, 64, 64)) == 2 * channels * 1024**2 + (4 + 2) * 32 * 64**2


@pytest.mark.parametrize("name", [name for name, spec in RELEASED.items() if not spec.family.tokenizer.streams])
def test_no_decode_needs_more_than_the_quick_bound(name: str) -> None:
    spec = RELEASED[name]
    with torch.device("meta"):
        tokenizer = spec.family.tokenizer(spec.tokenizer).eval()
    latent = torch.empty(1, tokenizer.channels, *tokenizer.latent_size(spec.schedule_for(1.0)), device="meta")
    assert decode_need(tokenizer, latent.shape[1:]) <= module._ceiling(tokenizer, latent)


@pytest.mark.parametrize(("fits", "samples"), [(7.0, 7), (2.5, 2), (1.0, 1), (0.5, 1)])
def test_videos_that_do_not_stream_are_sliced_but_never_cut_into_strips(fits: float, samples: int) -> None:
    loaded = load_backbone("tiny_video", device="cpu", dtype="float32")
    latent = torch.randn(7, loaded.tokenizer.channels, *loaded.tokenizer.latent_size(loaded.scale_schedule()))
    options = Decoding(memory_mb=megabytes(fits, loaded, latent))
    assert decode_plan(loaded.tokenizer, latent, options) == DecodePlan(samples, strips=False, compiled=False)
    assert decode_need(loaded.tokenizer, latent.shape[1:]) <= module._ceiling(loaded.tokenizer, latent)
    with torch.inference_mode():
        whole, ours = loaded.tokenizer.decode(latent), decode(loaded.tokenizer, latent, options)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)


def test_a_batch_far_beyond_the_memory_of_this_machine_is_sliced(backbone: Backbone) -> None:
    latent = torch.zeros(1, 16, 16, 16).expand(10**7, -1, -1, -1)
    plan = decode_plan(backbone.tokenizer, latent, Decoding())
    assert 1 <= plan.samples < len(latent) and not plan.strips
    assert plan.samples * decode_need(backbone.tokenizer, latent.shape[1:]) < free_memory(latent.device)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_free_memory_lies_between_the_unused_pages_and_all_of_them() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    free = free_memory(torch.device("cpu"))
    assert 0.5 * os.sysconf("SC_AVPHYS_PAGES") * page < free < os.sysconf("SC_PHYS_PAGES") * page


def test_a_machine_without_a_compiler_warns_once_and_decodes_the_same(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment |= {name: os.environ[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH") if name in os.environ}
    run = subprocess.run([sys.executable, "-c", UNCOMPILED], env=environment, capture_output=True, text=True, timeout=120)
    lines = run.stdout.strip().splitlines()
    assert len([line for line in lines if "the decoder runs uncompiled" in line]) == 1, run.stderr
    assert lines[-1] == "equal True True"


def test_arguments_reach_the_backbone_and_bad_ones_are_refused() -> None:
    loaded = LoadArguments(weights="random", device="cpu", decode_memory_mb=100, compiler="never").load()
    assert loaded.decoding == Decoding(100, "never")
    with pytest.raises(UserError, match="decode_memory_mb must be at least 0, got -1"):
        LoadArguments(decode_memory_mb=-1).load()
    with pytest.raises(UserError, match="compiler"):
        LoadArguments(compiler="always").load()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fits", [5.0, 2.5, 0.9])
def test_on_cuda_every_way_gives_the_same_images_but_for_rounding(fits: float) -> None:
    loaded = load_backbone("tiny", device="cuda")
    latent = torch.randn(5, 16, 16, 16, device="cuda")
    options = Decoding(memory_mb=megabytes(fits, loaded, latent))
    keys = list(loaded.tokenizer.state_dict())
    with torch.inference_mode():
        whole, ours = loaded.tokenizer.decode(latent), decode(loaded.tokenizer, latent, options)
    assert decode_plan(loaded.tokenizer, latent, options).compiled == (fits > 1)
    assert (ours - whole).abs().mean() < 0.01 and list(loaded.tokenizer.state_dict()) == keys
