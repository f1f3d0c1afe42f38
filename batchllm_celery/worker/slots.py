"""How many items a process has in flight, and which waiting one goes next."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count


class Slots:
    """A semaphore that serves the highest priority first, and first come first served within one.

    Args:
        limit: how many may hold a slot at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._order = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)

    async def take(self, priority: int = 0) -> None:
        """Wait for a slot, urgent ones first; `give` it back."""
        if self.used < self.limit and not self._waiting:
            self.used += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # given to us in the same moment
                self.give()
            raise

    def give(self) -> None:
        """Give a slot to the next one that waits."""
        self.used -= 1
        while self._waiting and self.used < self.limit:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self.used += 1
                turn.set_result(None)
