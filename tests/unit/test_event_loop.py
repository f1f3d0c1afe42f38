"""The process's event loop, reached from synchronous code and from other loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from batchllm_celery import event_loop
from tests.support import loop_of_its_own

marker: contextvars.ContextVar[str] = contextvars.ContextVar("marker", default="none")


@pytest.fixture(autouse=True)
def _loop_of_its_own() -> Iterator[None]:
    with loop_of_its_own():
        yield


async def _where() -> tuple[asyncio.AbstractEventLoop, str]:
    await asyncio.sleep(0)
    return asyncio.get_running_loop(), threading.current_thread().name


class _Sleeper:
    """A coroutine that sleeps till it is cancelled and takes a moment to clean up."""

    def __init__(self) -> None:
        self.sleeps = threading.Event()
        self.cleaned_up = False

    async def sleep(self) -> None:
        self.sleeps.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            self.cleaned_up = True


def test_run_uses_one_loop_thread_for_all_threads() -> None:
    """Whatever thread calls, the coroutine runs on the same loop in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        seen = set(threads.map(lambda _: event_loop.run(_where()), range(8)))
    assert seen == {(event_loop.loop(), "batchllm-loop")}


def test_run_raises_what_the_coroutine_raises() -> None:
    """An exception crosses from the loop to the caller."""

    async def fail() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        event_loop.run(fail())


def test_run_tells_of_a_cancellation_that_was_not_the_callers() -> None:
    """A coroutine that cancels itself ends as an ordinary exception in synchronous code."""

    async def give_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(concurrent.futures.CancelledError):
        event_loop.run(give_up())


def test_run_carries_the_callers_context_variables() -> None:
    """The coroutine sees the caller's context variables."""

    async def read() -> str:
        return marker.get()

    token = marker.set("mine")
    try:
        assert event_loop.run(read()) == "mine"
    finally:
        marker.reset(token)


def test_an_interrupt_cancels_the_coroutine_and_lets_it_clean_up() -> None:
    """Ctrl-C during run cancels the coroutine; it has cleaned up when KeyboardInterrupt arrives."""
    sleeper = _Sleeper()

    def interrupt() -> None:
        sleeper.sleeps.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        event_loop.run(sleeper.sleep())
    thread.join()
    assert sleeper.cleaned_up


def test_run_on_the_loop_itself_is_refused() -> None:
    """A coroutine on the loop that calls run would wait for itself: it is told to await."""

    async def run_again() -> None:
        event_loop.run(_where())

    with pytest.raises(RuntimeError, match="await the coroutine"):
        event_loop.run(run_again())


def test_run_on_the_loop_goes_over_the_bridge() -> None:
    """A bridge runs what synchronous code on the loop's own thread hands to run."""
    event_loop.use_bridge(lambda coro: (coro.close(), "bridged")[1])

    async def run_again() -> object:
        return event_loop.run(_where())

    try:
        assert event_loop.run(run_again()) == "bridged"
    finally:
        event_loop.use_bridge(None)


async def test_run_async_runs_on_the_process_loop() -> None:
    """From a user's loop the coroutine runs on the process's loop; theirs goes on meanwhile."""
    loop, _ = await event_loop.run_async(_where())
    assert loop is event_loop.loop()
    assert loop is not asyncio.get_running_loop()


async def test_run_async_raises_what_the_coroutine_raises() -> None:
    """An exception crosses from loop to loop."""

    async def fail() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        await event_loop.run_async(fail())


def test_run_async_on_the_loop_itself_just_awaits() -> None:
    """On the process's loop run_async stays in the caller's task."""

    async def same() -> bool:
        async def current() -> object:
            return asyncio.current_task()

        return await event_loop.run_async(current()) is asyncio.current_task()

    assert event_loop.run(same())


async def test_cancelling_run_async_cancels_the_coroutine_and_waits() -> None:
    """A cancelled caller returns once the coroutine has cleaned up."""
    sleeper = _Sleeper()
    task = asyncio.create_task(event_loop.run_async(sleeper.sleep()))
    await asyncio.to_thread(sleeper.sleeps.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sleeper.cleaned_up


def test_close_cancels_what_runs_and_the_next_use_starts_anew() -> None:
    """close lets coroutines clean up; a later run gets a new loop."""
    sleeper = _Sleeper()
    first = event_loop.loop()
    asyncio.run_coroutine_threadsafe(sleeper.sleep(), first)
    sleeper.sleeps.wait(10)
    event_loop.close()
    assert sleeper.cleaned_up
    assert first.is_closed()
    assert event_loop.run(_where())[0] is not first


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # 3.12: forking with threads
def test_a_forked_child_starts_its_own_loop() -> None:
    """After a fork the child runs coroutines on a loop of its own, and the parent's goes on."""
    parents = event_loop.loop()
    child = os.fork()
    if child == 0:
        fresh = event_loop.run(_where())[0] is not parents
        os._exit(0 if fresh else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert event_loop.run(_where())[0] is parents


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_task_that_exits_ends_itself_and_not_the_loop(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever awaits it hears of it; everybody else's loop goes on, and the log says so."""

    async def leave() -> None:
        raise error

    async def await_it() -> str:
        task = asyncio.ensure_future(leave())
        try:
            await task
        except BaseException as raised:
            return type(raised).__name__
        return "nothing"

    assert event_loop.run(await_it()) == type(error).__name__
    assert event_loop.run(_where())[1] == "batchllm-loop"
    assert "exit_ignored" in caplog.text


def test_code_that_stops_the_loop_stops_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """A strategy that takes the loop for its own: everybody's goes on, and the log says so."""

    async def stop() -> str:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
        return "went on"

    assert event_loop.run(stop()) == "went on"
    assert event_loop.run(_where())[1] == "batchllm-loop"
    assert "stop_ignored" in caplog.text
