"""Calibration files: what is written is read, what is wrong is one sentence, what does not fit is not used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.backbones.schedules import scale_schedule
from autoprune.errors import UserError
from autoprune.policy import fingerprint
from autoprune.search.calibration import LEVELS, Calibration, calibration_path, find_calibration
from tests.test_space import TARGETS, calibration

MADE_UP = calibration(TARGETS["infinity2b"])
SHIPPED = sorted((Path(__file__).parent.parent / "search_spaces" / "calibrations").glob("*.json"))


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    for written in (MADE_UP, replace(MADE_UP, probe=None, ranks={}), Calibration("tiny", "0" * 16, "none", 0)):
        assert Calibration.load(written.save(tmp_path / "deep" / "tiny.json")) == written
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_named_after_their_backbone(path: Path) -> None:
    assert Calibration.load(path).backbone == path.stem and calibration_path(path.stem) == path.resolve()


def test_quantiles_are_interpolated_between_levels_at_the_nearest_scale() -> None:
    row = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    one = replace(MADE_UP, changes={"latent_l2": {4: row, 8: tuple(2 * value for value in row)}}, discrepancies={})
    assert [one.change("latent_l2", 4, level) for level in LEVELS] == pytest.approx(row)
    assert one.change("latent_l2", 4, 0.625) == pytest.approx(0.35) and one.change("latent_l2", 0, 0.99) == 0.6
    assert one.change("latent_l2", 12) == pytest.approx(0.6) and one.change("latent_l2", 6) == pytest.approx(0.3)
    assert one.change("latent_cos", 4) is None and one.discrepancy("mse_hidden", 4) is None


def test_it_is_found_only_for_its_own_weights_and_schedule(tmp_path: Path) -> None:
    MADE_UP.save(calibration_path("infinity2b", tmp_path))
    own = {"scale_schedule": MADE_UP.scale_schedule, "weights": MADE_UP.weights, "folder": tmp_path}
    assert find_calibration("infinity2b", **own) == MADE_UP
    assert find_calibration("infinity8b", **own) is None
    assert find_calibration("infinity2b", **own | {"weights": "other"}) is None
    assert find_calibration("infinity2b", **own | {"scale_schedule": fingerprint(scale_schedule(1.5, "1M"))}) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": "autoprune.policy/1"}, "must have schema 'autoprune.calibration/1', got 'autoprune.policy/1'"),
        ({"rank": {}}, "unknown field of a calibration 'rank'; choose from backbone, "),
        ({"ranks": {"0.9": [0.5], "0.96": [0.5, 0.6]}}, "ranks of every alpha name as many chunks"),
        ({"ranks": {"1.5": [0.5]}}, "for an alpha in \\(0, 1\\), got \\[0.5\\] for 1.5"),
        ({"ranks": {"0.9": [0.0]}}, "ranks are shares above 0"),
        ({"changes": {"latent": {}}}, "unknown change metric 'latent'"),
        ({"discrepancies": {"kl_bits": {"3": [1, 2]}}}, "discrepancy quantiles must be 7 ascending numbers"),
        ({"discrepancies": {"kl_bits": {"3": [3, 2, 1, 1, 1, 1, 1]}}}, "must be 7 ascending numbers, got"),
        ({"discrepancies": {"kl_bits": {"x": []}}}, "does not have the fields"),
        ({"probe": {"scale": 3}}, "does not have the fields"),
        ({"probe": MADE_UP.probe.__dict__ | {"deviation": [0, 1]}}, "probe deviations must be above 0"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, change: dict, sentence: str) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(json.loads(MADE_UP.to_json()) | change))
    with pytest.raises(UserError, match=sentence) as caught:
        Calibration.load(path)
    assert str(caught.value).startswith(f"calibration '{path}'") and "\n" not in str(caught.value)


def test_a_missing_truncated_or_incomplete_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="is not complete JSON"):
        Calibration.from_json(MADE_UP.to_json()[:-40])
    with pytest.raises(UserError, match="must have schema .* got 'list'"):
        Calibration.from_json("[]")
    document = json.loads(MADE_UP.to_json())
    del document["weights"]
    with pytest.raises(UserError, match="a calibration names weights"):
        Calibration.from_json(json.dumps(document))
