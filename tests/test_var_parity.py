"""Our VAR against traces of the official code, every job and array of the goldens folder, and every pruning piece on it."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import var_goldens
from goldens import FOLDER, Job, jobs

from autoprune.backbones import Backbone
from autoprune.backbones.var import (
    VAR,
    VAR_D16,
    VAR_D20,
    VAR_D24,
    VAR_D30,
    VAR_D36,
    ClassLabels,
    VARConfig,
    read_labels,
    state_without_masks,
)
from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer
from autoprune.errors import UserError
from autoprune.generation import Observer, generate, generate_latent
from autoprune.policy import BranchRule, KeyRule, Policy, ProbeRule, ScalePruning, StopRule
from autoprune.prefix import record_prefix
from autoprune.pruning.plan import compile_plan
from autoprune.rules import GRANULARITIES, RESTORERS, SCORERS

TOLERANCES = {"latent": 1e-5, "f_hat.": 1e-5, "next_token_map.": 1e-5, "image_": 5e-4}
SIZES = {
    "var_d16": (VAR_D16, 310_283_520),
    "var_d20": (VAR_D20, 600_917_136),
    "var_d24": (VAR_D24, 1_033_399_360),
    "var_d30": (VAR_D30, 2_010_020_356),
    "var_d36": (VAR_D36, 2_353_893_904),
}
TINY = VARConfig(width=32, heads=2, depth=4, sides=(1, 2, 3, 4, 6, 8), channels=8, vocabulary=64)
TINY_VAE = VQConfig(vocabulary=64, channels=8, base=32, channel_multipliers=(1, 1), blocks=1, scales=6)
PROMPTS = ["3", "207"]
JOBS = jobs("var_")


def test_there_are_traces_to_compare_with() -> None:
    assert JOBS


@pytest.fixture(scope="module", params=JOBS, ids=[f"{job.trace}:{job.name}" for job in JOBS])
def compared(request: pytest.FixtureRequest) -> tuple[dict, dict]:
    job: Job = request.param
    arrays = job.arrays
    loaded = var_goldens.backbone(job.weights)
    recorder = var_goldens.Recorder(loaded)
    with torch.inference_mode():
        latent = generate_latent(loaded, var_goldens.request_of(job, arrays), recorder)
        image = loaded.decode(latent)
    recorder.remove()
    return arrays, recorder.found | {"latent": latent, "image": image}


def test_every_recorded_array_is_reproduced(compared: tuple[dict, dict]) -> None:
    arrays, found = compared
    names = [name for name in arrays if name != "label"]
    assert names
    for name in names:
        recorded = arrays[name]
        if name.startswith("idx."):
            np.testing.assert_array_equal(found[name].numpy(), recorded, err_msg=name)
        elif name.startswith("image_u8_rgb"):
            assert np.abs(_bytes_rgb(found["image"], name) - recorded.astype(np.int64)).max() <= 1, name
        else:
            ours = _as_recorded(name, found)[: len(recorded)]
            np.testing.assert_allclose(ours, recorded, rtol=0, atol=_tolerance(name), err_msg=name)


def _tolerance(name: str) -> float:
    return next((value for start, value in TOLERANCES.items() if name.startswith(start)), 2e-4)


def _as_recorded(name: str, found: dict[str, torch.Tensor]) -> np.ndarray:
    image = found["image"]
    if name.startswith("image_01_f32_crop"):
        side = int(name.rpartition("crop")[2])
        return image[..., :side, :side].numpy()
    if name == "image_mean_std":
        return torch.stack((image.mean(), image.std())).numpy()
    return found[name].numpy()


def _bytes_rgb(image: torch.Tensor, name: str) -> np.ndarray:
    stride = int(name.rpartition("stride")[2]) if "stride" in name else 1
    pixels = (image * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels[:, ::stride, ::stride].numpy().astype(np.int64)


@pytest.mark.parametrize("trace", sorted({job.trace for job in JOBS}))
def test_batch_of_two_equals_two_batches_of_one(trace: str) -> None:
    job = next(job for job in JOBS if job.trace == trace and job.record["top_k"] == 1)
    loaded, request = var_goldens.backbone(job.weights), var_goldens.request_of(job, job.arrays)
    labels = torch.tensor([1, 3])
    with torch.inference_mode():
        together = generate_latent(loaded, replace(request, text=ClassLabels(labels), samples=(0, 1)))
        for index in range(2):
            alone = replace(request, text=ClassLabels(labels[index : index + 1]), samples=(index,))
            torch.testing.assert_close(together[index : index + 1], generate_latent(loaded, alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes_have_the_published_parameters_and_the_official_keys(name: str) -> None:
    config, count = SIZES[name]
    with torch.device("meta"):
        model = VAR(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == state_without_masks(_manifest(name))


def test_the_tokenizer_has_the_published_parameters_and_the_official_keys() -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig())
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 108_948_355
    assert {key: list(value.shape) for key, value in tokenizer.state_dict().items()} == _manifest("var_vae_ch160v4096z32")


def _manifest(name: str) -> dict[str, list[int]]:
    path = FOLDER / "key_manifests.npz"
    if not path.exists():
        pytest.skip("no key manifests in this goldens folder")
    return {key: list(shape) for key, shape in json.loads(bytes(np.load(path)[name]).decode()).items()}


@pytest.mark.parametrize("prompt", ["cat", "1000", "-1", "2.5", "", "²"])
def test_a_prompt_that_is_no_class_is_refused_in_one_sentence(prompt: str) -> None:
    with pytest.raises(UserError, match=r"^a prompt must be a class number from 0 to 999, got .*; [^.]*\.$"):
        read_labels(["207", prompt])


def test_class_numbers_are_read_as_they_stand() -> None:
    assert read_labels(["0", " 207 ", "999"]).labels.tolist() == [0, 207, 999]
    with pytest.raises(UserError, match="h_div_w must be 1"):
        TINY.schedule_for(1.5)


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def tiny(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return var_goldens.backbone_of(replace(TINY, shared_aln=request.param), TINY_VAE, {})


@pytest.fixture(scope="module")
def dense(tiny: Backbone) -> torch.Tensor:
    return generate(tiny, PROMPTS, seed=1)


def _policy(backbone: Backbone, **fields: object) -> Policy:
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), **({"chunks": 4} | fields))


def _rule(keep: float, scorer: str, restorer: str, granularity: str) -> ScalePruning | None:
    """Returns the rule, None where the pieces cannot work together."""
    fields = {"reducer": "merge" if restorer == "merged" else "gather", "anchors": 4 if restorer == "anchor" else 0}
    try:
        return ScalePruning(keep, 3, scorer=scorer, restorer=restorer, granularity=granularity, **fields)
    except UserError:
        return None


def _combinations() -> Iterator[tuple[str, str, str]]:
    for scorer, restorer, granularity in itertools.product(SCORERS, RESTORERS, GRANULARITIES):
        if (scorer == "dc" or restorer in ("cached", "nearest")) and _rule(0.5, scorer, restorer, granularity):
            yield scorer, restorer, granularity


@pytest.mark.parametrize("pieces", list(_combinations()), ids="-".join)
def test_every_piece_is_dense_at_one_and_gives_an_image_at_half(
    tiny: Backbone, dense: torch.Tensor, pieces: tuple[str, str, str]
) -> None:
    whole = _policy(tiny, scales={scale: _rule(1.0, *pieces) for scale in (4, 5)})
    assert torch.equal(generate(tiny, PROMPTS, seed=1, policy=whole), dense)
    shapes = []

    class Watch(Observer):
        def kept(self, scale: int, site: int, index: torch.Tensor) -> None:
            shapes.append((scale, index.shape[1]))

    half = _policy(tiny, scales={scale: _rule(0.5, *pieces) for scale in (4, 5)})
    image = generate(tiny, PROMPTS, seed=1, policy=half, observer=Watch())
    assert image.isfinite().all() and not torch.equal(image, dense)
    sites = {"sublayer": 2 * tiny.depth, "chunk": 4, "scale": 1}[pieces[2]]
    assert sorted(shapes) == [(4, 18)] * sites + [(5, 32)] * sites


SCALE_RULE = ScalePruning(0.4, 3, granularity="scale")
ZERO_RULE = ScalePruning(0.5, granularity="scale", restorer="zero_residual", scorer="latent_l2")
DECISIONS = {
    "cond alone": {"guidance": BranchRule("cond", 3)},
    "uncond alone": {"guidance": BranchRule("uncond", 4)},
    "extrapolated": {"guidance": BranchRule("cond", 4, "extrapolate")},
    "adaptive": {"guidance": BranchRule("adaptive", 3, metric="kl_bits", threshold=1e9)},
    "skip": {"skip_last": 2},
    "group": {"group_from": 4, "scales": {5: ZERO_RULE}},
    "stop": {"stop": StopRule(4, threshold=1e9, share=0.5)},
    "probe": {"probe": ProbeRule(3, 2, (0.0, 0.0), (1.0, 1.0), (0.1, 0.1), skip_cuts=(-9.0,))},
    "keys": {"keys": KeyRule(1, 2)},
    "budget": {"keys": KeyRule(budget=0.3)},
    "sublayers": {"scales": {5: ScalePruning(0.5, 3, layers=(1, 2), sublayers=("sa", "ca"))}},
    "pruned": {"scales": {4: SCALE_RULE, 5: SCALE_RULE}, "guidance": BranchRule("cond", 5)},
}


@pytest.mark.parametrize("name", DECISIONS)
def test_every_decision_gives_an_image_and_leaves_nothing_behind(tiny: Backbone, dense: torch.Tensor, name: str) -> None:
    image = generate(tiny, PROMPTS, seed=1, policy=_policy(tiny, **DECISIONS[name]))
    assert image.shape == dense.shape and image.isfinite().all() and not torch.equal(image, dense)
    assert torch.equal(generate(tiny, PROMPTS, seed=1), dense)


def test_a_skip_leaves_the_latent_of_the_scales_before_it(tiny: Backbone) -> None:
    latents = []

    class Watch(Observer):
        def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
            latents.append(latent)

    generate(tiny, PROMPTS, seed=1, observer=Watch())
    skipped = generate(tiny, PROMPTS, seed=1, policy=_policy(tiny, skip_last=2))
    assert torch.equal(tiny.decode(latents[3]), skipped)


@pytest.mark.parametrize("name", [name for name in DECISIONS if name not in ("keys", "budget")])
def test_a_start_from_a_recorded_prefix_is_bit_identical(tiny: Backbone, name: str) -> None:
    prefix = record_prefix(tiny, PROMPTS, seed=5, sampling=tiny.sampling)
    policy = _policy(tiny, **DECISIONS[name])
    start = prefix.start(compile_plan(policy, policy.scale_schedule, policy.depth))
    assert start is not None
    image = generate(tiny, PROMPTS, seed=5, policy=policy, start=start)
    assert torch.equal(image, generate(tiny, PROMPTS, seed=5, policy=policy))


def test_a_shared_modulation_equals_networks_a_block_whose_biases_hold_the_learned_parts() -> None:
    torch.manual_seed(0)
    shared = var_goldens.backbone_of(replace(TINY, shared_aln=True), TINY_VAE, {})
    own = replace(shared, model=VAR(TINY).eval().requires_grad_(False))
    state = shared.model.state_dict()
    weight, bias = state.pop("shared_ada_lin.1.weight"), state.pop("shared_ada_lin.1.bias")
    for layer in range(TINY.depth):
        learned = state.pop(f"blocks.{layer}.ada_gss").flatten()
        state |= {f"blocks.{layer}.ada_lin.1.weight": weight, f"blocks.{layer}.ada_lin.1.bias": bias + learned}
    own.model.load_state_dict(state)
    ours, theirs = (each.model.condition(read_labels(PROMPTS)).modulation for each in (shared, own))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    images = [generate(each, PROMPTS, seed=1) for each in (shared, own)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_the_unconditional_class_is_the_one_after_the_last_unless_a_negative_is_given() -> None:
    model, labels = VAR(TINY), read_labels(PROMPTS)
    assert model.with_unconditional(labels, None).labels.tolist() == [3, 207, 1000, 1000]
    assert model.with_unconditional(labels, read_labels(["5", "6"])).labels.tolist() == [3, 207, 5, 6]


def test_masks_of_official_files_are_dropped_and_everything_else_is_strict(tiny: Backbone) -> None:
    state = tiny.model.state_dict()
    official = state | {"lvl_1L": torch.zeros(1, 130), "attn_bias_for_masking": torch.zeros(1, 1, 130, 130)}
    assert state_without_masks(official).keys() == state.keys()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        tiny.model.load_state_dict(state_without_masks(official | {"other": torch.zeros(1)}))


def test_blocks_may_be_in_half_precision() -> None:
    torch.manual_seed(0)
    loaded = var_goldens.backbone_of(TINY, TINY_VAE, {})
    expected = loaded.model.condition(read_labels(PROMPTS)).modulation
    for block in loaded.model.layers():
        block.bfloat16()
    loaded.tokenizer.decoder.bfloat16()
    found = loaded.model.condition(read_labels(PROMPTS)).modulation
    torch.testing.assert_close(found[0][2].float(), expected[0][2], rtol=0, atol=0.02)
    image = generate(loaded, PROMPTS, seed=1)
    assert image.dtype == torch.float32 and image.isfinite().all()
