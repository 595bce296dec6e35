"""What storing a study costs: seconds of storage calls a trial, for each storage and number of workers, sampling excluded.

Workers are real processes that start together and go through what a trial of the loop stores, with an objective of a few
milliseconds, so that the storage is asked far more often than in any real study.
"""

import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from optuna.samplers import RandomSampler

from autoprune.files import write_whole
from autoprune.search.presence import Worker
from autoprune.search.records import Measurement, TrialRecord
from autoprune.search.settings import StorageSettings
from autoprune.search.shared_study import Asked, SharedStudy
from autoprune.search.storage import open_storage
from autoprune.search.synthetic import measured, synthetic_space

START_SECONDS = 300.0


@dataclass(frozen=True)
class StorageCase:
    """Studies of `trials` trials shared by so many `workers`; a trial evaluates for `objective` seconds. Storage time is
    compared with a trial of `real` seconds."""

    workers: tuple[int, ...] = (1, 4, 32)
    trials: int = 192
    objective: float = 0.005
    real: float = 10.0
    space: str = "unified"


@dataclass(frozen=True)
class _Share:
    """What one worker did: seconds in storage of every trial, when it began and ended, and errors."""

    seconds: tuple[float, ...]
    began: float
    ended: float
    errors: tuple[str, ...]


def measure_storages(case: StorageCase, storages: Mapping[str, StorageSettings]) -> dict[str, object]:
    """Returns by storage and number of workers: seconds in storage a trial, trials a second, and errors."""
    rows = {
        name: {str(count): _measured(case, settings, count) for count in case.workers} for name, settings in storages.items()
    }
    return {"what": "seconds of storage calls a trial, sampling excluded", "case": asdict(case), "storages": rows}


def storage_table(record: Mapping[str, Mapping[str, Mapping]]) -> list[str]:
    """Returns the lines that the benchmark prints."""
    lines = [
        f"{'storage':12s} {'workers':>7s} {'ms a trial':>11s} {'95 %':>8s} {'of ten s':>9s} {'trials a s':>11s} {'errors':>7s}"
    ]
    for name, by_workers in record.items():
        for workers, row in by_workers.items():
            times = f"{1000 * row['median']:11.1f} {1000 * row['p95']:8.1f} {100 * row['share']:7.2f} %"
            lines.append(f"{name:12s} {workers:>7s} {times} {row['throughput']:11.2f} {len(row['errors']):7d}")
    return lines


def _measured(case: StorageCase, settings: StorageSettings, workers: int) -> dict[str, object]:
    each, context = -(-case.trials // workers), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    name = f"autoprune-bench-{time.time_ns()}"
    with TemporaryDirectory() as folder, ProcessPoolExecutor(workers, mp_context=context) as pool:
        storage = open_storage(settings, Path(folder))
        SharedStudy(storage, name=name, space=synthetic_space(case.space))  # tables are there before it begins
        jobs = [pool.submit(_worked, case, settings, (folder, name, rank, each)) for rank in range(workers)]
        until = time.monotonic() + START_SECONDS
        while len(list(Path(folder).glob("ready-*"))) < workers and time.monotonic() < until:
            time.sleep(0.05)
        write_whole(Path(folder, "go"), "")
        shares = [job.result() for job in jobs]
    seconds = [took for share in shares for took in share.seconds]
    lasted = max(share.ended for share in shares) - min(share.began for share in shares)
    return {
        "median": median(seconds),
        "mean": sum(seconds) / len(seconds),
        "p95": float(np.quantile(seconds, 0.95)),
        "share": sum(seconds) / len(seconds) / case.real,
        "throughput": len(seconds) / lasted,
        "trials": len(seconds),
        "errors": [error for share in shares for error in share.errors],
    }


def _worked(case: StorageCase, settings: StorageSettings, place: tuple[str, str, int, int]) -> _Share:
    """Runs `each` trials in one process, from when all are ready."""
    folder, name, rank, each = place
    storage = open_storage(settings, Path(folder))
    study = SharedStudy(storage, name=name, space=synthetic_space(case.space))
    study.use(RandomSampler(seed=rank))
    worker = Worker.here(str(rank))
    write_whole(Path(folder, f"ready-{rank}"), "")
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    seconds, errors, began = [], [], time.time()
    for _ in range(each):
        before = storage.seconds
        try:
            study.sync()
            asked = study.ask(worker)
            study.sync()
            time.sleep(case.objective)
            _tell(study, asked)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        seconds.append(storage.seconds - before)
    return _Share(tuple(seconds), began, time.time(), tuple(errors))


def _tell(study: SharedStudy, asked: Asked) -> None:
    found = measured(asked.policy, 0)
    latency, loss = float(np.exp(found.point[0])), found.point[1]
    scores = {"score_dense": 1.0, "score": 0.9, "score_drop": 0.1, "score_drop_interval": (0.0, 0.2)}
    measurement = Measurement(
        latency=latency,
        latency_spread=0.0,
        dense_latency=1.0,
        speed_up=1 / latency,
        loss=loss,
        ssim=1 - loss,
        psnr=30.0,
        **scores,
        peak_memory_mb=None,
        prompts=96,
        seed=0,
        batch=16,
        latency_source="table",
    )
    record = TrialRecord(asked.number, asked.source, asked.policy, measurement, True, "complete", 0.0)
    study.tell(asked, record, first=measurement, constraints={"score_drop": found.constraint})
