"""One implementation under a blocking and an awaitable surface.

What a producer does is written once, as coroutines that await nothing but steps:

    coroutine ── step ──> a blocking driver performs it: on the loop thread, by sleeping, ...
              └─ step ──> an async driver awaits the same without blocking its caller's loop

The coroutine itself runs in the caller's thread, and there it reads the caller's rows.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sys
import threading
import time
import warnings
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterator,
)
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from batchllm_celery import event_loop

T = TypeVar("T")
C = TypeVar("C")
P = ParamSpec("P")

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class BlockingCallWarning(RuntimeWarning):
    """A synchronous method was called on a running event loop, which stands still meanwhile."""


class Step(Generic[T]):
    """One thing that takes time, performed in either way."""

    def block(self) -> T:
        """Perform it while the calling thread waits."""
        raise NotImplementedError

    async def wait(self) -> T:
        """Perform it while the calling loop goes on."""
        raise NotImplementedError

    def __await__(self) -> Generator[Step[T], Any, T]:
        result: T = yield self
        return result


class OnLoop(Step[T]):
    """A coroutine function that runs on the process's loop thread, where the connections are."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work

    def block(self) -> T:
        return event_loop.run(self._work())

    async def wait(self) -> T:
        return await event_loop.run_async(self._work())


class Blocking(Step[T]):
    """A function that blocks: in the caller's thread, or in one of its own."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function

    def block(self) -> T:
        return self._function()

    async def wait(self) -> T:
        return await asyncio.to_thread(self._function)


class Sleep(Step[None]):
    """Seconds that pass."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def block(self) -> None:
        time.sleep(self._seconds)

    async def wait(self) -> None:
        await asyncio.sleep(self._seconds)


class NextRows(Step[list[T]]):
    """Up to `size` rows, fewer when they come slowly; none at the end."""

    def __init__(self, rows: Iterator[T] | AsyncIterator[T], size: int, seconds: float) -> None:
        self._rows = rows
        self._size = size
        self._seconds = seconds

    def block(self) -> list[T]:
        found: list[T] = []
        give_up = time.monotonic() + self._seconds
        for row in cast("Iterator[T]", self._rows):
            found.append(row)
            if len(found) >= self._size or time.monotonic() >= give_up:
                break
        return found

    async def wait(self) -> list[T]:
        if not isinstance(self._rows, AsyncIterable):
            return self.block()
        found: list[T] = []
        give_up = time.monotonic() + self._seconds
        async for row in self._rows:
            found.append(row)
            if len(found) >= self._size or time.monotonic() >= give_up:
                break
        return found


class Beside(Step["Running"]):
    """Starts a coroutine of steps beside the caller: in a thread, or as a task."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, object]], name: str) -> None:
        self._work = work
        self._name = name

    def block(self) -> Running:
        return _Thread(self._work, self._name)

    async def wait(self) -> Running:
        return _Task(self._work, self._name)


class Running:
    """What `Beside` started."""

    def is_over(self) -> bool:
        raise NotImplementedError

    def joined(self) -> Step[BaseException | None]:
        """Waits for its end; what it raised."""
        raise NotImplementedError


class _Thread(Running):
    def __init__(self, work: Callable[[], Coroutine[Any, Any, object]], name: str) -> None:
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            block(self._work())
        except BaseException as error:
            self._error = error

    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def joined(self) -> Step[BaseException | None]:
        def join() -> BaseException | None:
            self._thread.join()
            return self._error

        return Blocking(join)


class _Task(Running):
    def __init__(self, work: Callable[[], Coroutine[Any, Any, object]], name: str) -> None:
        self._task = asyncio.ensure_future(wait(work()))
        self._task.set_name(name)

    def is_over(self) -> bool:
        return self._task.done()

    def joined(self) -> Step[BaseException | None]:
        task = self._task

        class Join(Step[BaseException | None]):
            async def wait(self) -> BaseException | None:
                await asyncio.wait([task])
                if task.cancelled():
                    return asyncio.CancelledError()
                return task.exception()

        return Join()


def block(work: Coroutine[Any, Any, T]) -> T:
    """Perform a coroutine of steps while the calling thread waits."""
    try:
        step = work.send(None)
        while True:
            try:
                value = step.block()
            except BaseException as error:
                step = work.throw(error)
            else:
                step = work.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        work.close()


async def wait(work: Coroutine[Any, Any, T]) -> T:
    """Perform a coroutine of steps while the calling loop goes on."""
    try:
        step = work.send(None)
        while True:
            try:
                value = await step.wait()
            except BaseException as error:
                step = work.throw(error)
            else:
                step = work.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        work.close()


def iterate(steps: AsyncGenerator[T, None]) -> Iterator[T]:
    """An async generator of steps as a plain one."""
    try:
        while True:
            try:
                yield block(_next(steps))
            except StopAsyncIteration:
                return
    finally:
        block(_close(steps))


async def aiterate(steps: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """An async generator of steps for the caller's loop."""
    try:
        while True:
            try:
                value = await wait(_next(steps))
            except StopAsyncIteration:
                return
            yield value
    finally:
        await wait(_close(steps))


async def _next(steps: AsyncGenerator[T, None]) -> T:
    return await anext(steps)


async def _close(steps: AsyncGenerator[Any, None]) -> None:
    await steps.aclose()


def blocking(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[C, P], T]:
    """A blocking method of a method that is made of steps; name, signature and help stay."""

    @functools.wraps(method)
    def call(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        warn_on_loop(call.__name__)
        return block(method(self, *args, **kwargs))

    _name_as(call, method)
    return call


def awaitable(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[C, P], Coroutine[Any, Any, T]]:
    """The same as a coroutine method."""

    @functools.wraps(method)
    async def call(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await wait(method(self, *args, **kwargs))

    _name_as(call, method)
    return call


def _name_as(call: Any, method: Any) -> None:
    for name in ("__name__", "__qualname__"):
        setattr(call, name, getattr(method, name).replace("._", ".").removeprefix("_"))
    call.__signature__ = inspect.signature(method)


def warn_on_loop(name: str, instead: str = "") -> None:
    """Warn of a blocking call on a running event loop, with the line that makes it.

    Not where nothing else would stand still: on our own loop (a Celery task in a greenlet of the
    asyncio pool), and in a notebook, whose cells run one after the other.
    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return
    if running is event_loop.current() or "ipykernel" in sys.modules:
        return
    instead = instead or f"AsyncProducer, or await asyncio.to_thread(...{name}, ...)"
    warnings.warn(
        f"{name}() blocks the running event loop: use {instead}",
        BlockingCallWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """The `stacklevel` of the nearest frame that is not of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level
