"""The size of a batch where the user leaves it open."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.backbones import load_backbone
from autoprune.errors import UserError
from autoprune.measure.memory_plan import predicted_peak
from autoprune.pruning.plan import compile_plan
from autoprune.search import fitting
from autoprune.search.fitting import fitted
from autoprune.search.folders import shipped_folder
from autoprune.search.settings import LatencySettings, StudySettings
from autoprune.search.space_file import read_space


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random", device="cpu", dtype="float32")


@pytest.fixture
def settings(tmp_path: Path) -> StudySettings:
    space = read_space(shipped_folder("search_spaces") / "skip.yaml")
    return StudySettings(tmp_path, "study", space, latency=LatencySettings(batch="auto"))


def test_a_given_number_stays(backbone, settings: StudySettings) -> None:  # noqa: ANN001
    given = replace(settings, latency=LatencySettings(batch=3))
    assert fitted(given, backbone) == given


def test_it_is_the_largest_whose_dense_generation_fits(backbone, settings: StudySettings, monkeypatch) -> None:  # noqa: ANN001
    plan = compile_plan(None, backbone.scale_schedule(), backbone.depth)

    def need(batch: int) -> int:
        return predicted_peak(plan, backbone, ["a red circle"] * batch).above_loaded(backbone.device)

    for batch in (1, 2, 8):
        free = 1.1 * need(batch) / fitting.USABLE
        monkeypatch.setattr(fitting, "free_memory", lambda device, free=free: free)
        assert fitted(settings, backbone).latency.batch == batch
        assert fitting.USABLE * free >= need(batch) and fitting.USABLE * free < need(2 * batch)
    monkeypatch.setattr(fitting, "free_memory", lambda device: 1000 * need(1))
    assert fitted(settings, backbone).latency.batch == fitting.MOST_PROMPTS
    monkeypatch.setattr(fitting, "free_memory", lambda device: need(1))
    with pytest.raises(UserError, match=r"one dense image of tiny needs \d+ MB, \d+ MB are free on cpu; "):
        fitted(settings, backbone)


def test_a_study_that_goes_on_keeps_its_own(backbone, settings: StudySettings) -> None:  # noqa: ANN001
    settings.folder.mkdir()
    (settings.folder / "study.json").write_text(json.dumps({"settings": {"latency": {"batch": 5}}}))
    assert fitted(settings, backbone).latency.batch == 5
