"""What a study says of itself to all its workers: what it is of, which run is open, who leads, who is there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from optuna.study import Study

from autoprune.search.presence import Worker
from autoprune.search.storage import PatientStorage

_RUN, _IDENTITY, _LEADER = "run", "identity", "leader"


@dataclass(frozen=True)
class Run:
    """One run of the command over a study, by however many workers. `began` is in seconds of the epoch; `token` is what the
    workers that were started together share, empty where nobody can know."""

    number: int = 0
    is_open: bool = False
    began: float = 0.0
    token: str = ""


class StudyBoard:
    """The user attributes of an Optuna study."""

    def __init__(self, study: Study, storage: PatientStorage) -> None:
        self._study, self._storage = study, storage
        self._attributes: dict[str, object] = {}

    def sync(self) -> None:
        """Reads everything."""
        self._attributes = dict(self._study.user_attrs)

    @property
    def outages(self) -> int:
        """Returns how many calls had to wait for the storage."""
        return self._storage.outages

    @property
    def is_remote(self) -> bool:
        """Returns whether workers may see it whose study folder is another one."""
        return self._storage.patience > 0

    def attributes(self) -> Mapping[str, object]:
        """Returns the user attributes, as of the last `sync`."""
        return self._attributes

    def put(self, key: str, value: object, *, at_once: bool = False) -> None:
        """Sets a user attribute; `at_once` raises where the storage does not answer."""
        storage = self._storage.storage if at_once else self._storage
        storage.set_study_user_attr(self._study._study_id, key, value)
        if not at_once:
            self._attributes[key] = value

    def run(self) -> Run:
        """Returns the current or last run."""
        known = self._attributes.get(_RUN)
        return Run(**known) if isinstance(known, dict) else Run()

    def set_run(self, run: Run) -> None:
        """Opens or closes a run."""
        self.put(_RUN, asdict(run))

    def identity(self) -> dict[str, object] | None:
        """Returns what the study is of, None before its first run."""
        return self._attributes.get(_IDENTITY)

    def set_identity(self, identity: Mapping[str, object]) -> None:
        """Sets what the study is of."""
        self.put(_IDENTITY, dict(identity))

    def leader(self) -> str:
        """Returns the token of the worker that leads or led, empty before the first."""
        return str(self._attributes.get(_LEADER, ""))

    def set_leader(self, worker: Worker) -> None:
        """Says that a worker leads."""
        self.put(_LEADER, worker.token)
