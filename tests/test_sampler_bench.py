"""The comparison of samplers on the embedded backbone with random weights: few trials, few prompts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoprune.backbones import load_backbone
from autoprune.search.sampler_bench import BARRED, GRID, SamplerCase, measure_samplers, sampler_bars
from autoprune.search.sampler_plot import save_sampler_plot
from autoprune.search.settings import SAMPLERS


@pytest.fixture(scope="module")
def record() -> dict:
    case = SamplerCase(trials=7, seeds=2, reference=8, prompts=4, batch=4, space="skip")
    return measure_samplers(load_backbone("tiny", weights="random"), case)


def test_every_sampler_starts_from_the_presets_and_only_gains(record: dict) -> None:
    assert set(record["samplers"]) == {*SAMPLERS, GRID}
    firsts = {tuple(curve["trials"][: record["presets"] - 1]) for curve in record["samplers"].values()}
    assert len(firsts) == 1 and record["presets"] > 3
    for curve in record["samplers"].values():
        assert len(curve["trials"]) == 7 and curve["trials"] == sorted(curve["trials"]) and curve["trials"][-1] <= 1 + 1e-9
        assert curve["seconds"] == sorted(curve["seconds"])
        assert all(
            low <= middle <= high for low, middle, high in zip(curve["lowest"], curve["trials"], curve["highest"], strict=True)
        )


def test_the_plot_is_drawn(record: dict, tmp_path: Path) -> None:
    image = np.asarray(Image.open(save_sampler_plot(record, tmp_path / "x.png")).convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100


def test_the_bars_ask_more_of_gp_than_random_finds() -> None:
    case = SamplerCase(trials=6, seeds=1, reference=6, prompts=4, batch=4, space="skip", samplers=BARRED)
    gp, random = sampler_bars(load_backbone("tiny", weights="random"), case).values()
    assert gp["ok"] == (gp["value"] >= 0.9) and random["ok"] == (random["value"] <= 0.9)
    assert all((bar["first_reached"] is None) == (bar["value"] < 0.9) for bar in (gp, random))
