"""Verifying policies of the random-weights embedded backbone: what holds, what does not, and what cannot be compared."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import autoprune
from autoprune import verify
from autoprune.backbones import load_backbone
from autoprune.measure.device import device_conditions
from autoprune.policy import Policy
from autoprune.rules import BranchRule, ScalePruning
from autoprune.search.comparison import compare
from autoprune.search.comparison_records import Candidate, ComparisonSettings
from autoprune.search.export import measured_fields
from autoprune.search.progress import NullProgress
from autoprune.testbed.captions import prompt_set
from tests.test_imports import SEARCH_PACKAGES, run_without

ROOT = Path(autoprune.__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured_policy():
    """Returns a policy with numbers measured as a study of seed 0 does, and intervals wide enough for a busy machine."""
    backbone = load_backbone("tiny", weights="random")
    policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), {5: ScalePruning(0.5, 4)}, skip_last=1, name="fast")
    settings = ComparisonSettings(prompts=16, batch=2, rounds=6, per_prompt=0, seed=0)
    candidate = Candidate("fast", policy, "", "file")
    numbers = compare(backbone, [candidate], settings, progress=NullProgress()).policies[1].measurement
    texts = [prompt.text for prompt in prompt_set("held_out", 16)]
    measured = measured_fields(numbers, device_conditions(backbone.device, backbone.dtype), texts)
    measured |= {"speed_up_interval": [numbers.speed_up * 0.6, numbers.speed_up * 1.6], "loss_interval": [0.0, 0.9]}
    return replace(policy, measured=measured, provenance={"weights_sha256": "", "sampling": backbone.sampling.identity()})


@pytest.fixture
def verified(tmp_path, capsys):
    """Returns a function that verifies a policy, giving exit code, standard output and standard error."""

    def run(policy: Policy, *arguments: str) -> tuple[int, str, str]:
        path = policy.save(tmp_path / "policy.json")
        code = verify.main([f"policy={path}", "weights=random", "rounds=6", *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def verdicts(shown: str) -> dict[str, str]:
    names = {"speed-up": "speed_up", "loss (1 - SSIM)": "loss", "score drop, points": "score_drop"}
    words = ("PASS", "outside", "not compared")
    rows = {names[title]: line for line in shown.splitlines() for title in names if line.startswith(title)}
    return {name: next(word for word in words if word in line) for name, line in rows.items()}


def changed(policy: Policy, **changes: object) -> Policy:
    """Returns the policy with other numbers in its file."""
    return replace(policy, measured=policy.measured | changes)


def test_a_true_file_is_inside_and_both_measurements_are_shown(verified, measured_policy):
    code, shown, error = verified(measured_policy)
    assert (code, verdicts(shown)) == (0, dict.fromkeys(("speed_up", "loss", "score_drop"), "PASS")), shown + error
    assert f"{measured_policy.measured['loss']:.3f} [0.000, 0.900]" in shown
    assert "16 held-out prompts and noise of seed 1, batch 2, 8 rounds" in shown and "autoprune:" not in error


def test_numbers_that_do_not_hold_are_outside_and_the_files_own_noise_is_not_repeated(verified, measured_policy):
    code, shown, _ = verified(changed(measured_policy, loss=0.9, loss_interval=[0.89, 0.91], seed=1_000_004))
    assert code == 1 and verdicts(shown)["loss"] == "outside" and "outside: the file's numbers do not hold" in shown
    assert "noise of seed 2, batch 2" in shown


def test_other_devices_and_prompts_are_measured_and_shown_but_not_compared(verified, measured_policy):
    elsewhere = {"device_name": "Faster One", "speed_up": 99.0, "speed_up_interval": [98.0, 99.5], "prompts_sha256": "0" * 64}
    code, shown, error = verified(changed(measured_policy, **elsewhere))
    assert (code, set(verdicts(shown).values())) == (2, {"not compared"}) and "nothing could be compared" in shown
    assert "99.00x [98.00x, 99.50x]" in shown and "other prompts than the file's" in shown
    assert "device_name Faster One, here " in error and "python -m autoprune backbone=tiny searches here" in error


def test_a_policy_measured_on_own_prompts_is_verified_on_them(verified, measured_policy, tmp_path):
    own = tmp_path / "own.txt"
    shapes, colours = ("circle", "ring", "square", "triangle", "cross"), ("red", "blue", "green", "cyan", "yellow", "magenta")
    own.write_text("\n".join(f"a {colour} {shape}" for colour in colours for shape in shapes))
    unscored = dict.fromkeys(("score_dense", "score", "score_drop", "score_drop_interval"))
    policy = replace(measured_policy, measured=measured_policy.measured | unscored | {"prompts_sha256": None})
    code, shown, _ = verified(policy, f"prompts_file={own}")
    assert (code, verdicts(shown)) == (0, {"speed_up": "PASS", "loss": "PASS"})
    code, _, error = verified(policy)
    assert code == 2 and "give prompts_file=FILE" in error


NOTHING = {"scales": {5: ScalePruning(0.999, 4)}, "skip_last": 0}


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        (lambda policy: replace(policy, **NOTHING), [], "a policy must change something on its schedule, "),
        (
            lambda policy: replace(policy, measured={}),
            [],
            "a policy must carry held-out measurements to be verified, 'fast' has",
        ),
        (lambda policy: replace(policy, backbone="other"), [], "unknown backbone 'other'; choose from tiny"),
        (
            lambda policy: replace(policy, backbone="var_d16"),
            ["weights=nowhere"],
            "weights of var_d16 are a folder with the released files, 'nowhere' is none",
        ),
        (lambda policy: policy, ["backbone=var_d16"], "the policy is for backbone 'tiny', not 'var_d16'; "),
        (
            lambda policy: replace(policy, scale_schedule=(*policy.scale_schedule[:-1], (1, 20, 20)), provenance={}),
            [],
            "the policy is for scale schedule ",
        ),
        (lambda policy: policy, ["prompts=8"], "prompts must be at least 16 and a batch (2), got 8; raise prompts."),
        (lambda policy: policy, ["batch=32"], "prompts must be at least 16 and a batch (32), got 16; raise prompts."),
        (lambda policy: policy, ["rounds=5"], "rounds must be at least 6, got 5."),
        (lambda policy: policy, ["seed=0"], "seed must be at least 1, got 0."),
        (lambda policy: policy, ["prompts_file=missing"], "prompts 'missing' cannot be read"),
    ],
)
def test_what_cannot_apply_is_one_sentence_and_exit_code_2(verified, measured_policy, change, arguments, sentence):
    code, shown, error = verified(change(measured_policy), *arguments)
    assert (code, shown) == (2, "") and sentence in error and error.count("\n") == 1


def test_a_threshold_that_never_prunes_is_found_out(verified, measured_policy):
    policy = replace(measured_policy, scales={}, skip_last=0, guidance=BranchRule("adaptive", 1, threshold=0.0))
    code, _, error = verified(policy)
    assert code == 2 and "a policy must change something, 'fast' pruned nothing here; " in error


def test_the_real_command_exits_with_1_for_an_overstated_speed_up(measured_policy, tmp_path):
    path = changed(measured_policy, speed_up=50.0, speed_up_interval=[49.0, 51.0]).save(tmp_path / "policy.json")
    command = [sys.executable, "-m", "autoprune.verify", f"policy={path}", "weights=random", "rounds=6"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    assert verdicts(done.stdout) == {"speed_up": "outside", "loss": "PASS", "score_drop": "PASS"}


def test_without_the_search_extra_one_sentence_says_what_to_install(measured_policy, tmp_path):
    path = measured_policy.save(tmp_path / "policy.json")
    code = "from autoprune import verify\nsys.exit(verify.main([f'policy={sys.argv[1]}', 'weights=random']))"
    done = run_without(SEARCH_PACKAGES, code, str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        'autoprune: verifying needs torchmetrics, not installed here; run: pip install "autoprune[search]".'
    )
