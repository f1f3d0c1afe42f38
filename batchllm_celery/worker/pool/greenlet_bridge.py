"""Synchronous code that awaits: a call runs in a greenlet, and its coroutines are stepped there.

    asyncio.Task ── drives ──> greenlet: Celery's tracer -> task body -> event_loop.run(coroutine)
         ▲                                                                     │ coro.send
         └── waits for <──────────── only the future that it waits for ────────┘

Celery keys its task and request stacks by greenlet. The coroutine runs in the very greenlet of
its tracer, so `self.request` and `current_task` are right in each of thousands of interleaved
coroutines. It also has a real `asyncio.Task` and a `contextvars.Context` of its own, so that
`asyncio.timeout`, `TaskGroup`, `gather` and context variables behave as everywhere.

What a coroutine starts with `gather` or `create_task` runs outside of this greenlet, as threads
started by a task would: it has the context variables, but no `self.request`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from celery.exceptions import SoftTimeLimitExceeded
from greenlet import getcurrent, greenlet

T = TypeVar("T")


class _SoftTimeLimit(SoftTimeLimitExceeded, asyncio.CancelledError):
    """A soft time limit on its way through a coroutine.

    It is a cancellation too, because asyncio's own code (a TaskGroup that waits for its tasks)
    cleans up for nothing else.
    """


class BridgedCall:
    """One synchronous call on the loop, whose awaits suspend nothing but itself.

    Args:
        function: what to call; must not raise.
        on_end: called on the loop's thread when the call is over, also if it never began.

    All methods belong to the loop's thread.
    """

    __slots__ = ("_begun", "_function", "_on_end", "_soft_limit", "_task", "cancelled", "ended")

    def __init__(self, function: Callable[[], object], on_end: Callable[[], object]) -> None:
        self._function = function
        self._on_end = on_end
        self._soft_limit: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self.cancelled = False
        self.ended = False

    def start(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        """Begin in the loop's next turn, with `context` as the call's own."""
        self._task = loop.create_task(self._main(context), context=context)

    def cancel(self) -> None:
        """Raise CancelledError in the coroutine (or don't begin at all); none once it has ended."""
        if self.ended:
            return
        self.cancelled = True
        self._interrupt()

    def limit(self, seconds: float) -> None:
        """Raise SoftTimeLimitExceeded in the coroutine."""
        self._soft_limit = seconds
        self._interrupt()

    def error_for(self, error: BaseException) -> BaseException:
        """What the coroutine gets for what asyncio threw at its task."""
        if self._soft_limit is None or self.cancelled:
            return error
        if not isinstance(error, asyncio.CancelledError):
            return error
        seconds, self._soft_limit = self._soft_limit, None
        if self._task is not None:
            self._task.uncancel()  # it may clean up under an asyncio.timeout of its own
        return _SoftTimeLimit(seconds)

    def _interrupt(self) -> None:
        # A task cancelled before its first step would never run its coroutine, nor `on_end`.
        if self._task is not None and self._begun:
            self._task.cancel()

    async def _main(self, context: contextvars.Context) -> None:
        self._begun = True
        try:
            if not self.cancelled:
                await _drive(_CallGreenlet(self, self._function, context))
        finally:
            self.ended = True
            on_end = self._on_end
            # Their owner refers to this call: without the cycle, its memory is free at once.
            self._function = self._on_end = _nothing
            self._task = None
            on_end()


def _nothing() -> None:
    """Stands where a call's functions were."""


class _CallGreenlet(greenlet):
    """The greenlet of one call; its parent is the loop's."""

    def __init__(
        self, call: BridgedCall, function: Callable[[], object], context: contextvars.Context
    ) -> None:
        super().__init__(function)
        self.call = call
        # The very context that its asyncio.Task enters for every step, not a copy of it.
        self.gr_context = context

    def step(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run `coro` in here; hand up to the loop only the futures that it waits for."""
        wait = self.parent.switch  # type: ignore[union-attr]  # a running one has a parent
        try:
            awaited = coro.send(None)
            while True:
                try:
                    # The future passes as it is: its `_asyncio_future_blocking` mark, set by
                    # its __await__, must reach the asyncio.Task.
                    wait(awaited)
                except BaseException as error:
                    awaited = coro.throw(error)
                else:
                    awaited = coro.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result


@types.coroutine
def _drive(child: _CallGreenlet) -> Generator[Any, None, None]:
    """Pass what the greenlet waits for up to the asyncio.Task, and what comes of it down again."""
    awaited = child.switch()
    while not child.dead:
        try:
            yield awaited
        except GeneratorExit:  # the loop is gone: nobody could resume the greenlet
            raise
        except BaseException as error:
            awaited = child.throw(child.call.error_for(error))
        else:
            awaited = child.switch()


def run_in_greenlet(coro: Coroutine[Any, Any, T]) -> T:
    """Run `coro` to its end inside the current greenlet: the pool's `event_loop` bridge.

    Raises:
        SoftTimeLimitExceeded: the call's soft time limit interrupted it.
        asyncio.CancelledError: the call was cancelled (revoked, hard time limit, shutdown).
        concurrent.futures.CancelledError: the coroutine was cancelled by its own doing.
        RuntimeError: nobody in between could be suspended: await the coroutine instead.
    """
    current = getcurrent()
    if not isinstance(current, _CallGreenlet):
        coro.close()
        raise RuntimeError("event_loop.run would block its own loop: await the coroutine instead")
    try:
        return current.step(coro)
    except _SoftTimeLimit as limit:
        raise SoftTimeLimitExceeded(*limit.args) from None
    except asyncio.CancelledError as error:
        if current.call.cancelled:
            raise
        # Celery takes a BaseException for a lost worker; this is an ordinary failure.
        raise concurrent.futures.CancelledError(*error.args) from error
