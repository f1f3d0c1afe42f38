"""Awaits what a user wrote: whatever it raises ends its item, and nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from batchllm_celery.errors import FailureKind, ProviderError, text_of

T = TypeVar("T")


async def from_user(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Await what a user wrote. Whatever it raises is an `Exception`, unless it ends this task."""
    task = asyncio.current_task()
    try:
        return await function(*arguments)
    except Exception:
        raise
    except BaseException as error:
        if ends(error, task):
            raise
        raise stand_in(error) from error


def ends(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether `error` ends `task` (it is cancelled, or its coroutine is closed), in place of having
    been raised by the strategy: a client that cancels its own tasks, or a `sys.exit()` in it."""
    if isinstance(error, asyncio.CancelledError):
        return task is None or task.cancelling() > 0
    return isinstance(error, GeneratorExit) and asyncio.current_task() is not task


def stand_in(error: BaseException) -> Exception:
    """What a strategy raised to end more than its item, as an exception that ends its item."""
    if isinstance(error, asyncio.CancelledError):
        raised: Exception = RuntimeError("the strategy cancelled its own call")
    else:
        raised = ProviderError(
            text_of(error) or "raised to end more than the item",
            kind=FailureKind.LOGIC_ERROR,
            error_type=type(error).__name__,
        )
    raised.__cause__ = error
    return raised
