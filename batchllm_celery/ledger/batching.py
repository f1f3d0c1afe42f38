"""Many awaiting callers, one round trip."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

#: Seconds; a flush that takes longer had a slow link under it.
SLOW = 0.005

T = TypeVar("T")
R = TypeVar("R")


class Coalescer(Generic[T, R]):
    """Gathers the items of many callers and flushes them together.

    The first item goes at once, with all that are asked for in the same tick of the loop; those
    that arrive while a flush is under way, or within `gap` of its start, go with the next one. So
    an idle process waits for nothing, and a busy one makes few, large calls.

    Args:
        flush: takes the items, gives one answer for each in the same order; an exception among
            the answers is raised to that item's caller, a raised one to all callers of the flush.
        max_batch: items in one flush at most.
        concurrency: flushes under way at the same time at most.
        gap: seconds between the starts of two flushes at least, unless one is full.
        group: while flushes are quick (under 5 ms), one takes no more than so many, or a quarter of
            those that wait; with so many it is full. Of a crowd that came together the first go on
            while the others are served; as a whole it would stay together, whatever it does next.
    """

    def __init__(
        self,
        flush: Callable[[list[T]], Awaitable[Sequence[R | BaseException]]],
        *,
        max_batch: int = 500,
        concurrency: int = 1,
        gap: float = 0.0,
        group: int | None = None,
    ) -> None:
        self._flush = flush
        self._max_batch = max_batch
        self._concurrency = concurrency
        self._gap = gap
        self._group = max_batch if group is None else group
        self._quickest = 0.0
        self._full = self._group
        """Items with which a flush is full."""
        self._started = -math.inf
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._flushes: set[asyncio.Task[None]] = set()
        self._scheduled = False

    def submit(self, item: T) -> asyncio.Future[R]:
        """The future answer to `item`.

        Cancelled while it waits, the item is dropped; cancelled while its flush is under way, the
        flush goes on for the others and this answer is lost.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, answer))
        self._schedule(loop)
        return answer

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._scheduled or len(self._flushes) >= self._concurrency:
            return
        self._scheduled = True
        early = self._started + self._gap - loop.time()
        if early > 0 and len(self._waiting) < self._full:
            loop.call_later(early, self._start, loop)
        else:
            loop.call_soon(self._start, loop)  # after everything else of this tick has asked

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        self._started = loop.time()
        while self._waiting and len(self._flushes) < self._concurrency:
            batch: list[tuple[T, asyncio.Future[R]]] = []
            most = min(max(self._full, len(self._waiting) // 4), self._max_batch)
            while self._waiting and len(batch) < most:
                item, answer = self._waiting.popleft()
                if not answer.done():  # else its caller was cancelled
                    batch.append((item, answer))
            if batch:
                task = loop.create_task(self._run(batch))
                self._flushes.add(task)
                task.add_done_callback(self._finished)

    async def _run(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        began = time.monotonic()
        try:
            replies = await self._flush([item for item, _ in batch])
            # The quickest of late: a long one among them was this process' own doing.
            took = time.monotonic() - began
            self._quickest = min(took, self._quickest * 1.25 + 0.0005)
            # On a slow link everybody would wait for the round trips of all groups before.
            self._full = self._group if self._quickest < SLOW else self._max_batch
            pairs = list(zip(batch, replies, strict=True))
        except asyncio.CancelledError:
            for _, answer in batch:
                answer.cancel()
            raise
        except BaseException as error:
            for _, answer in batch:
                _settle(answer, error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, answer), reply in pairs:
            _settle(answer, reply)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._flushes.discard(task)
        if self._waiting:
            self._schedule(task.get_loop())


def _settle(answer: asyncio.Future[R], reply: R | BaseException) -> None:
    if answer.done():
        return
    if isinstance(reply, BaseException):
        answer.set_exception(reply)
        answer.exception()  # seen: a caller cancelled just now must not leave a warning behind
    else:
        answer.set_result(reply)
