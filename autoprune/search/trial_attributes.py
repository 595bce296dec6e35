"""What a trial carries in the storage besides its vector: where it came from, who holds it, and its whole record."""

from optuna.trial import FrozenTrial, Trial

from autoprune.policy import Policy
from autoprune.search.records import Measurement, TrialRecord

RECORD, SOURCE, FIRST, POLICY = "record", "source", "first", "policy"
WORKER, ATTEMPT, RETRY_OF = "worker", "attempt", "retry_of"


def source_of(trial: FrozenTrial | Trial) -> str:
    """Returns where a trial came from."""
    return trial.user_attrs.get(SOURCE, "sampler")


def plain_record(record: TrialRecord) -> dict[str, object]:
    """Returns a record as JSON values."""
    plain = {name: value for name, value in vars(record).items() if name not in ("policy", "measurement")}
    measurement = record.measurement and record.measurement.to_plain()
    return plain | {"policy": record.policy.to_json(), "measurement": measurement}


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Reads the record of a finished trial."""
    plain = dict(trial.user_attrs[RECORD])
    measurement = plain.pop("measurement")
    policy = Policy.from_json(plain.pop("policy"), source=f"trial {trial.number}")
    return TrialRecord(policy=policy, measurement=measurement and Measurement.from_plain(measurement), **plain)


def first_of(trial: FrozenTrial) -> Measurement | None:
    """Reads the measurement of a trial's first batch, None where there is none."""
    plain = trial.user_attrs.get(FIRST)
    return plain and Measurement.from_plain(plain)
