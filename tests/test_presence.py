"""Who is alive: processes of this machine are looked up, others must give signs; one measurement at a time on a device."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch

from autoprune.measure.device_lock import DeviceLock
from autoprune.search.presence import SIGN, Presence, Worker


class Board:
    """Attributes in memory, as a study has them."""

    def __init__(self) -> None:
        self.values, self.outages = {}, 0

    def attributes(self) -> dict[str, object]:
        return dict(self.values)

    def put(self, key: str, value: object, *, at_once: bool = False) -> None:
        self.values[key] = value


def _sleep(ready) -> None:  # noqa: ANN001
    ready.set()
    time.sleep(600)


def test_a_process_of_this_machine_is_dead_as_soon_as_it_is_killed_also_before_it_is_buried() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_sleep, args=(ready,))
    process.start()
    ready.wait()
    me = Worker.here("me")
    started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    other = Worker("other", me.host, me.space, process.pid, started)
    assert me.is_dead() is True and other.is_dead() is False
    with Presence(me, Board(), lease=10):
        assert me.is_dead() is False
    os.kill(process.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while not other.is_dead() and time.monotonic() < until:
        time.sleep(0.01)
    assert other.is_dead() is True
    process.join()
    assert other.is_dead() is True
    assert Worker("reused", me.host, me.space, os.getppid(), me.started + 1).is_dead() is True
    assert Worker("elsewhere", me.host, "another boot", 1, 1).is_dead() is None


def test_a_worker_elsewhere_is_gone_when_its_sign_stands_still_and_not_while_the_storage_is_away() -> None:
    board, other = Board(), Worker("other", "host", "boot", 1, 1)
    presence = Presence(Worker.here("me"), board, lease=0.2)
    board.put(SIGN + other.token, {**vars(other), "count": 0})
    for count in range(4):
        board.put(SIGN + other.token, {**vars(other), "count": count})
        assert not presence.is_gone(other.token)
        time.sleep(0.1)
    assert not presence.is_gone(other.token)
    time.sleep(0.15)
    board.outages += 1
    assert not presence.is_gone(other.token), "it could not give a sign either"
    time.sleep(0.25)
    assert presence.is_gone(other.token) and not presence.is_gone(presence.worker.token)
    assert (
        presence.label(other.token) == "other (host, process 1)"
        and presence.label("nobody") == presence.label(None) == "of unknown name"
    )


def test_signs_are_given_while_the_presence_lasts_and_survive_a_storage_that_is_away() -> None:
    board = Board()
    me = Worker.here("me")
    count = lambda: board.values[SIGN + me.token]["count"]  # noqa: E731
    with Presence(me, board, lease=0.2):
        until = time.monotonic() + 10
        while count() < 2 and time.monotonic() < until:
            time.sleep(0.01)
        put, board.put = board.put, lambda *arguments, at_once: 1 / 0
        time.sleep(0.2)
        board.put, before = put, count()
        while count() <= before and time.monotonic() < until:
            time.sleep(0.01)
        assert count() > before >= 2
    last = count()
    time.sleep(0.2)
    assert count() == last


def _hold(folder: Path, order, name: str) -> None:  # noqa: ANN001
    for _ in range(5):
        with DeviceLock(torch.device("cpu"), folder):
            order.put(("in", name))
            time.sleep(0.02)
            order.put(("out", name))


def test_a_device_is_held_by_one_process_at_a_time_and_freed_by_death(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    order = context.SimpleQueue()
    processes = [context.Process(target=_hold, args=(tmp_path, order, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    events = [order.get() for _ in range(20)]
    for process in processes:
        process.join()
    for entered, left in zip(events[::2], events[1::2], strict=True):
        assert entered == ("in", entered[1]) and left == ("out", entered[1])
    killed = context.Process(target=_die_holding, args=(tmp_path,))
    killed.start()
    killed.join()
    began = time.monotonic()
    with DeviceLock(torch.device("cpu"), tmp_path):
        assert time.monotonic() - began < 5


def _die_holding(folder: Path) -> None:
    with DeviceLock(torch.device("cpu"), folder):
        os.kill(os.getpid(), signal.SIGKILL)
