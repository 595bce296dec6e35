"""What trials of a study share of their early scales: nothing changes but the time, and the limits are kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from autoprune.backbones import load_backbone
from autoprune.generation import generate
from autoprune.measure.latency import plan_keys
from autoprune.policy import BranchRule, Policy
from autoprune.prefix import Recorder, Recording, record_prefix
from autoprune.pruning.plan import Plan, compile_plan
from autoprune.search.neighbour import mutated, random_vector
from autoprune.search.shared_prefixes import SharedPrefixes
from autoprune.search.space import space_for
from autoprune.search.space_file import read_space

PROMPTS = ["a red circle"]
UNIFIED = Path(__file__).parent.parent / "search_spaces" / "unified.yaml"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def dense(backbone) -> Recording:  # noqa: ANN001
    return record_prefix(backbone, PROMPTS, seed=5, sampling=backbone.sampling)


def plan_of(backbone, policy: Policy | None) -> Plan:  # noqa: ANN001
    return compile_plan(policy, backbone.scale_schedule(), backbone.depth)


def neighbours(backbone, *, count: int) -> list[Policy]:  # noqa: ANN001
    """Returns policies as a search asks for them: some anywhere, most near an earlier one, some of them dense for long."""
    space, rng = space_for(read_space(UNIFIED), backbone), np.random.default_rng(1)
    vectors = [random_vector(space, rng)]
    while len(vectors) < count:
        near = rng.random() < 0.7
        vectors.append(mutated(space, vectors[rng.integers(len(vectors))], rng) if near else random_vector(space, rng))
    return [space.policy(vector) for vector in vectors]


def trial(backbone, shared: SharedPrefixes, policy: Policy, dense: Recording) -> tuple[torch.Tensor, int]:  # noqa: ANN001
    """Generates as a study does and returns the images and the scale it began with."""
    plan, recorder = plan_of(backbone, policy), Recorder()
    start = shared.start(0, plan, lambda: dense)
    images = generate(backbone, PROMPTS, policy=policy, seed=5, observer=recorder, start=start.snapshot if start else None)
    shared.keep(0, Recording(plan, tuple(recorder.snapshots)), plan_keys(plan))
    return images, start.snapshot.scales if start else 0


@pytest.fixture(scope="module")
def in_full(backbone) -> list[tuple[Policy, torch.Tensor]]:  # noqa: ANN001
    policies = neighbours(backbone, count=40)
    return [(policy, generate(backbone, PROMPTS, policy=policy, seed=5)) for policy in policies]


@pytest.mark.parametrize(("limit", "host", "least"), [(1.5, 0.0, 1), (0.5, 1.5, 3), (1.2, 1.0, 3), (100.0, 0.0, 5)])
def test_trials_in_turn_are_bit_identical_to_full_runs(  # noqa: PLR0913
    backbone,  # noqa: ANN001
    dense: Recording,
    in_full: list[tuple[Policy, torch.Tensor]],
    limit: float,
    host: float,
    least: int,
) -> None:
    """Limits are in sizes of the dense recording: the small ones push trials out, `least` still begin later than dense."""
    size = dense.bytes / 2**20
    shared, later = SharedPrefixes(int(limit * size), device=CPU, host_mb=int(host * size)), 0
    for policy, expected in in_full:
        images, begins = trial(backbone, shared, policy, dense)
        assert torch.equal(images, expected), policy.key()
        alone = dense.start(plan_of(backbone, policy))
        later += begins > (alone.scales if alone else 0)
        for far, most in ((False, limit), (True, host)):
            assert shared.bytes(far=far) <= most * dense.bytes
    assert later >= least and (shared.bytes(far=True) > 0) == (host > 0)


def test_dense_generations_are_recorded_until_one_more_passes_the_limit(backbone, dense) -> None:  # noqa: ANN001
    plan = plan_of(backbone, None)
    made: list[int] = []

    def started(shared: SharedPrefixes, batch: int) -> bool:
        def record() -> Recording:
            made.append(batch)
            return record_prefix(backbone, PROMPTS, seed=5, sampling=backbone.sampling)

        return shared.start(batch, plan, record) is not None

    shared = SharedPrefixes(int(2.5 * dense.bytes / 2**20), device=CPU)
    assert [started(shared, batch) for batch in (0, 1, 2, 0)] == [True, True, False, True] and made == [0, 1]
    shared.clear()
    assert not started(shared, 0) and not shared.active and made == [0, 1]


def test_a_dense_generation_too_large_for_the_limit_is_not_made_again(backbone, dense) -> None:  # noqa: ANN001
    made: list[int] = []
    shared = SharedPrefixes(int(0.5 * dense.bytes / 2**20), device=CPU)
    for _ in range(2):
        assert shared.start(0, plan_of(backbone, None), lambda: made.append(1) or dense) is None
    assert made == [1] and shared.bytes() == 0


def test_scales_not_run_keep_the_keys_they_were_recorded_with(backbone, dense) -> None:  # noqa: ANN001
    shared = SharedPrefixes(10_000, device=CPU)
    policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), guidance=BranchRule("cond", 4))
    longer = Policy("tiny", backbone.depth, backbone.scale_schedule(), guidance=BranchRule("cond", 4), skip_last=1)
    trial(backbone, shared, policy, dense)
    start = shared.start(0, plan_of(backbone, longer), lambda: dense)
    assert start.snapshot.scales == 5 and list(start.keys) == plan_keys(plan_of(backbone, longer))[:5]
