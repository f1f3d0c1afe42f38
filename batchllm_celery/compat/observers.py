"""batch-llm's observers: `async on_event(event, data)`, fed from the engine's events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from batchllm_celery import events
from batchllm_celery.errors import describe
from batchllm_celery.events import Event

logger = logging.getLogger("batchllm_celery")

#: Seconds that one call of an observer may take.
OBSERVER_TIMEOUT = 5.0
#: Seconds that the end of a batch waits for observers that are behind.
DRAIN_TIMEOUT = 10.0


class ProcessingEvent(StrEnum):
    """Events of an observer, by batch-llm's names."""

    ITEM_STARTED = "item_started"
    ITEM_COMPLETED = "item_completed"
    ITEM_FAILED = "item_failed"
    RATE_LIMIT_HIT = "rate_limit_hit"
    COOLDOWN_STARTED = "cooldown_started"
    COOLDOWN_ENDED = "cooldown_ended"
    WORKER_STARTED = "worker_started"
    WORKER_STOPPED = "worker_stopped"
    BATCH_STARTED = "batch_started"
    BATCH_COMPLETED = "batch_completed"


@runtime_checkable
class ProcessorObserver(Protocol):
    """Anything with an async `on_event`."""

    async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        """Handle `event`, in 5 s at most; an exception is logged."""


class BaseObserver:
    """Override `on_event`."""

    async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        """Handle `event`."""


Notification = tuple[ProcessingEvent, dict[str, Any]]


def _item_finished(event: events.ItemFinished) -> Notification:
    data = {
        "item_id": event.item_id,
        "duration": event.seconds,
        "attempts": event.attempts,
        "tokens": event.input_tokens + event.output_tokens,
        "input_tokens": event.input_tokens,
        "output_tokens": event.output_tokens,
        "cached_input_tokens": event.cached_input_tokens,
        "cost": event.cost,
    }
    if event.success:
        return ProcessingEvent.ITEM_COMPLETED, data
    kind = None if event.kind is None else event.kind.value
    data |= {"error_type": event.error_type or kind, "error_kind": kind}
    return ProcessingEvent.ITEM_FAILED, data


def _cooldown_started(event: events.CooldownStarted) -> Notification:
    return ProcessingEvent.COOLDOWN_STARTED, {
        "worker_id": event.quota,  # the fleet cools down, not one worker
        "quota": event.quota,
        "duration": event.seconds,
        "consecutive": event.consecutive,
    }


_TRANSLATIONS: dict[type[Event], Callable[[Any], Notification]] = {
    events.ItemStarted: lambda e: (ProcessingEvent.ITEM_STARTED, {"item_id": e.item_id}),
    events.ItemFinished: _item_finished,
    events.RateLimitHit: lambda e: (
        ProcessingEvent.RATE_LIMIT_HIT,
        {"quota": e.quota, "retry_after": e.retry_after},
    ),
    events.CooldownStarted: _cooldown_started,
    events.CooldownEnded: lambda e: (
        ProcessingEvent.COOLDOWN_ENDED,
        {"quota": e.quota, "duration": e.seconds},
    ),
    events.WorkerStarted: lambda e: (ProcessingEvent.WORKER_STARTED, {"worker_id": e.worker_id}),
    events.WorkerStopped: lambda e: (ProcessingEvent.WORKER_STOPPED, {"worker_id": e.worker_id}),
    events.BatchStarted: lambda e: (ProcessingEvent.BATCH_STARTED, {"batch_id": e.batch_id}),
    events.BatchFinished: lambda e: (
        ProcessingEvent.BATCH_COMPLETED,
        {
            "batch_id": e.batch_id,
            "total": e.succeeded + e.failed,
            "succeeded": e.succeeded,
            "failed": e.failed,
        },
    ),
}


def translate(event: Event) -> Notification | None:
    """The engine's event as batch-llm names it; None for one that batch-llm does not have."""
    translation = _TRANSLATIONS.get(type(event))
    return None if translation is None else translation(event)


class ObserverFeed:
    """A listener that hands events to observers in order, from one task; the engine never waits.

    Use as an async context manager; leaving it waits until all events are delivered.
    """

    def __init__(self, observers: Sequence[ProcessorObserver]) -> None:
        self._observers = tuple(observers)
        self._queue: asyncio.Queue[Notification] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def __call__(self, event: Event) -> None:
        """Queue `event`; before entry and after exit it is dropped."""
        if self._task is None:
            return
        notification = translate(event)
        if notification is not None:
            self._queue.put_nowait(notification)

    async def __aenter__(self) -> ObserverFeed:
        if self._observers:
            self._queue = asyncio.Queue()
            self._task = asyncio.create_task(self._feed())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is None:
            return
        try:
            await self.drain()
        finally:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait([task])

    async def drain(self) -> None:
        """Wait until all events so far are delivered (`DRAIN_TIMEOUT` at most)."""
        if self._task is None:
            return
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await self._queue.join()
        except TimeoutError:
            logger.warning("observers_behind events=%d", self._queue.qsize())

    async def _feed(self) -> None:
        while True:
            event, data = await self._queue.get()
            for observer in self._observers:
                await self._notify(observer, event, data)
            self._queue.task_done()

    async def _notify(
        self, observer: ProcessorObserver, event: ProcessingEvent, data: dict[str, Any]
    ) -> None:
        try:
            async with asyncio.timeout(OBSERVER_TIMEOUT):
                await observer.on_event(event, dict(data))
        except Exception as error:
            logger.warning(
                "observer_failed name=%s event=%s error=%s",
                type(observer).__name__,
                event.value,
                describe(error),
            )
