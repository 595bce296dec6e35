"""The comparison of samplers on the embedded backbone with random weights: few trials, few prompts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoprune.backbones import load_backbone
from autoprune.search.sampler_bench import GRID, SamplerCase, measure_samplers
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
