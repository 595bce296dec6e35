"""HART on a small random model: what its family changes for policies, searches, prefixes and precision."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hart_goldens
import numpy as np
import pytest
import torch

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.hart import HART_0_7B, HART_SAMPLING, Hart, HartConfig
from autoprune.backbones.residual_diffusion import denoising_steps
from autoprune.backbones.vq_tokenizer import VQConfig
from autoprune.errors import UserError
from autoprune.generation import Observer, generate
from autoprune.policy import BranchRule, KeyRule, Policy, ProbeRule, ScalePruning, StopRule
from autoprune.prefix import record_prefix
from autoprune.pruning.plan import compile_plan
from autoprune.rules import GRANULARITIES, RESTORERS, SCORERS
from autoprune.search.neighbour import random_vector
from autoprune.search.space import SearchSpace, Target, space_for
from autoprune.search.space_file import read_space
from tests.test_space import calibration

CONFIG = HartConfig(
    width=32,
    heads=2,
    depth=4,
    sides=(1, 2, 3, 4, 6, 8),
    context_tokens=7,
    context_width=12,
    vocabulary=64,
    channels=8,
    normed_context=True,
    diffusion_width=16,
    diffusion_depth=2,
)
VAE = VQConfig(vocabulary=64, channels=8, base=32, channel_multipliers=(1, 1), blocks=1, scales=6, phi_at_last=False)
FORMS = {"plain": CONFIG, "normed": replace(CONFIG, normed_attention=True, normed_context=False, numbered_levels=True)}
PROMPTS = ["a cat", "two dogs on a hill"]
SPACES = Path(__file__).parent.parent / "search_spaces"


def build(config: HartConfig = CONFIG) -> Backbone:
    torch.manual_seed(0)
    return hart_goldens.backbone_of(config, VAE, {})


@pytest.fixture(scope="module", params=FORMS)
def tiny(request: pytest.FixtureRequest) -> Backbone:
    return build(FORMS[request.param])


@pytest.fixture(scope="module")
def dense(tiny: Backbone) -> torch.Tensor:
    return generate(tiny, PROMPTS, seed=1)


def policy_of(backbone: Backbone, **fields: object) -> Policy:
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), **({"chunks": 4} | fields))


def rule_of(keep: float, scorer: str, restorer: str, granularity: str) -> ScalePruning | None:
    """Returns the rule, None where the pieces cannot work together."""
    fields = {"reducer": "merge" if restorer == "merged" else "gather", "anchors": 4 if restorer == "anchor" else 0}
    try:
        return ScalePruning(keep, 3, scorer=scorer, restorer=restorer, granularity=granularity, **fields)
    except UserError:
        return None


def combinations() -> Iterator[tuple[str, str, str]]:
    for pieces in itertools.product(SCORERS, RESTORERS, GRANULARITIES):
        if rule_of(0.5, *pieces):
            yield pieces


class Watch(Observer):
    def __init__(self) -> None:
        self.kept_counts: list[tuple[int, int]] = []
        self.latents: dict[int, torch.Tensor] = {}

    def kept(self, scale: int, site: int, index: torch.Tensor) -> None:
        self.kept_counts.append((scale, index.shape[1]))

    def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
        self.latents[scale.index] = latent


@pytest.mark.parametrize("pieces", list(combinations()), ids="-".join)
def test_every_piece_is_dense_at_one_and_gives_an_image_at_half(
    tiny: Backbone, dense: torch.Tensor, pieces: tuple[str, str, str]
) -> None:
    whole = policy_of(tiny, scales={scale: rule_of(1.0, *pieces) for scale in (4, 5)})
    assert torch.equal(generate(tiny, PROMPTS, seed=1, policy=whole), dense)
    watch, half = Watch(), policy_of(tiny, scales={scale: rule_of(0.5, *pieces) for scale in (4, 5)})
    image = generate(tiny, PROMPTS, seed=1, policy=half, observer=watch)
    assert image.isfinite().all() and not torch.equal(image, dense)
    sites = {"sublayer": 2 * tiny.depth, "chunk": 4, "scale": 1}[pieces[2]]
    assert sorted(watch.kept_counts) == [(4, 18)] * sites + [(5, 32)] * sites


ZERO = ScalePruning(0.5, granularity="scale", restorer="zero_residual", scorer="latent_l2")
CACHED = ScalePruning(0.4, 3, granularity="scale")
DROPS = ProbeRule(3, 2, (0.0, 0.0), (1.0, 1.0), (0.1, 0.1), drop_cuts=(-9.0,))
DECISIONS = {
    "cond alone": {"guidance": BranchRule("cond", 3)},
    "uncond alone": {"guidance": BranchRule("uncond", 4)},
    "extrapolated": {"guidance": BranchRule("cond", 4, "extrapolate")},
    "adaptive": {"guidance": BranchRule("adaptive", 3, metric="mse_hidden", threshold=1e9)},
    "drops by probe": {"probe": DROPS},
    "group": {"group_from": 4, "scales": {5: ZERO}},
    "keys": {"keys": KeyRule(1, 2)},
    "budget": {"keys": KeyRule(budget=0.3)},
    "after the first": {"scales": {1: ScalePruning(0.5, 0, scorer="delta"), 2: ScalePruning(0.5, 0, scorer="cond_uncond")}},
    "cached from the first": {"scales": {1: ScalePruning(0.5, 0, granularity="chunk", restorer="cached_state")}},
    "pruned": {"scales": {4: CACHED, 5: CACHED}, "guidance": BranchRule("cond", 5)},
}


@pytest.mark.parametrize("name", DECISIONS)
def test_every_decision_gives_an_image_and_leaves_nothing_behind(tiny: Backbone, dense: torch.Tensor, name: str) -> None:
    image = generate(tiny, PROMPTS, seed=1, policy=policy_of(tiny, **DECISIONS[name]))
    assert image.shape == dense.shape and image.isfinite().all() and not torch.equal(image, dense)
    assert torch.equal(generate(tiny, PROMPTS, seed=1), dense)


@pytest.mark.parametrize("name", [name for name in DECISIONS if name not in ("keys", "budget")])
def test_a_start_from_a_recorded_prefix_is_bit_identical(tiny: Backbone, name: str) -> None:
    prefix = record_prefix(tiny, PROMPTS, seed=5, sampling=tiny.sampling)
    policy = policy_of(tiny, **DECISIONS[name])
    start = prefix.start(compile_plan(policy, policy.scale_schedule, policy.depth))
    assert (start is None) == (name == "after the first"), "it asks what the first scale did"
    image = generate(tiny, PROMPTS, seed=5, policy=policy, start=start)
    assert torch.equal(image, generate(tiny, PROMPTS, seed=5, policy=policy))


def test_the_residual_is_addressed_by_sample(tiny: Backbone, dense: torch.Tensor) -> None:
    alone = generate(tiny, PROMPTS[1:], seed=1, sampling=replace(tiny.sampling, first_sample=1))
    torch.testing.assert_close(alone[0], dense[1], rtol=0, atol=1e-4)
    watches = [Watch(), Watch()]
    for first, watch in enumerate(watches):
        generate(tiny, PROMPTS[:1], seed=1, sampling=replace(tiny.sampling, first_sample=first), observer=watch)
    added = [watch.latents[5] - watch.latents[4] for watch in watches]
    codes = tiny.tokenizer.quantize.embedding.weight
    distances = [torch.cdist(change.flatten(2).transpose(1, 2), codes[None]).amin(dim=2) for change in added]
    assert all(float(distance.min()) > 0 for distance in distances), "every code has a residual"


def test_removed_tokens_of_the_last_scale_add_neither_code_nor_residual(tiny: Backbone) -> None:
    watch = Watch()
    generate(tiny, PROMPTS, seed=1, policy=policy_of(tiny, scales={5: ZERO}), observer=watch)
    changed = (watch.latents[5] != watch.latents[4]).any(dim=1).flatten(1)
    assert changed.sum(dim=1).tolist() == [32, 32]


def test_blocks_may_be_in_half_precision() -> None:
    loaded = build()
    for block in loaded.model.layers():
        block.bfloat16()
    image = generate(loaded, PROMPTS, seed=1)
    assert loaded.dtype == torch.bfloat16 and image.dtype == torch.float32 and image.isfinite().all()


SKIPS = {
    "skip_last 2": {"skip_last": 2},
    "a stop rule from scale 4 on": {"stop": StopRule(4, threshold=0.1, share=0.5)},
    "a probe with skip cuts": {"probe": replace(DROPS, skip_cuts=(9.0,))},
}


@pytest.mark.parametrize("found", SKIPS)
def test_a_policy_that_may_skip_the_last_scale_is_refused_in_one_sentence(found: str) -> None:
    backbone = build()
    with pytest.raises(UserError, match=rf"^the last scale of hart must run, .*, got {found}; prune its tokens instead\.$"):
        generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, **SKIPS[found]))


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("calibrated", [False, True])
def test_no_space_offers_to_skip_and_every_policy_of_it_runs_to_the_end(path: Path, *, calibrated: bool) -> None:
    space = space_for(read_space(path), build())
    assert not space.target.skippable
    if calibrated:
        space = replace(space, calibration=calibration(space.target))
    assert not [name for name in space.distributions if name.startswith(("skip_last", "stop_", "log10_stop_"))]
    ending = space.dimensions["ending"].distribution
    assert ending is None or not {"stop", "probe"} & set(ending.choices)
    rng = np.random.default_rng(0)
    policies = [space.policy(random_vector(space, rng)) for _ in range(60)]
    policies += [space.policy({"skip_last": 2, "ending": ending, "adaptive": "allowed"}) for ending in ("stop", "probe")]
    assert not [policy.skips for policy in policies + [preset.policy for preset in space.presets()] if policy.skips]


def test_random_policies_of_the_whole_space_generate() -> None:
    backbone = build()
    space, rng = space_for(read_space(SPACES / "unified.yaml"), backbone), np.random.default_rng(1)
    for _ in range(24):
        policy = replace(space.policy(random_vector(space, rng)), batch="all")
        assert generate(backbone, PROMPTS[:1], seed=1, policy=policy).isfinite().all(), policy.key()


FULL = Target("hart", 24, HART_0_7B.schedule, skippable=False)


def presets_of(name: str, target: Target = FULL) -> tuple[dict, tuple[str, ...]]:
    space = SearchSpace(read_space(SPACES / f"{name}.yaml"), target, calibration(target))
    return {preset.name: preset for preset in space.presets()}, space.missing


def test_presets_run_what_they_skip_and_change_the_same_scales() -> None:
    ours, theirs = (presets_of("fastvar", replace(FULL, skippable=skippable))[0] for skippable in (False, True))
    assert ours["fastvar-hart"].policy == theirs["fastvar-hart"].policy, "nothing is skipped by FastVAR on HART"
    assert ours["fastvar"].policy == replace(theirs["fastvar"].policy, skip_last=0)
    assert ours["fastvar"].inferred and ours["fastvar"].source.endswith("; what it skips runs in full here")
    assert ours["fastvar"].vector is not None
    single = {name: presets_of("stagevar", replace(FULL, skippable=name))[0]["stagevar-ab"].policy for name in (False, True)}
    assert single[False].guidance == single[True].guidance and single[False].skip_last == 0


def test_presets_that_only_end_early_are_left_out_with_a_sentence() -> None:
    found, missing = presets_of("skip")
    assert list(found) == ["dense", "cond-only-1", "cond-only-2", "cond-only-3"]
    assert missing[0] == "preset skip-1 is left out: it ends early, and the last scale of hart must run."
    names = [sentence.split()[1] for name in ("skipvar", "stagevar", "ld_pruning") for sentence in presets_of(name)[1]]
    assert names == ["skipvar", "stagevar-a", "ld-pruning"]


def test_the_last_weight_is_held_as_in_the_official_loop() -> None:
    assert HART_SAMPLING.guidance_for(3) == (1.0, 1 + 4.5 / 2, 1 + 4.5 / 2)
    assert Sampling(guidance=4.5, ramp=True).guidance_for(3)[-1] == 5.5
    assert HART_SAMPLING.guidance_for(1) == (1.0,)
    assert [limits[0] for limits in HART_SAMPLING.limits_for(14)] == [600] * 7 + [300] * 7


def test_eight_steps_are_those_of_the_official_respacing() -> None:
    steps = denoising_steps(8)
    assert [step.number for step in steps] == [999, 856, 714, 571, 428, 285, 143, 0]
    assert all(step.least <= step.most for step in steps)
    last, signal = steps[-1], math.cos((0.001 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert (last.from_start, last.from_noisy) == (1, 0) and last.of_noisy == pytest.approx(signal**-0.5, rel=1e-9)


def test_the_inferred_size_is_the_published_one() -> None:
    with torch.device("meta"):
        model = Hart(HART_0_7B)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == 0.7
    assert sum(side**2 for side in HART_0_7B.sides) == 9451 and HART_0_7B.mlp_width == 4096
    assert not [key for key in model.state_dict() if "mask" in key or key.startswith("lvl_1L")]


FIELDS = {
    **{"embed_dim": 1536, "num_heads": 24, "depth": 24, "patch_nums": list(HART_0_7B.sides), "num_sampling_steps": "8"},
    **{"attn_type": "llama", "mlp_type": "llama", "disable_aln": True, "context_token": 300, "context_dim": 1536},
    **{"use_context_norm": True, "use_timestep_embed": True, "attn_l2_norm": False, "drop_rate": 0.0},
}


def test_a_config_file_is_read_into_sizes() -> None:
    assert HartConfig.from_fields(FIELDS) == HART_0_7B


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attn_type": "gpt2"}, "attn_type of a HART config must be llama, got gpt2"),
        ({"disable_aln": False}, "disable_aln of a HART config must be True, got False"),
        ({"shared_aln": True}, "shared_aln of a HART config must be False, got True"),
    ],
)
def test_other_forms_of_the_model_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}; "):
        HartConfig.from_fields(FIELDS | changes)
    with pytest.raises(UserError, match="must have depth"):
        HartConfig.from_fields({key: value for key, value in FIELDS.items() if key != "depth"})


def test_other_shapes_are_refused() -> None:
    backbone = build()
    features = backbone.encode_text(PROMPTS)
    with pytest.raises(UserError, match="a HART context must have 7 tokens, got 6"):
        backbone.model.condition(replace(features, values=features.values[:, 1:]))
    with pytest.raises(UserError, match="h_div_w must be 1"):
        backbone.scale_schedule(1.5)
