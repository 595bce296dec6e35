"""Generations through captured graphs against eager ones, bit for bit, on every family (tests/recorded_graph.py)."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_graph import RecordedGraphs
from torch import Tensor

from autoprune.backbones import Backbone, graphs, load_backbone
from autoprune.backbones.graphs import GraphCache
from autoprune.errors import UserError
from autoprune.generation import Observer, generate
from autoprune.measure.latency import ScaleClock, plan_keys
from autoprune.policy import BranchRule, KeyRule, Policy, ProbeRule, ScalePruning, StopRule
from autoprune.prefix import mapped, record_prefix
from autoprune.pruning.plan import ScalePlan, compile_plan
from autoprune.search.neighbour import random_vector
from autoprune.search.space import space_for
from autoprune.search.space_file import read_space
from autoprune.state import Snapshot
from tests.test_families import hart, infinity, var

UNIFIED = Path(__file__).parent.parent / "search_spaces" / "unified.yaml"
SHORT, LONG = ["7", "12"], ["7", "12 with a longer text behind it"]
FAMILIES = {"infinity": infinity, "var": var, "hart": hart}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Backbone:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def eager() -> Backbone:
    return infinity()


@pytest.fixture
def recorder() -> RecordedGraphs:
    return RecordedGraphs()


def with_graphs(backbone: Backbone, recorder: RecordedGraphs) -> Backbone:
    return replace(backbone, graphs=GraphCache(backbone.device, capturing=lambda device: recorder))


def policy_of(backbone: Backbone, **decisions: object) -> Policy:
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), **({"chunks": 2} | decisions))


def agrees(eager: Backbone, graphed: Backbone, policies: Sequence[Policy | None], prompts: Sequence[str] = SHORT) -> None:
    """Checks three rounds of all policies, each round with another seed."""
    for seed in range(3):
        for policy in policies:
            image = generate(graphed, prompts, policy=policy, seed=seed)
            assert torch.equal(image, generate(eager, prompts, policy=policy, seed=seed)), (seed, policy)


CACHED, WHOLE = ScalePruning(0.5, 3), ScalePruning(0.4, 3, granularity="scale")
CHUNKS = ScalePruning(0.5, 2, granularity="chunk", restorer="cached_state")
DECISIONS = {
    "sublayers": {"scales": {4: CACHED, 5: CACHED}},
    "some layers": {"scales": {5: replace(CACHED, layers=(1, 2), sublayers=("sa",))}},
    "scale": {"scales": {4: WHOLE, 5: WHOLE}, "guidance": BranchRule("cond", 5)},
    "chunks": {"scales": {5: CHUNKS}},
    "delta": {"scales": {5: replace(CACHED, scorer={"delta": 1.0}, chunk=1)}},
    "delta again": {
        "scales": {4: replace(WHOLE, scorer={"delta": 1.0}, chunk=1), 5: replace(CACHED, scorer={"delta": 1.0}, chunk=1)}
    },
    "latents": {"scales": {5: ScalePruning(0.5, granularity="scale", restorer="zero_residual", scorer="latent_l2")}},
    "branches": {"scales": {5: ScalePruning(0.5, granularity="scale", restorer="identity", scorer="cond_uncond")}},
    "anchors": {"scales": {5: ScalePruning(0.6, granularity="scale", restorer="anchor", anchors=4)}},
    "copies": {"scales": {5: ScalePruning(0.5, granularity="scale", restorer="nearest", recover_at="codes")}},
    "merged": {"scales": {5: ScalePruning(0.6, reducer="merge", restorer="merged")}},
    "cond alone": {"guidance": BranchRule("cond", 3), "scales": {5: replace(CACHED, cache_scale=2)}},
    "uncond alone": {"guidance": BranchRule("uncond", 4), "scales": {5: CACHED}},
    "extrapolated": {"guidance": BranchRule("cond", 4, "extrapolate")},
    "adaptive": {"guidance": BranchRule("adaptive", 3, metric="mse_hidden", threshold=1e9)},
    "group": {"group_from": 4, "scales": {5: replace(WHOLE, cache_scale=None, restorer="zero_residual")}},
    "window of keys": {"keys": KeyRule(1, 2)},
}
EAGER = {
    "random": {"scales": {5: replace(CACHED, scorer="random")}},
    "drawn": {"scales": {5: replace(WHOLE, select="draw", scorer="norm")}},
    "threshold": {"scales": {5: replace(WHOLE, select="threshold", threshold=0.3)}},
    "projected": {"scales": {5: replace(CHUNKS, reducer="project")}},
}
UNSEEN = {"budget of keys": {"keys": KeyRule(budget=0.3)}}
ENDING = {
    "skip": {"skip_last": 2},
    "stop": {"stop": StopRule(4, threshold=1e9, share=0.5)},
    "probe": {"probe": ProbeRule(3, 2, (0.0, 0.0), (1.0, 1.0), (0.1, 0.1), skip_cuts=(-9.0,))},
}


def test_every_decision_is_bit_identical_alternating_with_all_others(family: Backbone, recorder: RecordedGraphs) -> None:
    chosen = DECISIONS | EAGER | UNSEEN | (ENDING if family.skippable else {})
    agrees(family, with_graphs(family, recorder), [None, *(policy_of(family, **decisions) for decisions in chosen.values())])
    assert recorder.captured > 20 and recorder.replayed > 1.5 * recorder.captured


def test_random_policies_of_the_whole_space_are_bit_identical(family: Backbone, recorder: RecordedGraphs) -> None:
    space, rng = space_for(read_space(UNIFIED), family), np.random.default_rng(3)
    agrees(family, with_graphs(family, recorder), [space.policy(random_vector(space, rng)) for _ in range(25)])
    assert recorder.captured > 20


def test_presets_are_bit_identical(family: Backbone, recorder: RecordedGraphs) -> None:
    space = space_for(read_space(UNIFIED), family)
    agrees(family, with_graphs(family, recorder), [preset.policy for preset in space.presets()])
    assert recorder.captured > 20


@pytest.mark.parametrize("name", DECISIONS)
def test_all_scales_replay_from_the_third_time_on(eager: Backbone, recorder: RecordedGraphs, name: str) -> None:
    graphed, policy = with_graphs(eager, recorder), policy_of(eager, **DECISIONS[name])
    groups = len(compile_plan(policy, policy.scale_schedule, policy.depth).groups)
    counts = []
    for _ in range(4):
        generate(graphed, SHORT, policy=policy)
        counts.append((recorder.captured, recorder.replayed))
    assert counts == [(0, 0), (groups, groups), (groups, 2 * groups), (groups, 3 * groups)]


@pytest.mark.parametrize("name", EAGER)
def test_what_counts_or_draws_inside_the_blocks_is_never_captured(eager: Backbone, recorder: RecordedGraphs, name: str) -> None:
    graphed = with_graphs(eager, recorder)
    for _ in range(3):
        generate(graphed, SHORT, policy=policy_of(eager, **EAGER[name]))
    assert recorder.captured == len(eager.scale_schedule()) - 1, "all scales but the pruned one"


def test_texts_and_batches_of_other_lengths_alternate(family: Backbone, recorder: RecordedGraphs) -> None:
    graphed, policy = with_graphs(family, recorder), policy_of(family, **DECISIONS["scale"])
    for turn in range(3):
        for prompts in (["7"], SHORT, LONG[:1] * 3 if family.name == "hart" else ["1", "2", "3"], SHORT[1:]):
            for chosen in (policy, None):
                image = generate(graphed, prompts, policy=chosen, seed=turn)
                assert torch.equal(image, generate(family, prompts, policy=chosen, seed=turn))
    assert recorder.replayed > recorder.captured > 0


def test_other_texts_guidance_and_aspect_ratios(recorder: RecordedGraphs) -> None:
    plain = load_backbone("tiny", weights="random", dtype="float32", device="cpu")
    graphed, texts = with_graphs(plain, recorder), (["a red circle"], ["a red circle", "a photo of two blue squares"])
    changes = ({}, {"guidance": 1.0}, {"guidance_layers": (0, -2)}, {"guidance_layers": (-2,)}, {"negative": "a ring"})
    for turn in range(3):
        for sampling in [replace(plain.sampling, **change) for change in (*changes, {"h_div_w": 2.0}, {"guidance": 5.0})]:
            for prompts in texts:
                image = generate(graphed, prompts, seed=turn, sampling=sampling)
                assert torch.equal(image, generate(plain, prompts, seed=turn, sampling=sampling))
    assert recorder.replayed > recorder.captured > 40


def test_starts_from_a_dense_prefix_are_bit_identical_and_leave_it_as_it_was(
    family: Backbone, recorder: RecordedGraphs
) -> None:
    graphed = with_graphs(family, recorder)
    for _ in range(3):
        generate(graphed, SHORT, seed=5)
    prefix = record_prefix(graphed, SHORT, seed=5, sampling=family.sampling)
    before = [[tensor.clone() for tensor in _tensors(snapshot)] for snapshot in prefix.snapshots]
    for _ in range(3):
        for decisions in DECISIONS.values():
            policy = policy_of(family, **decisions)
            start = prefix.start(compile_plan(policy, policy.scale_schedule, policy.depth))
            image = generate(graphed, SHORT, seed=5, policy=policy, start=start)
            assert torch.equal(image, generate(family, SHORT, seed=5, policy=policy))
    after = [_tensors(snapshot) for snapshot in prefix.snapshots]
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


def _tensors(snapshot: Snapshot) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(snapshot, lambda tensor: found.append(tensor) or tensor)
    return found


class Failing(Observer):
    def __init__(self, scale: int) -> None:
        self._scale = scale

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        if scale.index == self._scale:
            raise InterruptedError


def test_a_generation_that_failed_leaves_nothing_behind(eager: Backbone, recorder: RecordedGraphs) -> None:
    graphed, policies = with_graphs(eager, recorder), [policy_of(eager, **DECISIONS[name]) for name in ("scale", "sublayers")]
    for scale in (3, 4, 4, 5, 5):
        for policy in policies:
            with pytest.raises(InterruptedError):
                generate(graphed, SHORT, policy=policy, observer=Failing(scale))
    agrees(eager, graphed, policies)


def test_an_error_inside_a_captured_block_is_raised_and_leaves_nothing_behind(
    eager: Backbone, recorder: RecordedGraphs
) -> None:
    graphed, policy = with_graphs(eager, recorder), policy_of(eager, **DECISIONS["delta"])
    generate(graphed, SHORT, policy=policy)

    def fail(module: torch.nn.Module, inputs: tuple) -> None:
        raise InterruptedError

    hook = eager.model.layers()[2].ffn.register_forward_pre_hook(fail)
    try:
        with pytest.raises(InterruptedError):
            generate(graphed, SHORT, policy=policy)
    finally:
        hook.remove()
    agrees(eager, graphed, [policy])


def test_what_cannot_be_captured_runs_without_and_says_so(eager: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(RecordedGraphs):
        def __call__(self, run):  # noqa: ANN001, ANN204
            super().__call__(run)
            raise RuntimeError("operation not permitted when stream is capturing")

    graphed = with_graphs(eager, Refusing())
    agrees(eager, graphed, [policy_of(eager, **DECISIONS[name]) for name in ("delta", "scale", "group")])
    assert "without a CUDA graph: operation not permitted" in caplog.text


def test_two_threads_never_share_memory(eager: Backbone, recorder: RecordedGraphs) -> None:
    graphed, policies = with_graphs(eager, recorder), [policy_of(eager, **DECISIONS[name]) for name in ("scale", "delta")]
    alone = [generate(eager, SHORT, seed=5, policy=policy) for policy in policies]
    turns, results = threading.Barrier(2), []

    class TakingTurns(Observer):
        def scale_started(self, scale: ScalePlan) -> None:
            turns.wait(timeout=60)

    def work(index: int) -> None:
        for _ in range(3):
            image = generate(graphed, SHORT, seed=5, policy=policies[index], observer=TakingTurns())
            results.append(torch.equal(image, alone[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6


def test_new_weights_are_noticed(recorder: RecordedGraphs) -> None:
    eager = infinity()
    graphed = with_graphs(eager, recorder)
    agrees(eager, graphed, [None])
    layer = eager.model.layers()[1].ffn.fc1
    layer.weight.mul_(-1)
    agrees(eager, graphed, [None])
    layer.weight = torch.nn.Parameter(layer.weight.flip(0), requires_grad=False)
    agrees(eager, graphed, [None])


def test_only_so_many_graphs_are_kept(eager: Backbone, recorder: RecordedGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 4)
    graphed = with_graphs(eager, recorder)
    agrees(eager, graphed, [None, policy_of(eager, **DECISIONS["scale"])])
    assert len(graphed.graphs._graphs) == 4 and recorder.captured > 20
    graphed.graphs.clear()
    assert not graphed.graphs._graphs and not graphed.graphs._slots
    agrees(eager, graphed, [None])


def test_an_observer_that_looks_inside_sees_every_time(eager: Backbone, recorder: RecordedGraphs) -> None:
    class Selections(Observer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def kept(self, scale: int, site: int, index: Tensor) -> None:
            self.seen.append(scale)

    graphed, policy = with_graphs(eager, recorder), policy_of(eager, **DECISIONS["scale"])
    for _ in range(4):
        watch = Selections()
        generate(graphed, SHORT, policy=policy, observer=watch)
        assert watch.seen == [4, 5]
        generate(graphed, SHORT, policy=policy)


def test_the_clock_sees_what_replays_ran(eager: Backbone, recorder: RecordedGraphs) -> None:
    graphed = with_graphs(eager, recorder)
    for name in ("scale", "chunks", "cond alone", "group"):
        policy = policy_of(eager, **DECISIONS[name])
        for _ in range(3):
            clock = ScaleClock(eager.device, len(SHORT))
            generate(graphed, SHORT, policy=policy, observer=clock)
            assert clock.keys == plan_keys(compile_plan(policy, policy.scale_schedule, policy.depth))[:-1]
    assert recorder.replayed > recorder.captured > 0


def test_where_memory_does_not_suffice_a_generation_runs_without(eager: Backbone, recorder: RecordedGraphs) -> None:
    class Full(GraphCache):
        def buffers(self, model, rows, capacity):  # noqa: ANN001, ANN202
            def none(rows: int, capacities: list[int]) -> None:
                raise torch.OutOfMemoryError

            return super().buffers(_Without(model, none), rows, capacity)

    class _Without:
        def __init__(self, model, buffers_for) -> None:  # noqa: ANN001
            self.layers, self.depth, self.buffers_for = model.layers, model.depth, buffers_for

    agrees(eager, replace(eager, graphs=Full(eager.device, capturing=lambda device: recorder)), [None])
    assert recorder.captured == 0


def test_graphs_are_a_choice_and_there_are_none_on_cpus() -> None:
    assert load_backbone("tiny", weights="random", device="cpu").graphs is None
    with pytest.raises(UserError, match="choose from auto, none"):
        load_backbone("tiny", weights="random", device="cpu", graphs="always")


GPU_CASES = {name: DECISIONS[name] for name in ("sublayers", "scale", "cond alone", "chunks", "merged", "copies", "anchors")}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(family: str) -> tuple[Backbone, Backbone]:
    """Returns a backbone of small size without and with graphs, on the same weights."""
    built = FAMILIES[family]()
    encode = built.text_encoder

    def encoded(prompts: Sequence[str]) -> object:
        features = encode(prompts)
        moved = {name: value.cuda() for name, value in vars(features).items() if isinstance(value, Tensor)}
        return replace(features, **moved)

    moved = replace(built, model=built.model.cuda(), tokenizer=built.tokenizer.cuda(), text_encoder=encoded)
    return moved, moved.with_graphs()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_are_bit_identical(family: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, graphed = on_cuda(family)
    agrees(plain, graphed, [None, *(policy_of(plain, **decisions) for decisions in GPU_CASES.values())])
    space, rng = space_for(read_space(UNIFIED), plain), np.random.default_rng(3)
    agrees(plain, graphed, [space.policy(random_vector(space, rng)) for _ in range(15)])
    assert len(graphed.graphs._graphs) > 20 and "without a CUDA graph" not in caplog.text


class NoHostSync(Observer):
    """Any wait of the host for the device between the start of the first scale and the end of the last one is an error."""

    def scale_started(self, scale: ScalePlan) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def blocks_done(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("graphs", ["auto", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_scales_never_wait_for_the_device(family: str, graphs: str) -> None:
    backbone = on_cuda(family)[0].with_graphs(graphs)
    for decisions in ({}, *GPU_CASES.values(), EAGER["random"], EAGER["drawn"], EAGER["projected"]):
        policy = policy_of(backbone, **decisions)
        for _ in range(2):
            generate(backbone, SHORT, policy=policy)
        try:
            generate(backbone, SHORT, policy=policy, observer=NoHostSync())
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_the_check_for_waiting_sees_one() -> None:
    backbone, policy = on_cuda("infinity")[0], policy_of(infinity(), **EAGER["threshold"])
    try:
        with pytest.raises(RuntimeError, match="synchron"):
            generate(backbone, SHORT, policy=policy, observer=NoHostSync())
    finally:
        torch.cuda.set_sync_debug_mode("default")
