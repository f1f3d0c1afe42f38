"""Synchronous calls whose awaits suspend only themselves."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
import uvloop
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.threads import LocalStack

from batchllm_celery.worker.pool.greenlet_bridge import BridgedCall, run_in_greenlet

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])


class Bridged:
    """A call of `body` that keeps its outcome."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.body = body
        self.value: Any = None
        self.error: BaseException | None = None
        self.over = asyncio.Event()
        self.call = BridgedCall(self._run, self.over.set)
        self.call.start(asyncio.get_running_loop(), contextvars.Context())

    def _run(self) -> None:
        try:
            self.value = self.body()
        except BaseException as error:
            self.error = error

    async def end(self) -> Bridged:
        await asyncio.wait_for(self.over.wait(), 10)
        return self


def bridged(coro: Coroutine[Any, Any, Any]) -> Bridged:
    return Bridged(lambda: run_in_greenlet(coro))


def run(
    main: Coroutine[Any, Any, Any], new_loop: Callable[[], Any] = asyncio.new_event_loop
) -> Any:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


@LOOPS
def test_interleaved_calls_keep_their_own_celery_stack(new_loop: Callable[[], Any]) -> None:
    """What a call pushes on Celery's stack is what its coroutine finds there after each await."""
    stack: Any = LocalStack()

    def body(number: int) -> bool:
        stack.push(number)
        try:
            return run_in_greenlet(check(number))
        finally:
            stack.pop()

    async def check(number: int) -> bool:
        for _ in range(3):
            await asyncio.sleep(0.001 * (number % 3))
            if stack.top != number:
                return False
        return True

    async def main() -> list[bool]:
        calls = [Bridged(partial(body, number)) for number in range(300)]
        return [(await call.end()).value for call in calls]

    assert run(main(), new_loop) == [True] * 300


@LOOPS
def test_asyncio_works_as_in_any_task(new_loop: Callable[[], Any]) -> None:
    """timeout, TaskGroup, gather, events and exceptions of futures behave as usual."""

    async def body() -> list[Any]:
        seen: list[Any] = [isinstance(asyncio.current_task(), asyncio.Task)]
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
        except TimeoutError:
            seen.append("timeout")
        async with asyncio.TaskGroup() as group:
            child = group.create_task(asyncio.sleep(0.001, "child"))
        seen.append(child.result())
        seen.extend(await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2)))
        failing = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(failing.set_exception, KeyError("future"))
        try:
            await failing
        except KeyError:
            seen.append("failed")
        return seen

    async def main() -> Any:
        return (await bridged(body()).end()).value

    assert run(main(), new_loop) == [True, "timeout", "child", 1, 2, "failed"]


def test_context_variables_belong_to_the_call() -> None:
    """A variable set in the body is seen by its coroutines and children, and by nobody else."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    def body(number: int) -> tuple[int, int, int]:
        before = variable.get()
        variable.set(number)
        child = run_in_greenlet(read())
        return before, child, variable.get()

    async def read() -> int:
        await asyncio.sleep(0.001)
        return await asyncio.create_task(read_in_child())

    async def read_in_child() -> int:
        await asyncio.sleep(0)
        return variable.get()

    async def main() -> list[Any]:
        calls = [Bridged(partial(body, number)) for number in range(1, 101)]
        return [(await call.end()).value for call in calls]

    assert run(main()) == [(0, number, number) for number in range(1, 101)]


def test_several_coroutines_of_one_body_run_in_turn() -> None:
    """A body may await again and again, and a coroutine may call synchronous code that awaits."""

    async def inner() -> int:
        await asyncio.sleep(0.001)
        return 1

    async def outer() -> int:
        await asyncio.sleep(0)
        return 1 + run_in_greenlet(inner())

    async def main() -> Any:
        return (
            await Bridged(lambda: run_in_greenlet(outer()) + run_in_greenlet(inner())).end()
        ).value

    assert run(main()) == 3


def test_cancel_is_raised_in_the_coroutine_and_in_what_it_waits_for() -> None:
    """cancel raises CancelledError where the coroutine waits, and cancels a gather's children."""
    cancelled = []

    async def child(name: str) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    async def main() -> Bridged:
        async def body() -> None:
            await asyncio.gather(child("a"), child("b"))

        call = bridged(body())
        await asyncio.sleep(0.01)
        call.call.cancel()
        return await call.end()

    assert isinstance(run(main()).error, asyncio.CancelledError)
    assert cancelled == ["a", "b"]


def test_a_call_cancelled_before_its_start_never_begins() -> None:
    """cancel right after start ends the call without running anything of it."""
    began = []

    async def main() -> None:
        call = Bridged(lambda: began.append(True))
        call.call.cancel()
        await call.end()

    run(main())
    assert began == []


def test_a_soft_limit_is_raised_once_and_leaves_room_to_clean_up() -> None:
    """The coroutine gets SoftTimeLimitExceeded and may await, under a timeout too, afterwards."""

    async def body() -> list[str]:
        seen = []
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            seen.append("limit")
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            seen.append("timeout")
        return seen

    async def main() -> Any:
        call = bridged(body())
        await asyncio.sleep(0.01)
        call.call.limit(0.01)
        return (await call.end()).value

    assert run(main()) == ["limit", "timeout"]


def test_an_uncaught_soft_limit_leaves_as_celerys_own_exception() -> None:
    """The tracer sees exactly SoftTimeLimitExceeded, and a TaskGroup's children are cancelled."""
    cancelled = []

    async def child() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> Bridged:
        async def body() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())

        call = bridged(body())
        await asyncio.sleep(0.01)
        call.call.limit(0.5)
        return await call.end()

    error = run(main()).error
    assert type(error) is SoftTimeLimitExceeded
    assert error.args == (0.5,)
    assert cancelled == [True]


def test_a_coroutine_that_cancels_itself_fails_as_an_ordinary_exception() -> None:
    """Celery would take a BaseException for a lost worker."""

    async def body() -> None:
        raise asyncio.CancelledError("own doing")

    async def main() -> Bridged:
        return await bridged(body()).end()

    assert isinstance(run(main()).error, concurrent.futures.CancelledError)


def test_awaiting_where_nothing_can_be_suspended_is_refused() -> None:
    """Outside of a bridged call the bridge says to await, and closes the coroutine."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match="await the coroutine"):
            run_in_greenlet(asyncio.sleep(0))

    run(main())
