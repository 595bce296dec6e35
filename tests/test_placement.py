"""Where keys and values go, and what happens to random weights that do not fit."""

from dataclasses import replace

import pytest
from tiny_star import star

from autoprune.backbones import LoadArguments
from autoprune.measure import placement
from autoprune.measure.memory_plan import predicted_peak
from autoprune.measure.placement import loaded_or_planned, readable_prompt, with_fitting_keys
from tests.test_flops import var


@pytest.fixture(autouse=True)
def undecided() -> None:
    placement._PLACES.clear()


def test_keys_leave_the_device_only_where_a_dense_generation_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = replace(var(), keys="auto")
    needs = [predicted_peak(backbone.plan(None), backbone, ["1"] * batch).above_loaded(backbone.device) for batch in (1, 2)]
    free = sum(needs) / 2 / placement.USABLE
    monkeypatch.setattr(placement, "free_memory", lambda device: free)
    assert [with_fitting_keys(backbone, batch=batch).keys for batch in (1, 2)] == ["device", "host"]
    monkeypatch.setattr(placement, "free_memory", lambda device: 0.0)
    assert with_fitting_keys(backbone, batch=1).keys == "device", "decided once"
    assert with_fitting_keys(backbone.with_keys("device"), batch=4).keys == "device", "a choice stays"


def test_small_keys_stay_without_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, asked = replace(var(), keys="auto"), []
    monkeypatch.setattr(placement, "predicted_peak", lambda *given: asked.append(given) or predicted_peak(*given))
    keys = predicted_peak(backbone.plan(None), backbone, ["1"]).key_values
    for free, dry_runs in ((keys / placement.WORTH * 1.01, 0), (keys / placement.WORTH * 0.99, 1)):
        placement._PLACES.clear()
        monkeypatch.setattr(placement, "free_memory", lambda device, free=free: free)
        with_fitting_keys(backbone, batch=1)
        assert len(asked) == dry_runs


def test_memory_of_graphs_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graphs:
        key_bytes = 10**12

    monkeypatch.setattr(placement, "free_memory", lambda device: 0.0)
    assert with_fitting_keys(replace(star(), keys="auto", graphs=Graphs()), batch=1).keys == "device"


def test_a_class_number_stands_for_a_prompt_where_only_that_is_read() -> None:
    assert readable_prompt(var()) == "7" and readable_prompt(star(1), "a cat") == "a cat"


def test_random_weights_that_do_not_fit_are_shapes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = LoadArguments(backbone="var_d16", weights="random", device="cpu", dtype="float32")
    monkeypatch.setattr(placement, "free_memory", lambda device: 1e9)
    backbone, left_out = loaded_or_planned(arguments, batch=1)
    assert backbone.device.type == "meta" and len(left_out) == 1
    assert left_out[0].startswith("times, as weights and a dense generation take 1.") and "0.7 are free on cpu" in left_out[0]
    assert all(value.is_meta for value in backbone.model.state_dict().values())
    asked, left_out = loaded_or_planned(replace(arguments, device="meta", dtype="bfloat16"), batch=1)
    assert (
        asked.device.type == "meta"
        and str(asked.dtype) == "torch.bfloat16"
        and left_out == ["times, as device=meta has shapes only"]
    )


def test_what_fits_is_loaded() -> None:
    backbone, left_out = loaded_or_planned(LoadArguments(weights="random", device="cpu"), batch=1)
    assert backbone.name == "tiny" and backbone.device.type == "cpu" and left_out == []
