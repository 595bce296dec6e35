"""Reads a policy file that anybody may have written or damaged: within limits, every field of its type, or one sentence.

Standard library only, and nothing but JSON: a file can hold no code.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import TypeVar, get_args, get_origin

from autoprune.errors import UserError

MOST_BYTES = 2**18  # published files have 3 kB; parsed, the worst that fits takes a few times as much memory
MOST_LEVELS, MOST_DIGITS = 24, 40
MOST_WORDS = 400  # characters of a sentence: a damaged file may hold names of any length
NUMBERS = ("speed_up", "loss", "score_drop", "latency", "dense_latency", "planned_memory_mb")  # that are shown, of `measured`
INTERVALS = ("speed_up_interval", "loss_interval", "score_drop_interval")
_Made = TypeVar("_Made")


def read_text(path: str | os.PathLike) -> str:
    """Returns the text of a policy file. Raises UserError when it cannot be read or is far too long for one."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MOST_BYTES + 1).decode()
    except (OSError, ValueError) as error:
        reason = error.__class__.__name__
        raise UserError(f"policy file {os.fspath(path)!r} cannot be read ({reason}); check the path.") from None


def read_object(text: str, source: str) -> dict[str, object] | str:
    """Returns the JSON object in a text, or, where it holds something else, the name of its type.

    Raises UserError for what is too long or deep, not JSON, not Unicode, or names a field twice.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{source} must have at most {MOST_BYTES} bytes to be a policy file; check the path.")
    try:
        document = json.loads(text, object_pairs_hook=_once, parse_int=_whole)
        text.encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not complete JSON (line {error.lineno}); copy the file again.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(sentence(f"{source} is not the JSON of a policy ({error}); copy the file again.")) from None
    _check_shape(document, source)
    return document if isinstance(document, dict) else type(document).__name__


def made(kind: type[_Made], entry: object) -> _Made:
    """Returns a frozen dataclass from JSON values, lists as tuples. Raises TypeError for a field of another type."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"{kind.__name__} must be an object, got {type(entry).__name__}")
    for place in fields(kind):
        if place.name in entry and not fits(entry[place.name], place.type):
            raise TypeError(f"{place.name} must be {_words(place.type)}, got {json.dumps(entry[place.name], default=str)[:60]}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


def fits(value: object, kind: object) -> bool:
    """Returns whether a value is of a type as it is annotated; numbers must be finite, a bool is none."""
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        length = len(value) if isinstance(value, list | tuple) else -1
        wanted = parts[:1] * length if parts[-1] is Ellipsis else parts
        return length == len(wanted) and all(map(fits, value, wanted))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(key, parts[0]) and fits(value[key], parts[1]) for key in value)
    if kind in (int, float):
        return _is_number(value) and (kind is float or isinstance(value, int)) and math.isfinite(value)
    return isinstance(value, kind)


def check_measured(measured: Mapping[str, object]) -> None:
    """Raises TypeError for measurements that could not be shown."""
    for name in NUMBERS:
        if not _is_number(measured.get(name, 0.0)) and measured[name] is not None:
            raise TypeError(f"measured {name} must be a number, got {json.dumps(measured[name])[:60]}")
    for name in INTERVALS:
        value = measured.get(name)
        if value is not None and not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))):
            raise TypeError(f"measured {name} must be two numbers, got {json.dumps(value)[:60]}")
    if (measured.get("latency") is None) != (measured.get("dense_latency") is None):
        raise TypeError("measured latency and dense_latency must both be there or neither")


def scale_index(key: str) -> int:
    """Returns the number of a scale; `3` is one, ` 3` or `03` is none. Raises ValueError."""
    if not key.isascii() or not key.isdigit() or str(int(key)) != key:
        raise ValueError(f"scales must be named by numbers, got {key[:40]!r}")
    return int(key)


def sentence(text: str) -> str:
    """Returns a text in one line of readable length."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_WORDS else f"{line[: MOST_WORDS - 60]} ... {line[-50:]}"


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns the fields of an object. Raises ValueError where one is named twice: readers differ in which they take."""
    found: dict[str, object] = {}
    for name, value in pairs:
        name.encode()
        if name in found:
            raise ValueError(f"field {name[:40]!r} is there twice")
        found[name] = value
    return found


def _whole(digits: str) -> int:
    """Returns an integer. Raises ValueError for one that no float is near to."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _check_shape(document: object, source: str) -> None:
    """Goes down level by level: no deeper than MOST_LEVELS, and no text that cannot be written."""
    level = [document]
    for _ in range(MOST_LEVELS):
        if any(isinstance(each, str) and not _is_unicode(each) for each in level):
            raise UserError(f"{source} holds text that is no Unicode; copy the file again.")
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else _items(each))]
        if not level:
            return
    raise UserError(f"{source} must nest at most {MOST_LEVELS} levels deep; use the exported file.")


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _is_unicode(text: str) -> bool:
    """Returns whether a text can be written: JSON may hold half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("collections.abc.", "")
