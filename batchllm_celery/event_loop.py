"""One event-loop thread per process, and the two ways across to it.

Sync code calls `run`, a user's own event loop awaits `run_async`; both hand a coroutine to the
same loop, so that its connections are shared however the process was started (threads, solo and
prefork pools, a script, a notebook). Under our asyncio pool, tasks already run on that loop, in
greenlets: there `run` steps the coroutine inside the caller's greenlet (see `worker.pool`).
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from batchllm_celery.errors import stack_of

logger = logging.getLogger("batchllm_celery")

T = TypeVar("T")

Bridge = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine to its end for a caller that is on the loop's own thread."""

#: How long `run` lets an interrupted coroutine clean up before it gives up on it, in seconds.
UNWIND_SECONDS = 5.0
_STOP_SECONDS = 2.0
_AGAIN_SECONDS = 0.05


class _LoopThread:
    """An event loop that runs in a daemon thread."""

    def __init__(self) -> None:
        self.loop = _new_loop()
        self._running = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._main, name="batchllm-loop", daemon=True)
        self._thread.start()
        self._running.wait()

    @property
    def is_current(self) -> bool:
        return self._thread is threading.current_thread()

    def stop(self) -> None:
        """End what still runs and close the loop; gives up after a few seconds."""
        self._stopped = True
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self.loop.call_soon_threadsafe(self.loop.stop)
        if not self.is_current:
            self._thread.join(_STOP_SECONDS)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._running.set)
        try:
            self._run()
            self.loop.run_until_complete(_cancel_everything())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    def _run(self) -> None:
        """Run until `stop`: a task that calls `sys.exit` ends itself, and not everybody's loop. Nor
        does one that stops the loop, as code does that takes it for its own."""
        while True:
            try:
                self.loop.run_forever()
                if self._stopped:
                    return
                logger.error("event_loop.stop_ignored: a task of a strategy stopped the loop")
            except (SystemExit, KeyboardInterrupt) as error:
                logger.error(
                    "event_loop.exit_ignored error=%s: a task of a strategy raised it\n%s",
                    type(error).__name__,
                    stack_of(error),
                )


class Unending:
    """A task of this loop that runs until `end`: one that a strategy cancels begins anew.

    Code that takes the loop for its own cancels every task that it finds; a process without its
    background work would hold its items for ever.

    Args:
        work: makes the coroutine.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._work = work
        self._ending = False
        self._begin()

    def _begin(self) -> None:
        if not self._ending:
            self._task = asyncio.get_running_loop().create_task(self._work())
            self._task.add_done_callback(self._begin_again)

    def _begin_again(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and not self._ending:
            # Later: a loop that is ending cancels everything, too, and does not get there.
            task.get_loop().call_later(_AGAIN_SECONDS, self._begin)

    async def end(self) -> None:
        """Cancel it, and wait for its end."""
        self._ending = True
        self._task.cancel()
        await asyncio.wait([self._task])


def _new_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it is installed: about a tenth less CPU per item.

    Under gevent or eventlet a "thread" is a greenlet: uvloop waits in C, and would stop them all.
    """
    if _threads_are_greenlets():
        return asyncio.new_event_loop()
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _threads_are_greenlets() -> bool:
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return bool(
        (gevent is not None and gevent.is_module_patched("threading"))
        or (eventlet is not None and eventlet.is_monkey_patched("thread"))
    )


async def _cancel_everything() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_STOP_SECONDS / 2)


_lock = threading.Lock()
_thread: _LoopThread | None = None
_bridge: Bridge | None = None
_inherited: list[_LoopThread] = []


def _forget_after_fork() -> None:
    """A child has the parent's loop, but not its thread: it starts its own on first use.

    The parent's loop is kept, not closed: closing it here would unregister its descriptors
    from the epoll instance that parent and child share.
    """
    global _lock, _thread, _bridge
    _lock = threading.Lock()
    if _thread is not None:
        _inherited.append(_thread)
    _thread = _bridge = None


os.register_at_fork(after_in_child=_forget_after_fork)


def _started() -> _LoopThread:
    global _thread
    with _lock:
        if _thread is None:
            _thread = _LoopThread()
        return _thread


def loop() -> asyncio.AbstractEventLoop:
    """This process's loop; its thread starts with the first call. Never call it before a fork."""
    return _started().loop


def current() -> asyncio.AbstractEventLoop | None:
    """This process's loop if its thread is running; starts nothing."""
    thread = _thread
    return None if thread is None else thread.loop


def is_here() -> bool:
    """Whether the calling code runs on this process's loop, in a greenlet that may wait."""
    thread = _thread
    return thread is not None and thread.is_current and _bridge is not None


def use_bridge(bridge: Bridge | None) -> None:
    """Let `bridge` run what `run` is given on the loop's own thread; None: nobody can."""
    global _bridge
    _bridge = bridge


def close() -> None:
    """Cancel what runs, stop the thread and close the loop; the next use starts a new one."""
    global _thread
    with _lock:
        thread, _thread = _thread, None
    if thread is not None:
        thread.stop()


# A loop thread that runs while the interpreter is torn down can crash it.
atexit.register(close)


class _Submission:
    """A coroutine that was sent to the loop, and the future of its outcome.

    Unlike `asyncio.run_coroutine_threadsafe`, it can be cancelled *and* waited for until it has
    cleaned up.
    """

    def __init__(self, coro: Coroutine[Any, Any, Any]) -> None:
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._coro = coro
        self._task: asyncio.Task[Any] | None = None
        self._loop = loop()
        # call_soon copies the caller's context, and with it the caller's context variables.
        self._loop.call_soon_threadsafe(self._start)

    def cancel(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing runs any more
            self._loop.call_soon_threadsafe(self._cancel)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._coro)
        self._task.add_done_callback(self._finish)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self.outcome.set_exception(concurrent.futures.CancelledError())
        elif (error := task.exception()) is not None:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


def run(coro: Coroutine[Any, Any, T]) -> T:
    """Run `coro` on the process's loop and return its result, from synchronous code.

    An interrupt of the wait (Ctrl-C, Celery's soft time limit) cancels the coroutine, lets it
    clean up for at most `UNWIND_SECONDS`, and is raised then.

    Raises:
        concurrent.futures.CancelledError: the coroutine was cancelled by somebody else.
        RuntimeError: called by a coroutine on the loop itself, which must await instead.
    """
    if _started().is_current:
        return _run_on_loop_thread(coro)
    submission = _Submission(coro)
    try:
        result: T = submission.outcome.result()
        return result
    except BaseException:
        if not submission.outcome.done():
            submission.cancel()
            concurrent.futures.wait([submission.outcome], UNWIND_SECONDS)
        raise


def _run_on_loop_thread(coro: Coroutine[Any, Any, T]) -> T:
    if _bridge is None:
        coro.close()
        raise RuntimeError("event_loop.run would block its own loop: await the coroutine instead")
    result: T = _bridge(coro)
    return result


async def run_async(coro: Coroutine[Any, Any, T]) -> T:
    """Run `coro` on the process's loop from any event loop, which goes on meanwhile.

    Cancelling the caller cancels the coroutine and waits until it has cleaned up.
    """
    if asyncio.get_running_loop() is loop():
        return await coro
    submission = _Submission(coro)
    outcome = asyncio.wrap_future(submission.outcome)
    try:
        await asyncio.wait([outcome])
    except asyncio.CancelledError:
        submission.cancel()
        await asyncio.wait([outcome])
        _retrieve(outcome)
        raise
    result: T = outcome.result()
    return result


def _retrieve(outcome: asyncio.Future[Any]) -> None:
    """Mark a failure as seen, so that asyncio doesn't report it as lost."""
    if not outcome.cancelled():
        outcome.exception()
