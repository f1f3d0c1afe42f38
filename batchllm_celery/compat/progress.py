"""Progress of a run: the calls of the user's callback, and a ready-made progress bar."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from batchllm_celery.errors import describe

logger = logging.getLogger("batchllm_celery")

#: `(completed, total, current_item_id)`; may be a coroutine function.
ProgressCallback = Callable[[int, int, str], Awaitable[None] | None]


class RichProgressBar:
    """A progress bar on the terminal, as a progress callback.

        processor = ParallelBatchProcessor(config=config, progress_callback=RichProgressBar())

    Args:
        description: the text before the bar.
        console: where to draw; default standard error, so that output can be piped.
    """

    def __init__(self, description: str = "Processing", console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._description = description
        self._task: TaskID | None = None
        self.completed = 0
        """Items shown as done."""

    def __call__(self, completed: int, total: int, current_item_id: str) -> None:
        """Move the bar; it appears at the first call and closes when all is done."""
        if self._task is None or completed < self.completed:
            self._begin(total)
        assert self._task is not None
        self.completed = completed
        self._progress.update(self._task, completed=completed, total=total)
        if completed >= total:
            self.close()

    def _begin(self, total: int) -> None:
        self.close()
        self._task = self._progress.add_task(self._description, total=total)
        self._progress.start()

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._task is not None:
            self._progress.stop()
            self._task = None
            self.completed = 0


class ProgressReporter:
    """Calls a progress callback every `interval` items, in order, without delaying them.

    A synchronous callback runs in a thread. One that raises or takes longer than `timeout`
    seconds is logged, and the items go on.
    """

    def __init__(self, callback: ProgressCallback | None, interval: int, timeout: float) -> None:
        self._callback = callback
        self._interval = interval
        self._timeout = timeout
        # Only touched on the event loop's thread: done callbacks of tasks run there as well,
        # so adding and discarding need no lock.
        self._progress_tasks: set[asyncio.Task[None]] = set()
        self._order = asyncio.Lock()

    def report(self, completed: int, total: int, item_id: str) -> None:
        """Call the callback soon, if this item is the `interval`-th or the last one."""
        if self._callback is None or (completed % self._interval and completed < total):
            return
        task = asyncio.create_task(self._call(self._callback, completed, total, item_id))
        self._progress_tasks.add(task)
        task.add_done_callback(self._progress_tasks.discard)

    async def finish(self) -> None:
        """Wait for calls under way, at most `timeout` seconds; cancel what is left."""
        if not self._progress_tasks:
            return
        _, late = await asyncio.wait(set(self._progress_tasks), timeout=self._timeout)
        await self.cancel(late)

    async def cancel(self, tasks: set[asyncio.Task[None]] | None = None) -> None:
        """Stop the calls under way."""
        late = set(self._progress_tasks) if tasks is None else tasks
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=2.0)

    async def _call(self, callback: ProgressCallback, *arguments: Any) -> None:
        async with self._order:
            try:
                async with asyncio.timeout(self._timeout):
                    await _run(callback, *arguments)
            except TimeoutError:
                logger.warning("progress_callback_timeout seconds=%s", self._timeout)
            except Exception as error:
                logger.warning("progress_callback_failed error=%s", describe(error))


async def _run(callback: ProgressCallback, *arguments: Any) -> None:
    if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(
        getattr(callback, "__call__", None)  # noqa: B004 - an object with an async __call__
    ):
        answer = callback(*arguments)
    else:
        answer = await _in_thread(callback, *arguments)
    if inspect.isawaitable(answer):
        await answer


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Like `asyncio.to_thread`, but a call that hangs does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def work() -> None:
        try:
            answer, error = function(*arguments), None
        except Exception as raised:
            answer, error = None, raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, done, answer, error)

    threading.Thread(target=work, name="batchllm-progress", daemon=True).start()
    return await done


def _resolve(future: asyncio.Future[Any], answer: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(answer)
    else:
        future.set_exception(error)
