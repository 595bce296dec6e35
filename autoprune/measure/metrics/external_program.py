"""Runs a program that writes scores, one JSON line an image: without a shell, with a time-out, keeping whatever it wrote."""

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Scores:
    """What a program wrote: by image its score (absent where it gave only parts) and its parts; and lines that were neither."""

    whole: Mapping[str, float]
    parts: Mapping[str, Mapping[str, float]]
    wrong: tuple[str, ...]


def run_program(
    arguments: Sequence[str], output: Path, *, seconds: float, progress: Callable[[int], None] = lambda lines: None
) -> str:
    """Runs a program until it ends or `seconds` have passed; what it started ends with it.

    Calls `progress` with the number of lines whenever that grows. Returns "" for success, else how it ended and the last
    line it printed.
    """
    with (output.parent / "log.txt").open("w+b") as log:
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return f"did not start ({error.strerror})"
        try:
            in_time = _wait(process, output, seconds, progress)
        finally:
            _end(process)
        log.seek(0)
        said = log.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    ended = f"ended with code {process.returncode}" if in_time else f"was stopped after {seconds:g} s"
    return "" if in_time and process.returncode == 0 else f"{ended}, last said {last[:200]!r}"


def read_scores(output: Path, images: Sequence[str]) -> Scores:
    """Reads lines {"image": name, "score": number} and {"image": name, "scores": {part: number}}; a later one adds or replaces.

    A line that is neither, or of no image that was asked for, is wrong; so is one that a crash cut short.
    """
    whole: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {name: {} for name in images}
    wrong = []
    for line in output.read_text(errors="replace").split("\n") if output.exists() else ():
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            found = {name: _number(value) for name, value in document.get("scores", {}).items()}
            score = _number(document["score"]) if "score" in document or not found else None
            parts[document["image"]].update(found)
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong.append(line[:80])
            continue
        if score is not None:
            whole[document["image"]] = score
    return Scores(whole, parts, tuple(wrong))


def _wait(process: subprocess.Popen, output: Path, seconds: float, progress: Callable[[int], None]) -> bool:
    """Returns whether the program ended by itself."""
    lines, deadline = 0, time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        written = output.read_bytes().count(b"\n") if output.exists() else 0
        if written > lines:
            progress(lines := written)
        if process.poll() is not None:
            return True
        if time.monotonic() > deadline:
            return False


def _end(process: subprocess.Popen) -> None:
    """Ends the program and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _number(value: object) -> float:
    """Returns a score. Raises ValueError for what is no finite number."""
    if isinstance(value, str) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)
