"""`key=value` command lines read into a frozen dataclass, for the commands that must run without Hydra."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TypeVar

from autoprune.errors import UserError, unknown_name

Choices = TypeVar("Choices")


@dataclass(frozen=True)
class Answer:
    """What a command prints and the code it exits with; a command that returns its text alone exits with 0."""

    text: str
    code: int = 0


def run_command(
    kind: type[Choices], arguments: Sequence[str], *, usage: str, command: Callable[[Choices], str | Answer]
) -> int:
    """Prints what `command` makes of the arguments; returns its code, 2 after bad input (one sentence), 130 after Ctrl-C."""
    try:
        answer = command(read_arguments(kind, arguments, usage=usage))
    except UserError as error:
        print(f"autoprune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    answer = answer if isinstance(answer, Answer) else Answer(answer)
    print(answer.text)
    return answer.code


def read_arguments(kind: type[Choices], arguments: Sequence[str], *, usage: str) -> Choices:
    """Returns a `kind` filled from arguments such as `seed=3`; fields without a default must be given.

    Raises UserError for an unknown key, a missing one or a bad number; `usage` is an example to show.
    """
    known = {field.name: field for field in fields(kind)}
    values: dict[str, object] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"arguments are written key=value, got {argument!r}; for example {usage}.")
        if key not in known:
            raise unknown_name("argument", key, known)
        values[key] = _converted(known[key].type, key, value)
    missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; for example {usage}.")
    return kind(**values)


def _converted(kind: object, key: str, value: str) -> object:
    if kind in (int, int | None):
        if not value.lstrip("-").isdigit():
            raise UserError(f"{key} must be a whole number, got {value!r}.")
        return int(value)
    if kind in (float, float | None):
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{key} must be a number, got {value!r}.") from None
    return value
