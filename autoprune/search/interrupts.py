"""Ctrl-C, and SIGTERM as cluster schedulers send it: the first lets the running trial finish, a second stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context manager over a study. Outside `finishing` a signal raises KeyboardInterrupt, within it only the second does."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested, self._finishing, self._say = False, False, say
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._before = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """A context that the first signal does not end."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self._finishing or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._say("stopping when this trial is done; Ctrl-C again stops at once.")
