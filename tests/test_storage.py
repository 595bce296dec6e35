"""Storages: what is refused, what is waited for, and Optuna's gRPC proxy in front of a real server."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from formula_study import FormulaEvaluator, search, settings
from optuna.trial import TrialState
from postgres_server import postgres_server
from sqlalchemy.exc import OperationalError

from autoprune.backbones import load_backbone
from autoprune.errors import UserError
from autoprune.search.settings import StorageSettings
from autoprune.search.storage import PatientStorage, open_storage, shown
from autoprune.search.storage_bench import StorageCase, measure_storages, storage_table


@pytest.mark.parametrize(
    ("name", "url", "sentence"),
    [
        ("sqlite", None, "unknown storage 'sqlite'; choose from journal, postgresql, grpc"),
        ("postgresql", None, "storage postgresql takes a storage.url that starts with postgresql, got None; see README"),
        ("postgresql", "mysql://me:secret@host/x", "starts with postgresql, got mysql; see README"),
        ("grpc", "host:13000", "storage grpc takes a storage.url that starts with grpc://, got host;"),
        ("journal", "postgresql://host/x", "storage journal takes no storage.url, got postgresql;"),
    ],
)
def test_an_address_that_does_not_fit_is_refused_without_its_password(name: str, url: str | None, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        StorageSettings(name, url)
    assert sentence in str(error.value) and "secret" not in str(error.value)


def test_a_server_that_is_not_there_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    settings = StorageSettings("postgresql", "postgresql://me:secret@127.0.0.1:9/studies")
    with pytest.raises(
        UserError, match=r"storage postgresql://me:\*\*\*@127.0.0.1:9/studies must answer .*; start it"
    ) as error:
        open_storage(settings, tmp_path)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert shown(StorageSettings("postgresql", "postgresql://host/x")) == "postgresql://host/x"


class Unreliable(optuna.storages.InMemoryStorage):
    """Answers nothing for the next `silent` calls of one method; `carried_out` says whether it does what it is asked then."""

    def __init__(self, method: str, *, silent: int, carried_out: bool) -> None:
        super().__init__()
        self.silent, call = silent, getattr(super(), method)

        def unreliable(*arguments: object) -> object:
            if not self.silent:
                return call(*arguments)
            self.silent -= 1
            if carried_out:
                call(*arguments)
            raise RuntimeError("commit") from OperationalError("commit", None, Exception("server closed the connection"))

        setattr(self, method, unreliable)


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_call_that_is_not_answered_is_made_again(carried_out: bool, caplog: pytest.LogCaptureFixture) -> None:
    storage = PatientStorage(Unreliable("set_trial_state_values", silent=0, carried_out=carried_out), patience=60)
    study = optuna.create_study(storage=storage, direction="minimize")
    trial = study.ask()
    storage.storage.silent = 1
    study.tell(trial, 0.5)
    assert study.trials[0].state == TrialState.COMPLETE and study.trials[0].value == 0.5
    assert storage.outages == 1
    said = [message.partition(" (")[0].partition(" after")[0] for message in caplog.messages if message.startswith("storage")]
    assert said == ["storage: no answer", "storage: it answers again"]


def test_a_trial_that_was_created_unheard_is_left_to_the_leader() -> None:
    storage = PatientStorage(Unreliable("create_new_trial", silent=0, carried_out=True), patience=60)
    study = optuna.create_study(storage=storage, direction="minimize")
    storage.storage.silent = 1
    assert study.ask().number == 1 and [trial.state for trial in study.trials] == [TrialState.RUNNING] * 2


def test_patience_ends_in_one_sentence_and_other_errors_at_once() -> None:
    storage = PatientStorage(Unreliable("get_all_studies", silent=99, carried_out=False), patience=0.3)
    with pytest.raises(UserError, match="has not answered for 0.0 minutes .*; what was finished is kept: start it"):
        storage.get_all_studies()
    with pytest.raises(KeyError):
        storage.get_trial(17)


@contextmanager
def proxy(url: str, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "autoprune.storage_proxy", f"url={url}", f"port={port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert f"serving on grpc://localhost:{port}" in process.stderr.readline()
        yield
        process.kill()


def test_a_study_behind_the_proxy_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backbone = load_backbone("tiny", weights="random")
    config = settings(tmp_path, trials=14, sampler="random")
    config = replace(config, storage=StorageSettings("grpc", f"grpc://localhost:{port}", patience=1))
    with postgres_server() as server:
        with proxy(server.url, port):
            first = search(config, backbone, FormulaEvaluator(6))
        assert len(first.trials) >= 14 and first.front
        with pytest.raises(UserError, match=f"storage grpc://localhost:{port} must answer"):
            search(config, backbone, FormulaEvaluator(6))
        with proxy(server.url, port):
            evaluator = FormulaEvaluator(6)
            again = search(config, backbone, evaluator)
    assert again.trials == first.trials and not evaluator.asked


def test_the_proxy_refuses_what_it_cannot_serve() -> None:
    command = [sys.executable, "-m", "autoprune.storage_proxy", "url=sqlite:///x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "starts with postgresql, got sqlite" in done.stderr and "Traceback" not in done.stderr


def test_a_study_is_refused_by_another_device_also_where_folders_differ(tmp_path: Path) -> None:
    with postgres_server() as server:
        storage, backbone = StorageSettings("postgresql", server.url), load_backbone("tiny", weights="random")
        search(replace(settings(tmp_path / "one", trials=2), storage=storage), backbone, FormulaEvaluator(6))
        began = time.monotonic()
        with pytest.raises(UserError, match="belongs to another device, dtype, kernel or torch .*study.per_device=true"):
            other = load_backbone("tiny", weights="random", dtype="bfloat16")
            search(replace(settings(tmp_path / "two", trials=2), storage=storage), other, FormulaEvaluator(6))
        assert time.monotonic() - began < 60


def test_the_benchmark_times_what_a_study_stores(tmp_path: Path) -> None:
    case = StorageCase(workers=(2,), trials=6)
    with postgres_server() as server:
        storages = {"journal": StorageSettings(), "postgresql": StorageSettings("postgresql", server.url)}
        record = measure_storages(case, storages)
    for row in (by_workers["2"] for by_workers in record["storages"].values()):
        assert row["trials"] == 6 and row["errors"] == [] and 0 < row["median"] <= row["p95"]
        assert row["share"] == pytest.approx(row["mean"] / 10) and 0 < row["throughput"] < 6 / (3 * case.objective)
    lines = storage_table(record["storages"])
    assert len(lines) == 3 and lines[2].split()[:2] == ["postgresql", "2"]
