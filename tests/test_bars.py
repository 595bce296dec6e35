"""The bars command on a tiny case: every bar has a value of its own, and cases say what they were measured on."""

import math

import pytest
import torch

from autoprune import bench
from autoprune.backbones import load_backbone
from autoprune.measure.bars import bar, bars_table, measure_bars
from autoprune.measure.bars_case import INFINITY_2B_CASE, BarsCase, barred_policies, bars_case, fixed_request, random_infinity

CPU = torch.device("cpu")
TINY = BarsCase(
    width=64,
    depth=4,
    heads=2,
    pixel_budget="0.06M",
    dtypes=(torch.float32, torch.bfloat16),
    fastvar_from=4,
    fastvar_layers=(1, 2),
    decoder=32,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # noqa: ANN201
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_bar_is_the_ratio_of_its_parts() -> None:
    bars = measure_bars(TINY, device=CPU, rounds=1)
    assert [entry["bar"] for entry in bars.values()] == [1.0, 2.0, 0.85, 0.75]
    for entry in bars.values():
        ratio = entry["slow_seconds"] / entry["fast_seconds"]
        assert entry["value"] == pytest.approx(ratio / entry.get("flop_ratio", 1.0))
        assert entry["ok"] == (entry["value"] >= entry["bar"])
        assert entry.get("flop_ratio", 2.0) > 1
    table = "\n".join(bars_table(bars))
    assert all(name in table for name in bars)


def test_dense_float32_draws_the_bits_of_the_reference() -> None:
    bars = measure_bars(TINY, device=CPU, rounds=1)
    exact, lower = list(bars.values())[:2]
    assert exact["same_bits"] > 0.999  # a draw at its threshold may fall either way
    assert 0.9 < lower["same_bits"] <= 1.0


def test_the_large_case_takes_the_same_path_on_a_cpu() -> None:
    case = BarsCase(
        width=64,
        depth=2,
        heads=2,
        pixel_budget="0.06M",
        batches=(1, 2),
        dtypes=(torch.bfloat16,),
        faster=(2.0,),
        fastvar_from=4,
        fastvar_layers=(0, 1),
        fastvar=0.8,
        few=None,
        ceiling=2.0,
        decoder=32,
    )
    bars = measure_bars(case, device=CPU, rounds=1)
    assert len(bars) == 2 * 3 and all(name.endswith(("batch 1", "batch 2")) for name in bars)
    whole = [entry for name, entry in bars.items() if "decoder" in name]
    assert all(math.isfinite(entry["value"]) and entry["ok"] == (entry["value"] <= 2.0) for entry in whole)
    assert whole[1]["tflop"] > 1.5 * whole[0]["tflop"]


def test_weights_are_the_same_in_every_precision_and_requests_fit_them() -> None:
    exact, lower = (random_infinity(TINY, CPU, dtype) for dtype in TINY.dtypes)
    assert torch.equal(exact.model.layers()[1].ffn.fc1.weight.bfloat16(), lower.model.layers()[1].ffn.fc1.weight)
    assert torch.equal(exact.model.head.weight, lower.model.head.weight)
    assert fixed_request(TINY, lower, 2).text.values.shape == (2, 40, 2048)


@pytest.mark.parametrize(
    ("case", "cut"), [(BarsCase(), {7: 0.6, 8: 0.5}), (INFINITY_2B_CASE, {9: 0.6, 10: 0.5})], ids=["0.25M", "1M"]
)
def test_fastvar_is_the_preset_of_the_search_spaces(case: BarsCase, cut: dict[int, float]) -> None:
    pytest.importorskip("optuna")
    from autoprune.search.folders import shipped_folder
    from autoprune.search.knobs import Target
    from autoprune.search.space import SearchSpace
    from autoprune.search.space_file import read_space

    ours, _ = barred_policies(case)["FastVAR"]
    target = Target(ours.backbone, ours.depth, ours.scale_schedule)
    space = SearchSpace(read_space(shipped_folder("search_spaces") / "fastvar.yaml"), target)
    preset = next(entry for entry in space.presets() if entry.name == "fastvar")
    assert ours.key() == preset.policy.key()
    assert {scale: rule.keep for scale, rule in ours.scales.items()} == cut


def test_cases_follow_the_device_and_its_precision() -> None:
    assert bars_case(torch.device("cuda"), torch.bfloat16) is INFINITY_2B_CASE
    assert bars_case(CPU, torch.float32).dtypes == (torch.float32,)
    assert bars_case(CPU, torch.bfloat16).faster == (1.0, 2.0)
    assert bar(1.5, 2.0, most=True)["ok"] and not bar(1.5, 2.0)["ok"]


def test_a_trial_is_timed_with_and_without_shared_scales() -> None:
    pytest.importorskip("optuna")
    from autoprune.search.trial_bar import TrialCase, trial_bar

    (entry,) = trial_bar(load_backbone("tiny", weights="random"), TrialCase(prompts=2, batch=2, rounds=1)).values()
    assert entry["value"] > 1 and entry["bar"] == 1.6 and entry["lowest"] <= entry["value"]


def test_the_suite_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["suite=nothing"]) == 2
    assert "bars" in capsys.readouterr().err
