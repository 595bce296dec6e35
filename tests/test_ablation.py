"""What trials say about dimensions, on a study whose objectives depend on two of them only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from example_study import DENSE, SCHEDULE
from PIL import Image

from autoprune.search.ablation import FEWEST_TRIALS, dimension_rows
from autoprune.search.dimension_plot import save_dimension_plot
from autoprune.search.knobs import Target
from autoprune.search.neighbour import random_vector
from autoprune.search.records import TrialRecord
from autoprune.search.space import SearchSpace
from autoprune.search.space_file import read_space

SPACE = SearchSpace(read_space(Path(__file__).parent.parent / "search_spaces" / "fastvar.yaml"), Target("tiny", 6, SCHEDULE))


def trial(number: int, vector: dict, *, speed_up: float, loss: float) -> tuple[dict, TrialRecord]:
    measured = replace(DENSE, latency=DENSE.latency / speed_up, speed_up=speed_up, loss=loss)
    return vector, TrialRecord(number, "sampler", SPACE.policy(vector), measured, True, "complete", 1.0)


def drawn(count: int) -> list[tuple[dict, TrialRecord]]:
    """Skipping makes it fast, the number of pruned scales costs quality; nothing else matters."""
    rng = np.random.default_rng(1)
    vectors = [random_vector(SPACE, rng) for _ in range(count)]
    return [
        trial(number, vector, speed_up=1.1 + 2 * vector["skip_last"], loss=0.05 + 0.1 * vector["pruned_scales"])
        for number, vector in enumerate(vectors)
        if not SPACE.policy(vector).is_dense()
    ]


def test_importance_goes_to_what_decides_an_objective() -> None:
    rows = {row.name: row for row in dimension_rows(SPACE, drawn(400))}
    assert set(rows) == set(SPACE.distributions)
    assert max(rows.values(), key=lambda row: row.latency).name == "skip_last" and rows["skip_last"].latency > 0.5
    assert max(rows.values(), key=lambda row: row.loss).name == "pruned_scales" and rows["pruned_scales"].loss > 0.5
    for objective in ("latency", "loss"):
        assert sum(getattr(row, objective) for row in rows.values()) == pytest.approx(1)


def test_the_front_owes_what_is_lost_without_the_trials_that_use_a_dimension() -> None:
    neutral = SPACE.normal({})
    keep = {**neutral, "pruned_scales": 1, "keep_6": 0.5}
    trials = [
        trial(0, keep, speed_up=1.5, loss=0.1),
        trial(1, {**neutral, "skip_last": 1}, speed_up=3.0, loss=0.1),
        trial(2, {**keep, "interpolation": "bicubic"}, speed_up=1.4, loss=0.3),
    ]
    rows = {row.name: row for row in dimension_rows(SPACE, trials)}
    assert rows["skip_last"].owed == pytest.approx(1 - np.log(1.5) / np.log(3))
    assert rows["interpolation"].owed == 0 and rows["interpolation"].used == 1
    assert rows["exempt_first"].used == 0
    assert next(iter(rows)) == "skip_last"


def test_a_short_study_has_no_importances() -> None:
    assert all(row.latency == row.loss == 0 for row in dimension_rows(SPACE, drawn(FEWEST_TRIALS // 2)))
    assert dimension_rows(SPACE, [])[0].owed == 0


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    image = np.asarray(Image.open(save_dimension_plot(dimension_rows(SPACE, drawn(100)), tmp_path / "x.png")).convert("RGB"))
    colours = {tuple(colour) for colour in image.reshape(-1, 3)}
    assert {(0x25, 0x63, 0xEB), (0xD9, 0x77, 0x06), (0x11, 0x18, 0x27)} <= colours
