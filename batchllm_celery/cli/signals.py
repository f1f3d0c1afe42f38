"""Signals that end a command are counted; the command decides what each one means."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP instead of ending the process."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1  # no lock and no output: a handler may interrupt any line

    @contextlib.contextmanager
    def counted(self) -> Iterator[Interrupts]:
        """Count signals inside the `with` block; restore the handlers after it."""
        before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
