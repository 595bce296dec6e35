"""What a policy file says about where its numbers come from."""

import csv
import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from example_study import measured, policy

import autoprune
from autoprune.measure.device import device_conditions, device_identity
from autoprune.policy import Policy
from autoprune.rules import KeyRule, StopRule
from autoprune.search.export import export_policy, measured_fields, write_trials
from autoprune.search.folder import StudyFolder
from autoprune.search.records import TrialRecord

ROOT = Path(autoprune.__file__).parent.parent
CPU = torch.device("cpu")


def test_conditions_are_those_of_this_machine_and_no_part_of_a_studys_identity():
    identity, conditions = device_identity(CPU, torch.float32), device_conditions(CPU, torch.float32)
    assert identity.items() <= conditions.items() and set(identity) == {"device", "device_name", "threads", "dtype", "torch"}
    assert conditions["attention"] == "sdpa" and conditions["threads"] == torch.get_num_threads()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert {"avx2", "avx512f"} <= set(conditions["instructions"].split())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_conditions_of_a_gpu_hold_capability_and_driver():
    conditions = device_conditions(torch.device("cuda"), torch.bfloat16)
    assert tuple(map(int, conditions["capability"].split("."))) == torch.cuda.get_device_capability()
    assert conditions["driver"][0].isdigit() and conditions["cuda"] == torch.version.cuda


def test_a_measurement_names_the_prompts_that_were_used(tmp_path):
    texts = [f"prompt {number}" for number in range(60)]
    fields = measured_fields(measured(1.5, 0.1), {"device": "cpu"}, texts)
    used = "\n".join(sorted(texts[: fields["prompts"]]))
    assert fields["prompts"] == 48 and fields["prompts_sha256"] == hashlib.sha256(used.encode()).hexdigest()


def test_trials_say_every_decision_and_none_that_was_not_taken(tmp_path):
    plain = policy(0.5, 0.25)
    stopped = replace(plain, stop=StopRule(5, 0.1, 0.05), keys=KeyRule(1, 2))
    trials = [TrialRecord(4, "sampler", one, measured(1.5, 0.1), True, "complete", 1.0) for one in (plain, stopped)]
    with StudyFolder(tmp_path / "mine", {}) as folder:
        folder.claim()
        rows = list(csv.DictReader(write_trials(folder, trials).open()))
    first, second = (json.loads(row["schedule"]) for row in rows)
    assert set(first) == {"scales", "guidance", "skip_last"} and set(second) == {*first, "stop", "keys"}


def test_an_exported_policy_carries_sampling_study_and_code(tmp_path):
    sampling = {"guidance": [3.0, 2.0], "temperature": 0.5}
    trial = TrialRecord(4, "sampler", policy(0.5, 0.25), measured(1.5, 0.1), True, "complete", 1.0)
    with StudyFolder(tmp_path / "mine", {"sampling": sampling, "weights": "abc", "space": "unified"}) as folder:
        folder.claim()
        path = export_policy(folder, trial, {"device": "cpu"}, tier="high", rule="the rule")
    found = Policy.load(path).provenance
    assert (found["study"], found["trial"], found["sampling"], found["weights_sha256"]) == ("mine", 4, sampling, "abc")
    assert found["autoprune"] == autoprune.__version__ and "sha256:" in json.loads(path.read_text())["digest"]
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (found["commit"] or "").removesuffix("-dirty") == (head if (ROOT / ".git").exists() else "")
