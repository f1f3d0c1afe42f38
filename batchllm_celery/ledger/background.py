"""Work that goes on when whoever asked for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

#: Longest wait of `close` for work under way, in seconds.
CLOSE_SECONDS = 5.0


class BackgroundWork:
    """Tasks and futures of the ledger that outlive their callers until `close`."""

    def __init__(self) -> None:
        self.under_way: set[asyncio.Future[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine to its end."""
        task: asyncio.Task[T] = asyncio.get_running_loop().create_task(work)
        self.keep(task)
        return task

    def keep(self, work: asyncio.Future[Any]) -> None:
        """Let `close` wait for `work`."""
        self.under_way.add(work)
        work.add_done_callback(self.under_way.discard)

    async def close(self) -> None:
        """Wait for what is under way, 5 seconds at most, then cancel it."""
        if self.under_way:
            await asyncio.wait(self.under_way, timeout=CLOSE_SECONDS)
        for work in self.under_way:
            work.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)
