"""The journal after everything that may happen to it: a kill in the middle of a write, a full disk, damage, many writers."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from autoprune.errors import UserError
from autoprune.search.journal_file import open_journal

TOLD = 4


def study(path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(storage=open_journal(path), study_name="x", load_if_exists=True)


def tell(opened: optuna.Study, value: float) -> None:
    trial = opened.ask({"keep": optuna.distributions.FloatDistribution(0, 1)})
    trial.set_user_attr("note", f"told {value} ✓")
    opened.tell(trial, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "study.journal"
    opened = study(path)
    for value in range(TOLD):
        tell(opened, value)
    return path.read_bytes()


def values(path: Path) -> list[float | None]:
    return [trial.value for trial in study(path).get_trials()]


def test_a_journal_cut_anywhere_in_its_last_two_records_goes_on(tmp_path: Path, whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    begins = len(whole) - len(lines[-1]) - len(lines[-2])
    for cut in range(begins, len(whole) + 1):
        path = tmp_path / f"{cut}" / "study.journal"
        path.parent.mkdir()
        path.write_bytes(whole[:cut])
        opened = study(path)
        assert [trial.value for trial in opened.get_trials()][: TOLD - 1] == list(range(TOLD - 1))
        tell(opened, 7)
        assert values(path)[-1] == 7
        kept = b"".join(line for line in lines if whole[:cut].startswith(b"".join(lines[: lines.index(line) + 1])))
        aside = path.with_name("study.journal.damaged-1")
        assert path.read_bytes().startswith(kept), "whole records stay as they are"
        assert (aside.read_bytes() if aside.exists() else b"") == whole[len(kept) : cut], "what is cut is kept beside it"


def test_a_second_process_goes_on_with_a_cut_journal(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(whole[:-9])
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_journal_file import study, tell
tell(study(Path({str(path)!r})), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert values(path)[: TOLD - 1] == list(range(TOLD - 1)) and values(path)[-1] == 9


def test_a_tail_of_garbage_is_set_aside_and_said_in_one_line(
    tmp_path: Path, whole: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "study.journal"
    for number, garbage in enumerate((b"\0" * 40, b"\xff\xfe\n\0\0", b'{"op_code": 4, "tri\n', b"7\n[]\nnull\n"), start=1):
        path.write_bytes(whole + garbage)
        caplog.clear()
        assert values(path) == list(range(TOLD)) and path.read_bytes().startswith(whole)
        assert (tmp_path / f"study.journal.damaged-{number}").read_bytes() == garbage
        assert [message for message in caplog.messages if f"damaged-{number}" in message and "\n" not in message]


def test_an_open_journal_sees_what_a_dead_process_left_and_writes_after_it(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(whole)
    opened = study(path)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    assert len(opened.get_trials()) == TOLD, "half a line is not there yet"
    tell(opened, 5)
    assert values(path) == [*range(TOLD), 5]


def test_damage_before_the_end_names_the_line_and_changes_nothing(tmp_path: Path, whole: bytes) -> None:
    path, lines = tmp_path / "study.journal", whole.splitlines(keepends=True)
    lines[5] = lines[5][:-9] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"line 6 of journal .* is damaged.* `head -n 5`") as caught:
        study(path)
    assert path.read_bytes() == b"".join(lines) and "\n" not in str(caught.value)
    path.write_bytes(b"".join(lines[:5]))
    assert study(path).get_trials() is not None


def test_a_journal_that_got_shorter_in_use_is_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(whole)
    opened = study(path)
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="lost records while it was in use"):
        tell(opened, 5)


def _append(path: str, gate: str, count: int) -> None:
    opened = study(Path(path))
    Path(gate).touch()
    for value in range(count):
        tell(opened, value)


def test_two_writers_go_on_when_a_third_is_killed_while_it_writes(tmp_path: Path) -> None:
    path, context = tmp_path / "study.journal", multiprocessing.get_context("spawn")
    study(path)
    gates = [tmp_path / f"gate{number}" for number in range(3)]
    counts = (25, 25, 10**6)
    arguments = [(str(path), str(gate), count) for gate, count in zip(gates, counts, strict=True)]
    writers = [context.Process(target=_append, args=each) for each in arguments]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 120
    while not all(gate.exists() for gate in gates) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writers[2].pid, signal.SIGKILL)
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, -signal.SIGKILL]
    trials = study(path).get_trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert sum(trial.state.is_finished() for trial in trials) >= 50
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_lock_dies_with_its_process(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(whole)
    code = (
        f"import fcntl, os; f = open({str(path) + '.flock'!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code + "; import time; time.sleep(60)"], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    began = time.monotonic()
    assert values(path) == list(range(TOLD)) and time.monotonic() - began < 10


def test_a_full_disk_takes_no_half_record(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(whole)
    opened = study(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # the kernel takes 20 bytes and refuses the rest
    try:
        with pytest.raises(UserError, match="must be written, but: File too large; make space there, and the same command"):
            tell(opened, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    tell(opened, 5)
    assert values(path)[-1] == 5
