"""The benchmark command writes a record of ratios with the machine, and refuses bad input in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoprune import bench
from autoprune.backbones import Backbone, load_backbone
from autoprune.backbones.released import Target, random_backbone
from autoprune.errors import UserError
from autoprune.measure.loading import LoadingCase, measure_loading
from autoprune.measure.overhead import OverheadCase, measure_overhead
from autoprune.measure.scale_table import scale_table
from autoprune.measure.scales import measure_scales
from autoprune.policy import Policy, token_count
from autoprune.rules import BranchRule, ScalePruning
from tests.test_flops import hart, var
from tests.test_imports import SEARCH_PACKAGES, run_without
from tests.tiny_star import SPEC, star


def test_record_holds_ratios_and_the_machine(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "bench.json"
    assert bench.main(["weights=random", "batch=1", "rounds=1", f"json={path}"]) == 0
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


def scales_record(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict, str]:
    path = folder / "scales.json"
    assert (
        bench.main(["suite=scales", "weights=random", "dtype=float32", "batch=1", "rounds=1", f"json={path}", *arguments]) == 0
    )
    return json.loads(path.read_text()), capsys.readouterr().out


def test_scales_reports_work_time_and_memory_of_every_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = load_backbone("tiny", weights="random")
    schedule = tiny.scale_schedule()
    rule = ScalePruning(0.5, granularity="scale", restorer="zero_residual")
    Policy("tiny", 6, schedule, {5: rule, 6: rule}, group_from=5).save(tmp_path / "files" / "grouped.json")
    Policy("tiny", 6, schedule, guidance=BranchRule("adaptive", 4, threshold=1e9)).save(tmp_path / "files" / "decides.json")
    record, shown = scales_record(tmp_path, capsys, f"policies={tmp_path / 'files'}")
    dense, grouped, decides = (record["scales"]["policies"][name] for name in ("dense", "grouped", "decides"))
    assert [row["scales"] for row in dense["forwards"]] == [[scale] for scale in range(7)]
    assert [row["tokens"] for row in dense["forwards"]] == [token_count(grid) for grid in schedule]
    assert all(row["ms"] > 0 and 0 < row["share"] < 1.2 and row["rows"] == 2 for row in dense["forwards"])
    assert grouped["forwards"][-1]["scales"] == [5, 6] and grouped["forwards"][-1]["kept"] == 72 + 128
    assert [row["rows"] for row in decides["forwards"]] == [2, 2, 2, 2, 2, 1, 1], "what ran, not what might have"
    assert decides["forwards"][-1]["gflop"] == pytest.approx(dense["forwards"][-1]["gflop"] / 2, rel=0.01)
    held = dense["forwards"][-1]["key_value_mb"]
    assert held == pytest.approx(dense["predicted"]["key_values_mb"]) and dense["predicted"]["resident_mb"] > held
    assert dense["text_ms"] > 0 and dense["decoding_ms"] > 0 and dense["peak_memory_mb"] > 0
    assert record["scales"]["dense_keys_values"]["ratio"] > 1.5 and record["machine"]["dtype"] == "float32"
    decoder = record["scales"]["decoder"]
    assert decoder["samples"] == 1 and not decoder["strips"] and not decoder["compiled"] and decoder["peak_memory_mb"] > 10
    assert "decoder: 1 at a time, uncompiled" in shown
    assert (tmp_path / "scales.png").stat().st_size > 10000 and "grouped: where it differs from dense" in shown


@pytest.mark.parametrize("family", [var, hart])
def test_scales_serves_every_family(family: Callable[[], Backbone]) -> None:
    record = measure_scales(family(), {}, batch=1, rounds=1, prompt="a cat")
    assert len(record["policies"]["dense"]["forwards"]) == 6 and "dense_keys_values" not in record
    assert record["policies"]["dense"]["text_keys_values_gflop"] == 0


def test_scales_runs_without_the_search_extra_and_says_what_is_left_out(tmp_path: Path) -> None:
    code = "import sys\nfrom autoprune import bench\nsys.exit(bench.main(sys.argv[1:]))"
    arguments = ["suite=scales", "weights=random", "batch=1", "rounds=1", "presets=true", f"json={tmp_path / 's.json'}"]
    done = run_without(SEARCH_PACKAGES, code, *arguments)
    assert done.returncode == 0, done.stderr
    assert "presets are left out" in done.stdout and "the plot is left out" in done.stdout
    assert list(json.loads((tmp_path / "s.json").read_text())["scales"]["policies"]) == ["dense"]


def test_presets_are_those_of_the_unified_space() -> None:
    policies, missing = bench._presets(load_backbone("tiny", weights="random"))
    assert {"fastvar", "skip-1"} <= policies.keys() and all(isinstance(sentence, str) for sentence in missing)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rounds=x"], "rounds must be a whole number"),
        (["speed=1"], "choose from backbone"),
        (["batch=0"], "batch must be at least 1"),
        (["suite=all"], "unknown suite 'all'; choose from policies, overhead, loading, search"),
        (["presets=maybe"], "presets must be true or false, got 'maybe'"),
        (["weights=random", "policies=/nowhere.json"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(arguments: list[str], words: str, capsys) -> None:
    assert bench.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_policy_that_prunes_nothing_is_refused(tmp_path: Path) -> None:
    nothing = Policy("tiny", 6, ((1, 1, 1), (1, 4, 4)), {1: ScalePruning(0.99, 0)}, name="nothing")
    with pytest.raises(UserError, match="a policy must change something on its schedule, 'nothing' runs every token"):
        bench.loaded_policies(str(nothing.save(tmp_path / "nothing.json")))


def test_scales_plans_shapes_that_have_no_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, shown = scales_record(tmp_path, capsys, "backbone=var_d16", "device=meta")
    dense = record["scales"]["policies"]["dense"]
    assert [row["tokens"] for row in dense["forwards"]] == [side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    assert all(row["gflop"] > 0 and row["ms"] is None and row["share"] is None for row in dense["forwards"])
    assert dense["ms"] is None and dense["peak_memory_mb"] is None and record["scales"]["matmul_ceiling_gflops"] is None
    assert dense["forwards"][-1]["key_value_mb"] == pytest.approx(dense["predicted"]["key_values_mb"])
    assert record["machine"]["device"] == "meta" and record["left_out"] == ["times, as device=meta has shapes only"]
    assert "planned, nothing was timed" in shown and (tmp_path / "scales.png").stat().st_size > 10000


def test_planned_scales_are_those_that_run() -> None:
    timed = measure_scales(star(), {}, batch=1, rounds=1, prompt="a cat")
    shapes = random_backbone("infinitystar_480p", SPEC, Target(torch.device("meta"), torch.float32)).sampled(frames=17)
    planned = measure_scales(shapes, {}, batch=1, rounds=1, prompt="a cat")
    names = ("scales", "scale", "clip", "repetition", "tokens", "kept", "rows", "gflop", "gflop_parts", "key_value_mb")
    rows = [[{name: row[name] for name in names} for row in each["policies"]["dense"]["forwards"]] for each in (timed, planned)]
    assert rows[0] == rows[1]
    places = [(row["clip"], row["scale"], row["repetition"]) for row in rows[0]]
    assert places[:4] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 0)] and places[-1] == (1, 9, 0) and len(places) == 16
    assert timed["policies"]["dense"]["predicted"] == planned["policies"]["dense"]["predicted"]
    table = "\n".join(scale_table(planned))
    assert "1:7          3" in table and "1:9          1" in table, "the third scale of the clip runs three times"
