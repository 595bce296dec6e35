"""A PostgreSQL server of the machine's own binaries, on a free port and in a folder of its own."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class PostgresServer:
    """`url` is its address; it can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._programs, self._data, self._folder = _programs(), folder / "data", folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"postgresql://autoprune@127.0.0.1:{self._port}/postgres"
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(folder, "postgres")
        self._run("initdb", "-A", "trust", "-U", "autoprune")

    def start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*user, str(self._programs / program), "-D", str(self._data), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._folder, timeout=120)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server; skips the test on a machine without PostgreSQL."""
    if _programs() is None:
        pytest.skip("no PostgreSQL here")
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short: the path of a socket has a limit
        server = PostgresServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _programs() -> Path | None:
    """Returns the folder of initdb and pg_ctl, which Debian keeps off PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None
