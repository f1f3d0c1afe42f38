"""Shows in Flower what happens inside a task before it ends: retries, and refusals by the quota.

A task retries its items itself, so Celery knows nothing of it. Here each failed attempt that
another one follows becomes Celery's own `task-retried` event: Flower shows the task as RETRY, with
the reason, until it has ended. How often it happened stands in the task's result.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from celery import Celery

from batchllm_celery.errors import FailureKind
from batchllm_celery.events import AttemptFailed, Event

logger = logging.getLogger("batchllm_celery")

#: A task is shown as retried once in so many seconds; what happens in between is counted.
SECONDS_BETWEEN = 1.0
#: So many tasks wait to be shown at most: after a refusal of thousands, some will do.
MAX_WAITING = 100
#: An event that comes after its task's end would bring the task back to RETRY, so the end waits
#: for one that is on its way; but no longer than this, should the broker hang.
PATIENCE_SECONDS = 2.0


@dataclass(slots=True)
class Retries:
    """How often the items of one task were tried again, and why last."""

    task_id: str
    hostname: str | None
    failures: int = 0
    refusals: int = 0
    last: str = ""
    shown_at: float = float("-inf")

    def add(self, event: AttemptFailed) -> None:
        """Count an attempt that another one follows."""
        if event.kind is FailureKind.RATE_LIMITED:
            self.refusals += 1
            wait = "waits for the quota"
        else:
            self.failures += 1
            wait = f"next attempt in {event.wait or 0.0:.1f} s"
        self.last = f"{_harmless(event.item_id)}: {event.kind} ({event.error_type}), {wait}"

    def __str__(self) -> str:
        retried = f", {self.failures:,} retried" if self.failures else ""
        return retried + (f", {self.refusals:,} refused by the quota" if self.refusals else "")


def _harmless(item_id: str) -> str:
    """An id as people may see it: Flower's list shows an exception's text as HTML."""
    return re.sub(r"[<>&\"']|[^ -~\w]", "?", item_id[:80])


_current: ContextVar[Retries | None] = ContextVar("batchllm_task", default=None)


class RetryEvents:
    """A listener that tells Celery's event stream of retries; events are sent off the loop.

    Args:
        app: whose event stream.
        wanted: whether this worker sends task events.
    """

    def __init__(self, app: Celery, wanted: Callable[[], bool]) -> None:
        self._app = app
        self._wanted = wanted
        self._waiting: dict[str, Retries] = {}
        self._sending: asyncio.Task[None] | None = None

    def wants(self, kind: type[Event]) -> bool:
        """Only attempts that failed."""
        return kind is AttemptFailed

    @asynccontextmanager
    async def of(self, task_id: str, hostname: str | None) -> AsyncIterator[Retries]:
        """Attempts that fail in this block, in the tasks that it starts too, are this task's."""
        retries = Retries(task_id, hostname)
        token = _current.set(retries)
        try:
            yield retries
        finally:
            _current.reset(token)
            self._waiting.pop(task_id, None)
            if retries.last and self._sending is not None:
                await asyncio.wait([self._sending], timeout=PATIENCE_SECONDS)

    def __call__(self, event: Event) -> None:
        """Note an attempt that failed and will be repeated."""
        if not isinstance(event, AttemptFailed) or event.wait is None:
            return
        retries = _current.get()
        if retries is None:
            return
        retries.add(event)
        now = time.monotonic()
        if now - retries.shown_at < SECONDS_BETWEEN or len(self._waiting) >= MAX_WAITING:
            return
        if self._wanted():
            retries.shown_at = now
            self._waiting[retries.task_id] = retries
            if self._sending is None:
                self._sending = asyncio.ensure_future(self._send_all())

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                retries = self._waiting.pop(next(iter(self._waiting)))
                await asyncio.to_thread(self._send, retries)
        finally:
            self._sending = None

    def _send(self, retries: Retries) -> None:
        try:
            with self._app.events.default_dispatcher(hostname=retries.hostname) as dispatcher:
                dispatcher.send(
                    "task-retried",
                    uuid=retries.task_id,
                    exception=retries.last,
                    retries=retries.failures + retries.refusals,
                    retry=False,
                )
        except Exception as error:  # only something to look at is lost
            logger.debug("retry_events.failed error=%s", type(error).__name__)
