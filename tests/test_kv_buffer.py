"""Keys and values in host memory against those on the device, bit for bit, on every family and for all that is done to them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from tiny_star import star
from torch import Tensor

from autoprune.backbones import Backbone, load_backbone
from autoprune.backbones.kv_buffer import HostedBuffer, KeyStream, KeyValueBuffer
from autoprune.errors import UserError
from autoprune.generation import Observer, generate
from autoprune.measure.memory import PeakMemory
from autoprune.policy import Policy
from autoprune.prefix import record_prefix
from autoprune.state import GenerationState
from tests.test_graphs import DECISIONS, EAGER, ENDING, FAMILIES, SHORT, UNSEEN, needs_gpu, on_cuda, policy_of
from tests.test_video_measures import POLICIES as OF_VIDEOS

CPU = torch.device("cpu")


def both(layers: int, shape: tuple[int, ...]) -> tuple[list[KeyValueBuffer], list[HostedBuffer]]:
    stream = KeyStream()
    return tuple([make(shape, dtype=torch.float32, device=CPU) for _ in range(layers)] for make in (KeyValueBuffer, stream))


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_whatever_is_done_to_a_layer_host_memory_holds_the_same(layers: int) -> None:
    plain, hosted = both(layers, (4, 2, 40, 8))
    rng, rows = torch.Generator().manual_seed(layers), 4

    def each(do: Callable[[KeyValueBuffer], object]) -> None:
        for one, other in zip(plain, hosted, strict=True):
            torch.testing.assert_close(do(one), do(other), rtol=0, atol=0)
            assert one.length == other.length and one.sizes == other.sizes

    def some(count: int) -> tuple[Tensor, Tensor]:
        k, v = torch.randn(2, rows, 2, count, 8, generator=rng)
        return k, v

    for round in range(3):
        for count in (1, 5, 3):
            k, v = some(count)
            each(lambda buffer, k=k, v=v: buffer.append(k + buffer.length, v))
            each(lambda buffer, k=k, v=v: buffer.beside(k, v))
        each(lambda buffer: buffer.forget(range(1, 2)))
        k, v = some(2)
        each(lambda buffer, k=k, v=v: buffer.append(k, v))
        index = torch.rand(rows, 2, plain[0].length, generator=rng).argsort(dim=-1)[..., :4].sort(dim=-1).values
        each(lambda buffer, index=index: buffer.keep(index))
        if round == 0:
            each(lambda buffer: buffer.keep_rows(slice(2, 4)))
            rows = 2
        each(lambda buffer: buffer.held())
    held = [buffer.held() for buffer in hosted]
    empty = [buffer.emptied(1) for buffer in hosted]
    assert all(buffer.length == 0 and buffer.keys.shape[0] == 1 for buffer in empty)
    _, other = both(layers, (2, 2, 40, 8))
    for buffer, own in zip(other, held, strict=True):
        buffer.fill(own)
        torch.testing.assert_close(buffer.held(), own, rtol=0, atol=0)


def test_the_next_layer_is_there_before_it_is_asked_for_and_the_device_holds_two() -> None:
    _, hosted = both(3, (1, 1, 8, 4))
    k = torch.ones(1, 1, 2, 4)
    for number, buffer in enumerate(hosted):
        buffer.append(k * number, k)
    slots = hosted[0]._stream._slots
    for buffer, following in zip(hosted, [*hosted[1:], hosted[0]], strict=True):
        keys, _ = buffer.beside(k, k)
        assert [slot.content for slot in slots] == [buffer.content, following.content]
        assert torch.equal(keys[:, :, :2], k * hosted.index(buffer))
    hosted[0].forget(range(0, 1))
    assert hosted[0].content not in [slot.content for slot in slots], "what was brought early is known to be old"


def agrees(plain: Backbone, policies: Sequence[Policy | None], prompts: Sequence[str] = SHORT) -> None:
    hosted = plain.with_keys("host")
    for policy in policies:
        expected = generate(plain, prompts, policy=policy, seed=2)
        assert torch.equal(generate(hosted, prompts, policy=policy, seed=2), expected), policy


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decision_is_bit_identical(family: str) -> None:
    backbone = FAMILIES[family]()
    chosen = DECISIONS | EAGER | UNSEEN | (ENDING if backbone.skippable else {})
    agrees(backbone, [None, *(policy_of(backbone, **decisions) for decisions in chosen.values())])


@pytest.mark.parametrize("frames", [1, 17, 33])
def test_clips_are_bit_identical(frames: int) -> None:
    backbone = star(frames)
    last = len(backbone.scale_schedule()) - 1
    policies = [policy_of(backbone, **fields) for fields in OF_VIDEOS.values()] if frames == 17 else []
    agrees(backbone, [None, policy_of(backbone, skip_last=1), policy_of(backbone, fewer_repetitions={last - 2: 1}), *policies])


def test_generations_go_on_from_prefixes_in_host_memory() -> None:
    backbone = FAMILIES["infinity"]()
    hosted = backbone.with_keys("host")
    recording = record_prefix(hosted, SHORT, seed=0, sampling=backbone.sampling)
    for name in ("sublayers", "scale", "window of keys", "cond alone"):
        policy = policy_of(backbone, **DECISIONS[name])
        start = recording.start(backbone.plan(policy))
        assert start is not None and start.scales > 0
        expected = generate(backbone, SHORT, policy=policy, seed=0)
        for _ in range(2):
            assert torch.equal(generate(hosted, SHORT, policy=policy, seed=0, start=start), expected), name


def test_every_layer_of_a_generation_is_in_host_memory_and_graphs_are_off() -> None:
    seen = []

    class Watch(Observer):
        def group_done(self, state: GenerationState, latent: Tensor) -> None:
            seen.append((state.graphs, {type(buffer) for buffer in state.buffers}))

    backbone = replace(FAMILIES["infinity"]().with_keys("host"), graphs=object())
    generate(backbone, ["7"], observer=Watch())
    assert seen and all(entry == (None, {HostedBuffer}) for entry in seen)


def test_where_keys_lie_is_a_choice() -> None:
    assert load_backbone("tiny", weights="random", device="cpu").keys == "device"
    assert load_backbone("tiny", weights="random", device="cpu", keys="host").keys == "host"
    with pytest.raises(UserError, match="unknown keys choice 'disk'; choose from auto, device, host"):
        load_backbone("tiny", weights="random", device="cpu", keys="disk")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_streams_are_bit_identical(family: str) -> None:
    backbone, _ = on_cuda(family)
    chosen = DECISIONS | EAGER | UNSEEN
    for _ in range(3):
        agrees(backbone, [None, *(policy_of(backbone, **decisions) for decisions in chosen.values())])


@pytest.mark.gpu
@needs_gpu
def test_cuda_keys_are_pinned_and_the_device_holds_less() -> None:
    stream, layers, shape = KeyStream(), 24, (2, 16, 8192, 64)
    device, peaks = torch.device("cuda"), {}
    for name, make in (("device", KeyValueBuffer), ("host", stream)):
        with PeakMemory(device) as before:
            pass
        with PeakMemory(device) as inside, torch.inference_mode():
            buffers = [make(shape, dtype=torch.bfloat16, device=device) for _ in range(layers)]
            sums = []
            for place in range(2 * layers):
                k = torch.full((2, 16, 1024, 64), float(place), dtype=torch.bfloat16, device=device)
                keys, values = buffers[place % layers].append(k, k)
                sums.append((keys.float().sum(), values[:, :, -1].float().sum()))
        peaks[name] = inside.megabytes - before.megabytes, torch.tensor(sums)
        if name == "host":
            assert all(buffer.keys.is_pinned() and buffer.device.type == "cuda" for buffer in buffers)
        del buffers, keys, values, k
    assert torch.equal(peaks["host"][1], peaks["device"][1])
    assert peaks["host"][0] < 0.2 * peaks["device"][0]
