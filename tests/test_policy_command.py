"""`python -m autoprune.policy` on real files: what it prints, its exit codes, and that it imports no torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import autoprune
from autoprune.policy import Policy
from autoprune.policy_command import main
from autoprune.policy_text import differences
from autoprune.rules import BranchRule, ScalePruning

ROOT = Path(autoprune.__file__).parent.parent
SCHEDULE = ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8))
MEASURED = {"speed_up": 1.5, "speed_up_interval": [1.4, 1.6], "loss": 0.05, "score_drop": None, "prompts": 20, "seed": 3}
PRUNED = Policy("tiny", 6, SCHEDULE, {3: ScalePruning(0.5, 2)}, BranchRule("cond", 3), name="one", measured=MEASURED)


@pytest.fixture
def files(tmp_path):
    policies = {
        "one": PRUNED,
        "same": replace(PRUNED, name="same", scales={3: ScalePruning(0.5, 2, cell=3)}),  # no merging: cells are inactive
        "other": replace(PRUNED, scales={3: ScalePruning(0.25, 2)}),
        "dense": Policy("tiny", 6, SCHEDULE, {3: ScalePruning(0.999, 2)}, name="dense"),
    }
    return {name: str(policy.save(tmp_path / f"{name}.json")) for name, policy in policies.items()}


def test_show_tells_schedule_numbers_and_digest(files, capsys):
    assert main(["show", files["one"]]) == 0
    shown = capsys.readouterr().out
    for words in (
        "scale 3 (8x8): keep 50 % (dc, sublayer, area from scale 2)",
        "from scale 3: cond branch only",
        "speed-up: 1.50x [1.40x, 1.60x]",
        "loss (1 - SSIM): 0.050\n",
        "score drop, points: -\n",
        f"digest {json.loads(Path(files['one']).read_text())['digest']}",
    ):
        assert words in shown
    assert main(["show", "json=true", files["one"]]) == 0
    assert json.loads(capsys.readouterr().out) == {files["one"]: json.loads(Path(files["one"]).read_text())}


def test_validate_tells_every_file_and_fails_for_one_bad_one(files, tmp_path, capsys):
    edited = tmp_path / "edited.json"
    edited.write_text(Path(files["one"]).read_text().replace('"keep": 0.5', '"keep": 0.4'))
    assert main(["validate", files["one"], files["other"]]) == 0
    assert capsys.readouterr().out == f"{files['one']}: ok\n{files['other']}: ok\n"
    assert main(["validate", str(edited), files["one"], files["dense"], str(tmp_path / "none.json")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{edited} was edited or damaged") and lines[1] == f"{files['one']}: ok"
    assert lines[2].startswith(f"{files['dense']}: a policy must change something on its schedule")
    assert "cannot be read" in lines[3] and len(lines) == 4


@pytest.mark.parametrize(
    ("other", "code", "found"), [("same", 0, ["name: "]), ("other", 1, ["scales.3.keep: 0.5 -> 0.25"]), ("one", 0, [])]
)
def test_diff_compares_decisions_and_names_every_field(files, capsys, other, code, found):
    assert main(["diff", files["one"], files[other]]) == code
    shown = capsys.readouterr().out
    assert all(words in shown for words in found)
    assert shown.splitlines()[-1].startswith("different decisions, 1" if code else "equal decisions, ")
    assert main(["diff", files["one"], files[other], "json=true"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["equal_decisions"] == (code == 0) and ("scales.3.keep" in document["fields"]) == (other == "other")


def test_differences_reach_measurements_and_fields_of_one_side():
    changed = replace(PRUNED, measured=MEASURED | {"loss": 0.06, "device": "cpu"}, skip_last=1)
    assert differences(PRUNED, changed) == {
        "skip_last": (0, 1),
        "measured.loss": (0.05, 0.06),
        "measured.device": (None, "cpu"),
    }


def test_migrate_rewrites_an_old_file_and_leaves_a_current_one(files, tmp_path, capsys):
    golden = Path(__file__).parent / "data" / "policy-before-wider-vocabulary.json"
    old = tmp_path / "old.json"
    old.write_text(golden.read_text())
    before, current = Policy.load(old), Path(files["one"]).read_text()
    assert main(["migrate", str(old), files["one"]]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"{files['one']}: is current (autoprune.policy/1)"
    assert Policy.load(old) == before and before.scales[6].scorer == {"dc": 1.0}
    assert "group_from" in json.loads(old.read_text()) and Path(files["one"]).read_text() == current
    assert main(["migrate", str(old)]) == 0
    assert "is current" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "unknown action ''; choose from show, validate, diff, migrate."),
        (["print", "x"], "unknown action 'print'; "),
        (["show"], "at least one policy file must be given; for example "),
        (["show", "missing.json"], "policy file 'missing.json' cannot be read (FileNotFoundError); "),
        (["diff", "x.json"], "diff compares two policy files, got 1; name two."),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, sentence):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_the_real_command_imports_the_standard_library_only(files):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", "-m", "autoprune.policy", "diff", files["one"], files["other"]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1 and "scales.3.keep" in done.stdout
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "import time:" in line}
    assert "autoprune" in names and not names & {"torch", "numpy", "rich", "safetensors", "hydra", "optuna"}


def test_every_published_policy_is_valid_and_current(capsys):
    folders = sorted({str(path.parent) for path in (ROOT / "outputs" / "published").rglob("policies/*.json")})
    assert folders and main(["validate", *folders]) == 0 and main(["migrate", *folders]) == 0
    assert "rewritten" not in capsys.readouterr().out
