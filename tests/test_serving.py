"""Generation inside a server: threads, failures, forks, and whatever the host program set, against the same calls alone."""

import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_graph import RecordedGraphs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import autoprune
from autoprune.backbones import Backbone, linear, load_backbone
from autoprune.backbones.official import RELEASED
from autoprune.backbones.released import random_backbone
from autoprune.backbones.rope import rotate, rotation
from autoprune.backbones.var import VARConfig
from autoprune.errors import UserError
from autoprune.generation import Observer
from autoprune.policy import BranchRule, KeyRule, Policy, ScalePruning
from autoprune.pruning.plan import ScalePlan
from tests.test_families import CPU, VQ, hart, infinity, var
from tests.test_graphs import DECISIONS, EAGER, ENDING, UNSEEN, WHOLE, policy_of, with_graphs
from tests.test_wrapping import CONFIG, TOKENIZER, Authors, features

ROOT = Path(__file__).parent.parent
SPLIT = {"guidance": BranchRule("adaptive", 3, metric="mse_hidden", threshold=1e9), "batch": "split"}
RANKS = {"scales": {5: replace(WHOLE, scorer={"dc": 1.0, "norm": 0.5}, normalise="rank")}, "keys": KeyRule(budget=0.4)}
ALL = {"dense": {}, "split": SPLIT, "ranks": RANKS} | DECISIONS | EAGER | UNSEEN | ENDING
FEW = ("dense", "sublayers", "delta", "copies", "adaptive", "split", "random", "threshold", "budget of keys", "group")


def tiny() -> Backbone:
    return load_backbone("tiny", weights="random", dtype="float32", device="cpu")


FAMILIES = {"infinity": infinity, "var": var, "hart": hart, "tiny": tiny}
built = cache(lambda family: FAMILIES[family]())


@dataclass(frozen=True)
class Job:
    """One request to a server."""

    policy: str
    seed: int
    batch: int

    def run(self, backbone: Backbone, policy: Policy | None = None) -> str:
        """Returns the digest of its images."""
        words = ["a red circle", "two rings", "a blue square"] if backbone.name == "tiny" else ["7", "12", "3"]
        chosen = policy or (policy_of(backbone, **ALL[self.policy]) if self.policy != "dense" else None)
        images = autoprune.generate(backbone, words[: self.batch], policy=chosen, seed=self.seed)
        assert images.shape[0] == self.batch and images.isfinite().all()
        return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def jobs(names: Sequence[str] = FEW) -> list[Job]:
    return [Job(name, seed=place, batch=1 + place % 3) for place, name in enumerate(names)]


def python(code: str, *, threads: int = 1) -> str:
    """Runs code in a fresh process and returns what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def print_alone() -> None:
    """Prints the digests of all jobs of all families, for the fresh process of the tests."""
    torch.set_num_threads(1)
    print(json.dumps({family: [job.run(built(family)) for job in jobs()] for family in FAMILIES}))


@pytest.fixture(scope="module")
def alone() -> dict[str, list[str]]:
    return json.loads(python("import tests.test_serving as t; t.print_alone()"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # threads take turns inside every scale
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Runs work(number) in threads and raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_with_mixed_policies_get_what_each_gets_alone(family: str, graphs: bool, alone: dict[str, list[str]]) -> None:
    backbone, recorder = built(family), RecordedGraphs()
    todo, rounds = (jobs()[:5], 1) if family == "tiny" else (jobs(), 2)  # eight times as slow as the others
    served = with_graphs(backbone, recorder) if graphs else backbone
    if graphs:  # what was met once is captured by whichever thread borrows the graphs
        assert [job.run(served) for job in todo] == alone[family][: len(todo)]

    def work(number: int) -> None:
        for turn in range(rounds):
            for place in range(len(todo)):
                index = (place * (1 + 2 * turn) + 3 * number) % len(todo)
                assert todo[index].run(served) == alone[family][index], todo[index]

    in_threads(work, 5)
    assert bool(recorder.captured) == graphs


def test_threads_share_a_policy_while_files_are_loaded_and_others_refused(tmp_path: Path, alone: dict[str, list[str]]) -> None:
    backbone, stop = built("tiny"), threading.Event()
    shared = policy_of(backbone, **ALL["sublayers"])
    paths = [shared.save(tmp_path / "a.json"), policy_of(backbone, **ALL["delta"]).save(tmp_path / "b.json")]
    other = policy_of(built("infinity"), **ALL["delta"])
    loaded: list[str] = []

    def work(number: int) -> None:
        if number == 4:
            while not stop.is_set():
                loaded.append(Policy.load(paths[len(loaded) % 2]).key())
                with pytest.raises(UserError, match="the policy is for backbone 'infinity2b', not 'tiny'"):
                    autoprune.generate(backbone, ["a ring"], policy=other)
            return
        try:
            for _ in range(2):
                assert jobs()[1].run(backbone, shared) == alone["tiny"][1]
                assert jobs()[2].run(backbone, Policy.load(paths[1])) == alone["tiny"][2]
        finally:
            if number == 0:
                stop.set()

    in_threads(work, 5)
    assert len(loaded) > 2 and len(set(loaded)) == 2


class Ending(TorchDispatchMode):
    """Raises at the n-th operator, wherever that is."""

    def __init__(self, place: int, error: BaseException) -> None:
        super().__init__()
        self.left, self._error = place, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.left -= 1
        if self.left == 0:
            raise self._error
        return func(*args, **(kwargs or {}))


class Watching(Observer):
    """Does something at one scale."""

    def __init__(self, scale: int, act: Callable[[], object]) -> None:
        self._scale, self._act = scale, act

    def scale_done(self, scale: ScalePlan, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        if scale.index == self._scale:
            self._act()


def raising(error: type[BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def nothing_left(*modules: torch.nn.Module) -> None:
    """Checks that neither torch's modes nor the modules carry anything of a generation."""
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert not _get_current_dispatch_mode_stack() and torch.zeros(1).device.type == "cpu"
    assert torch._C._len_torch_function_stack() == 0
    for module in (part for whole in modules for part in whole.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("name", ["delta", "sublayers", "adaptive"])
def test_an_interrupt_at_any_operator_leaves_nothing_behind(name: str, graphs: bool, alone: dict[str, list[str]]) -> None:
    backbone, recorder, index = built("infinity"), RecordedGraphs(), FEW.index(name)
    served, job = with_graphs(backbone, recorder) if graphs else backbone, jobs()[FEW.index(name)]
    for _ in range(2):  # the first one computes what is remembered
        with Ending(0, KeyboardInterrupt()) as counted:
            job.run(backbone)
    operators = -counted.left
    for place in range(1, operators, operators // 15):
        with pytest.raises(KeyboardInterrupt), Ending(place, KeyboardInterrupt()):
            job.run(served)
        nothing_left(served.model, served.tokenizer)
        if place % 5 == 0:
            assert job.run(served) == alone["infinity"][index], place
    before = recorder.replayed
    assert [job.run(served) for _ in range(3)] == [alone["infinity"][index]] * 3
    assert (recorder.replayed > before) == graphs, "graphs are lent again"


def test_ctrl_c_and_errors_of_observers_prompts_and_encoders_leave_nothing_behind(alone: dict[str, list[str]]) -> None:
    backbone, job = built("tiny"), jobs()[1]
    policy = policy_of(backbone, **ALL[job.policy])
    broken = replace(backbone, text_encoder=lambda prompts: raising(OSError)())
    cases = [
        (backbone, "a ring", Watching(3, lambda: signal.raise_signal(signal.SIGINT)), KeyboardInterrupt),
        (backbone, "a ring", Watching(5, raising(MemoryError)), MemoryError),
        (backbone, "an unknown word", None, UserError),
        (broken, "a ring", None, OSError),
    ]
    for served, prompt, observer, error in cases:
        with pytest.raises(error):
            autoprune.generate(served, [prompt], policy=policy, observer=observer)
        nothing_left(served.model, served.tokenizer)
        assert job.run(backbone) == alone["tiny"][1]


def test_a_wrapped_model_is_left_as_it_was() -> None:
    authors = (
        Authors(autoprune.backbones.infinity.Infinity(CONFIG).state_dict()),
        Authors(autoprune.backbones.bsq_tokenizer.BSQTokenizer(TOKENIZER).state_dict()),
    )
    before = [sorted(vars(part)) for whole in authors for part in whole.modules()]
    backbone = autoprune.wrap(*authors, text=features, pixel_budget="0.06M")
    first = autoprune.generate(backbone, ["a cat"], seed=2)
    for place in (1, 50, 400):
        with pytest.raises(KeyboardInterrupt), Ending(place, KeyboardInterrupt()):
            autoprune.generate(backbone, ["a cat"], seed=2)
    with pytest.raises(UserError):
        autoprune.wrap(authors[1], authors[1])
    nothing_left(*authors)
    assert [sorted(vars(part)) for whole in authors for part in whole.modules()] == before
    assert torch.equal(autoprune.generate(backbone, ["a cat"], seed=2), first)


def small() -> Backbone:
    """Returns a generator of three scales and two blocks, about as fast as one can be."""
    config = VARConfig(width=32, heads=2, depth=2, sides=(1, 2, 4), channels=8, vocabulary=60)
    spec = replace(RELEASED["var_d16"], transformer=config, tokenizer=VQ, schedule_for=config.schedule_for)
    return random_backbone("var_d16", spec, CPU)


def generations(served: Sequence[Backbone], count: int) -> None:
    """Generates with the backbones in turn; seven of twelve calls fail, in an observer or because there is no prompt."""
    half = ScalePruning(0.5, 1)
    pruned = {2: half}, {2: replace(half, scorer={"delta": 1.0}, chunk=1)}, {}, {}
    policies = [policy_of(served[0], scales=scales) for scales in pruned]
    policies[-1] = replace(policies[-1], guidance=SPLIT["guidance"])
    failing = Watching(1, raising(InterruptedError))
    for turn in range(count):
        observer, prompts = failing if turn // 4 % 2 else None, [] if turn % 12 == 2 else [str(turn % 10), "3"]
        try:
            options = {"policy": policies[turn % 4], "seed": turn, "observer": observer}
            autoprune.generate(served[turn % 3 % len(served)], prompts, **options)
        except (InterruptedError, UserError):
            pass


@cache
def built_with_graphs() -> Backbone:
    return with_graphs(built("infinity"), RecordedGraphs())


def print_memory() -> None:
    """Prints what 1000 generations left alive: kilobytes resident and traced, tensors, without and with garbage collection."""
    import tracemalloc

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def tensors() -> int:
        return sum(issubclass(type(entry), Tensor) for entry in gc.get_objects())

    torch.set_num_threads(1)
    plain = small()
    served = plain, with_graphs(plain, RecordedGraphs())
    generations(served, 120)
    gc.collect()
    gc.disable()
    before = tensors()
    generations(served, 24)
    cyclic = tensors() - before
    gc.enable()
    tracemalloc.start()
    generations(served, 120)
    gc.collect()
    before, rss = tensors(), resident()
    generations(served, 880)  # the last free lists fill up after several hundred
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0]
    generations(served[:1], 120)
    gc.collect()
    rss = resident() - rss
    found = {"resident": rss, "traced": tracemalloc.get_traced_memory()[0] - traced, "tensors": tensors() - before}
    print(json.dumps(found | {"cyclic": cyclic}))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_thousand_generations_that_succeed_or_fail_leave_no_memory_behind() -> None:
    left = json.loads(python("import tests.test_serving as t; t.print_memory()"))
    assert left["tensors"] <= 0 and left["cyclic"] <= 0, left
    assert left["traced"] < 6_000 and left["resident"] < 4 * 2**20, left


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
        assert torch.get_default_device().type == name
    finally:
        torch.set_default_device(None)


HOSTS: dict[str, Callable[[], AbstractContextManager]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "float64": partial(default_dtype, torch.float64),
    "float16": partial(default_dtype, torch.float16),
    "another device": partial(default_device, "meta"),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("family", ["infinity", "var", "hart", "tiny"])
def test_what_the_host_program_set_changes_no_image(family: str, host: str) -> None:
    backbone = built(family)
    todo = {"infinity": jobs(tuple(ALL)), "tiny": jobs(("dense", "ranks"))}.get(family, jobs())
    plain = [job.run(backbone) for job in todo]
    rotation.cache_clear()
    linear._runs_here.cache_clear()
    with HOSTS[host]():
        inside = [job.run(backbone) for job in todo]
    assert inside == plain
    assert [job.run(backbone) for job in todo] == plain, "nothing wrong was remembered"


@pytest.mark.parametrize("host", ["float64", "another device"])
def test_a_backbone_loads_the_same_whatever_the_host_program_set(host: str) -> None:
    plain = load_backbone("tiny", dtype="float32", device="cpu")
    with HOSTS[host]():
        loaded = load_backbone("tiny", dtype="float32", device="cpu")
        image = autoprune.generate(loaded, ["a ring"], seed=1)
    assert torch.equal(image, autoprune.generate(plain, ["a ring"], seed=1))


def test_what_a_generation_remembers_can_be_trained_with() -> None:
    rotation.cache_clear()
    jobs()[0].run(built("tiny"))
    factors = rotation((1, 4, 4), (1, 16, 16), 16, torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        again = rotation((1, 6, 6), (1, 16, 16), 16, torch.device("cpu"), torch.bfloat16)
    for each in (factors, again):
        x = torch.ones(each.shape[1], 16, dtype=torch.bfloat16, requires_grad=True)
        rotate(x, each).sum().backward()
        assert x.grad is not None


def test_random_numbers_of_the_host_program_are_neither_used_nor_changed() -> None:
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
        digests.add(tuple(job.run(built(family)) for family in ("infinity", "hart") for job in jobs()))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (str(np.random.get_state()), random.getstate()) == before[1:]
    assert len(digests) == 1


FORK = """
import os, threading, time
import torch
import tests.test_serving as t
from autoprune.errors import UserError
from autoprune.backbones.text_models import PromptMemory

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
backbone, job = t.built_with_graphs(), t.jobs()[1]
expected = job.run(backbone)
memory, inside = PromptMemory(4), threading.Event()
def encode(prompt):
    inside.set()
    time.sleep(0.4)
    return prompt
busy = [
    threading.Thread(target=lambda: [job.run(backbone) for _ in range(20)]),
    threading.Thread(target=memory.of, args=(["a"], encode)),
]
for thread in busy:
    thread.start()
inside.wait()
child = os.fork()
if child == 0:
    if torch.get_num_threads() > 1:
        try:
            job.run(backbone)
            os._exit(2)
        except UserError as error:
            if "torch.set_num_threads(1)" not in str(error):
                os._exit(3)
        found = []
        thread = threading.Thread(target=lambda: found.append(job.run(backbone)))
        thread.start()
        thread.join()
        torch.set_num_threads(1)
    else:
        found = [job.run(backbone)]
    found.append(job.run(backbone))
    os._exit(0 if set(found) == {expected} and memory.of(["b"], str.upper) == ["B"] else 4)
for thread in busy:
    thread.join()
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
    raise SystemExit("the child hangs")
print(os.waitstatus_to_exitcode(status), job.run(backbone) == expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_generates_the_same_or_says_what_to_do(threads: int) -> None:
    assert python(FORK, threads=threads).split() == ["0", "True"]
