"""Where the trials of a study live (Optuna storages), and how long a server that is gone is waited for."""

import abc
import logging
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage, get_storage
from sqlalchemy.exc import IntegrityError, ProgrammingError

from autoprune.errors import UserError
from autoprune.search.journal_file import open_journal
from autoprune.search.settings import StorageSettings

_LOG = logging.getLogger("autoprune")
JOURNAL_FILE = "study.journal"
GRPC_PORT = 13000  # Optuna's
CONNECT_SECONDS = 5
PAUSES = (0.2, 0.5, 1.0, 2.0)  # seconds before the next try, the last one again and again
SHORTAGES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN")  # UNKNOWN: the proxy answers, the server behind it does not


def open_storage(settings: StorageSettings, folder: Path) -> "PatientStorage":
    """Returns the storage, connected. Raises UserError where it does not answer, or what it needs is not installed."""
    if settings.name == "journal":
        return PatientStorage(open_journal(folder / JOURNAL_FILE), patience=0)
    return PatientStorage(server_storage(settings), patience=60 * settings.patience)


def server_storage(settings: StorageSettings) -> BaseStorage:
    """Returns the storage of a server, connected. Raises UserError as `open_storage`."""
    try:
        return _connected(settings)
    except ImportError as error:
        raise UserError(f'storage {settings.name} needs {error.name}; run: pip install "autoprune[cluster]"') from None
    except Exception as error:
        if not is_outage(error):
            raise
        raise UserError(
            f"storage {shown(settings)} must answer ({_reason(error)}); start it, or set storage.url to another."
        ) from None


def shown(settings: StorageSettings) -> str:
    """Returns the address of a storage without its password, for logs and reports."""
    if settings.url is None:
        return settings.name
    parts = urlsplit(settings.url)
    return settings.url.replace(f":{parts.password}@", ":***@") if parts.password else settings.url


def is_outage(error: BaseException | None) -> bool:
    """Returns whether an error, or what is behind it, says that a server does not answer, not that it was asked wrongly."""
    while error is not None:
        code = getattr(error, "code", None)
        if callable(code) and getattr(code(), "name", "") in SHORTAGES:
            return True
        if isinstance(error, ConnectionError):
            return True
        if type(error).__module__.startswith("sqlalchemy") and type(error).__name__ in ("OperationalError", "InterfaceError"):
            return True
        error = error.__cause__ or error.__context__
    return False


class PatientStorage(BaseStorage):
    """Passes every call on to `storage`; while its server does not answer, waits up to `patience` seconds and tries again.

    A call that was answered by nothing may have been carried out. Trying again is then harmless but for a trial created twice:
    nobody holds the first, and it is given up like that of a dead worker. `outages` counts the calls that had to wait,
    `seconds` are those spent in calls.
    Raises UserError when patience ends.
    """

    def __init__(self, storage: BaseStorage, *, patience: float) -> None:
        self.storage, self.patience, self._lock = storage, patience, threading.Lock()
        self.outages, self.seconds = 0, 0.0

    def _call(self, call: Callable[[], object]) -> object:
        began, tries = time.monotonic(), 0
        while True:
            try:
                answer = call()
            except UpdateFinishedTrialError:
                if not tries:
                    raise
                answer = True  # what was tried again had been carried out
            except Exception as error:
                if not is_outage(error):
                    raise
                self._wait(error, tries, time.monotonic() - began)
                tries += 1
                continue
            if tries:
                _LOG.warning("storage: it answers again after %.0f s.", time.monotonic() - began)
            return answer

    def _wait(self, error: Exception, tries: int, waited: float) -> None:
        with self._lock:
            self.outages += 1
        if waited >= self.patience:
            raise UserError(
                f"the storage has not answered for {waited / 60:.1f} minutes ({_reason(error)}); what was finished is kept: "
                "start it and run the same command again."
            ) from None
        if not tries:
            _LOG.warning("storage: no answer (%s); waiting up to %.0f minutes.", _reason(error), self.patience / 60)
        time.sleep(PAUSES[min(tries, len(PAUSES) - 1)])


def _passed_on(name: str) -> Callable[..., object]:
    def method(self: PatientStorage, *args: object, **kwargs: object) -> object:
        began = time.perf_counter()
        try:
            return self._call(lambda: getattr(self.storage, name)(*args, **kwargs))
        finally:
            self.seconds += time.perf_counter() - began

    method.__name__ = name
    return method


for _name in (name for name, member in vars(BaseStorage).items() if callable(member) and not name.startswith("_")):
    setattr(PatientStorage, _name, _passed_on(_name))
abc.update_abstractmethods(PatientStorage)


def _connected(settings: StorageSettings) -> BaseStorage:
    if settings.name == "grpc":
        address = urlsplit(settings.url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = GrpcStorageProxy(host=address.hostname or "localhost", port=address.port or GRPC_PORT)
        proxy.wait_server_ready(timeout=CONNECT_SECONDS)
        return proxy
    url = (
        settings.url if settings.url.startswith("postgresql+") else settings.url.replace("postgresql", "postgresql+psycopg", 1)
    )
    options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
    for pause in PAUSES:
        try:
            return get_storage(RDBStorage(url, engine_kwargs=options))
        except (IntegrityError, ProgrammingError):  # another worker creates the tables
            time.sleep(pause)
    return get_storage(RDBStorage(url, engine_kwargs=options))


def _reason(error: BaseException) -> str:
    """Returns the first line of the error that is deepest behind this one."""
    while error.__cause__ is not None and isinstance(error, StorageInternalError):
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
