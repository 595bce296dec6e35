"""The training recipes in small: what the parts compute, and that a killed run goes on where it was."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import autoprune
from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.caption_encoder import CaptionEncoder
from autoprune.backbones.infinity import Infinity
from autoprune.backbones.schedules import scale_schedule
from autoprune.errors import UserError
from autoprune.testbed import scenes
from autoprune.testbed.captions import sample_description
from autoprune.testbed.distributed import Team
from autoprune.testbed.generator_checkpoint import SPEC, GeneratorRun, load_tokenizer, read_record
from autoprune.testbed.generator_recipe import CURRICULUM, GeneratorRecipe, Optimisers, initialise, pick_scales
from autoprune.testbed.generator_session import GeneratorSession
from autoprune.testbed.latents import open_latents, teacher_forcing
from autoprune.testbed.muon import Muon, MuonMatrix, orthogonalise
from autoprune.testbed.train_text import SCENE_EXAM, pretrain_text, scene_answers, text_batch

SCHEDULE = scale_schedule()


@pytest.fixture(scope="module")
def tokenizer() -> BSQTokenizer:
    torch.manual_seed(0)
    return BSQTokenizer(SPEC.tokenizer).eval().requires_grad_(False)


def test_orthogonalise_brings_singular_values_near_one():
    matrices = torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_muon_treats_fused_matrices_one_by_one():
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    fused = torch.nn.Parameter(torch.zeros(24, 8))
    apart = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    fused.grad = gradient
    for parameter, part in zip(apart, gradient.split(8), strict=True):
        parameter.grad = part
    Muon([MuonMatrix(fused, 3)], lr=0.1).step()
    Muon([MuonMatrix(parameter) for parameter in apart], lr=0.1).step()
    torch.testing.assert_close(fused, torch.cat(apart))


def test_teacher_forcing_on_the_first_scales_alone_gives_what_it_gives_there_on_all(tokenizer):
    features = torch.randn(2, tokenizer.config.bits, *SCHEDULE[-1][1:])
    options = {"max_flip": 0.0, "generator": torch.Generator()}
    every = teacher_forcing(tokenizer, features, SCHEDULE, **options)
    first = teacher_forcing(tokenizer, features, SCHEDULE[:4], **options)
    assert len(first.targets) == 4 and len(first.inputs) == 3
    for ours, theirs in ((first.targets, every.targets), (first.inputs, every.inputs)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))


def test_teacher_forcing_without_flips_is_what_the_tokenizer_and_inference_compute(tokenizer):
    features = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher = teacher_forcing(tokenizer, features, SCHEDULE, max_flip=0.0, generator=torch.Generator())
    bits, _ = tokenizer.quantise(features, SCHEDULE)
    latent = torch.zeros_like(features)
    for scale, grid in enumerate(SCHEDULE):
        assert torch.equal(teacher.targets[scale], bits[scale].flatten(1, 2).bool())
        if scale:
            torch.testing.assert_close(teacher.inputs[scale - 1], tokenizer.next_tokens(latent, grid))
        latent = tokenizer.accumulate(latent, tokenizer.codes(bits[scale], scale), scale, len(SCHEDULE))


def test_flipped_bits_change_later_inputs_and_targets_repair_them(tokenizer):
    features = torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    clean, flipped = (
        teacher_forcing(tokenizer, features, SCHEDULE, max_flip=rate, generator=torch.Generator().manual_seed(1))
        for rate in (0.0, 0.5)
    )
    assert torch.equal(clean.targets[0], flipped.targets[0])
    assert not torch.allclose(clean.inputs[0], flipped.inputs[0])
    assert not torch.equal(clean.targets[-1], flipped.targets[-1])


def test_text_answers_agree_with_the_scenes():
    rng = np.random.default_rng(0)
    drawn = [scenes.sample_scene(rng) for _ in range(100)]
    batch = text_batch([([0] * 28, scene_answers(scene.description)) for scene in drawn], SCENE_EXAM)
    for index, scene in enumerate(drawn):
        nouns = (~batch.places[index, :, 0].isnan()).nonzero()[:, 0]
        assert len(nouns) == len(scene.description.nouns)
        taken = [batch.places[index, noun].nonzero()[:, 0].tolist() for noun in nouns]
        slots = [thing.slot for thing in scene.things]
        assert taken == ([sorted(slots)] if scene.description.relation == "count" else [[slot] for slot in slots])


def test_text_pre_training_learns_places():
    torch.manual_seed(0)
    encoder = CaptionEncoder()
    before = encoder.words.weight.clone()
    accuracy = pretrain_text(Team(), encoder, steps=20, seed=0)
    assert 0 <= accuracy <= 1
    assert not torch.equal(before, encoder.words.weight)
    assert sample_description(np.random.default_rng(0)).text()


def test_the_curriculum_ends_with_mostly_full_steps():
    assert {pick_scales(0.0, draw) for draw in (0.0, 0.99)} == {4, 5}
    assert pick_scales(1.0, 0.99) == len(SCHEDULE)
    assert all(sum(shares.values()) == pytest.approx(1) for _, shares in CURRICULUM)


def test_the_learning_rate_warms_up_holds_and_falls():
    recipe = GeneratorRecipe()
    assert recipe.rate_factor(0, 0.0) == pytest.approx(1 / recipe.warmup_steps)
    assert recipe.rate_factor(1000, recipe.constant_share) == 1
    assert recipe.rate_factor(1000, 1.0) == pytest.approx(recipe.final_rate)


def test_every_weight_has_an_optimiser():
    model, text = Infinity(SPEC.transformer), CaptionEncoder()
    initialise(model)
    optimisers = Optimisers(model, text, GeneratorRecipe())
    owned = sum(parameter.numel() for group, _ in optimisers._groups for parameter in group["params"])
    assert owned == sum(parameter.numel() for part in (model, text) for parameter in part.parameters())


def test_a_run_saves_resumes_and_its_file_generates(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.safetensors"
    save_file({key: value.clone() for key, value in tokenizer.state_dict().items()}, path)
    recipe = GeneratorRecipe(minutes=10, images=8, text_steps=1, batch_share=0.05)
    run = GeneratorRun(recipe, path, tmp_path / "tiny.safetensors", tmp_path / "latents", "cpu", resume=True)
    loaded = load_tokenizer(run)
    latents = open_latents(run.cache, loaded, 8, seed=0, team=Team())
    first = GeneratorSession(Team(), run, loaded)
    first.prepare(started=0.0)
    first.elapsed = 0.0
    first.step(latents)
    first.finish(latents)
    second = GeneratorSession(Team(), run, loaded)
    second.prepare(started=0.0)
    assert second.steps == 1
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict())
    second.step(latents)
    record = read_record(run.out)
    assert record["steps"] == 1 and json.loads(run.out.with_suffix(".json").read_text()) == record
    assert run.out.stat().st_size < 16e6
    images = autoprune.generate(autoprune.load_backbone("tiny", weights=run.out), ["a red circle"])
    assert images.shape == (1, 3, 128, 128)


def test_a_missing_tokenizer_is_one_sentence(tmp_path):
    run = GeneratorRun(GeneratorRecipe(), tmp_path / "none", tmp_path / "out", tmp_path, "cpu")
    with pytest.raises(UserError, match="cannot be read.*train_tokenizer"):
        load_tokenizer(run)
