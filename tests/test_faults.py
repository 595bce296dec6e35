"""What goes wrong in a trial: real shortages of memory, broken images, vanished files, a disk without space."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from test_study import FormulaEvaluator, evaluated, search, settings

from autoprune.backbones import load_backbone
from autoprune.errors import UserError
from autoprune.files import NoSpace
from autoprune.measure.metrics.lpips import ALEXNET, Trunk
from autoprune.policy import BranchRule, Policy, ScalePruning
from autoprune.search.evaluation import Evaluation, Stop
from autoprune.search.evaluator import GenerationEvaluator
from autoprune.search.faults import IMAGES, MEMORY, VALUES, VIOLATION, Fault, check_images, fault_of
from autoprune.search.journal_file import open_journal
from autoprune.search.model_sampler import ModelSampler
from autoprune.search.settings import LatencySettings, QualitySettings, SamplerSettings
from tests.test_space import space

CHUNK = 2**50  # bytes that no machine has


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random")


def raised(run: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        run()
    return caught.value


def behind() -> None:
    try:
        bytearray(2**62)
    except MemoryError as error:
        raise RuntimeError("a kernel failed") from error


def full() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")
        file.flush()


@pytest.mark.parametrize(
    "run",
    [lambda: torch.empty(CHUNK, dtype=torch.uint8), lambda: bytearray(2**62), lambda: np.ones(2**60, np.uint8), behind],
    ids=["torch", "python", "numpy", "behind another error"],
)
def test_real_shortages_of_memory_are_one_fault(run: Callable[[], object]) -> None:
    fault = fault_of(raised(run))
    assert fault.constraint == MEMORY and fault.note.startswith("out of memory (") and "\n" not in fault.note


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_full_gpu_is_a_fault_and_is_free_after_it() -> None:
    fault = fault_of(raised(lambda: torch.empty(CHUNK, dtype=torch.uint8, device="cuda")))
    assert fault.constraint == MEMORY and "CUDA out of memory" in fault.note


def test_other_errors_are_none_and_a_full_disk_is_no_fault_of_a_trial() -> None:
    assert fault_of(raised(lambda: torch.ones(2) @ torch.ones(3))) is None
    assert fault_of(raised(Path("/nowhere/x").read_text)) is None
    with pytest.raises(NoSpace, match="No space left on device; make space there"):
        fault_of(raised(full))


@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "not finite"), (math.inf, "not finite"), (-math.inf, "not finite"), (None, "one colour")]
)
def test_broken_images_are_found_one_by_one(value: float | None, words: str) -> None:
    images = torch.rand(3, 3, 8, 8)
    check_images(images)
    if value is None:
        images[1] = 0
    else:
        images[1, 2, 3, 4] = value
    with pytest.raises(Fault, match=f"^1 of 3 images have .*{words}") as caught:
        check_images(images)
    assert caught.value.constraint == IMAGES


def small(**changes: object):  # noqa: ANN201
    made = replace(settings(Path("unused"), space="unified"), latency=LatencySettings(batch=2, rounds=1))
    return replace(made, quality=QualitySettings(prompts=4, held_out_prompts=2), **changes)


def never(first: object) -> str:
    return ""


def policy(backbone, **decisions: object) -> Policy:  # noqa: ANN001
    return Policy("tiny", backbone.depth, backbone.scale_schedule(), **decisions)


class Breaks:
    """A decoder whose pictures become `value` in batch after batch while it is on: a GPU that went bad, an overflow."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.value: float | None = None
        self.handle = module.register_forward_hook(lambda module, inputs, output: self.spoilt(output))

    def spoilt(self, output: torch.Tensor) -> torch.Tensor:
        return output if self.value is None else torch.full_like(output, self.value)


@pytest.fixture
def breaks(backbone):  # noqa: ANN001, ANN201
    made = Breaks(backbone.tokenizer.decoder)
    yield made
    made.handle.remove()


@pytest.mark.parametrize("overlaps", [False, True], ids=["in line", "beside the next batch"])
def test_a_policy_of_black_images_is_a_fault_and_spoils_no_later_trial(backbone, breaks, overlaps: bool) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, small(), overlaps=overlaps)
    evaluator.dense()
    pruned = policy(backbone, scales={6: ScalePruning(0.5, 5)})
    before = evaluator.evaluate(pruned, stop=never).measurement
    for value, words in ((-1.0, "one colour only"), (math.nan, "not finite")):
        breaks.value = value
        with pytest.raises(Fault, match=f"2 of 2 images have .*{words}"):
            evaluator.evaluate(pruned, stop=never)
        assert evaluator._prefixes.bytes() == 0
    breaks.value = None
    again = evaluator.evaluate(pruned, stop=never).measurement
    assert (again.loss, again.psnr, again.score) == (before.loss, before.psnr, before.score)


def test_a_dense_model_of_broken_images_ends_before_any_trial(tmp_path: Path, backbone, breaks) -> None:  # noqa: ANN001
    breaks.value = math.nan
    config = replace(small(), directory=tmp_path)
    with pytest.raises(UserError, match=r"^every policy is compared with dense tiny, but: 2 of 2 images have values that "):
        search(config, backbone, None)
    assert not (config.folder / "trials.csv").exists()


def test_a_policy_that_breaks_on_held_out_prompts_is_left_out(backbone, breaks, caplog: pytest.LogCaptureFixture) -> None:  # noqa: ANN001
    evaluator = GenerationEvaluator(backbone, small())
    evaluator.dense()

    def overflows(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        breaks.value = math.nan if len(inputs[0]) == 2 else None  # where one guidance branch runs

    handle = backbone.model.head.register_forward_pre_hook(overflows)
    try:
        policies = {"good": policy(backbone, skip_last=1), "bad": policy(backbone, guidance=BranchRule("cond", 5))}
        found = evaluator.validate(policies, step=lambda: True)
        assert evaluator.validate({"bad": policies["bad"]}, step=lambda: True) == {}
    finally:
        handle.remove()
    assert list(found) == ["good"] and 0 < found["good"].loss < 1
    assert [message for message in caplog.messages if "left out of the held-out measurement: 2 of 2 images" in message]


SHORT_OF_MEMORY = """
import json, resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from autoprune.backbones import load_backbone
from autoprune.search.evaluator import GenerationEvaluator
from autoprune.search.faults import Fault
from test_faults import never, policy, small
backbone = load_backbone("tiny", weights="random")
evaluator = GenerationEvaluator(backbone, small(shared_prefix_mb={shared}))
evaluator.dense()
pruned = policy(backbone, skip_last=1)
before = evaluator.evaluate(pruned, stop=never).measurement
limits = resource.getrlimit(resource.RLIMIT_AS)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * 2**20, limits[1]))
filler = []
try:
    while True:
        filler.append(bytearray(2**16))
except MemoryError:
    pass
try:
    evaluator.evaluate(policy(backbone), stop=never)
    fault = ""
except Fault as error:
    fault = error.constraint
kept = evaluator._prefixes.bytes()
filler.clear()
resource.setrlimit(resource.RLIMIT_AS, limits)
after = evaluator.evaluate(pruned, stop=never).measurement
print(json.dumps([fault, kept, before.loss == after.loss]))
"""


def test_a_trial_that_the_machine_has_no_memory_for_is_a_fault_and_the_next_one_runs() -> None:
    tests = Path(__file__).parent
    code = SHORT_OF_MEMORY.format(tests=str(tests), root=str(tests.parent), shared=2048)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["memory", 0, True]


def heavy(chosen: Policy) -> bool:
    return chosen.skip_last > 0


class ShortOfMemory(FormulaEvaluator):
    """Policies that skip a scale need more than there is."""

    def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
        if heavy(policy):
            self.asked.append(policy.key())
            torch.empty(CHUNK, dtype=torch.uint8)
        return super().evaluate(policy, stop=stop)


def test_a_study_records_faults_as_infeasible_and_goes_on(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    config = replace(settings(tmp_path, trials=24), sampler=SamplerSettings("gp", startup=12))
    result = search(config, backbone, ShortOfMemory(6))
    faults = [trial for trial in result.trials if trial.state == "failed"]
    assert faults and all(heavy(trial.policy) and trial.note.startswith("out of memory (") for trial in faults)
    assert not any(trial.feasible or trial.measurement for trial in faults) and len(result.trials) >= 24
    assert result.front and not {member.trial.number for member in result.front} & {trial.number for trial in faults}
    stored = optuna.load_study(study_name="study", storage=open_journal(config.folder / "study.journal")).trials
    told = [stored[trial.number] for trial in faults if stored[trial.number].params]
    assert told and all(trial.state.name == "COMPLETE" and trial.values == list(VALUES) for trial in told)
    assert all(trial.constraints == {MEMORY: VIOLATION} for trial in told)
    again = search(config, backbone, ShortOfMemory(6))
    assert again.trials == result.trials, "a resumed study knows them"


def test_a_preset_outside_the_space_that_fails_is_recorded(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    class NoControls(FormulaEvaluator):
        def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
            if any("random" in rule.scorer for rule in policy.scales.values()):
                raise RuntimeError("no kernel")
            return super().evaluate(policy, stop=stop)

    result = search(settings(tmp_path, trials=14), backbone, NoControls(6))
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed and {trial.source.partition(":")[0] for trial in failed} == {"control"} and result.front
    assert {trial.note for trial in failed} == {"RuntimeError: no kernel"}


def test_a_policy_that_cannot_be_built_is_a_failed_trial(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    class Refuses(FormulaEvaluator):
        def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
            if len(self.asked) in (13, 15):
                self.asked.append("")
                policy.check_fits("tiny", 7, policy.scale_schedule)
            return super().evaluate(policy, stop=stop)

    result = search(settings(tmp_path), backbone, Refuses(6))
    notes = [trial.note for trial in result.trials if trial.state == "failed"]
    assert len(notes) == 2 and notes[0].startswith("UserError: the policy is for 6 layers") and result.front


def test_thirty_faults_in_a_row_end_the_study_with_what_it_found(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    class Full(FormulaEvaluator):
        def evaluate(self, policy: Policy, *, stop: Stop) -> Evaluation:
            if len(self.asked) >= 12:
                self.asked.append("")
                torch.empty(CHUNK, dtype=torch.uint8)
            return super().evaluate(policy, stop=stop)

    evaluator = Full(6)
    with pytest.raises(UserError, match=r"^30 trials in a row did not finish, the last with: out of memory \(.*; free memory "):
        search(settings(tmp_path, trials=60), backbone, evaluator)
    assert len(evaluator.asked) == 12 + 30
    assert len(evaluated(search(settings(tmp_path, trials=30), backbone, FormulaEvaluator(6)))) >= 12


def test_the_sampler_learns_where_faults_are_and_fits_no_objective_to_them() -> None:
    here = space("fastvar", "tiny")

    def objectives(built: Policy) -> tuple[float, float]:
        kept = sum(rule.keep for rule in built.scales.values()) + len(built.scale_schedule) - len(built.scales)
        return math.log((kept - built.skip_last) / len(built.scale_schedule)), 0.02 * (len(built.scale_schedule) - kept)

    def asked_for(sampler: ModelSampler, *, faulty: bool) -> int:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        count = 0
        for number in range(30):
            trial = study.ask(fixed_distributions=here.distributions)
            built = here.policy(trial.params)
            bad = built.skip_last > 0  # the fastest by far, were it not for the fault
            count += bad and number >= 14
            if bad and faulty:
                trial.set_constraint(MEMORY, VIOLATION)
                study.tell(trial, list(VALUES))
                continue
            trial.set_constraint("memory_mb", 4000 * (objectives(built)[1] - 0.5))  # far from the size of VIOLATION
            study.tell(trial, list(objectives(built)))
        return count

    sound, faulty = (asked_for(ModelSampler(here, startup=14, seed=1), faulty=faulty) for faulty in (False, True))
    assert faulty <= 0.4 * sound and sound >= 6


def test_weights_that_vanish_before_validation_keep_the_search_and_the_same_command_goes_on(
    tmp_path: Path,
    backbone,  # noqa: ANN001
) -> None:
    torch.manual_seed(0)
    file = tmp_path / "alexnet.pth"
    torch.save(Trunk(ALEXNET).state_dict(), file)
    hidden = tmp_path / "elsewhere.pth"
    quality = QualitySettings(prompts=2, held_out_prompts=2, metrics=("lpips",), max_score_drop=1.0)
    config = settings(tmp_path, trials=3, space="skip", latency=LatencySettings(batch=2, rounds=1))
    config = replace(config, weights={"lpips_alexnet": file}, quality=quality)

    class Vanishing(GenerationEvaluator):
        def validate(self, *arguments: object, **options: object) -> object:
            file.rename(hidden)
            return super().validate(*arguments, **options)

    with pytest.raises(UserError, match=r"alexnet\.pth' does not exist.*every trial is kept, and the same command goes on"):
        search(config, backbone, Vanishing(backbone, config))
    hidden.rename(file)
    kept = (config.folder / "trials.csv").read_text()
    result = search(config, backbone, None)
    assert (config.folder / "trials.csv").read_text() == kept and result.front
    assert all("lpips" in member.held_out.metrics for member in result.front)


def test_a_full_disk_stops_a_study_which_goes_on_when_there_is_space(tmp_path: Path, backbone) -> None:  # noqa: ANN001
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        config = settings(tmp_path, trials=24)
        first = FormulaEvaluator(6)
        with pytest.raises(NoSpace, match=r"must be written, but: No space left on device; make space there, and the same"):
            search(config, backbone, first)
        assert 2 < len(first.asked) < 23, "it went on for a while"
        lines = (config.folder / "study.journal").read_bytes().split(b"\n")
        assert lines[-1] == b"" and all(json.loads(line) for line in lines[:-1]), "no half record"
        assert not list(config.folder.rglob(".part-*"))
        subprocess.run(["mount", "-o", "remount,size=8m", tmp_path], check=True)
        second = FormulaEvaluator(6)
        result = search(config, backbone, second)
        assert len(evaluated(result)) == 24 and result.front
        assert not set(first.asked[:-2]) & set(second.asked), "finished trials are not run again"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
