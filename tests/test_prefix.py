"""Generations that start from a recorded one against the same ones run in full."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_star import star

from autoprune.backbones import load_backbone
from autoprune.generation import Observer, generate
from autoprune.policy import BranchRule, KeyRule, Policy, ProbeRule, ScalePruning, StopRule
from autoprune.prefix import Recorder, Recording, mapped, moved, record_prefix
from autoprune.pruning.plan import compile_plan
from autoprune.search.neighbour import random_vector
from autoprune.search.space import space_for
from autoprune.search.space_file import read_space

PROMPTS = ["a red circle", "a photo of two blue squares"]
UNIFIED = Path(__file__).parent.parent / "search_spaces" / "unified.yaml"


class Scales(Observer):
    def __init__(self) -> None:
        self.run: list[int] = []

    def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
        self.run.append(scale.index)


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prefix(backbone) -> Recording:  # noqa: ANN001
    return record_prefix(backbone, PROMPTS, seed=5, sampling=backbone.sampling)


def policy_for(backbone, **decisions: object) -> Policy:  # noqa: ANN001
    return Policy("tiny", backbone.depth, backbone.scale_schedule(), **decisions)


def scales_run(backbone, policy: Policy, prefix: Recording) -> list[int]:  # noqa: ANN001
    """Checks that starting from the prefix changes no bit, and returns the scales that still ran."""
    start = prefix.start(compile_plan(policy, policy.scale_schedule, policy.depth))
    seen = Scales()
    image = generate(backbone, PROMPTS, seed=5, policy=policy, start=start, observer=seen)
    assert torch.equal(image, generate(backbone, PROMPTS, seed=5, policy=policy))
    return seen.run


CACHED = ScalePruning(keep=0.4, cache_scale=4, granularity="scale")
CASES = {
    "dense": ({}, [6]),
    "skip": ({"skip_last": 2}, [4]),
    "sublayer": ({"scales": {6: ScalePruning(keep=0.5, cache_scale=5)}}, [6]),
    "scale": ({"scales": {5: CACHED, 6: CACHED}}, [5, 6]),
    "chunk": ({"scales": {5: ScalePruning(keep=0.5, cache_scale=3, granularity="chunk", restorer="cached_state")}}, [5, 6]),
    "latents": ({"scales": {6: ScalePruning(keep=0.5, cache_scale=5, scorer={"latent_cos": 1.0})}}, [6]),
    "branch": ({"guidance": BranchRule("cond", 4)}, [4, 5, 6]),
    "extrapolated": ({"guidance": BranchRule("cond", 5, "extrapolate"), "skip_last": 1}, [5]),
    "group": ({"group_from": 4}, [4, 5, 6]),
    "adaptive guidance": ({"guidance": BranchRule("adaptive", 4, threshold=1e9)}, [4, 5, 6]),
    "stop": ({"stop": StopRule(5, threshold=0.1, share=0.5)}, [5, 6]),
    "asks the scale before": ({"scales": {6: ScalePruning(keep=0.5, cache_scale=5, scorer={"delta": 1.0})}}, [5, 6]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_start_from_the_prefix_is_bit_identical_and_runs_the_rest_only(backbone, prefix, name: str) -> None:  # noqa: ANN001
    decisions, expected = CASES[name]
    assert scales_run(backbone, policy_for(backbone, **decisions), prefix) == expected


SPLIT = {"guidance": BranchRule("adaptive", 4, threshold=1e9), "batch": "split"}


@pytest.mark.parametrize("decisions", [{"keys": KeyRule(budget=0.5)}, SPLIT])
def test_what_reaches_back_into_the_prefix_runs_in_full(backbone, prefix, decisions: dict) -> None:  # noqa: ANN001
    assert scales_run(backbone, policy_for(backbone, **decisions), prefix)[0] == 0


def test_a_key_rule_starts_where_it_first_takes_keys_away(backbone, prefix) -> None:  # noqa: ANN001
    assert scales_run(backbone, policy_for(backbone, keys=KeyRule(1, 2)), prefix) == [4, 5, 6]


def recorded(backbone, policy: Policy) -> Recording:  # noqa: ANN001
    recorder = Recorder()
    generate(backbone, PROMPTS, seed=5, policy=policy, observer=recorder)
    return Recording(compile_plan(policy, policy.scale_schedule, policy.depth), tuple(recorder.snapshots))


EARLY = {4: ScalePruning(keep=0.5, cache_scale=3), 5: ScalePruning(keep=0.5, cache_scale=3)}
LAST = {6: ScalePruning(keep=0.3, cache_scale=3)}
DROPPED = BranchRule("cond", 4)
EXTRAPOLATED = BranchRule("cond", 4, "extrapolate")
ADAPTIVE = BranchRule("adaptive", 3, "extrapolate", threshold=1e9)
STOP = StopRule(3, threshold=0.0, share=0.0)
NEAREST = ScalePruning(keep=0.5, granularity="scale", restorer="nearest")
PROBE = ProbeRule(3, 2, mean=(0.0, 0.0), deviation=(1.0, 1.0), weights=(0.0, 0.0), drop_cuts=(-3.0, -2.0, -1.0))
THRESHOLD = ScalePruning(keep=0.9, granularity="scale", restorer="nearest", select="threshold", threshold=0.5)
DELTA = ScalePruning(keep=0.5, cache_scale=3, scorer={"delta": 1.0}, chunk=2)
PAIRS = {
    "more is pruned": ({"scales": EARLY | LAST}, {"scales": EARLY | {6: ScalePruning(keep=0.7, cache_scale=3)}}, 6),
    "fewer are skipped": ({"scales": EARLY, "skip_last": 1}, {"scales": EARLY}, 6),
    "another cache": ({"scales": EARLY}, {"scales": EARLY | {6: ScalePruning(keep=0.7, cache_scale=2)}}, 2),
    "cached at chunks": ({"scales": EARLY}, {"scales": EARLY | {6: replace(CACHED, cache_scale=3, granularity="chunk")}}, 3),
    "branch": ({"guidance": DROPPED}, {"guidance": DROPPED, "scales": LAST}, 3),
    "branch, caches": ({"guidance": DROPPED, "scales": LAST}, {"guidance": DROPPED, "scales": EARLY}, 4),
    "branch dropped later": ({"guidance": DROPPED}, {"guidance": BranchRule("cond", 5)}, 4),
    "uncond": ({"guidance": BranchRule("uncond", 4)}, {"guidance": BranchRule("uncond", 4), "skip_last": 1}, 5),
    "extrapolated": ({"guidance": EXTRAPOLATED}, {"guidance": EXTRAPOLATED, "skip_last": 1}, 5),
    "extrapolated or not": ({"guidance": EXTRAPOLATED}, {"guidance": DROPPED}, 4),
    "nothing to extrapolate": ({"guidance": DROPPED}, {"guidance": EXTRAPOLATED}, 0),
    "adaptive": ({"guidance": ADAPTIVE}, {"guidance": ADAPTIVE, "skip_last": 1}, 5),
    "adaptive, just decided": ({"guidance": ADAPTIVE}, {"guidance": ADAPTIVE, "scales": {4: NEAREST}}, 4),
    "dropped by data": ({"guidance": ADAPTIVE}, {}, 4),
    "data would drop": ({}, {"guidance": BranchRule("adaptive", 3, threshold=1e9)}, 3),
    "stop": ({"stop": STOP}, {"stop": STOP, "guidance": BranchRule("cond", 6)}, 6),
    "other stop": ({"stop": STOP}, {"stop": StopRule(4, threshold=0.1, share=0.5)}, 4),
    "probe": ({"probe": PROBE}, {"probe": PROBE, "skip_last": 1}, 5),
    "dropped by a probe": ({"probe": PROBE}, {}, 4),
    "a probe would drop": ({"stop": STOP}, {"probe": PROBE}, 3),
    "threshold": ({"scales": {4: THRESHOLD}}, {"scales": {4: THRESHOLD, 6: THRESHOLD}}, 6),
    "keys": ({"keys": KeyRule(1, 2)}, {"keys": KeyRule(1, 2), "guidance": BranchRule("cond", 6)}, 6),
    "other keys": ({"keys": KeyRule(1, 2)}, {"keys": KeyRule(1, 3)}, 4),
    "budget": ({"keys": KeyRule(budget=0.5)}, {"keys": KeyRule(budget=0.5), "skip_last": 1}, 5),
    "group": ({"group_from": 4}, {"group_from": 5}, 4),
    "delta": ({"scales": {4: DELTA, 5: DELTA}}, {"scales": {4: DELTA, 5: DELTA, 6: LAST[6]}}, 6),
    "delta of another chunk": ({"scales": {4: DELTA}}, {"scales": {4: replace(DELTA, chunk=1)}}, 3),
    "delta of other chunks": ({"scales": {4: DELTA}}, {"scales": {4: DELTA}, "chunks": 4}, 3),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pruned_generation_serves_another_up_to_where_they_differ(backbone, name: str) -> None:  # noqa: ANN001
    first, second, agreed = PAIRS[name]
    recording, policy = recorded(backbone, policy_for(backbone, **first)), policy_for(backbone, **second)
    assert scales_run(backbone, policy, recording) == list(range(agreed, policy.run))


def test_random_policies_of_the_whole_space_are_bit_identical(backbone, prefix) -> None:  # noqa: ANN001
    space, rng = space_for(read_space(UNIFIED), backbone), np.random.default_rng(0)
    shortened = 0
    for _ in range(25):
        shortened += len(scales_run(backbone, space.policy(random_vector(space, rng)), prefix)) < 4
    assert shortened > 5


class Runs(Observer):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def scale_done(self, scale, logits, bits, latent) -> None:  # noqa: ANN001
        self.steps.append(scale.step)


def runs_of_video(backbone, policy: Policy, prefix: Recording) -> list[int]:  # noqa: ANN001
    """Checks as `scales_run` that no bit changes, and returns the runs of scales that were left."""
    seen, start = Runs(), prefix.start(backbone.plan(policy))
    video = generate(backbone, PROMPTS, seed=5, policy=policy, start=start, observer=seen)
    assert torch.equal(video, generate(backbone, PROMPTS, seed=5, policy=policy))
    return seen.steps


def video_policy(backbone, **decisions: object) -> Policy:  # noqa: ANN001
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), **decisions)


@pytest.fixture(scope="module")
def video_backbone():  # noqa: ANN201
    return star()


@pytest.fixture(scope="module")
def of_video(video_backbone) -> Recording:  # noqa: ANN001
    return record_prefix(video_backbone, PROMPTS, seed=5, sampling=video_backbone.sampling)


VIDEO_CASES = {  # the scales of the video clip, 5 to 9, begin at runs 7, 8, 10, 13, 15
    "dense": ({}, 15),
    "skip": ({"skip_last": 2}, 12),
    "pruned": ({"scales": {8: ScalePruning(0.5, 6, "spatiotemporal", granularity="scale")}}, 13),
    "fewer repetitions": ({"fewer_repetitions": {8: 1}}, 15),
    "branch": ({"guidance": BranchRule("cond", 8)}, 13),
    "extrapolated": ({"guidance": BranchRule("cond", 8, "extrapolate")}, 13),
    "adaptive guidance": ({"guidance": BranchRule("adaptive", 7, threshold=1e9)}, 10),
    "stop": ({"stop": StopRule(8, threshold=0.0, share=0.0)}, 13),
}


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_a_video_starts_at_the_run_from_which_on_it_differs(video_backbone, of_video, name: str) -> None:  # noqa: ANN001
    decisions, first = VIDEO_CASES[name]
    assert runs_of_video(video_backbone, video_policy(video_backbone, **decisions), of_video)[0] == first


def test_a_video_goes_on_from_one_whose_branch_the_data_dropped_until_then(video_backbone) -> None:  # noqa: ANN001
    dropped = {"guidance": BranchRule("adaptive", 7, threshold=1e9)}
    policy, recorder = video_policy(video_backbone, **dropped), Recorder()
    generate(video_backbone, PROMPTS, seed=5, policy=policy, observer=recorder)
    recording = Recording(video_backbone.plan(policy), tuple(recorder.snapshots))
    assert runs_of_video(video_backbone, video_policy(video_backbone, **dropped, skip_last=1), recording)[0] == 14
    assert runs_of_video(video_backbone, video_policy(video_backbone), recording)[0] == 13


def test_random_policies_of_videos_are_bit_identical(video_backbone, of_video) -> None:  # noqa: ANN001
    space, rng = space_for(read_space(UNIFIED), video_backbone), np.random.default_rng(0)
    shared = [runs_of_video(video_backbone, space.policy(random_vector(space, rng)), of_video)[0] for _ in range(8)]
    assert min(shared) > 4 and max(shared) > 12  # from where a branch may be dropped first to the last scales


def test_keys_of_snapshots_outlive_the_third_clip() -> None:
    backbone = star(frames=97)
    recorder = Recorder()
    generate(backbone, PROMPTS[:1], seed=5, observer=recorder)
    recording = Recording(backbone.plan(None), tuple(recorder.snapshots))
    dense = generate(backbone, PROMPTS[:1], seed=5)
    for scales in (6, 15, 16, 24):
        start = next(snapshot for snapshot in recording.snapshots if snapshot.scales == scales)
        assert torch.equal(generate(backbone, PROMPTS[:1], seed=5, start=start), dense)
    assert len({keys.data_ptr() for keys in (snapshot.keys[0][0] for snapshot in recording.snapshots)}) == 4


def tensors(value: object) -> list[torch.Tensor]:
    found = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)
    return found


def test_generations_leave_the_prefix_as_it_was(backbone, prefix) -> None:  # noqa: ANN001
    before = [tensor.clone() for tensor in tensors(prefix.snapshots)]
    scales_run(backbone, policy_for(backbone, guidance=BranchRule("cond", 4), scales={6: CACHED}), prefix)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors(prefix.snapshots), strict=True))


def test_the_size_counts_shared_tensors_once(prefix) -> None:  # noqa: ANN001
    last = replace(prefix, snapshots=prefix.snapshots[-1:])
    assert replace(prefix, snapshots=(*last.snapshots, replace(last.snapshots[0]))).bytes == last.bytes < prefix.bytes * 1.01
    assert last.bytes >= sum(keys.numel() * 4 * 2 for keys, _, _ in last.snapshots[0].keys)


def test_what_moves_is_equal_shares_as_before_and_leaves_the_original(prefix) -> None:  # noqa: ANN001
    copy = moved(prefix, torch.clone)
    assert all(torch.equal(old, new) for old, new in zip(tensors(prefix.snapshots), tensors(copy.snapshots), strict=True))
    assert copy.bytes == prefix.bytes and not copy.storages.keys() & prefix.storages.keys()
