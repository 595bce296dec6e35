"""Generations that start from a recorded dense prefix against the same ones run in full."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoprune.backbones import load_backbone
from autoprune.generation import Observer, generate
from autoprune.policy import BranchRule, KeyRule, Policy, ScalePruning, StopRule
from autoprune.prefix import DensePrefix, record_prefix
from autoprune.pruning.plan import compile_plan
from autoprune.search.neighbour import random_vector
from autoprune.search.shared_prefixes import SharedPrefixes
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
def prefix(backbone) -> DensePrefix:  # noqa: ANN001
    return record_prefix(backbone, PROMPTS, seed=5, sampling=backbone.sampling)


def policy_for(backbone, **decisions: object) -> Policy:  # noqa: ANN001
    return Policy("tiny", backbone.depth, backbone.scale_schedule(), **decisions)


def scales_run(backbone, policy: Policy, prefix: DensePrefix) -> list[int]:  # noqa: ANN001
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


@pytest.mark.parametrize("decisions", [{"keys": KeyRule(1, 2)}, SPLIT])
def test_what_reaches_back_into_the_prefix_runs_in_full(backbone, prefix, decisions: dict) -> None:  # noqa: ANN001
    assert scales_run(backbone, policy_for(backbone, **decisions), prefix)[0] == 0


def test_random_policies_of_the_whole_space_are_bit_identical(backbone, prefix) -> None:  # noqa: ANN001
    space, rng = space_for(read_space(UNIFIED), backbone), np.random.default_rng(0)
    shortened = 0
    for _ in range(25):
        shortened += len(scales_run(backbone, space.policy(random_vector(space, rng)), prefix)) < 4
    assert shortened > 5


def test_generations_leave_the_prefix_as_it_was(backbone, prefix) -> None:  # noqa: ANN001
    before = [[tensor.clone() for tensor in snapshot.tensors()] for snapshot in prefix.snapshots]
    scales_run(backbone, policy_for(backbone, guidance=BranchRule("cond", 4), scales={6: CACHED}), prefix)
    after = [list(snapshot.tensors()) for snapshot in prefix.snapshots]
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


def test_the_limit_of_memory_is_kept(backbone, prefix) -> None:  # noqa: ANN001
    plan = compile_plan(None, backbone.scale_schedule(), backbone.depth)
    size = prefix.bytes / 2**20
    shared = SharedPrefixes(int(2.5 * size))
    assert [shared.start(batch, plan, lambda: prefix) is not None for batch in range(4)] == [True, True, False, False]
    assert SharedPrefixes(0).start(0, plan, lambda: prefix) is None
    shared.clear()
    assert shared.start(0, plan, lambda: prefix) is None


def test_the_size_counts_shared_tensors_once(prefix) -> None:  # noqa: ANN001
    last = prefix.snapshots[-1]
    assert DensePrefix((last, replace(last))).bytes == DensePrefix((last,)).bytes < prefix.bytes * 1.01
