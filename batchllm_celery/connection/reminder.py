"""When somebody who waits should say so."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds of waiting after which a word is due, the first time and then again.
_DUE = (3.0, 60.0, 600.0)


class Reminder:
    """Tells when a word about a wait is due: after 3 s, a minute later, then every ten minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said = 0
        self.since = clock()
        self._next = self.since + _DUE[0]

    @property
    def seconds(self) -> float:
        """How long the wait has lasted."""
        return self._clock() - self.since

    def due(self) -> bool:
        """Whether to say it now; true once for each word."""
        if self._clock() < self._next:
            return False
        self._said = min(self._said + 1, len(_DUE) - 1)
        self._next = self._clock() + _DUE[self._said]
        return True
