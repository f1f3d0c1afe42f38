"""What Celery runs: one task, and the signals that open and close a process' runtime."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery, Signature, bootsteps, signals
from celery.exceptions import Ignore, WorkerShutdown
from celery.worker import state as worker_state
from kombu.utils.imports import symbol_by_name

from batchllm_celery import event_loop
from batchllm_celery.connection import broker_url, safe_url
from batchllm_celery.embedded import resolve_url, revive_when_lost
from batchllm_celery.errors import (
    FailureKind,
    ItemFailedError,
    StrategyNotFoundError,
    UsageError,
    describe,
)
from batchllm_celery.events import Events, Listener
from batchllm_celery.ledger.standing import ItemPlace
from batchllm_celery.models import WorkItemResult
from batchllm_celery.observability import LogListener, switched_on
from batchllm_celery.queue import (
    DEFAULT_QUEUE,
    ITEMS_HEADER,
    OFFERED,
    RUN_ITEMS,
    STRATEGY_PREFIX,
    Installed,
    host,
    hosts,
    is_fleet,
    lane_of_host,
    make_app,
    publish,
    redis_of,
)
from batchllm_celery.services import Services
from batchllm_celery.settings import Settings
from batchllm_celery.strategies.registry import Registration, catalog
from batchllm_celery.worker.pool import watchdog
from batchllm_celery.worker.pool.bad_messages import MOST_ITEMS, dropped, guarded
from batchllm_celery.worker.pool.task_events import gather_task_events
from batchllm_celery.worker.pool.transport import fetch_together, use_in
from batchllm_celery.worker.process import Runtime
from batchllm_celery.worker.retry_events import RetryEvents
from batchllm_celery.worker.startup import touch_forever, wait_for_redis
from batchllm_celery.worker.strategy_task import (
    Expired,
    StrategyTask,
    lane_of,
    make_task,
    reference,
    seal,
    send_again,
)

logger = logging.getLogger("batchllm_celery")

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


#: Seconds for which outcomes gather that Celery has been told of.
TELL_SECONDS = 0.02
#: Seconds for which a revoked item that runs is waited for.
CANCEL_SECONDS = 30.0
#: Seconds.
NO_TIME_LIMIT = 10**8


class ItemsFailed(Exception):
    """Shows a message some of whose items failed for good as failed, in Celery and in Flower."""

    def __repr__(self) -> str:
        return str(self)  # what Flower shows


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """A task's result, which is shown and never stored. Not a string: Flower would quote it."""

    text: str

    def __repr__(self) -> str:
        return self.text


def worker_app() -> Celery:
    """The fleet's own Celery app, tasks installed: what `celery -A batchllm_celery` finds.

    Without BATCHLLM_REDIS_URL it runs on the embedded Valkey.
    """
    settings = Settings()
    return install(make_app(settings, settings.redis_url), settings=settings)


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
        The app. Installing again changes nothing.

    Raises:
        UsageError: it was installed with other settings or another `redis_url`; or nothing says
            where Redis is, and the app's broker is no single Redis.
    """
    settings = settings or Settings()
    known = _installed.get(app)
    if known is not None:
        if known.settings != settings or known.redis_url != redis_url:
            raise UsageError("this app is installed already, with other settings")
        return app
    process = _Process(app, settings, redis_url, listeners)
    process.check_redis()
    _installed[app] = process

    @app.task(
        name=RUN_ITEMS,
        bind=True,
        acks_late=True,
        ignore_result=True,
        shared=False,  # other apps of this process have their own, or none
        throws=(ItemsFailed,),
        # Out of reach: Celery reads 0 and None as the host's, and a limit shorter than a call has
        # every item paid for again and again. The item runner has limits of its own.
        time_limit=NO_TIME_LIMIT,
        soft_time_limit=NO_TIME_LIMIT,
    )
    def run_items(self: Any, batch_id: str, indexes: list[int]) -> TaskOutcome:
        request = self.request
        return event_loop.run(process.run_items(request.id, request.hostname, batch_id, indexes))

    if not is_fleet(app):
        hosts.append(Installed(app, settings, redis_url))
    process.register_strategies()
    process.connect()
    return app


#: An app has one runtime in a process, however often it is installed.
_installed: weakref.WeakKeyDictionary[Celery, _Process] = weakref.WeakKeyDictionary()


def has_only_our_tasks(app: Celery) -> bool:
    """Whether every message of an app may be lost: a batch's items are offered again, but an
    app's other tasks would be gone."""
    return all(
        name == RUN_ITEMS or name.startswith("celery.") or isinstance(task, StrategyTask)
        for name, task in app.tasks.items()
    )


def task_of(name: str) -> StrategyTask:
    """A strategy's task: of the app that was installed first, else of the fleet's own.

    Raises:
        StrategyNotFoundError: the app has none of this name.
    """
    installed = host()
    app = importlib.import_module("batchllm_celery").app if installed is None else installed.app
    task = app.tasks.get(f"{STRATEGY_PREFIX}{name}")
    if not isinstance(task, StrategyTask):
        raise StrategyNotFoundError(f"no strategy {name!r} is registered in this process")
    return task


def _services_of(signature: Mapping[str, Any]) -> Services | None:
    """Where the arguments of a strategy's signature are kept: with the app that it belongs to, else
    with this worker's, else with the first one installed. None of other tasks."""
    own = getattr(signature, "_app", None)
    first = host()
    wanted = (own, *(app for app, one in list(_installed.items()) if one.is_worker))
    wanted += () if first is None else (first.app,)
    for app in (*wanted, *list(_installed)):
        process = _installed.get(app) if isinstance(app, Celery) else None
        if process is not None and process.has_task(signature["task"]):
            return process.sender()
    return None


@signals.before_task_publish.connect(weak=False)
def _seal(sender: Any = None, body: Any = None, **_: Any) -> None:
    """No message carries a prompt in clear, that of another task's either: `chain(fetch.s(),
    summarise.si("text"))` embeds the second signature in the first message."""
    if isinstance(body, tuple) and len(body) == 3 and isinstance(body[2], dict):
        embedded = body[2]
        for key, value in embedded.items():
            if value:
                embedded[key] = seal(value, _services_of)
        if sender == "celery.chord_unlock":  # of backends that don't count: the body is an argument
            for value in body[0]:
                if isinstance(value, dict):
                    value.update(seal(value, _services_of))


@signals.task_revoked.connect(weak=False)
def _cancel_revoked(sender: Any = None, request: Any = None, **_: Any) -> None:
    """Revoke, in Flower or by `AsyncResult.revoke`, ends the item too."""
    if isinstance(sender, StrategyTask):
        place = reference(tuple(request.args or ()), request.kwargs or {})
        if place is not None:
            sender.host.cancel(place)


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
        self.settings = settings
        self.redis_url = redis_url
        self.is_worker = False
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
        self._sender: Services | None = None
        self._sender_pid = 0
        self._told: deque[tuple[str, int]] = deque()
        self._telling: asyncio.Task[None] | None = None

    async def run_items(
        self, task_id: str, hostname: str | None, batch_id: str, indexes: list[int]
    ) -> TaskOutcome:
        runtime = self._current()
        async with self._retry_events.of(task_id, hostname) as retries:
            tally = await runtime.run_items(
                batch_id,
                indexes,
                requeued=task_id.startswith(OFFERED),
                time_limit=self._time_limit(),
            )
        if task_id.startswith(OFFERED):
            await runtime.send_owed(batch_id, indexes)
        if tally.unknown:
            raise ItemsFailed(
                f"batch {batch_id!r} is unknown to this worker's Redis; is its producer's another?"
            )
        if tally.failed:
            raise ItemsFailed(f"{tally}{retries}")
        return TaskOutcome(f"{tally}{retries}")

    # -- single items

    def register_strategies(self) -> None:
        """A task for each strategy that somebody has registered, and for those to come."""
        for name in catalog:
            self._register(catalog.lookup(name))
        catalog.listeners.append(self._register)

    def has_task(self, name: str) -> bool:
        """Whether a strategy's task of this name is the app's."""
        return isinstance(self._app.tasks.get(name), StrategyTask)

    def _register(self, registration: Registration) -> None:
        if registration.provider is None:  # built-ins are named by `PROVIDER:MODEL`
            make_task(self._app, registration, self)

    def sender(self) -> Services:
        if self._sender is None or self._sender_pid != os.getpid():
            self._sender = Services(self.settings, self.redis())
            self._sender_pid = os.getpid()
        return self._sender

    def lane(self, queue: str | None) -> str:
        lane = lane_of(self._app, queue)
        return lane if is_fleet(self._app) else lane_of_host(self._app, lane)

    async def run_single(
        self, task_id: str, hostname: str | None, batch_id: str, index: int
    ) -> tuple[Any, str]:
        runtime = self._current()
        async with self._retry_events.of(task_id, hostname) as retries:
            tally = await runtime.run_items(batch_id, [index], time_limit=self._time_limit())
        if tally.unknown:
            raise ItemFailedError(FailureKind.UNKNOWN, "Expired: its standing batch is gone")
        standing = runtime.services.ledger.standing
        found = (await standing.look(batch_id, [index], tasks=True))[0]
        if found.outcome is None or not found.task:
            # It went back, runs elsewhere, or somebody has told Celery: not this message's to say.
            raise Ignore
        result = WorkItemResult.from_json(json.loads(found.outcome.line))
        if not result.success:
            if result.error_kind is FailureKind.DEADLINE and (result.error or "")[:7] == "Expired":
                raise Expired
            raise ItemFailedError(str(result.error_kind), result.error or "", result.item_id)
        return result.output, f"{tally}{retries}"

    def told(self, batch_id: str, index: int) -> None:
        self._told.append((batch_id, index))
        loop = event_loop.loop()
        loop.call_soon_threadsafe(self._tell_soon, loop)

    def _tell_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._telling is None or self._telling.done():
            self._telling = loop.create_task(self._tell())

    async def _tell(self) -> None:
        """Note in the ledger, many at a time, that Celery knows of these outcomes."""
        await asyncio.sleep(TELL_SECONDS)
        while self._told:
            batches: dict[str, list[int]] = {}
            while self._told:
                batch_id, index = self._told.popleft()
                batches.setdefault(batch_id, []).append(index)
            for batch_id, indexes in batches.items():
                await self._current().services.ledger.standing.told(batch_id, indexes)

    def cancel(self, place: ItemPlace) -> None:
        async def cancel() -> None:
            standing = self._current().services.ledger.standing
            give_up = time.monotonic() + CANCEL_SECONDS
            while await standing.cancel(place.batch_id, place.index) is None:
                if time.monotonic() >= give_up:
                    logger.warning("item.not_cancelled item=%s: it runs", place)
                    return
                await asyncio.sleep(0.1)
            await standing.told(place.batch_id, [place.index])

        asyncio.run_coroutine_threadsafe(cancel(), event_loop.loop())

    def _send_again(self, batch_id: str, index: int, task: bytes) -> None:
        send_again(self._app, ItemPlace(batch_id, index), task)

    def _tell_end(self, batch_id: str, round_: int, signature: dict[str, Any]) -> None:
        """The same id each time: whoever was called twice (a worker died in between) can tell."""
        task = {"args": (), "kwargs": {}, "options": {}, **signature}
        Signature.from_dict(task, app=self._app).apply_async(
            () if task.get("immutable") else (batch_id,), task_id=f"finished-{batch_id}-{round_}"
        )

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
            self.settings,
            self.redis(),
            self._publish,
            slots=self._slots,
            events=Events(LogListener(), self._retry_events, *self._listeners, *self._opened),
            queues=self._lanes(),
        )
        runtime.dropped_messages = lambda: dropped.count
        runtime.send_again = self._send_again
        runtime.tell_end = self._tell_end
        if self._pool is not None:
            runtime.admission.on_room = self._pool.look_again
        watchdog.events.listen(runtime.services.events.emit)
        revive_when_lost(runtime.services.events)
        return runtime

    def _open_listeners(self) -> Iterator[Listener]:
        for opener in self._openers:
            try:
                yield opener()
            except UsageError as error:  # no reason to leave the items alone
                logger.error("listener.not_opened error=%s", error)

    def redis(self) -> str:
        """Where ledger and limiter live; of our own app without a URL: the embedded Valkey."""
        if self.redis_url is None and self.settings.redis_url is None and is_fleet(self._app):
            return resolve_url(self.settings)
        return redis_of(self._app, self.settings, self.redis_url)

    def check_redis(self) -> None:
        """Say at once what `redis` would say, where that needs no look at our own app's broker,
        which would start the embedded Valkey.

        Raises:
            UsageError: the broker of a host's app is no single Redis.
        """
        if not is_fleet(self._app) and self._app.conf.broker_url:  # else it is still to come
            self.redis()

    def _lanes(self) -> list[str]:
        """The lanes that this worker consumes; the app's default queue is the lane `default`."""
        default = self._app.conf.task_default_queue
        consumed = list(self._app.amqp.queues.consume_from) or self.settings.queues
        lanes = [DEFAULT_QUEUE if name == default else name for name in consumed]
        if is_fleet(self._app):
            return lanes
        return lanes + [lane_of_host(self._app, lane) for lane in lanes]

    def _publish(self, batch_id: str, indexes: Any, queue: str, priority: int) -> None:
        lanes = self._lanes()
        if not is_fleet(self._app) and queue in lanes[len(lanes) // 2 :]:
            queue = lanes[lanes.index(queue) - len(lanes) // 2]
        publish(self._app, batch_id, indexes, queue=queue, priority=priority, offered=True)

    # -- signals ----------------------------------------------------------------------------------

    def _on_init(self, sender: Any, **_: Any) -> None:
        """Import the modules that register strategies, before the first message comes; under
        prefork, before the fork."""
        self.is_worker = sender.app is self._app
        if not self.is_worker:
            return
        use_in(self._app)
        sender.consumer_cls = guarded(
            symbol_by_name(sender.consumer_cls), only_ours=lambda: has_only_our_tasks(self._app)
        )
        try:
            self.redis()
        except UsageError as error:
            raise SystemExit(f"Error: {error}") from error
        self._task_events = bool(sender.task_events)
        try:
            self._openers = switched_on.openers(self.settings)
        except UsageError as error:
            raise SystemExit(f"Error: {error}") from error
        limit = self._time_limit()
        if limit is not None:
            logger.warning(
                "worker.time_limit seconds=%g: Celery's time limit for %s cuts calls off; "
                "leave it out of task_annotations",
                limit,
                RUN_ITEMS,
            )
        for name in filter(None, (self.settings.app or "").split(",")):
            _import_or_end(name.strip())

    def _on_pool_started(self, worker: Any) -> None:
        if not _forks(worker.pool):
            self._tell_probes()
        url = self.redis()
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
        file = self.settings.heartbeat_file
        if file is not None and self._probed != os.getpid():
            self._probed = os.getpid()
            touching = touch_forever(file, self.settings.heartbeat_seconds)
            asyncio.run_coroutine_threadsafe(touching, event_loop.loop())

    def _on_ready(self, sender: Any, **_: Any) -> None:
        pool = sender.pool
        if not self.is_worker or _forks(pool):
            return  # its children open their own; a thread or a loop before a fork is trouble
        gather_task_events(sender)
        if hasattr(pool, "admit"):
            self._pool, self._slots = pool, pool.limit
            pool.admit = lambda in_hand: self._current().admission.room_for_messages(in_hand)
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
        items = headers.get(ITEMS_HEADER)
        if headers.get("task") == RUN_ITEMS and type(items) is int:
            self._current().admission.expect(min(items, MOST_ITEMS))

    def _on_process_init(self, **_: Any) -> None:
        if not self.is_worker:
            return
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


def _import_or_end(module: str) -> None:
    """Import a module that registers strategies; without it every item here would fail.

    Celery logs and swallows what a signal's receiver raises, but for SystemExit.
    """
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may call sys.exit
        frames = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in frames if frame.name == "<module>"), frames[-1])
        quiet = isinstance(error, ImportError | SyntaxError)  # they name it themselves
        place = "" if quiet else f" ({at.filename}:{at.lineno})"
        print(f"Error: --app {module!r}: {describe(error)}{place}", file=sys.stderr, flush=True)
        raise SystemExit(os.EX_CONFIG) from error
