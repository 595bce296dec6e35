"""The tokenizer recipe: it learns, its processes agree, it resumes, and its file loads again."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig, load_tokenizer
from autoprune.testbed import train_tokenizer
from autoprune.testbed.convolution_optimiser import ConvolutionOptimiser
from autoprune.testbed.distributed import Team, run_team
from autoprune.testbed.image_store import open_images
from autoprune.testbed.reconstruction import reconstruct, reconstruction_psnr

SMALL = {"base": 8, "channel_multipliers": [2, 2], "encoder_blocks": 1, "decoder_blocks": 1}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(train_tokenizer, "VALIDATION_IMAGES", 8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_command(folder, *more, steps):
    train_tokenizer.main(
        [
            *("--out", str(folder / "tokenizer.safetensors"), "--cache", str(folder / "images"), "--images", "32"),
            *("--batch", "4", "--steps", str(steps), "--config", json.dumps(SMALL), *more),
        ]
    )
    return folder / "tokenizer.safetensors"


def test_two_processes_write_a_file_that_loads(tmp_path):
    path = run_command(tmp_path, "--processes", "2", steps=4)
    tokenizer = load_tokenizer(path)
    assert tokenizer.config.channel_multipliers == (2, 2)
    with safe_open(path, "pt") as file:
        record = file.metadata()
    assert json.loads(record["recipe"])["seed"] == 0
    assert record["steps"] == "4"


def test_training_resumes_where_the_state_file_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "SAVE_SECONDS", 0.0)
    run_command(tmp_path, "--processes", "1", steps=2)
    first = torch.load(tmp_path / "tokenizer.state", weights_only=True)
    path = run_command(tmp_path, "--processes", "1", "--resume", steps=5)
    with safe_open(path, "pt") as file:
        assert (first["steps"], file.metadata()["steps"]) == (2, "5")


def test_unknown_configuration_field_ends_with_code_2_and_lists_the_fields(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train_tokenizer.main(["--config", '{"depth": 3}'])
    assert ended.value.code == 2
    assert "norm_groups" in capsys.readouterr().err


def test_a_few_updates_bring_the_reconstruction_closer():
    torch.manual_seed(0)
    model = BSQTokenizer(TokenizerConfig(bits=16, base=8, channel_multipliers=(2, 2), norm_groups=8, pixel_patch=4))
    optimiser = ConvolutionOptimiser(model, 0.0)
    images = torch.rand(4, 3, 1, 1).mul(2).sub(1).expand(4, 3, 128, 128).contiguous()
    losses = []
    for _ in range(12):
        result = reconstruct(model, images, train_encoder=True, flip_rate=0.0)
        model.zero_grad()
        result.loss.backward()
        optimiser.step(2e-3, 5e-3)
        losses.append(result.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_resting_encoder_gets_no_gradient_from_the_loss():
    model = BSQTokenizer(TokenizerConfig(bits=16, base=8, channel_multipliers=(2, 2), norm_groups=8, pixel_patch=4))
    reconstruct(model, torch.zeros(4, 3, 128, 128), train_encoder=False, flip_rate=0.1).loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_psnr_is_10_log10_of_the_squared_error(tmp_path):
    model = BSQTokenizer(TokenizerConfig(bits=16, base=8, channel_multipliers=(2, 2), norm_groups=8, pixel_patch=4)).eval()
    images = np.array(open_images(tmp_path, 3, seed=1, team=Team()))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        schedule = [(1, n, n) for n in (1, 2, 4, 6, 8, 12, 16)]
        _, latent = model.quantise(model.encode(2 * pixels - 1), schedule)
        error = ((model.decode(latent) + 1) / 2 - pixels).square().mean()
    assert reconstruction_psnr(model, images)[-1] == pytest.approx(float(-10 * torch.log10(error)), abs=1e-3)


def test_images_are_those_of_the_seed_however_many_processes_render(tmp_path):
    from autoprune.testbed.scenes import training_pair

    run_team(_render, tmp_path, processes=2)
    images = open_images(tmp_path, 5, seed=3, team=Team())
    np.testing.assert_array_equal(images[4], training_pair(3, 4)[0])


def _render(team, folder):
    open_images(folder, 5, seed=3, team=team)


def test_gradients_and_extra_numbers_are_averaged_over_the_team():
    run_team(_check_average, None, processes=2)


def _check_average(team, _):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    parameters[0].grad = torch.full((2, 3), float(team.rank))
    extra = team.average_gradients(parameters, torch.tensor([10.0 * team.rank]))
    assert extra.tolist() == [5.0]
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 0.5))
    assert torch.equal(parameters[1].grad, torch.zeros(4))
