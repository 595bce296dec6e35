"""The benchmark command writes a record of ratios with the machine, and refuses bad input in one sentence."""

import json

import pytest
import torch

from autoprune import bench
from autoprune.measure.loading import LoadingCase, measure_loading
from autoprune.measure.overhead import OverheadCase, measure_overhead


def test_record_holds_ratios_and_the_machine(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "bench.json"
    assert bench.main(["weights=random", "batch=1", "rounds=1", f"output={path}"]) == 0
    record = json.loads(path.read_text())
    assert record["policies"]["dense"]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in record["policies"].values())
    assert set(record["attention"]) == {"explicit", "sdpa"}
    assert record["machine"]["torch"]
    assert str(path) in capsys.readouterr().out


def test_overhead_is_the_share_of_select_and_restore_in_the_pruned_scale() -> None:
    case = OverheadCase(width=128, depth=4, heads=2)
    rows = measure_overhead(case, device=torch.device("cpu"), dtype=torch.float32, rounds=1)
    assert len(rows) == 4
    for row in rows.values():
        assert 0 < row["seconds"] < row["scale_seconds"] and row["ratio"] == row["seconds"] / row["scale_seconds"]


def test_loading_reads_a_sharded_checkpoint_and_says_what_it_needed(tmp_path) -> None:
    rows = measure_loading(LoadingCase(width=256, depth=2, shards=3), tmp_path)
    assert len(list(tmp_path.glob("*.bin"))) == 3
    assert 0 < rows["bfloat16"]["kept"] < rows["float32"]["kept"]
    assert all(row["shard"] > 1 and row["peak"] >= 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rounds=x"], "rounds must be a whole number"),
        (["speed=1"], "choose from backbone"),
        (["batch=0"], "batch must be at least 1"),
        (["suite=all"], "unknown suite 'all'; choose from policies, overhead, loading, search"),
        (["weights=random", "policies=/nowhere.json"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(arguments: list[str], words: str, capsys) -> None:
    assert bench.main(arguments) == 2
    assert words in capsys.readouterr().err
