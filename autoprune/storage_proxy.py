"""`python -m autoprune.storage_proxy url=postgresql://...`: Optuna's gRPC proxy, for workers that do not reach the server.

It asks nobody who they are and encrypts nothing: listen where only the workers are.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from autoprune.arguments import run_command
from autoprune.errors import UserError

USAGE = "python -m autoprune.storage_proxy url=postgresql://user@host/studies host=localhost port=13000"


@dataclass(frozen=True)
class ProxyChoices:
    """`url` is that of the server, by default AUTOPRUNE_STORAGE_URL; `host` and `port` are where the proxy listens."""

    url: str = ""
    host: str = "localhost"
    port: int = 13000


def main(arguments: Sequence[str]) -> int:
    """Serves until Ctrl-C; returns 0, or 2 after bad input."""
    return run_command(ProxyChoices, arguments, usage=USAGE, command=serve)


def serve(choices: ProxyChoices) -> str:
    """Serves the storage. Raises UserError where it does not answer, or the port is not to be had."""
    missing = [name for name in ("optuna", "grpc", "psycopg") if find_spec(name) is None]
    if missing:
        raise UserError(
            f'the proxy needs {", ".join(missing)}, not installed here; run: pip install "autoprune[search,cluster]"'
        )
    from optuna.storages import run_grpc_proxy_server

    from autoprune.search.settings import StorageSettings
    from autoprune.search.storage import server_storage

    url = choices.url or os.environ.get("AUTOPRUNE_STORAGE_URL")
    storage = server_storage(StorageSettings("postgresql", url))
    print(f"serving on grpc://{choices.host}:{choices.port}; Ctrl-C ends it.", file=sys.stderr)
    try:
        run_grpc_proxy_server(storage, host=choices.host, port=choices.port)
    except RuntimeError as error:
        raise UserError(f"port {choices.port} of {choices.host} must be free ({error}); set port to another.") from None
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
