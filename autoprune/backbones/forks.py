"""Forked processes: a fork copies one thread of a process, so what other threads were to do never gets done.

OpenMP keeps a team of helpers for every thread that computed; in the child those of the forking thread are gone, and torch
waits for them forever. With one thread of torch, and in threads that the child starts itself, nothing is missing.
"""

import os
import threading

import torch

from autoprune.errors import UserError

_home: int | None = None


def check_process() -> None:
    """Notes the first process that calls it. Raises UserError in one forked from it where torch would wait forever."""
    global _home
    process = os.getpid()
    _home = _home or process
    if process != _home and torch.get_num_threads() > 1 and threading.current_thread() is threading.main_thread():
        raise UserError(
            f"a forked process must compute on one thread, torch would wait for {torch.get_num_threads()} forever; "
            "call torch.set_num_threads(1) in it, or start processes by spawn."
        )


class ForkSafeLock:
    """A lock that a forked process finds open, whoever held it when it was forked."""

    def __init__(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._lock, self._process = threading.Lock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
