"""Names the code that keeps an event loop from running."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from types import FrameType

from batchllm_celery.events import Events, LoopBlocked

logger = logging.getLogger("batchllm_celery")

#: Listeners of `LoopBlocked`, whoever runs the watchdog.
events = Events()

_STACK_DEPTH = 12


class Watchdog:
    """A thread that asks the loop for a sign of life and logs the loop's stack if none comes.

    Args:
        loop: a running loop.
        threshold: seconds without a sign of life after which it is reported, once per block.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, threshold: float = 1.0) -> None:
        self.blocked = 0
        """How often the loop was found blocked."""
        self._loop = loop
        self._threshold = threshold
        self._ident: int | None = None
        self._alive = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="batchllm-watchdog", daemon=True)

    @property
    def watching(self) -> bool:
        """Whether the loop has answered once."""
        return self._ident is not None

    def start(self) -> None:
        """Watch, until `stop` or the loop's end."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns at once."""
        self._stopped.set()
        self._alive.set()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            if not self._ask():
                return
            asked = time.monotonic()
            if not self._alive.wait(self._threshold):
                self._report(time.monotonic() - asked)
                self._alive.wait()
            self._stopped.wait(self._threshold / 4)

    def _ask(self) -> bool:
        self._alive.clear()
        try:
            self._loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _answer(self) -> None:
        self._ident = threading.get_ident()
        self._alive.set()

    def _report(self, seconds: float) -> None:
        if self._stopped.is_set() or seconds > 2 * self._threshold:
            return  # this thread too was held up: the whole process stood still
        frame = sys._current_frames().get(self._ident or 0)
        stack = _innermost(frame)
        self.blocked += 1
        logger.warning("loop.blocked seconds=%.1f stack=\n%s", seconds, stack)
        events.emit(LoopBlocked(seconds, stack))


def _innermost(frame: FrameType | None) -> str:
    """The last calls of a stack, innermost last; places and source lines only, never values."""
    if frame is None:
        return ""
    return "".join(traceback.format_list(traceback.extract_stack(frame)[-_STACK_DEPTH:]))
