"""Policies on a backbone with clips and repetitions: exact dense runs, what is pruned when, what every schedule obeys."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_graph import RecordedGraphs
from tiny_star import star

from autoprune.backbones import Backbone
from autoprune.backbones.graphs import GraphCache
from autoprune.clips import ONCE_EACH
from autoprune.errors import UserError
from autoprune.generation import Observer, generate
from autoprune.policy import BranchRule, KeyRule, Policy, ProbeRule, ScalePruning, StopRule
from autoprune.policy_text import policy_lines, schedule_lines
from autoprune.pruning.signals import Signals
from autoprune.rules import GRANULARITIES, RESTORERS, SCORERS
from autoprune.search.neighbour import random_vector
from autoprune.search.space import space_for
from autoprune.search.space_file import read_space

SPACES = Path(__file__).parent.parent / "search_spaces"
PROMPTS = ["a red circle"]
LAST, LATE = 9, 7  # scales of the video clip that run once and three times; 4 ends the image clip


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return star()


@pytest.fixture(scope="module")
def dense(backbone: Backbone) -> torch.Tensor:
    return generate(backbone, PROMPTS, seed=1)


class Watch(Observer):
    """Notes every run of a scale, what it kept and the latent behind it."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.kept_at: dict[int, list[torch.Tensor]] = {}
        self.latents: list[torch.Tensor] = []

    def scale_started(self, scale) -> None:  # noqa: ANN001
        self.runs.append((scale.index, scale.step))

    def kept(self, scale: int, site: int, index: torch.Tensor) -> None:
        self.kept_at.setdefault(self.runs[-1][1], []).append(index)

    def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
        self.latents.append(latent)


def policy_of(backbone: Backbone, **fields: object) -> Policy:
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), **fields)


def watched(backbone: Backbone, **fields: object) -> Watch:
    watch = Watch()
    video = generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, **fields), observer=watch)
    assert video.isfinite().all()
    return watch


def rule(keep: float, scorer: str, restorer: str, granularity: str) -> ScalePruning | None:
    fields = {"reducer": "merge" if restorer == "merged" else "gather", "anchors": 3 if restorer == "anchor" else 0}
    try:
        return ScalePruning(keep, 6, scorer, restorer=restorer, granularity=granularity, **fields)
    except UserError:
        return None


COMBINATIONS = [entry for entry in itertools.product(SCORERS, RESTORERS, GRANULARITIES) if rule(0.5, *entry) is not None]


@pytest.mark.parametrize("entry", COMBINATIONS, ids="-".join)
def test_keep_one_and_no_repetition_less_is_the_dense_plan(backbone: Backbone, entry: tuple[str, str, str]) -> None:
    policy = policy_of(backbone, scales={scale: rule(1.0, *entry) for scale in (7, 8, 9)}, fewer_repetitions={8: 0})
    assert policy.is_dense() and backbone.plan(policy).groups == backbone.plan(None).groups


def test_a_policy_that_changes_nothing_is_bit_identical(backbone: Backbone, dense: torch.Tensor) -> None:
    policy = policy_of(backbone, scales={9: ScalePruning(1.0, 6)}, fewer_repetitions={8: 0})
    assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy), dense)


@pytest.mark.parametrize("entry", COMBINATIONS[::3], ids="-".join)
def test_every_third_combination_runs_kept_tokens_in_all_repetitions_but_the_last(
    backbone: Backbone, entry: tuple[str, str, str]
) -> None:
    pruning = rule(0.4, *entry)
    watch = watched(backbone, scales={LATE: pruning, LAST: pruning})
    plan = backbone.plan(policy_of(backbone, scales={LATE: pruning, LAST: pruning}))
    pruned = [scale for scale in plan.scales if scale.pruning]
    steps = [step for index, step in watch.runs if index == LATE][:2] + [step for index, step in watch.runs if index == LAST]
    assert sorted(watch.kept_at) == steps == [scale.step for scale in pruned]
    for scale in pruned:
        assert all(index.shape[1] == scale.kept < scale.tokens for index in watch.kept_at[scale.step])
        assert all(len(row.unique()) == scale.kept for index in watch.kept_at[scale.step] for row in index)


@pytest.mark.parametrize(("dense_repetitions", "pruned"), [(0, 3), (1, 2), (2, 1), (5, 1)])
def test_the_last_repetitions_run_all_tokens_but_never_every_one(
    backbone: Backbone, dense_repetitions: int, pruned: int
) -> None:
    pruning = ScalePruning(0.5, 6, granularity="scale", dense_repetitions=dense_repetitions)
    watch = watched(backbone, scales={LATE: pruning})
    assert sorted(watch.kept_at) == [step for index, step in watch.runs if index == LATE][:pruned]


def test_fewer_repetitions_leave_the_last_runs_out_and_all_numbers_as_they_are(backbone: Backbone) -> None:
    everything, fewer = watched(backbone).runs, watched(backbone, fewer_repetitions={7: 2, 8: 1, 2: 1}).runs
    gone = {
        run for scale, number in {7: 2, 8: 1, 2: 1}.items() for run in [run for run in everything if run[0] == scale][-number:]
    }
    assert fewer == [run for run in everything if run not in gone]


def test_a_policy_says_in_words_what_runs_less_and_on_which_grids(backbone: Backbone) -> None:
    policy = policy_of(backbone, fewer_repetitions={7: 2, 8: 1})
    assert schedule_lines(policy) == ["scale 7 runs 2 times less", "scale 8 runs 1 time less"]
    assert "scales 1x1 2x3 2x4 3x5 4x7 4x1x1 4x2x3 4x2x4 4x3x5 4x4x7 (" in policy_lines(policy)[1]


def test_repetitions_survive_the_file_and_old_files_do_not_have_them(tmp_path: Path, backbone: Backbone) -> None:
    pruning = ScalePruning(0.5, 6, dense_repetitions=0)
    policy = policy_of(backbone, scales={7: pruning}, fewer_repetitions={8: 1, 7: 1})
    assert Policy.load(policy.save(tmp_path / "policy.json")) == policy
    assert "fewer_repetitions" not in policy_of(backbone).to_json() and "repetitions" not in policy_of(backbone).key()
    assert policy.key() != replace(policy, fewer_repetitions={8: 1}).key()
    assert replace(policy, fewer_repetitions={8: 0}).key() == replace(policy, fewer_repetitions={}).key()
    skipped = policy_of(backbone, fewer_repetitions={8: 1}, skip_last=2)
    assert skipped.canonical().fewer_repetitions == {}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"scales": {4: ScalePruning(0.5, 3)}}, "scale 4 ends a clip and is all that the next clip sees of it"),
        ({"skip_last": 5}, "at the end of its last clip only, at most 4, got 5"),
        ({"fewer_repetitions": {10: 1}}, "names scales 0 to 9 and whole numbers of at least 0, got 10: 1"),
        ({"fewer_repetitions": {3: -1}}, "got 3: -1"),
        ({"fewer_repetitions": {3: 0.5}}, "got 3: 0.5"),
        ({"stop": StopRule(6, 0.1, 0.1)}, "may stop from the third scale of its last clip on, scale 7, got 6"),
        ({"scales": {6: ScalePruning(0.5, 5, "latent_cos")}}, "looks back 2 scales; use it from scale 7 on, got scale 6"),
        ({"scales": {5: ScalePruning(0.5, 3, "delta")}}, "looks back 1 scales; use it from scale 6 on, got scale 5"),
    ],
)
def test_rules_of_clips_are_one_sentence_each(backbone: Backbone, fields: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        policy_of(backbone, **fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"fewer_repetitions": {7: 3}}, "scale 7 of infinitystar_480p runs 3 times and must run at least once, got 3"),
        ({"group_from": 8}, "see no other scale of their clip"),
        ({"keys": KeyRule(budget=0.5)}, "leave group_from, probe and keys out"),
        ({"probe": ProbeRule(7, 6, (0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (0.0,))}, "leave group_from, probe and keys out"),
    ],
)
def test_what_a_backbone_of_clips_cannot_do_is_refused(backbone: Backbone, fields: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        generate(backbone, PROMPTS, policy=policy_of(backbone, **fields))


def test_images_have_no_repetition_to_leave_out() -> None:
    schedule = ((1, 1, 1), (1, 2, 2), (1, 4, 4))
    policy = Policy("tiny", 6, schedule, fewer_repetitions={2: 1})
    with pytest.raises(UserError, match="scale 2 of tiny runs 1 times"):
        policy.check_fits("tiny", 6, schedule, course=ONCE_EACH)


def test_zero_residual_changes_the_latent_of_kept_tokens_alone(backbone: Backbone) -> None:
    pruning = ScalePruning(0.2, scorer="spatiotemporal", restorer="zero_residual", granularity="scale")
    watch = watched(backbone, scales={LAST: pruning})
    before, after = watch.latents[-2:]
    changed = (before != after).any(dim=1)
    assert not changed[:, 0].any(), "the image clip is done"
    assert set(changed[0, 1:].flatten().nonzero()[:, 0].tolist()) == set(watch.kept_at[watch.runs[-1][1]][0][0].tolist())


def test_copied_codes_are_those_of_a_kept_token_of_the_same_frame(backbone: Backbone) -> None:
    pruning = ScalePruning(4 / 112, scorer="random", restorer="nearest", granularity="scale", recover_at="codes")
    watch = watched(backbone, scales={LAST: pruning})
    added = (watch.latents[-1] - watch.latents[-2])[0, :, 1:]
    kept = watch.kept_at[watch.runs[-1][1]][0][0]
    for frame in range(4):
        own = {int(place) - 28 * frame for place in kept if place // 28 == frame}
        sources = torch.stack([added[:, frame].flatten(1)[:, place] for place in own]) if own else None
        for code in added[:, frame].flatten(1).T:
            assert sources is None or any(torch.allclose(code, source, atol=1e-6) for source in sources)


def test_the_image_clip_is_the_same_whatever_the_video_clip_does(backbone: Backbone) -> None:
    pruning = ScalePruning(0.3, 6, granularity="scale")
    full, changed = watched(backbone), watched(backbone, scales={8: pruning}, skip_last=1, fewer_repetitions={7: 1})
    assert torch.equal(full.latents[-1][:, :, :1], changed.latents[-1][:, :, :1])
    assert not torch.equal(full.latents[-1][:, :, 1:], changed.latents[-1][:, :, 1:])


def test_skipping_the_end_leaves_what_was_before_it(backbone: Backbone) -> None:
    full, skipped = watched(backbone), watched(backbone, skip_last=2)
    last = len(skipped.latents) - 1
    assert torch.equal(full.latents[last], skipped.latents[last]) and full.runs[: last + 1] == skipped.runs


@pytest.mark.parametrize(
    "guidance",
    [
        BranchRule("cond", 8),
        BranchRule("uncond", 8),
        BranchRule("cond", 8, "extrapolate"),
        BranchRule("cond", 5),
        BranchRule("cond", 5, "extrapolate"),
    ],
)
def test_a_branch_may_be_dropped_between_the_two_stages_of_bits_and_between_clips(
    backbone: Backbone, guidance: BranchRule
) -> None:
    watch, full = watched(backbone, guidance=guidance), watched(backbone)
    first = next(place for place, (index, _) in enumerate(full.runs) if index == guidance.from_scale)
    assert torch.equal(watch.latents[first - 1], full.latents[first - 1])
    assert not torch.equal(watch.latents[-1], full.latents[-1])


def test_an_adaptive_stop_compares_latents_of_its_own_clip(backbone: Backbone, dense: torch.Tensor) -> None:
    never, always = StopRule(7, 0.0, 0.0), StopRule(8, 1e9, 1.0)
    assert torch.equal(generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, stop=never)), dense)
    stopped = generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, stop=always))
    assert torch.equal(stopped, generate(backbone, PROMPTS, seed=1, policy=policy_of(backbone, skip_last=2)))


def test_a_projection_draws_anew_in_every_repetition(backbone: Backbone) -> None:
    pruning = ScalePruning(
        0.1, 6, "norm", "chunk", restorer="cached_state", reducer="project", select="draw", dense_repetitions=0
    )
    watch = watched(backbone, scales={LATE: pruning})
    first, second, third = (watch.kept_at[step] for step in sorted(watch.kept_at))
    assert not torch.equal(first[0], second[0]) and not torch.equal(second[0], third[0])


def test_the_video_space_offers_its_own_choices_and_nothing_that_clips_forbid(backbone: Backbone) -> None:
    definition = read_space(SPACES / "unified.yaml")
    video, image = space_for(definition, backbone), space_for(definition, star(1))
    assert set(video.distributions["ending"].choices) == {"fixed", "stop"} and "keys" not in video.distributions
    assert "spatiotemporal" in video.distributions["scorer"].choices
    assert "spatiotemporal" not in image.distributions["scorer"].choices
    assert {"fewer_repetitions", "dense_repetitions", "short_scales"} <= set(video.distributions) & set(image.distributions)
    assert video.prunable == (8, 9) and image.prunable == (3, 4)
    assert [space.distributions["single_branch_scales"].high for space in (video, image)] == [2 + 5, 2]  # of 5 scales a clip
    assert video.target.chunks == backbone.model.config.chunks == 2


DECISIONS = {
    "dense": {},
    "sublayers": {"scales": {8: ScalePruning(0.5, 6), 9: ScalePruning(0.5, 6)}},
    "latents": {
        "scales": {
            scale: ScalePruning(0.3, scorer="spatiotemporal", restorer="zero_residual", granularity="scale") for scale in (7, 9)
        }
    },
    "copies": {
        "scales": {7: ScalePruning(0.3, restorer="nearest", granularity="scale", recover_at="codes", dense_repetitions=0)}
    },
    "one branch": {"guidance": BranchRule("cond", 7), "fewer_repetitions": {7: 1}},
}


def test_graphs_of_runs_are_bit_identical_alternating_with_all_others(backbone: Backbone) -> None:
    recorder = RecordedGraphs()
    graphed = replace(backbone, graphs=GraphCache(backbone.device, capturing=lambda device: recorder))
    for seed in range(3):
        for name, decisions in DECISIONS.items():
            policy = policy_of(backbone, **decisions)
            eager = generate(backbone, PROMPTS, policy=policy, seed=seed)
            assert torch.equal(generate(graphed, PROMPTS, policy=policy, seed=seed), eager), (seed, name)
    assert recorder.replayed > recorder.captured > len(backbone.plan(None).scales)


def test_random_policies_of_the_whole_space_generate(backbone: Backbone) -> None:
    space, rng = space_for(read_space(SPACES / "unified.yaml"), backbone), np.random.default_rng(0)
    seen = set()
    for _ in range(16):
        policy = space.policy(random_vector(space, rng))
        assert Policy.from_json(policy.to_json()) == policy == policy.canonical()
        assert generate(backbone, PROMPTS, seed=1, policy=policy).isfinite().all(), policy.key()
        seen.add(bool(policy.fewer_repetitions))
    assert seen == {True, False}


def test_signals_of_a_new_clip_hold_the_frame_before_it_alone() -> None:
    signals = Signals()
    signals.open_clip()
    assert signals.before is None and signals.latents == []
