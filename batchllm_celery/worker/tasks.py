"""What Celery runs: one task, and the signals that open and close a process' runtime."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery, bootsteps, signals
from celery.exceptions import WorkerShutdown
from celery.worker import state as worker_state
from kombu.utils.imports import symbol_by_name

from batchllm_celery import event_loop
from batchllm_celery.connection import broker_url, safe_url
from batchllm_celery.embedded import resolve_url, revive_when_lost
from batchllm_celery.errors import UsageError, describe
from batchllm_celery.events import Events, Listener
from batchllm_celery.observability import LogListener, switched_on
from batchllm_celery.queue import (
    DEFAULT_QUEUE,
    ITEMS_HEADER,
    OFFERED,
    RUN_ITEMS,
    make_app,
    publish,
    redis_of,
)
from batchllm_celery.settings import Settings
from batchllm_celery.worker import watchdog
from batchllm_celery.worker.bad_messages import MOST_ITEMS, dropped, guarded
from batchllm_celery.worker.broker import fetch_together, use_in
from batchllm_celery.worker.retry_events import RetryEvents
from batchllm_celery.worker.runtime import Runtime
from batchllm_celery.worker.startup import touch_forever, wait_for_redis
from batchllm_celery.worker.task_events import gather_task_events

logger = logging.getLogger("batchllm_celery")

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


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
    app: Celery,
    *,
    settings: Settings | None = None,
    redis_url: str | None = None,
    listeners: Sequence[Listener] = (),
) -> Celery:
    """Add the tasks and their lifetime to a Celery app, an existing one of yours included.

    Args:
        app: its workers run batches from then on, on its default queue and every other that
            they consume; any pool will do.
        settings: default: from the environment.
        redis_url: where ledger and limiter live; default: the settings', else the app's broker.
        listeners: called with each event of a worker process (`batchllm_celery.events`), on its
            event loop: quick ones, please. Besides them the settings may switch on Prometheus and
            OpenTelemetry.

    Returns:
        The app.

    Raises:
        UsageError: nothing says where, and the app's broker is no single Redis.
    """
    settings = settings or Settings()
    if app.conf.broker_url:  # else it is still to come
        redis_url = redis_of(app, settings, redis_url)
    process = _Process(app, settings, redis_url, listeners)

    @app.task(name=RUN_ITEMS, bind=True, acks_late=True, ignore_result=True, throws=(ItemsFailed,))
    def run_items(self: Any, batch_id: str, indexes: list[int]) -> Outcome:
        request = self.request
        return event_loop.run(process.run_items(request.id, request.hostname, batch_id, indexes))

    process.connect()
    return app


def has_only_our_tasks(app: Celery) -> bool:
    """Whether every message of an app may be lost: a batch's items are offered again, but an
    app's other tasks would be gone."""
    return all(name == RUN_ITEMS or name.startswith("celery.") for name in app.tasks)


def _nothing() -> None:
    """Closes a listener that has nothing to close."""


def _forks(pool: Any) -> bool:
    return type(pool).__module__ == "celery.concurrency.prefork"


class _Process:
    """The runtime of this process, whichever pool it is of. Signals differ by pool: `worker_ready`
    comes to the parent, `worker_process_init` to each child of prefork (and to solo)."""

    def __init__(
        self, app: Celery, settings: Settings, redis_url: str | None, listeners: Sequence[Listener]
    ) -> None:
        self._app = app
        self._settings = settings
        self._redis_url = redis_url
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None
        self._pid = self._probed = 0
        self._pool: Any = None
        self._slots: int | None = None
        self._task_events = False
        self._listeners = list(listeners)
        self._openers: list[switched_on.Opener] = []
        self._opened: list[Listener] = []
        self._retry_events = RetryEvents(app, lambda: self._task_events)

    async def run_items(
        self, task_id: str, hostname: str | None, batch_id: str, indexes: list[int]
    ) -> Outcome:
        runtime = self._current()
        async with self._retry_events.of(task_id, hostname) as retries:
            tally = await runtime.run_items(batch_id, indexes, offered=task_id.startswith(OFFERED))
        if tally.unknown:
            raise ItemsFailed(
                f"batch {batch_id!r} is unknown to this worker's Redis; is its producer's another?"
            )
        if tally.failed:
            raise ItemsFailed(f"{tally}{retries}")
        return Outcome(f"{tally}{retries}")

    def connect(self) -> None:
        """Listen to the worker's signals, which reach this process only if it is a worker."""
        start = self._on_pool_started

        class AfterPool(bootsteps.StartStopStep):
            """Between the pool and Celery's consumer, which connects to the broker."""

            requires = ("celery.worker.components:Pool",)

            def start(self, worker: Any) -> None:
                start(worker)

        self._app.steps["worker"].add(AfterPool)
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
        self._opened = list(self._open_listeners())
        runtime = Runtime(
            self._settings,
            redis_of(self._app, self._settings, self._redis_url),
            self._publish,
            slots=self._slots,
            events=Events(LogListener(), self._retry_events, *self._listeners, *self._opened),
            queues=self._lanes(),
        )
        runtime.dropped_messages = lambda: dropped.count
        if self._pool is not None:
            runtime.on_room = self._pool.look_again
        watchdog.events.listen(runtime.events.emit)
        revive_when_lost(runtime.events)
        return runtime

    def _open_listeners(self) -> Iterator[Listener]:
        for opener in self._openers:
            try:
                yield opener()
            except UsageError as error:  # no reason to leave the items alone
                logger.error("listener.not_opened error=%s", error)

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
        use_in(self._app)
        sender.consumer_cls = guarded(
            symbol_by_name(sender.consumer_cls), only_ours=has_only_our_tasks(self._app)
        )
        try:
            redis_of(self._app, self._settings, self._redis_url)
        except UsageError as error:
            raise SystemExit(f"Error: {error}") from error
        self._task_events = bool(sender.task_events)
        try:
            self._openers = switched_on.openers(self._settings)
        except UsageError as error:
            raise SystemExit(f"Error: {error}") from error
        for name in filter(None, (self._settings.app or "").split(",")):
            try:
                importlib.import_module(name.strip())
            except ImportError as error:
                raise SystemExit(f"Error: --app {name.strip()!r}: {error}") from error

    def _on_pool_started(self, worker: Any) -> None:
        if not _forks(worker.pool):
            self._tell_probes()
        url = redis_of(self._app, self._settings, self._redis_url)
        # An app with another broker has other work to do meanwhile.
        if self._app.conf.broker_url != broker_url(url) or not url.startswith(REDIS_SCHEMES):
            return
        if self._app.conf.broker_connection_retry_on_startup is False:
            return
        try:
            wait_for_redis(url, worker_state.maybe_shutdown)
        except redis.RedisError as error:
            logger.critical("Redis at %s can't be used: %s", safe_url(url), describe(error))
            raise WorkerShutdown(1) from error

    def _tell_probes(self) -> None:
        """Touch the heartbeat file from this process' loop, whether Redis is there or not."""
        file = self._settings.heartbeat_file
        if file is not None and self._probed != os.getpid():
            self._probed = os.getpid()
            touching = touch_forever(file, self._settings.heartbeat_seconds)
            asyncio.run_coroutine_threadsafe(touching, event_loop.loop())

    def _on_ready(self, sender: Any, **_: Any) -> None:
        pool = sender.pool
        if _forks(pool):
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

    def _seen(self, headers: dict[str, Any]) -> None:
        items = headers.get(ITEMS_HEADER)
        if headers.get("task") == RUN_ITEMS and type(items) is int:
            self._current().expect(min(items, MOST_ITEMS))

    def _on_process_init(self, **_: Any) -> None:
        self._tell_probes()
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
            for listener in self._opened:
                getattr(listener, "close", _nothing)()
