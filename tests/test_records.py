"""Measurements as JSON, there and back, also as studies wrote them before they had intervals."""

import json
from dataclasses import replace

from autoprune.search.records import Measurement
from tests.example_study import DENSE


def test_a_measurement_reads_back_from_json() -> None:
    measured = replace(DENSE, loss_interval=(0.01, 0.02), speed_up_interval=(1.4, 1.6), score_flips=(3, 1))
    assert Measurement.from_plain(json.loads(json.dumps(measured.to_plain()))) == measured
    unscored = replace(measured, score_drop=None, score_drop_interval=None, score_flips=None)
    assert Measurement.from_plain(json.loads(json.dumps(unscored.to_plain()))) == unscored


def test_records_from_before_intervals_were_measured_still_load() -> None:
    old = {name: value for name, value in DENSE.to_plain().items() if name not in NEW}
    read = Measurement.from_plain(json.loads(json.dumps(old)))
    assert read == DENSE and all(getattr(read, name) is None for name in NEW)


NEW = ("loss_interval", "speed_up_interval", "score_flips")
