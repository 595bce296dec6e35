"""The command line composes from anywhere and every mistake in it is one sentence that names the choices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from autoprune.backbones import BACKBONES
from autoprune.errors import UserError
from autoprune.search.config import read_settings, run_composed
from autoprune.search.folders import shipped_folder
from autoprune.search.settings import EMBEDDED, LATENCIES, QUALITIES, SAMPLERS

OWN = "".join(f"prompt {number}\n" for number in range(400))


def composed(monkeypatch, *overrides):
    """Returns the settings that `python -m autoprune OVERRIDES` would run with."""
    monkeypatch.setattr(sys, "argv", ["autoprune", *overrides])
    runs = []
    run_composed(runs.append)
    return runs


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


def test_defaults_compose_from_any_folder_and_write_nothing_there(monkeypatch, tmp_path):
    (run,) = composed(monkeypatch)
    assert (run.backbone.name, run.study.name, run.tracker.name) == ("tiny", "tiny-unified", "wandb")
    assert run.study.folder == Path("outputs/tiny-unified")
    assert not list(tmp_path.iterdir())


def test_groups_and_values_reach_the_settings(monkeypatch):
    overrides = ("search_spaces=fastvar", "sampler=tpe", "latency=measured", "budget.trials=7", "study.name=a", "tracker=none")
    (run,) = composed(monkeypatch, *overrides)
    assert run.study.space.name == "fastvar"
    assert (run.study.sampler.name, run.study.latency.name, run.study.budget.trials) == ("tpe", "measured", 7)
    assert (run.study.name, run.tracker.name) == ("a", "none")


def test_what_every_backbone_takes_can_be_set_for_each(monkeypatch):
    changes = ("keys=host", "graphs=none", "sampling.guidance=3", "sampling.top_p=[0.9,0.8]", "sampling.negative=blurry")
    for name in ("tiny", "infinitystar_480p"):
        Path("own.txt").write_text(OWN)
        (run,) = composed(monkeypatch, f"backbone={name}", "prompts=own.txt", *(f"backbone.{change}" for change in changes))
        sampling = run.backbone.sampling
        assert (run.backbone.name, run.backbone.keys, run.backbone.graphs) == (name, "host", "none")
        assert (sampling.guidance, sampling.top_p, sampling.negative) == (3, (0.9, 0.8), "blurry")
        assert sampling.frames == (81 if "star" in name else None)


def test_a_multirun_is_one_study_a_choice(monkeypatch):
    runs = composed(monkeypatch, "-m", "search_spaces=fastvar,unified")
    assert [run.study.folder for run in runs] == [Path("outputs/tiny-fastvar"), Path("outputs/tiny-unified")]


URLS = {"postgresql": "postgresql://me:secret@host/studies", "grpc": "grpc://host:13000"}


def test_every_choice_of_every_group_composes(monkeypatch):
    groups = [path for path in shipped_folder("conf").iterdir() if path.is_dir()] + [shipped_folder("search_spaces")]
    Path("own.txt").write_text(OWN)
    for group in groups:
        for choice in group.glob("*.yaml"):
            own = choice.stem == "fidelity" or (group.name == "backbone" and choice.stem not in EMBEDDED)
            needed = ("prompts=own.txt",) if own else ("backbone=tiny_video",) if choice.stem == "motion" else ()
            needed += (f"storage.url={URLS[choice.stem]}",) if choice.stem in URLS else ()
            (run,) = composed(monkeypatch, f"{group.name}={choice.stem}", *needed)
            chosen = run.composed.get(group.name, {})
            assert chosen.get("name", choice.stem) == choice.stem


def test_a_password_is_in_nothing_that_is_recorded(monkeypatch):
    (run,) = composed(monkeypatch, "storage=postgresql", f"storage.url={URLS['postgresql']}")
    assert run.study.storage.url == URLS["postgresql"]
    assert run.composed["storage"]["url"] == "postgresql://me:***@host/studies"


def test_every_backbone_sampler_and_latency_has_its_file():
    qualities = ("auto", *QUALITIES)
    for group, names in (("backbone", BACKBONES), ("sampler", SAMPLERS), ("latency", LATENCIES), ("quality", qualities)):
        assert {path.stem for path in (shipped_folder("conf") / group).glob("*.yaml")} == set(names)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("nokey=3", "unknown setting 'nokey'; choose from backbone, budget, join, latency, "),
        ("budget.trial=3", "unknown setting 'budget.trial'; choose from front, minutes, trials."),
        ("+budget.trial=3", "unknown setting 'budget.trial'; "),
        ("backbone=nope", "unknown backbone 'nope'; choose from "),
        ("sampler=foo", "unknown sampler 'foo'; choose from gp, nsga2, random, tpe."),
        ("sampler.pending=foo", "unknown sampler.pending 'foo'; choose from believer, liar, none."),
        ("search_spaces=foo", "unknown search_spaces 'foo'; choose from faststar, fastvar, "),
        ("samplers=gp", "unknown setting 'samplers'; choose from "),
        ("budget.trials=many", "budget.trials must be a valid integer, got 'many'."),
        ("budget.trials=0", "budget.trials must be at least 1, got 0."),
        ("quality.max_score_drop=1.5", "quality.max_score_drop must be in [0, 1], got 1.5."),
        ("quality.max_loss=-1", "quality.max_loss must be in [0, 1], got -1.0."),
        ("quality=foo", "unknown quality 'foo'; choose from auto, fidelity, motion, scenes."),
        ("quality.name=foo", "unknown quality 'foo'; choose from scenes, motion, fidelity."),
        ("quality=fidelity", "quality fidelity needs prompts, got none; give prompts=FILE."),
        ("prompts=missing.txt", "prompts 'missing.txt' cannot be read (No such file or directory); give a file or a folder."),
        ("quality.loss=psnr", "unknown quality.loss 'psnr'; choose from ssim, ms_ssim, lpips, lpips_vgg."),
        ("quality.metrics=[psnr,foo]", "unknown metric 'foo'; choose from psnr, ssim, "),
        ("quality.metrics=[fid]", "metric fid needs weights.feature_network, got nothing; give weights.feature_network=PATH: "),
        ("weights.lpips=a.pth", "unknown setting 'weights.lpips'; choose from bert_tokenizer, "),
        ("tracker.name=mlflow", "tracker.name must be 'wandb' or 'none', got 'mlflow'."),
        ("search_spaces.dimensions.keep.high=1.2", "keep ratios need 0 < low < high <= 1"),
        ("study.name=${nothing}", "the settings do not compose (Interpolation key 'nothing' not found); "),
        ("budget", "the settings do not compose ("),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, override, sentence):
    with pytest.raises(UserError) as caught:
        composed(monkeypatch, override)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_own_prompts_choose_the_quality_without_a_score(monkeypatch):
    assert composed(monkeypatch)[0].study.quality.name == "scenes"
    Path("own.txt").write_text(OWN)
    (run,) = composed(monkeypatch, "prompts=own.txt", "quality.prompts=7", "quality.max_loss=0.2")
    quality = run.study.quality
    assert (quality.name, quality.prompts, quality.max_drop, len(run.study.prompts.prompts)) == ("fidelity", 7, 0.2, 400)
    (same,) = composed(monkeypatch, "prompts=own.txt", "quality=fidelity", "quality.prompts=7", "quality.max_loss=0.2")
    assert same.study == run.study
    with pytest.raises(UserError, match="^quality scenes makes its own prompts, got 'own.txt'; set quality=fidelity.$"):
        composed(monkeypatch, "prompts=own.txt", "quality=scenes")


def test_too_few_own_prompts_are_refused_before_anything_is_loaded(monkeypatch):
    Path("own.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"split of the 3 prompts in 'own.txt', got 96; lower quality.prompts or give"):
        composed(monkeypatch, "prompts=own.txt")


def test_what_identifies_a_study_are_its_prompts_and_the_budget_in_use(monkeypatch):
    Path("own.txt").write_text(OWN)
    Path("shuffled.txt").write_text("\n".join(reversed(OWN.splitlines())))
    Path("other.txt").write_text(OWN.replace("prompt 7\n", "prompt seven\n"))
    files = ("own", "shuffled", "other")
    own, shuffled, other = (composed(monkeypatch, f"prompts={name}.txt")[0].study.measurement_identity() for name in files)
    assert own == shuffled != other
    scenes = composed(monkeypatch)[0].study.measurement_identity()
    assert "prompts" not in scenes and "max_loss" not in scenes["quality"] and "max_score_drop" not in own["quality"]


def test_weights_of_metrics_are_paths_and_metrics_do_not_identify_a_study(monkeypatch):
    (plain,) = composed(monkeypatch)
    assert plain.study.quality.metrics == ("psnr", "ssim", "tokens") and plain.study.weights == {}
    Path("alexnet.pth").touch()
    given = ("weights.lpips_alexnet=alexnet.pth", "quality.metrics=[lpips]")
    (run,) = composed(monkeypatch, *given)
    assert run.study.weights == {"lpips_alexnet": Path("alexnet.pth")} and run.study.quality.metrics == ("lpips",)
    assert run.study.measurement_identity() == plain.study.measurement_identity()
    (other,) = composed(monkeypatch, *given, "quality.loss=lpips")
    assert other.study.measurement_identity() != plain.study.measurement_identity()
    assert (plain.study.quality.loss_text, other.study.quality.loss_text) == ("1 - SSIM", "LPIPS")


def test_an_error_of_the_task_keeps_its_own_type(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["autoprune"])

    def task(run):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_composed(task)


def test_an_incomplete_configuration_is_refused():
    with pytest.raises(UserError, match="backbone field required"):
        read_settings(OmegaConf.create({"study": {"name": "x"}}))


def test_a_user_folder_adds_choices(tmp_path):
    (tmp_path / "mine" / "budget").mkdir(parents=True)
    (tmp_path / "mine" / "budget" / "night.yaml").write_text("trials: 500\nminutes: null\nfront: 20\n")
    command = [sys.executable, "-m", "autoprune", "--config-dir", "mine", "budget=night", "--cfg", "job", "-p", "budget"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert "trials: 500" in done.stdout, done.stderr


def test_the_video_backbone_comes_with_a_search_that_every_choice_replaces(monkeypatch):
    def search(*overrides: str) -> tuple[str, int, float | None, int]:
        study = composed(monkeypatch, *overrides)[0].study
        return study.space.name, study.budget.front, study.budget.minutes, study.quality.held_out_prompts

    assert search("backbone=tiny_video") == ("video", 6, 9.5, 256)
    assert search("search_spaces=unified", "budget.minutes=2", "backbone=tiny_video") == ("unified", 6, 2.0, 256)
    assert search("backbone=tiny_video", "experiment=smoke") == ("video", 2, None, 16)
    assert search() == ("unified", 10, 5.5, 160)


def test_the_embedded_backbones_are_scored_on_what_they_have_learnt(monkeypatch):
    for chosen in ("auto", "motion"):
        quality = composed(monkeypatch, "backbone=tiny_video", f"quality={chosen}")[0].study.quality
        assert quality.name == "motion" and quality.metrics[-2:] == ("temporal_error", "flicker") and quality.threshold == 0.6
    for chosen in ("auto", "scenes"):
        quality = composed(monkeypatch, f"quality={chosen}")[0].study.quality
        assert quality.name == "scenes" and quality.metrics[-1] == "tokens" and quality.threshold == 0.75
    assert composed(monkeypatch, "backbone=tiny_video", "quality.threshold=0.7")[0].study.quality.threshold == 0.7
    with pytest.raises(UserError, match="^backbone infinitystar_480p makes videos, which scenes do not ask for; give prompts"):
        composed(monkeypatch, "backbone=infinitystar_480p", "quality=scenes")
    for backbone, wrong, own in (("tiny", "motion", "scenes"), ("tiny_video", "scenes", "motion")):
        with pytest.raises(UserError, match=f"^quality {wrong} is of scenes that {backbone} has not .*; set quality={own}.$"):
            composed(monkeypatch, f"backbone={backbone}", f"quality={wrong}")
