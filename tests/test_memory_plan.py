"""Predicted memory against what processes really need, and the layouts of keys and values by hand."""

from dataclasses import replace

import pytest
import torch

from autoprune.backbones.allocation_trace import AllocationTrace, on_meta
from autoprune.backbones.official import RELEASED
from autoprune.generation import Observer, generate
from autoprune.measure.memory_check import VIDEO, MemoryCase, check_memory, policies_of, random_infinity
from autoprune.measure.memory_plan import compared_layouts, key_value_bytes, official_key_value_bytes, predicted_peak
from autoprune.policy import BranchRule, KeyRule, Policy, ScalePruning, StopRule
from autoprune.pruning.plan import compile_plan
from autoprune.state import GenerationState
from tests.test_flops import hart, var
from tests.tiny_star import star

SMALL = MemoryCase(width=256, depth=2, heads=4, pixel_budget="0.06M", decoder_base=8)


def test_a_trace_counts_what_is_alive_and_every_storage_once() -> None:
    with torch.inference_mode(), AllocationTrace() as trace:
        x = torch.empty(100, 10, device="meta")
        y = x @ x.T
        view = y[:50]
        assert trace.held == 4 * (1000 + 10000)
        del y
        assert trace.held == 4 * 11000, "a view keeps its storage"
        del view
        assert trace.held == 4000
        attended = torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
        assert trace.held == 8000 and attended.shape == (1, 1, 100, 10), "no products of fused attention"
    assert trace.peak == 44000


def test_a_copy_on_meta_has_the_structure_and_precision_of_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    copied = on_meta(model)
    assert {name: (value.shape, value.dtype) for name, value in copied.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in model.state_dict().items()
    }
    assert all(value.is_meta for value in copied.state_dict().values()) and not model[0].weight.is_meta


def test_predicted_is_near_measured_for_every_kind_of_policy() -> None:
    rows = check_memory(MemoryCase(width=512, depth=4, pixel_budget="0.06M", decoder_base=8, runs=1))
    assert len(rows) == 7
    for name, row in rows.items():
        apart = abs(row["predicted"] - row["measured"])
        assert row["measured"] > 15 and apart < 0.1 * row["measured"] + 6, (name, row)  # libraries keep a few MB of their own


def test_lasting_parts_are_what_a_generation_holds() -> None:
    backbone = random_infinity(SMALL)
    held = {}

    class Watch(Observer):
        def group_done(self, state: GenerationState, latent: torch.Tensor) -> None:
            held["key_values"] = sum(buffer.keys.nbytes + buffer.values.nbytes for buffer in state.buffers)
            held["text_key_values"] = sum(layer.nbytes for layer in state.conditioning.text)
            held["caches"] = sum(cache.nbytes for cache, _ in state.sandwich.caches.values())

    for name, policy in policies_of(backbone).items():
        if "branch" in name:
            continue  # what is left of the buffers is a view then
        generate(backbone, ["a"], policy=policy, observer=Watch())
        plan = predicted_peak(compile_plan(policy, policy.scale_schedule, policy.depth), backbone, ["a"])
        assert held == {part: getattr(plan, part) for part in held} and plan.unwritten == 0
        assert plan.transient > 0 and plan.allocated == plan.resident >= plan.scales


def test_what_is_never_written_is_not_resident() -> None:
    backbone = random_infinity(SMALL)
    schedule, depth = backbone.scale_schedule(), backbone.depth

    def predicted(**fields: object):  # noqa: ANN202
        return predicted_peak(compile_plan(Policy("random", depth, schedule, **fields), schedule, depth), backbone, ["a"])

    dropped = predicted(guidance=BranchRule("cond", 5))
    assert dropped.unwritten == 2 * 4 * 256 * depth * (144 + 256), "one of two rows misses the last two scales"
    assert predicted(keys=KeyRule(budget=0.3)).unwritten > 0


def test_policies_that_decide_on_the_way_are_predicted_at_their_most() -> None:
    backbone = random_infinity(SMALL)
    schedule, depth = backbone.scale_schedule(), backbone.depth
    cut = ScalePruning(0.5, granularity="scale", restorer="zero_residual", select="threshold", threshold=0.5)
    adaptive = Policy("random", depth, schedule, stop=StopRule(4, 0.1, 0.1), guidance=BranchRule("adaptive", 2, threshold=1.0))
    plans = [compile_plan(policy, schedule, depth) for policy in (None, adaptive, Policy("random", depth, schedule, {6: cut}))]
    dense, decided, fewer = (predicted_peak(plan, backbone, ["a"]) for plan in plans)
    assert decided.allocated == pytest.approx(dense.allocated, rel=0.01) and fewer.key_values < dense.key_values


@pytest.mark.parametrize("family", [var, hart])
def test_every_family_can_be_predicted(family) -> None:  # noqa: ANN001
    backbone = family()
    plan = compile_plan(None, backbone.scale_schedule(), backbone.depth)
    memory = predicted_peak(plan, backbone, ["1", "2"])
    rows, tokens = 4, backbone.model.prefix_tokens + sum(h * w for _, h, w in plan.schedule)
    assert memory.key_values == 2 * 4 * rows * 64 * 4 * tokens
    assert memory.text_key_values == 0 and memory.scales > memory.key_values and memory.decoding > 0


def test_official_infinity_2b_needs_half_as_much_again_for_keys_and_values() -> None:
    spec = RELEASED["infinity2b"]
    plan = compile_plan(None, spec.schedule_for(1.0), spec.transformer.depth)
    tokens, last, width, rows, depth = 10521, 4096, 2048, 2, 32
    ours = key_value_bytes(plan, width=width, rows=rows, itemsize=2)
    assert ours == 4 * tokens * width * rows * depth
    official = official_key_value_bytes(plan, width=width, rows=rows)
    copies = 4 * (tokens - last) - 2 * last  # the last layer's old keys beside its new ones, its values not yet grown
    assert official == width * rows * (6 * tokens * depth + copies)
    assert compared_layouts(plan, width=width, rows=rows)["ratio"] == official / ours == pytest.approx(1.513, abs=0.001)


@pytest.mark.parametrize("family", [var, hart, star, lambda: random_infinity(SMALL)])
def test_keys_in_host_memory_leave_two_layers_on_the_device(family) -> None:  # noqa: ANN001
    backbone, held = family(), {}
    hosted, plan = backbone.with_keys("host"), backbone.plan(None)

    class Watch(Observer):
        def group_done(self, state: GenerationState, latent: torch.Tensor) -> None:
            held["host"] = sum(buffer.keys.nbytes + buffer.values.nbytes for buffer in state.buffers)
            slots = state.buffers[0]._stream._slots
            held["key_values"] = sum(memory.nbytes for slot in slots for memory in slot._memory)

    generate(hosted, ["1"], observer=Watch())
    here, there = predicted_peak(plan, backbone, ["1"]), predicted_peak(plan, hosted, ["1"])
    assert held == {part: getattr(there, part) for part in held} and there.host == here.key_values and here.host == 0
    assert there.transient == here.transient, "the dry run counts two layers on the device and nothing else more"
    assert there.scales - here.scales == there.key_values - here.key_values <= 0
    assert backbone.depth <= 2 or there.key_values < here.key_values
    assert there.resident_scales == there.scales + there.host


def test_predicted_is_near_measured_on_the_scales_of_480p() -> None:
    rows = check_memory(replace(VIDEO, width=128, depth=1, frames=1))
    assert len(rows) == 8
    for name, row in rows.items():
        assert abs(row["predicted"] - row["measured"]) < 0.1 * row["measured"] + 6, (name, row)
