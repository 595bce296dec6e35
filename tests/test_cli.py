"""The two commands: what they write, and one sentence with exit code 2 for every kind of bad input."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import autoprune
from autoprune import Policy

ROOT = Path(autoprune.__file__).parent.parent
SMALL = ("experiment=smoke", "quality.prompts=8", "quality.held_out_prompts=8", "latency.rounds=1")


@pytest.fixture
def policy_file(tmp_path):
    backbone = autoprune.load_backbone("tiny")
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), skip_last=1).save(tmp_path / "policy.json")


def run(module: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def test_generate_writes_the_policys_image_and_prints_the_speed_up(tmp_path, policy_file):
    prompt = "a red circle left of a striped blue square"
    done = run("autoprune.generate", f"policy={policy_file}", f"prompt={prompt}", "seed=3", "runs=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "image.png: " in done.stdout and "x faster than dense" in done.stdout
    backbone = autoprune.load_backbone("tiny")
    expected = autoprune.generate(backbone, [prompt], policy=Policy.load(policy_file), seed=3)[0]
    shown = torch.from_numpy(np.array(Image.open(tmp_path / "image.png"))).permute(2, 0, 1) / 255
    assert (shown - expected.cpu()).abs().max() < 0.02


@pytest.fixture
def video_policy_file(tmp_path):
    backbone = autoprune.load_backbone("tiny_video", weights="random")
    return Policy(backbone.name, backbone.depth, backbone.scale_schedule(), skip_last=1).save(tmp_path / "policy.json")


VIDEO = ("weights=random", "prompt=a red circle moving left", "runs=1")


def test_generate_writes_a_video_as_one_file_that_moves(command, video_policy_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([f"policy={video_policy_file}", *VIDEO]) == 0
    assert capsys.readouterr().out.startswith("video.webp: ")
    backbone = autoprune.load_backbone("tiny_video", weights="random")
    expected = autoprune.generate(backbone, ["a red circle moving left"], policy=Policy.load(video_policy_file))[0]
    with Image.open("video.webp") as moving:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(moving)]
        assert moving.info["duration"] == 125
    shown = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 255
    assert shown.shape == (3, 13, 64, 64) and (shown - expected.cpu()).abs().max() < 0.02


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["output=a.avi"], "output must end in .png, .webp, .gif, .mp4 for a video, got 'a.avi'; choose another name."),
        (["output=a.gif", "frames=1"], "output must end in .png for an image, got 'a.gif'; choose another name."),
        (
            ["output=a.mp4"],
            "a video as .mp4 needs PyAV, which is not installed; pip install 'autoprune[video]'.",
        ),
    ],
)
def test_generate_refuses_a_file_that_it_cannot_write_before_it_reads_the_prompt(
    command, video_policy_file, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.setitem(sys.modules, "av", None)
    if "frames=1" in arguments:
        backbone = autoprune.load_backbone("tiny_video", weights="random").sampled(frames=1)
        Policy(backbone.name, backbone.depth, backbone.scale_schedule(), skip_last=1).save(video_policy_file)
    assert command.main([f"policy={video_policy_file}", *VIDEO[:2], "prompt=a purple dog", *arguments]) == 2
    assert capsys.readouterr().err.strip().endswith(sentence)


def test_png_is_read_back_by_another_library(command):
    image = torch.rand(3, 5, 9, generator=torch.Generator().manual_seed(0))
    read = np.asarray(Image.open(io.BytesIO(command.png(image))))
    assert np.array_equal(read, (image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "policy and prompt must be given; for example "),
        (["bare"], "arguments are written key=value, got 'bare'; "),
        (["polcy=x"], "unknown argument 'polcy'; choose from policy, prompt, "),
        (["seed=x"], "seed must be a whole number, got 'x'."),
        (["policy=missing.json", "prompt=circle"], "policy file 'missing.json' cannot be read (FileNotFoundError)"),
        (["policy=FILE", "prompt=circle", "backbone=huge"], "unknown backbone 'huge'; choose from tiny"),
        (["policy=FILE", "prompt=a purple dog"], "the embedded text encoder knows a closed vocabulary, got 'purple', 'dog'"),
        (["policy=FILE", "prompt=circle", "runs=0"], "runs must be at least 1, got 0."),
        (["policy=FILE", "prompt=circle", "output=/dev/null/x.png", "runs=1"], "output '/dev/null/x.png' cannot be written"),
        (["policy=FILE", "prompt=circle", "output=a.jpg"], "output must end in .png for an image, got 'a.jpg'; choose "),
        (["policy=TRUNCATED", "prompt=circle"], "TRUNCATED is not complete JSON"),
        (["policy=EDITED", "prompt=circle"], "EDITED was edited or damaged"),
        (["policy=NOTHING", "prompt=circle"], "a policy must change something on its schedule, 'none' runs every token of "),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(command, policy_file, capsys, arguments, sentence):
    text = policy_file.read_text()
    files = {"FILE": text, "TRUNCATED": text[: len(text) // 2], "EDITED": text.replace('"skip_last": 1', '"skip_last": 2')}
    files["NOTHING"] = replace(Policy.load(policy_file), skip_last=0, name="none").to_json()
    for name, content in files.items():
        policy_file.with_name(name).write_text(content)
        arguments = [argument.replace(f"policy={name}", f"policy={policy_file.with_name(name)}") for argument in arguments]
    assert command.main(arguments) == 2
    shown = capsys.readouterr().err
    assert sentence in shown.replace(f"{policy_file.parent}/", "") and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("backbone=huge",), "unknown backbone 'huge'; choose from "),
        (("study.dir=/dev/null/x",), "output folder '/dev/null/x/tiny-unified' must be writable (Not a directory); "),
        (("backbone.weights=missing",), "weights 'missing' cannot be read (FileNotFoundError); "),
    ],
)
def test_the_search_refuses_bad_input_before_any_work(tmp_path, arguments, sentence):
    done = run("autoprune", *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"autoprune: {sentence}") and done.stderr.count("\n") == 1


def test_without_its_extra_the_search_says_what_to_install(tmp_path):
    code = "import runpy, sys; sys.modules['optuna'] = None; runpy.run_module('autoprune', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert "needs optuna" in done.stderr and 'pip install "autoprune[search]"' in done.stderr


def test_ctrl_c_keeps_the_trials_and_the_same_command_goes_on(tmp_path):
    arguments = [sys.executable, "-m", "autoprune", *SMALL, f"study.dir={tmp_path}", "study.name=study"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trials = tmp_path / "study" / "trials.csv"
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as search:
        until = time.monotonic() + 240
        while rows(trials) < 2 and search.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        search.send_signal(signal.SIGINT)
        error = search.communicate(timeout=120)[1]
    assert search.returncode == 130 and "the same command goes on from here" in error
    before, page = trials.read_text().splitlines()[1], trials.parent / "report.html"
    assert "This study was stopped" in page.read_text()
    done = run("autoprune", *SMALL, f"study.dir={tmp_path}", "study.name=study", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert trials.read_text().splitlines()[1] == before and rows(trials) == 6
    for name in ("front.json", "pareto.png", "report.html", "dimensions.png"):
        assert (trials.parent / name).stat().st_size > 0
    assert "This study was stopped" not in page.read_text() and "python -m autoprune experiment=smoke" in page.read_text()


def rows(path: Path) -> int:
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0
