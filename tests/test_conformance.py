"""What every method must obey whatever it is made of: exact dense runs, kept counts, kept tokens, one-way branches."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.backbones import load_backbone
from autoprune.backbones.backbone import Backbone
from autoprune.errors import UserError
from autoprune.generation import Observer, generate
from autoprune.policy import Policy, kept_count, token_count
from autoprune.pruning.plan import compile_plan
from autoprune.rules import (
    GRANULARITIES,
    REDUCERS,
    RESTORERS,
    SCORERS,
    BranchRule,
    KeyRule,
    ProbeRule,
    ScalePruning,
    StopRule,
)
from autoprune.search.neighbour import random_vector
from autoprune.search.space import space_for
from autoprune.search.space_file import read_space

SPACES = Path(__file__).parent.parent / "search_spaces"
PROMPTS = ["a red circle", "a photo of two blue squares"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("tiny", weights="random", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def dense(backbone: Backbone) -> torch.Tensor:
    return generate(backbone, PROMPTS, seed=1)


def combination(keep: float, scorer: str, restorer: str, granularity: str, **fields: object) -> ScalePruning | None:
    """Returns the rule, None where the pieces cannot work together."""
    fields = {"reducer": "merge" if restorer == "merged" else "gather", "anchors": 4 if restorer == "anchor" else 0} | fields
    try:
        return ScalePruning(keep, 3, scorer=scorer, restorer=restorer, granularity=granularity, **fields)
    except UserError:
        return None


COMBINATIONS = [entry for entry in itertools.product(SCORERS, RESTORERS, GRANULARITIES) if combination(0.5, *entry) is not None]


def policy_of(backbone: Backbone, **fields: object) -> Policy:
    return Policy("tiny", backbone.depth, backbone.scale_schedule(), **fields)


@pytest.mark.parametrize("entry", COMBINATIONS, ids="-".join)
def test_keep_one_is_bit_identical_to_dense(backbone: Backbone, dense: torch.Tensor, entry: tuple[str, str, str]) -> None:
    policy = policy_of(backbone, scales={scale: combination(1.0, *entry) for scale in (4, 5, 6)})
    plans = [compile_plan(each, policy.scale_schedule, policy.depth) for each in (policy, None)]
    assert policy.is_dense() and plans[0].groups == plans[1].groups
    if entry[0] == "dc":
        assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy), dense)


@pytest.mark.parametrize("entry", COMBINATIONS[::2], ids="-".join)
def test_every_second_combination_runs_the_kept_tokens_only(backbone: Backbone, entry: tuple[str, str, str]) -> None:
    policy = policy_of(backbone, scales={6: combination(0.3, *entry)})
    seen: list[torch.Tensor] = []

    class Watch(Observer):
        def kept(self, scale: int, site: int, index: torch.Tensor) -> None:
            seen.append(index)

    image = generate(backbone, PROMPTS[:1], seed=1, policy=policy, observer=Watch())
    plan = compile_plan(policy, policy.scale_schedule, policy.depth).scales[6]
    assert seen and all(index.shape[1] == plan.kept < plan.tokens for index in seen)
    assert all(len(row.unique()) == plan.kept for index in seen for row in index)
    assert image.isfinite().all()


@pytest.mark.parametrize("entry", [entry for entry in COMBINATIONS if entry[0] in ("dc", "random")], ids="-".join)
def test_a_split_batch_gives_the_same_images(backbone: Backbone, entry: tuple[str, str, str]) -> None:
    policy = policy_of(backbone, scales={5: combination(0.5, *entry), 6: combination(0.4, *entry)})
    together = generate(backbone, PROMPTS, seed=3, policy=policy)
    alone = generate(backbone, PROMPTS[1:], seed=3, policy=policy, sampling=replace(backbone.sampling, first_sample=1))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-3)


def test_dense_after_every_kind_of_run_is_dense_before(backbone: Backbone, dense: torch.Tensor) -> None:
    for entry in COMBINATIONS[::24]:
        generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, scales={6: combination(0.3, *entry)}))
    assert torch.equal(generate(backbone, PROMPTS, seed=1), dense)


@pytest.mark.parametrize("positions", ["first", "kept"])
@pytest.mark.parametrize("select", ["top", "draw"])
def test_projected_chunks_run_their_ranks(backbone: Backbone, select: str, positions: str) -> None:
    ranks = (0.02, 0.14, 0.21, 0.25, 0.26, 0.2)
    rule = ScalePruning(
        1.0, 5, "norm", "chunk", restorer="cached_state", reducer="project", ranks=ranks, select=select, positions=positions
    )
    lengths = []

    class Watch(Observer):
        def kept(self, scale: int, site: int, index: torch.Tensor) -> None:
            lengths.append(index.shape[1])

    policy = policy_of(backbone, scales={6: rule})
    first = generate(backbone, PROMPTS, seed=1, policy=policy, observer=Watch())
    assert lengths == [int(rank * 256) + 1 for rank in ranks]
    assert torch.equal(first, generate(backbone, PROMPTS, seed=1, policy=policy)), "its draws belong to the address alone"


def test_stagevar_ranks_at_40x40_are_the_published_ones() -> None:
    shares = (0.0168, 0.1365, 0.2104, 0.2503, 0.2559, 0.1979, 0.1570, 0.1909)
    schedule = tuple((1, side, side) for side in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40))
    rule = ScalePruning(1.0, 9, "norm", "chunk", restorer="cached_state", reducer="project", ranks=shares, select="draw")
    plan = compile_plan(Policy("infinity2b", 32, schedule, {10: rule}), schedule, 32)
    published = (27, 219, 337, 401, 410, 317, 252, 306)
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(plan.scales[10].kept_chunks, published, strict=True))


def test_scales_decoded_together_equal_teacher_forcing_on_the_same_inputs(backbone: Backbone) -> None:
    latents, logits = {}, {}

    class Watch(Observer):
        def scale_done(self, scale, guided, bits, latent) -> None:  # noqa: ANN001
            latents[scale.index], logits[scale.index] = latent, guided

    sampling = replace(backbone.sampling, guidance=1.0, temperature=1.0)
    generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, group_from=5), sampling=sampling, observer=Watch())
    schedule = backbone.scale_schedule()
    inputs = [backbone.tokenizer.next_tokens(latents[min(scale - 1, 4)], schedule[scale]) for scale in range(1, 7)]
    with torch.inference_mode():
        expected = backbone.model.forward_training(backbone.encode_text(PROMPTS), inputs, schedule)
    for scale in range(7):
        torch.testing.assert_close(logits[scale], expected[scale], rtol=0, atol=2e-4)


def test_zero_residual_leaves_the_latent_alone_where_tokens_were_removed(backbone: Backbone) -> None:
    latents, kept = [], []

    class Watch(Observer):
        def kept(self, scale: int, site: int, index: torch.Tensor) -> None:
            kept.append(index)

        def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
            latents.append(latent)

    rule = ScalePruning(0.1, restorer="zero_residual", granularity="scale", scorer="latent_l2")
    generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, scales={6: rule}), observer=Watch())
    changed = (latents[6] != latents[5]).any(dim=1).flatten(1)
    for sample in range(2):
        assert set(changed[sample].nonzero()[:, 0].tolist()) == set(kept[0][sample].tolist())


def test_copied_codes_are_those_of_the_nearest_kept_token(backbone: Backbone) -> None:
    latents = {}

    class Watch(Observer):
        def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
            latents[scale.index] = latent

    rule = ScalePruning(1 / 256, restorer="nearest", granularity="scale", recover_at="codes")
    generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, scales={6: rule}), observer=Watch())
    added = (latents[6] - latents[5]).flatten(2)
    torch.testing.assert_close(added, added[..., :1].expand_as(added))


def test_adaptive_guidance_at_no_threshold_is_both_and_at_any_is_cond(backbone: Backbone, dense: torch.Tensor) -> None:
    for metric in ("mse_hidden", "cos_hidden", "mse_logits", "kl_bits"):
        never = BranchRule("adaptive", 3, metric=metric, threshold=0.0)
        assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, guidance=never)), dense)
        always = BranchRule("adaptive", 3, metric=metric, threshold=1e9)
        cond = policy_of(backbone, guidance=BranchRule("cond", 4))
        images = [generate(backbone, PROMPTS, seed=1, policy=each) for each in (policy_of(backbone, guidance=always), cond)]
        assert torch.equal(*images)


def test_extrapolation_is_closer_to_both_branches_than_cond_alone() -> None:
    backbone = load_backbone("tiny", dtype="float32", device="cpu")
    prompts = ["a red circle", "a blue square left of a green triangle"]
    dense = generate(backbone, prompts, seed=1)
    errors = {}
    for replacement in ("cond", "extrapolate"):
        rule = BranchRule("cond", 5, replacement)
        policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), guidance=rule)
        errors[replacement] = (generate(backbone, prompts, seed=1, policy=policy) - dense).square().mean()
    assert errors["extrapolate"] < errors["cond"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_stop_rule_stops_at_once_or_never(backbone: Backbone, dense: torch.Tensor, share: float) -> None:
    never, always = StopRule(5, threshold=0.0, share=0.0), StopRule(5, threshold=1e9, share=1.0)
    policy = policy_of(backbone, stop=always if share else never)
    expected = generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, skip_last=2)) if share else dense
    assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy), expected)


@pytest.mark.parametrize(("cuts", "skip", "single"), [((-9.0, -9.0), 2, 0), ((9.0, 9.0), 0, 0), ((9.0, 9.0), 0, 1)])
def test_a_probe_skips_or_drops_what_its_cuts_say(
    backbone: Backbone, cuts: tuple[float, float], skip: int, single: int
) -> None:
    rule = ProbeRule(4, 3, (0.0, 0.0), (1.0, 1.0), (0.1, 0.1), skip_cuts=cuts, drop_cuts=(-9.0,) if single else ())
    guidance = BranchRule("cond", 6) if single else BranchRule()
    expected = generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, skip_last=skip, guidance=guidance))
    assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, probe=rule)), expected)


def test_samples_of_a_split_batch_decide_alone(backbone: Backbone) -> None:
    policy = policy_of(backbone, guidance=BranchRule("adaptive", 3, threshold=1e-4), batch="split")
    together = generate(backbone, PROMPTS, seed=1, policy=policy)
    alone = generate(backbone, PROMPTS[1:], seed=1, policy=policy, sampling=replace(backbone.sampling, first_sample=1))
    assert torch.equal(together[1:], alone)


def test_a_threshold_keeps_between_floor_and_keep(backbone: Backbone) -> None:
    counts = []

    class Watch(Observer):
        def kept(self, scale: int, site: int, index: torch.Tensor) -> None:
            counts.append(index.shape[1])

    for threshold, expected in ((0.0, 128), (1.0, 26)):
        rule = ScalePruning(
            0.5, restorer="identity", granularity="scale", select="threshold", threshold=threshold, floor=0.1017, scorer="dc"
        )
        generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, scales={6: rule}), observer=Watch())
        assert counts.pop() == expected


@pytest.mark.parametrize("rule", [KeyRule(first=2, last=2), KeyRule(budget=0.3)])
def test_fewer_keys_still_give_images_and_all_keys_are_dense(backbone: Backbone, dense: torch.Tensor, rule: KeyRule) -> None:
    images = generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, keys=rule))
    assert images.isfinite().all() and not torch.equal(images, dense)
    everything = KeyRule(first=3, last=6)
    assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, keys=everything)), dense)


SIDES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    sides=SIDES,
    keep=st.floats(0.01, 1.0),
    restorer=st.sampled_from(RESTORERS),
    granularity=st.sampled_from(GRANULARITIES),
    reducer=st.sampled_from(REDUCERS),
    depth=st.integers(1, 12),
)
def test_plans_of_random_schedules_count_what_they_keep(
    sides: list[tuple[int, int]], keep: float, restorer: str, granularity: str, reducer: str, depth: int
) -> None:
    schedule = tuple((1, height, width) for height, width in sides)
    try:
        rule = ScalePruning(keep, 0, restorer=restorer, granularity=granularity, reducer=reducer, anchors=2)
        policy = Policy("any", depth, schedule, {len(schedule) - 1: rule})
    except UserError:
        return
    plan = compile_plan(policy, schedule, depth)
    last = plan.scales[-1]
    assert policy.canonical().canonical() == policy.canonical()
    assert 1 <= last.kept <= last.tokens == token_count(schedule[-1])
    assert last.kept >= min(last.tokens, kept_count(last.tokens, keep))
    assert sorted(layer for chunk in plan.chunks for layer in chunk) == list(range(depth))
    for layer in range(depth):
        held = sum(scale.kept_at(layer, plan.chunk_of(layer)) for scale in plan.scales)
        assert plan.key_capacity(layer) == held <= sum(scale.tokens for scale in plan.scales)


def test_random_policies_of_the_whole_space_generate(backbone: Backbone) -> None:
    space, rng = space_for(read_space(SPACES / "unified.yaml"), backbone), np.random.default_rng(0)
    for _ in range(24):
        policy = replace(space.policy(random_vector(space, rng)), batch="all")
        assert generate(backbone, PROMPTS[:1], seed=1, policy=policy).isfinite().all(), policy.key()
