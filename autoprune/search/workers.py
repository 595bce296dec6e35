"""`workers=N`: this command N times on one machine, each process on a GPU of its own; the dead are started again."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from autoprune.errors import UserError
from autoprune.search.crew import SUPERVISED, TERMINAL, visible_gpus

MOST_RESTARTS = 3  # of one worker
POLL_SECONDS = 0.2
INTERRUPTED, REFUSED = 130, 2
LOGS = "workers"


def log_file(folder: Path, name: str) -> Path:
    """Returns where a worker of a study writes its log."""
    return folder / LOGS / f"{name}.log"


def run_workers(count: int, arguments: Sequence[str], *, folder: Path, on_gpus: bool) -> None:
    """Starts `count` processes of `python -m autoprune` with these arguments and waits for them.

    Their standard errors go to `folder`/workers/, all but the progress of the one that leads. Signals are passed on. Raises
    UserError where there are fewer GPUs, and where a worker refused to work, with its sentence. Workers that share a CPU
    take turns: what is measured there is measured alone.
    """
    devices = _gpus(count) if on_gpus else [None] * count
    token = secrets.token_hex(6)
    workers = [_Process(rank, token, device, arguments, folder) for rank, device in enumerate(devices)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            worker.signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for worker in workers:
            worker.start()
        while any([worker.is_at_work() for worker in workers]):
            time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _judge(workers)


class _Process:
    """One worker: a process that is started again when it dies, unless it was told to stop."""

    def __init__(self, rank: int, token: str, device: str | None, arguments: Sequence[str], folder: Path) -> None:
        self.rank, self.log, self.code, self._restarts = rank, log_file(folder, f"worker-{rank}"), None, 0
        self._command = [sys.executable, "-m", "autoprune", *arguments]
        self._environment = {**os.environ, SUPERVISED: f"{rank}/{token}/{os.getpid()}", TERMINAL: str(sys.stderr.fileno())}
        if device is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = device

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stderr=log, pass_fds=[sys.stderr.fileno()], start_new_session=True
            )

    def signal(self, number: int) -> None:
        if self.code is None and self._process.poll() is None:
            self._process.send_signal(number)

    def is_at_work(self) -> bool:
        """Returns whether it has not ended for good, starting it again if need be."""
        if self.code is not None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        if code in (0, INTERRUPTED, REFUSED) or self._restarts >= MOST_RESTARTS:
            self.code = code
            return False
        self._restarts += 1
        again = f"started again ({self._restarts} of {MOST_RESTARTS})"
        print(f"autoprune: worker-{self.rank} {_cause(code)} and is {again}; see {self.log}", file=sys.stderr)
        self.start()
        return True


def _judge(workers: Sequence[_Process]) -> None:
    """Raises unless a worker came to the end: it took over what the others left behind."""
    codes = [worker.code for worker in workers]
    if 0 in codes:
        return
    if INTERRUPTED in codes:
        raise KeyboardInterrupt
    for worker in workers:
        if worker.code == REFUSED:
            raise UserError(worker.log.read_text().strip().splitlines()[-1].removeprefix("autoprune: "))
    raise UserError(
        f"all {len(workers)} workers ended with an error (the first {_cause(codes[0])}); read {workers[0].log.parent}, and "
        "run the same command again to go on."
    )


def _gpus(count: int) -> list[str]:
    visible = visible_gpus(os.environ)
    if count > len(visible):
        raise UserError(f"workers must be at most the number of visible GPUs, {len(visible)}, got {count}.")
    return visible[:count]


def _cause(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
