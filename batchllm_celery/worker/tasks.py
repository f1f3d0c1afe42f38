"""What Celery runs: one task, and the signals that open and close a process' runtime."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import threading
from dataclasses import dataclass
from typing import Any

from celery import Celery, signals

from batchllm_celery import event_loop
from batchllm_celery.embedded import resolve_url, revive_when_lost
from batchllm_celery.events import Events
from batchllm_celery.observability import LogListener
from batchllm_celery.queue import (
    DEFAULT_QUEUE,
    ITEMS_HEADER,
    OFFERED,
    RUN_ITEMS,
    make_app,
    publish,
)
from batchllm_celery.settings import Settings
from batchllm_celery.worker import watchdog
from batchllm_celery.worker.broker import fetch_together
from batchllm_celery.worker.retry_events import RetryEvents
from batchllm_celery.worker.runtime import Runtime
from batchllm_celery.worker.task_events import gather_task_events

logger = logging.getLogger("batchllm_celery")


#: Seconds.
NO_TIME_LIMIT = 10**8


class ItemsFailed(Exception):
    """Shows a message some of whose items failed for good as failed, in Celery and in Flower."""

    def __repr__(self) -> str:
        return str(self)  # what Flower shows


@dataclass(frozen=True, slots=True)
class Outcome:
    """A task's result, which is shown and never stored. Not a string: Flower would quote it."""

    text: str

    def __repr__(self) -> str:
        return self.text


def worker_app() -> Celery:
    """The fleet's own Celery app, tasks installed: what `celery -A batchllm_celery` finds.

    Without BATCHLLM_REDIS_URL it runs on the embedded Valkey.
    """
    settings = Settings()
    url = resolve_url(settings)
    return install(make_app(settings, url), settings=settings, redis_url=url)


def install(
    app: Celery, *, settings: Settings | None = None, redis_url: str | None = None
) -> Celery:
    """Add the tasks and their lifetime to a Celery app, an existing one of yours included.

    Args:
        app: its workers run batches from then on, on its default queue and every other that
            they consume; any pool will do.
        settings: default: from the environment.
        redis_url: where ledger and limiter live; default: the settings', else the app's broker
            if that is Redis, else the embedded Valkey.

    Returns:
        The app.
    """
    settings = settings or Settings()
    process = _Process(app, settings, redis_url)

    @app.task(
        name=RUN_ITEMS,
        bind=True,
        acks_late=True,
        ignore_result=True,
        throws=(ItemsFailed,),
        # Out of reach: Celery reads 0 and None as the host's, and a limit shorter than a call has
        # every item paid for again and again. The item runner has limits of its own.
        time_limit=NO_TIME_LIMIT,
        soft_time_limit=NO_TIME_LIMIT,
    )
    def run_items(self: Any, batch_id: str, indexes: list[int]) -> Outcome:
        request = self.request
        return event_loop.run(process.run_items(request.id, request.hostname, batch_id, indexes))

    process.connect()
    return app


def has_only_our_tasks(app: Celery) -> bool:
    """Whether every message of an app may be lost: a batch's items are offered again, but an
    app's other tasks would be gone."""
    return all(name == RUN_ITEMS or name.startswith("celery.") for name in app.tasks)


class _Process:
    """The runtime of this process, whichever pool it is of. Signals differ by pool: `worker_ready`
    comes to the parent, `worker_process_init` to each child of prefork (and to solo)."""

    def __init__(self, app: Celery, settings: Settings, redis_url: str | None) -> None:
        self._app = app
        self._settings = settings
        self._redis_url = redis_url
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None
        self._pid = 0
        self._pool: Any = None
        self._slots: int | None = None
        self._task_events = False
        self._retry_events = RetryEvents(app, lambda: self._task_events)

    async def run_items(
        self, task_id: str, hostname: str | None, batch_id: str, indexes: list[int]
    ) -> Outcome:
        runtime = self._current()
        async with self._retry_events.of(task_id, hostname) as retries:
            tally = await runtime.run_items(
                batch_id,
                indexes,
                offered=task_id.startswith(OFFERED),
                time_limit=self._time_limit(),
            )
        if tally.failed:
            raise ItemsFailed(f"{tally}{retries}")
        return Outcome(f"{tally}{retries}")

    def connect(self) -> None:
        """Listen to the worker's signals, which reach this process only if it is a worker."""
        for signal, receiver in (
            (signals.worker_init, self._on_init),
            (signals.worker_ready, self._on_ready),
            (signals.worker_process_init, self._on_process_init),
            (signals.worker_shutting_down, self._on_shutting_down),
            (signals.worker_process_shutdown, self._on_shutdown),
            (signals.worker_shutdown, self._on_shutdown),
        ):
            signal.connect(receiver, weak=False)

    # -- the runtime ------------------------------------------------------------------------------

    def _current(self) -> Runtime:
        """This process' runtime, made on first use: never before a fork."""
        with self._lock:
            if self._runtime is None or self._pid != os.getpid():
                self._pid = os.getpid()
                self._runtime = self._make()
            return self._runtime

    def _make(self) -> Runtime:
        runtime = Runtime(
            self._settings,
            self._redis_url or self._own_redis(),
            self._publish,
            slots=self._slots,
            events=Events(LogListener(), self._retry_events),
            queues=self._lanes(),
        )
        if self._pool is not None:
            runtime.on_room = self._pool.look_again
        watchdog.events.listen(runtime.events.emit)
        revive_when_lost(runtime.events)
        return runtime

    def _own_redis(self) -> str:
        if self._settings.redis_url is None:
            broker = str(self._app.conf.broker_url or "")
            if broker.startswith(("redis://", "rediss://")):
                return broker
        return resolve_url(self._settings)

    def _lanes(self) -> list[str]:
        """The lanes that this worker consumes; the app's default queue is the lane `default`."""
        default = self._app.conf.task_default_queue
        consumed = list(self._app.amqp.queues.consume_from) or self._settings.queues
        return [DEFAULT_QUEUE if name == default else name for name in consumed]

    def _publish(self, batch_id: str, indexes: Any, queue: str, priority: int) -> None:
        publish(self._app, batch_id, indexes, queue=queue, priority=priority, offered=True)

    # -- signals ----------------------------------------------------------------------------------

    def _on_init(self, sender: Any, **_: Any) -> None:
        """Import the modules that register strategies, before the first message comes."""
        self._task_events = bool(sender.task_events)
        limit = self._time_limit()
        if limit is not None:
            logger.warning(
                "worker.time_limit seconds=%g: Celery's time limit for %s cuts calls off; "
                "leave it out of task_annotations",
                limit,
                RUN_ITEMS,
            )
        for name in filter(None, (self._settings.app or "").split(",")):
            try:
                importlib.import_module(name.strip())
            except ImportError as error:
                raise SystemExit(f"Error: --app {name.strip()!r}: {error}") from error

    def _on_ready(self, sender: Any, **_: Any) -> None:
        pool = sender.pool
        if type(pool).__module__ == "celery.concurrency.prefork":
            return  # its children open their own; a thread or a loop before a fork is trouble
        gather_task_events(sender)
        if hasattr(pool, "admit"):
            self._pool, self._slots = pool, pool.limit
            pool.admit = lambda in_hand: self._current().room_for_messages(in_hand)
            if has_only_our_tasks(self._app):
                fetch_together(lambda: int(pool.room), self._seen)
            # What has been imported stays: a full collection that looks at it stops all calls' loop
            # for 50 ms or more.
            gc.collect()
            gc.freeze()
        asyncio.run_coroutine_threadsafe(self._current().open(), event_loop.loop())

    def _time_limit(self) -> float | None:
        """Seconds that Celery lets the task run, where the host has set a limit for it after all
        (by `task_annotations`, say)."""
        task = self._app.tasks[RUN_ITEMS]
        limits = [one for one in (task.time_limit, task.soft_time_limit) if one]
        shortest = min(limits, default=NO_TIME_LIMIT)
        return None if shortest >= NO_TIME_LIMIT else float(shortest)

    def _seen(self, headers: dict[str, Any]) -> None:
        if headers.get("task") == RUN_ITEMS:
            self._current().expect(int(headers.get(ITEMS_HEADER) or 1))

    def _on_process_init(self, **_: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._current().open(), event_loop.loop())

    def _on_shutting_down(self, how: str, **_: Any) -> None:
        if self._runtime is not None and self._pid == os.getpid():
            end = self._runtime.drain if how == "Warm" else self._runtime.abandon
            event_loop.loop().call_soon_threadsafe(end)

    def _on_shutdown(self, **_: Any) -> None:
        fetch_together(None)
        with self._lock:
            runtime, self._runtime = self._runtime, None
        if runtime is not None and self._pid == os.getpid():
            event_loop.run(runtime.close())
            event_loop.close()
