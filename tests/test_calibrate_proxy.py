"""Rank correlations against scipy, and the command on a small study's files."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from autoprune.calibrate_proxy import main
from autoprune.measure.rank_correlation import correlated, kendall, spearman
from autoprune.search.export import write_front
from autoprune.search.folder import StudyFolder
from autoprune.search.front import search_front
from autoprune.search.proxies import FEW_POLICIES
from tests.example_study import study_result

LOSSES = {"lossless": 0.025, "balanced": 0.095, "6": 0.165, "fast": 0.225, "fastvar": 0.28, "fastvar-hart": 0.25}


@pytest.mark.parametrize("seed", range(5))
def test_coefficients_are_scipys_with_and_without_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for x, y in (rng.normal(size=(2, 12)), rng.integers(0, 4, (2, 12)).astype(float)):
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_the_interval_is_that_of_a_plain_bootstrap_over_policies() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=15)
    y = x + rng.normal(size=15)
    found = correlated(spearman, x, y)
    picks = rng.integers(0, 15, (3000, 15))
    expected = np.quantile([stats.spearmanr(x[pick], y[pick]).statistic for pick in picks], (0.025, 0.975))
    assert found.interval == pytest.approx(expected, abs=0.05)
    assert correlated(kendall, x, np.ones(15)).value is None


def test_two_unrelated_rankings_often_agree_below_the_number_that_is_warned_of() -> None:
    ranks = np.random.default_rng(0).random((20000, 2, FEW_POLICIES - 1))
    assert np.mean(np.abs(spearman(ranks[:, 0], ranks[:, 1])) >= 0.5) > 0.2


@pytest.fixture
def study(tmp_path: Path) -> Path:
    result = study_result(tmp_path / "study")
    write_front(StudyFolder(result.directory, {}), result, search_front(result.trials))
    return result.directory


def csv_file(folder: Path, rows: dict[str, float], *, benchmark: str = "geneval") -> str:
    file = folder / f"{benchmark}.csv"
    file.write_text(f"policy,{benchmark}\n" + "".join(f"{name},{value}\n" for name, value in rows.items()))
    return str(file)


def row(study: Path, proxy: str, benchmark: str) -> dict:
    rows = json.loads((study / "proxy_calibration.json").read_text())["correlations"]
    return next(row for row in rows if (row["proxy"], row["benchmark"]) == (proxy, benchmark))


def test_a_proxy_that_ranks_like_the_benchmark_has_1_in_either_direction(study: Path, tmp_path: Path, capsys) -> None:  # noqa: ANN001
    good = csv_file(tmp_path, {name: 1 - loss**2 for name, loss in LOSSES.items()})
    bad = tmp_path / "fid.jsonl"
    bad.write_text("".join(json.dumps({"policy": name, "fid": 10 * loss}) + "\n" for name, loss in LOSSES.items()))
    assert main([f"study={study}", f"scores={good},{bad}", "lower=fid"]) == 0
    shown = capsys.readouterr()
    for benchmark in ("geneval", "fid"):
        found = row(study, "loss", benchmark)
        assert found["policies"] == 6 and found["spearman"]["value"] == found["kendall"]["value"] == 1
    assert row(study, "psnr", "fid")["spearman"] == {"value": None, "interval": None}, "the example's PSNR is one number"
    assert "loss             geneval                 6  +1.00 [+1.00, +1.00]" in shown.out and "written: " in shown.out
    assert shown.err == f"autoprune: 6 policies say little about a rank correlation; score {FEW_POLICIES} or more.\n"


def test_the_result_is_in_front_json_from_the_next_time_it_is_written(study: Path, tmp_path: Path) -> None:
    assert json.loads((study / "front.json").read_text())["proxy_calibration"] is None
    assert main([f"study={study}", f"scores={csv_file(tmp_path, LOSSES)}"]) == 0
    assert row(study, "loss", "geneval")["spearman"]["value"] == -1, "higher is better unless said otherwise"
    result = study_result(study)
    write_front(StudyFolder(study, {}), result, search_front(result.trials))
    kept = json.loads((study / "front.json").read_text())["proxy_calibration"]
    assert kept["scores"]["geneval"] == LOSSES and kept["correlations"]


def test_a_policy_under_two_names_counts_once_and_dense_not_at_all(study: Path, tmp_path: Path) -> None:
    scores = csv_file(tmp_path, LOSSES | {"dense": 0, "4": LOSSES["lossless"]})
    assert main([f"study={study}", f"scores={scores}"]) == 0
    assert row(study, "loss", "geneval")["policies"] == 6


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("policy,a\nlossless,1\nbalanced,2\nmedium,3", "unknown policy 'medium'; choose from "),
        ("policy,a\nlossless,1\nbalanced,2", "a must have at least 3 scored policies, got 2; "),
        ("policy,a\nlossless,x", "a must be a finite number, got 'x' in "),
        ("policy,a\nlossless,1\nlossless,2", "a policy must have one a, got another one of 'lossless' in "),
        (
            "policy,a\nlossless,1\n4,2\nbalanced,3\n6,1",
            "got another one of '4' under its other name; ",
        ),
        ("name,a\nlossless,1", "every row must name its policy, got none in "),
        ("policy\nlossless", "scores must hold at least one benchmark beside policy, got none in "),
        ('{"policy": "lossless", "a": 1}\n[2]', "every line must be one JSON object, got '[2]' in "),
        ("policy,a\nlossless,1,2", "every row must have as many values as the header, got more in "),
    ],
)
def test_bad_scores_are_one_sentence(study: Path, tmp_path: Path, capsys, rows: str, sentence: str) -> None:  # noqa: ANN001
    (tmp_path / "scores").write_text(rows)
    assert main([f"study={study}", f"scores={tmp_path / 'scores'}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (study / "proxy_calibration.json").exists()


def test_bad_arguments_are_one_sentence(study: Path, tmp_path: Path, capsys) -> None:  # noqa: ANN001
    scores = csv_file(tmp_path, LOSSES)
    for arguments, sentence in (
        ([f"study={tmp_path}", f"scores={scores}"], "study must be a folder with the front.json of a search, got "),
        ([f"study={study}", "scores=missing.csv"], "scores 'missing.csv' cannot be read (FileNotFoundError); "),
        (
            [f"study={study}", f"scores={scores}", "lower=clip"],
            "unknown benchmark or proxy 'clip'; choose from geneval, ",
        ),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
