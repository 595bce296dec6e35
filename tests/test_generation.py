"""The public call on the embedded sizes: exact dense runs, split batches, branches, aspect ratios, threads."""

import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from autoprune.backbones import load_backbone
from autoprune.errors import UserError
from autoprune.generation import Observer, generate
from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.pruning.plan import WHOLE_SCALE

PROMPTS = ["a red circle", "a photo of two blue squares", "a striped ring"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny", weights="random", dtype="float32", device="cpu")


def policy_for(backbone, **changes) -> Policy:
    scales = {5: ScalePruning(keep=0.6, cache_scale=4), 6: ScalePruning(keep=0.5, cache_scale=4)}
    values = {"backbone": "tiny", "depth": backbone.depth, "scale_schedule": backbone.scale_schedule(), "scales": scales}
    return Policy(**(values | changes))


def test_images_have_the_promised_form(backbone) -> None:
    images = generate(backbone, PROMPTS, seed=1)
    assert images.shape == (3, 3, 128, 128)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("granularity", ["sublayer", "scale"])
def test_keep_ratio_one_is_bit_identical_to_dense(backbone, granularity: str) -> None:
    dense = generate(backbone, PROMPTS, seed=1)
    scales = {scale: ScalePruning(keep=1.0, cache_scale=0, granularity=granularity) for scale in range(1, 7)}
    assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy_for(backbone, scales=scales)), dense)


@pytest.mark.parametrize("granularity", ["sublayer", "scale"])
def test_dense_after_a_pruned_run_is_bit_identical_to_dense_before(backbone, granularity: str) -> None:
    before = generate(backbone, PROMPTS, seed=1)
    scales = {6: ScalePruning(keep=0.3, cache_scale=5, granularity=granularity)}
    pruned = generate(backbone, PROMPTS, seed=1, policy=policy_for(backbone, scales=scales))
    assert not torch.equal(pruned, before)
    assert torch.equal(generate(backbone, PROMPTS, seed=1), before)


@pytest.mark.parametrize("scorer", ["dc", "random"])
def test_a_split_batch_draws_the_same_noise(backbone, scorer: str) -> None:
    scales = {6: ScalePruning(keep=0.5, cache_scale=4, scorer=scorer)}
    policy = policy_for(backbone, scales=scales)
    together = generate(backbone, PROMPTS, seed=3, policy=policy)
    later = replace(backbone.sampling, first_sample=2)
    torch.testing.assert_close(
        together[2:], generate(backbone, PROMPTS[2:], seed=3, policy=policy, sampling=later), rtol=0, atol=1e-4
    )


def test_guidance_weight_one_equals_running_the_conditional_branch_alone(backbone) -> None:
    both = replace(backbone.sampling, guidance=(2.0,) * 6 + (1.0,))
    dropped = policy_for(backbone, scales={}, guidance=BranchRule("cond", 6))
    ours = generate(backbone, PROMPTS, seed=1, policy=dropped, sampling=replace(backbone.sampling, guidance=2.0))
    torch.testing.assert_close(ours, generate(backbone, PROMPTS, seed=1, sampling=both), rtol=0, atol=1e-4)


def test_guidance_weight_zero_equals_running_the_unconditional_branch_alone(backbone) -> None:
    both = replace(backbone.sampling, guidance=(2.0,) * 6 + (0.0,))
    dropped = policy_for(backbone, scales={}, guidance=BranchRule("uncond", 6))
    ours = generate(backbone, PROMPTS, seed=1, policy=dropped, sampling=replace(backbone.sampling, guidance=2.0))
    torch.testing.assert_close(ours, generate(backbone, PROMPTS, seed=1, sampling=both), rtol=0, atol=1e-4)


def test_skipping_the_last_scales_decodes_the_latent_of_the_earlier_ones(backbone) -> None:
    latents = {}

    class KeepLatents(Observer):
        def scale_done(self, scale, logits, bits, latent) -> None:
            latents[scale.index] = latent

    generate(backbone, PROMPTS, seed=1, observer=KeepLatents())
    expected = backbone.decode(latents[4])
    assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy_for(backbone, scales={}, skip_last=2)), expected)


@pytest.mark.parametrize("h_div_w", [0.5, 1.333, 2.0])
def test_other_aspect_ratios_run_pruned_at_any_batch(backbone, h_div_w: float) -> None:
    schedule = backbone.scale_schedule(h_div_w)
    policy = policy_for(backbone).for_schedule(schedule)
    images = generate(backbone, PROMPTS, policy=policy, sampling=replace(backbone.sampling, h_div_w=h_div_w))
    assert images.shape == (3, 3, 8 * schedule[-1][1], 8 * schedule[-1][2])


def test_only_kept_tokens_run(backbone) -> None:
    lengths = []
    hook = backbone.model.layers()[2].ffn.register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    try:
        generate(backbone, PROMPTS, policy=policy_for(backbone))
    finally:
        hook.remove()
    assert lengths == [1, 4, 16, 36, 64, 87, 128]


def test_the_observer_sees_every_selection(backbone) -> None:
    seen = []

    class Selections(Observer):
        def kept(self, scale, site, index) -> None:
            seen.append((scale, site, index.shape))

    scales = {6: ScalePruning(keep=0.5, cache_scale=4, granularity="scale")}
    generate(backbone, PROMPTS, policy=policy_for(backbone, scales=scales), observer=Selections())
    assert seen == [(6, WHOLE_SCALE, (6, 128))]


def test_two_policies_in_two_threads_never_meet(backbone) -> None:
    policies = [policy_for(backbone), policy_for(backbone, scales={}, guidance=BranchRule("cond", 4))]
    alone = [generate(backbone, PROMPTS, seed=5, policy=policy) for policy in policies]
    turns, results = threading.Barrier(2), {}

    class TakingTurns(Observer):
        def scale_started(self, scale) -> None:
            turns.wait(timeout=60)

    def work(index: int) -> None:
        results[index] = generate(backbone, PROMPTS, seed=5, policy=policies[index], observer=TakingTurns())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], alone[index]) for index in range(2))


def test_a_policy_for_another_schedule_is_refused(backbone) -> None:
    with pytest.raises(UserError, match="scale schedule"):
        generate(backbone, PROMPTS, policy=policy_for(backbone).for_schedule(backbone.scale_schedule(2.0)))


def test_an_unknown_word_is_named_with_the_vocabulary(backbone) -> None:
    with pytest.raises(UserError, match="'dog'.*circle"):
        generate(backbone, ["a red dog"])


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(UserError, match="choose from tiny"):
        load_backbone("gpt")
    with pytest.raises(UserError, match="choose from auto, float32"):
        load_backbone("tiny", weights="random", dtype="int3")
    with pytest.raises(UserError, match="cannot be used here"):
        load_backbone("tiny", weights="random", device="abacus")


def test_unfit_weights_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_backbone("tiny", weights=tmp_path / "missing.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(b"1234567890")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_backbone("tiny", weights=truncated)
    other = tmp_path / "other.safetensors"
    save_file({"infinity.pos_start": torch.zeros(1, 1, 8)}, other)
    with pytest.raises(UserError, match="tensors differ, first infinity"):
        load_backbone("tiny", weights=other)


@pytest.mark.parametrize("name", ["dense", "pruned", "one branch"])
def test_nothing_of_a_generation_is_alive_when_the_decoder_starts(backbone, name: str) -> None:
    changes = {"dense": {"scales": {}}, "pruned": {}, "one branch": {"guidance": BranchRule("cond", 5)}}[name]
    held, alive = [], []

    class Watch(Observer):
        def group_done(self, state, latent) -> None:
            tensors = [each for buffer in state.buffers for each in (buffer.keys, buffer.values)]
            tensors += [*state.conditioning.text, *(cache for cache, _ in state.sandwich.caches.values())]
            held.extend(weakref.ref(each) for each in (state, *state.buffers, state.sandwich, *tensors))

    hook = backbone.tokenizer.decoder.register_forward_pre_hook(lambda *_: alive.extend(each() is not None for each in held))
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        generate(backbone, PROMPTS, policy=policy_for(backbone, **changes), observer=Watch())
    finally:
        gc.enable()
        hook.remove()
    assert len(alive) > 50 and not any(alive)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_keep_ratio_one_is_bit_identical_to_dense() -> None:
    loaded = load_backbone("tiny", weights="random", device="cuda")
    scales = {scale: ScalePruning(keep=1.0, cache_scale=0) for scale in range(1, 7)}
    dense = generate(loaded, PROMPTS, seed=1)
    assert torch.equal(generate(loaded, PROMPTS, seed=1, policy=policy_for(loaded, scales=scales)), dense)


def test_a_negative_prompt_takes_the_place_of_the_unconditional_text(backbone) -> None:
    plain = generate(backbone, PROMPTS, seed=2)
    negative = generate(backbone, PROMPTS, seed=2, sampling=replace(backbone.sampling, negative="a blue square"))
    other = generate(backbone, PROMPTS, seed=2, sampling=replace(backbone.sampling, negative="a striped ring"))
    assert not torch.equal(plain, negative) and not torch.equal(negative, other)
    unguided = replace(backbone.sampling, guidance=1.0)
    assert torch.equal(
        generate(backbone, PROMPTS, seed=2, sampling=unguided),
        generate(backbone, PROMPTS, seed=2, sampling=replace(unguided, negative="a blue square")),
    )


def test_guidance_inside_the_layers_differs_from_guidance_on_logits(backbone) -> None:
    inside = replace(backbone.sampling, guidance_layers=(-2,))
    images = generate(backbone, PROMPTS, seed=2, sampling=inside)
    assert images.isfinite().all() and not torch.equal(images, generate(backbone, PROMPTS, seed=2))


def test_given_first_scales_replace_what_is_drawn_also_one_sample_at_a_time(backbone) -> None:
    drawn = {}

    class Bits(Observer):
        def scale_done(self, scale, logits, bits, latent) -> None:
            drawn[scale.index] = bits

    generate(backbone, PROMPTS, seed=8, observer=Bits())
    given = tuple(drawn[scale] for scale in range(7))
    leaked = replace(backbone.sampling, given=given)
    expected = generate(backbone, PROMPTS, seed=8)
    assert torch.equal(generate(backbone, PROMPTS, seed=99, sampling=leaked), expected)
    split = policy_for(backbone, scales={}, guidance=BranchRule("adaptive", 4, threshold=0.0), batch="split")
    alone = generate(backbone, PROMPTS, seed=99, policy=split, sampling=leaked)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)


def test_other_sampling_defaults_are_checked_when_they_are_set(backbone) -> None:
    wide = backbone.sampled(h_div_w=0.5, guidance=(1.0,) * 7)
    assert wide.scale_schedule() == backbone.scale_schedule(0.5) and wide.sampling.guidance == (1.0,) * 7
    for changes, words in (({"temperature": 0.0}, "temperature must be above 0"), ({"guidance": (1.0, 2.0)}, "one a scale")):
        with pytest.raises(UserError, match=words):
            backbone.sampled(**changes)
