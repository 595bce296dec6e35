"""What is computed, held and compared of videos: FLOPs against torch's own count, memory against a real run, drawn tokens."""

import json

import numpy as np
import pytest
import torch
from tiny_star import star

from autoprune.backbones import Backbone
from autoprune.generation import Observer, generate
from autoprune.measure import memory_plan
from autoprune.measure.flops import scale_flops, text_flops, transformer_shape, workload
from autoprune.measure.held_keys import key_counts
from autoprune.measure.memory_plan import predicted_peak
from autoprune.measure.metrics.similarity import psnr, ssim
from autoprune.measure.metrics.tokens import NOT_DRAWN, TokenRecorder
from autoprune.measure.scales import measure_scales
from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.state import GenerationState
from tests.test_flops import counted

PRUNED = {7: ScalePruning(0.5, 6), 9: ScalePruning(0.3, 6)}
POLICIES = {
    "dense": {},
    "sublayers": {"scales": PRUNED, "fewer_repetitions": {8: 1}},
    "scale": {"scales": {7: ScalePruning(0.5, 6, granularity="scale", dense_repetitions=0)}, "skip_last": 1},
    "chunks": {"scales": {9: ScalePruning(0.5, 8, granularity="chunk", restorer="cached_state")}, "chunks": 2},
    "one branch": {"guidance": BranchRule("cond", 7)},
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return star()


def policy_of(backbone: Backbone, name: str) -> Policy:
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), **POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_flops_of_every_run_are_those_that_torch_counts(backbone: Backbone, name: str) -> None:
    policy = policy_of(backbone, name)
    shape, work = transformer_shape(backbone.model), workload(backbone, backbone.encode_text(["1", "2"]))
    computed = [flops.total for flops in scale_flops(backbone.plan(policy), shape, work)]
    assert computed == pytest.approx(counted(backbone, policy), rel=0.01)


def test_flops_of_the_text_are_those_of_all_blocks_on_it(backbone: Backbone) -> None:
    shape, features = transformer_shape(backbone.model), backbone.encode_text(["1", "2"])
    work, text, config = workload(backbone, features), features.values.shape[1], backbone.model.config
    projections = 2 * config.width**2 + 2 * config.width * config.key_heads * config.head_width
    token = projections + 3 * config.width * config.mlp_width + 2 * text * config.width
    assert text_flops(backbone.plan(None), shape, work) == 2 * 4 * text * config.depth * token


@pytest.mark.parametrize("name", ["dense", "sublayers", "scale"])
def test_planned_memory_is_what_a_generation_holds(backbone: Backbone, name: str) -> None:
    held, policy = {}, policy_of(backbone, name)

    class Watch(Observer):
        def group_done(self, state: GenerationState, latent: torch.Tensor) -> None:
            held["key_values"] = sum(buffer.keys.nbytes + buffer.values.nbytes for buffer in state.buffers)
            held["text_key_values"] = sum(layer.nbytes for layer in state.conditioning.keys)
            held["caches"] = sum(cache.nbytes for cache, _ in state.sandwich.caches.values())
            held.setdefault("keys", []).append([sum(buffer.sizes) for buffer in state.buffers])

    generate(backbone, ["a"], policy=policy, observer=Watch())
    plan = backbone.plan(policy)
    keys = held.pop("keys")
    assert [list(run) for run in key_counts(plan, prefix=40).held] == keys
    memory = predicted_peak(plan, backbone, ["a"])
    assert held == {part: getattr(memory, part) for part in held}
    assert memory.unwritten == 0 and memory.scales > memory.key_values and memory.decoding > 0


def test_runs_are_timed_one_by_one(backbone: Backbone) -> None:
    record = measure_scales(backbone, {"pruned": policy_of(backbone, "sublayers")}, batch=1, rounds=1, prompt="a")
    rows = json.loads(json.dumps(record))["policies"]
    dense, pruned = rows["dense"]["forwards"], rows["pruned"]["forwards"]
    assert [row["scales"] for row in dense] == [[step] for step in range(16)]
    assert [row["scales"] for row in pruned] == [[step] for step in range(16) if step != 14]
    assert pruned[-1]["kept"] < dense[-1]["kept"] and pruned[12]["kept"] == dense[12]["kept"], "the last repetition is dense"


def test_runs_that_are_left_out_agree_with_nothing(backbone: Backbone) -> None:
    recorders = TokenRecorder(), TokenRecorder()
    for recorder, name in zip(recorders, ("dense", "sublayers"), strict=True):
        generate(backbone, ["a", "b"], seed=1, policy=policy_of(backbone, name), observer=recorder)
    dense = recorders[0].tokens()
    own = recorders[1].tokens(dense)
    assert len(own) == len(dense) == 16 and [bool((run == NOT_DRAWN).all()) for run in own] == [
        step == 14 for step in range(16)
    ]
    assert all(torch.equal(one, other) for one, other in zip(own[:10], dense[:10], strict=True))


def test_videos_are_compared_frame_by_frame() -> None:
    one, other = torch.rand(2, 3, 4, 24, 32), torch.rand(2, 3, 4, 24, 32)
    frames = [ssim(one[:, :, frame], other[:, :, frame]) for frame in range(4)]
    torch.testing.assert_close(ssim(one, other), torch.stack(frames).mean(dim=0))
    errors = (one - other).double().square().mean(dim=(1, 3, 4)).numpy()
    np.testing.assert_allclose(psnr(one, other), (-10 * np.log10(errors)).mean(axis=1), rtol=1e-5)
    assert ssim(one, one).tolist() == [1.0, 1.0] and psnr(one, one.clone()).tolist() == [100.0, 100.0]


def test_an_image_of_the_same_backbone_is_measured_like_any_other() -> None:
    backbone = star(1)
    policy = Policy(backbone.name, backbone.depth, backbone.scale_schedule(), {4: ScalePruning(0.5, 3)})
    shape = transformer_shape(backbone.model)
    work = workload(backbone, backbone.encode_text(["1", "2"]))
    computed = [flops.total for flops in scale_flops(backbone.plan(policy), shape, work)]
    assert computed == pytest.approx(counted(backbone, policy), rel=0.01)


@pytest.mark.parametrize("frames", [1, 17, 33])
def test_runs_that_a_dry_run_leaves_out_need_no_more(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, plans = star(frames), {}
    names = POLICIES if frames == 17 else ["dense"]
    for name in names:
        plan = backbone.plan(policy_of(backbone, name))
        plans[name] = plan, predicted_peak(plan, backbone, ["a", "b"])
        assert len(memory_plan._decisive(plan).groups) < 0.7 * len(plan.groups)
    monkeypatch.setattr(memory_plan, "_decisive", lambda plan: plan)
    for plan, decisive in plans.values():
        assert predicted_peak(plan, backbone, ["a", "b"]) == decisive
