"""The Celery side of a fleet: its app, and the one message that work travels in.

A message is a wake-up, not the truth: it names a batch and a few item indexes, never a prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs, urlsplit

from celery import Celery
from kombu import Queue, compression
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid
from redis.exceptions import RedisError

from batchllm_celery.connection import Reminder, broker_tls, broker_url, safe_url
from batchllm_celery.connection.redis_connection import denied_words, is_denial
from batchllm_celery.embedded import resolve_url
from batchllm_celery.errors import RedisDeniedError, UsageError, describe
from batchllm_celery.models.names import as_label
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

_NOT_IN_QUEUES: Final = str.maketrans(dict.fromkeys(":/@+%~=", "_"))

App: TypeAlias = Celery
"""A Celery app, for those who only hand one on."""

RUN_ITEMS: Final = "batchllm.run_items"
#: A strategy's task has its name after this.
STRATEGY_PREFIX: Final = "batchllm."
#: How many items a message names: a worker must know before it reads the body.
ITEMS_HEADER: Final = "items"
#: Ids of messages begin so that a worker sent for items which no message had brought.
OFFERED: Final = "offered-"
#: Stands in for a host's `task_compression`: our messages are short, and one that may not be
#: packed can't unpack to gigabytes.
NOT_PACKED: Final = "application/x-batchllm-not-packed"
compression.register(lambda body: body, lambda body: body, NOT_PACKED)
DEFAULT_QUEUE: Final = "default"
AMQP: Final = "batchllm_celery.worker.broker:Amqp"
POOL: Final = "batchllm_celery.worker.pool:AsyncioPool"

#: A message unacknowledged for so long is delivered again. A duplicate costs one claim, which
#: answers `held`, so this may be shorter than a call lasts.
VISIBILITY_TIMEOUT_SECONDS: Final = 120


class _FleetApp(Celery):
    """Its messages go to the Redis of its ledger. Plain Celery lets CELERY_BROKER_URL (also set by
    `celery -b`) win, and the messages would travel where nobody looks for them."""

    find_redis: Callable[[], str]

    @cached_property
    def fleet_broker(self) -> str:
        """The one broker URL; found (and the embedded Valkey started) when somebody connects."""
        return broker_url(self.find_redis())

    def connection(self, hostname: Any = None, *args: Any, **options: Any) -> Any:
        return super().connection(hostname or self.fleet_broker, *args, **options)

    def connection_for_read(self, url: Any = None, **options: Any) -> Any:
        return super().connection_for_read(url or self.fleet_broker, **options)

    def connection_for_write(self, url: Any = None, **options: Any) -> Any:
        return super().connection_for_write(url or self.fleet_broker, **options)


class _EmbeddedBroker:
    """Celery settings whose broker is found, and started, when somebody reads its URL."""

    def __init__(self, app: _FleetApp) -> None:
        self._app = app

    @property
    def broker_url(self) -> str:
        return self._app.fleet_broker

    @property
    def result_backend(self) -> str:
        return self._app.fleet_broker


@dataclass(frozen=True, slots=True)
class Installed:
    """An app that `install` was called with, and where its ledger is."""

    app: Celery
    settings: Settings
    redis_url: str | None


#: Apps of this process that are no fleet's own, in the order of their installation.
hosts: list[Installed] = []


def host() -> Installed | None:
    """The app of this process that work goes to where nobody names one: the first installed."""
    return hosts[0] if hosts else None


def lane_of_host(app: Celery, queue: str) -> str:
    """The lane of a host's single items: workers of other apps have another result backend."""
    return f"{queue}.{as_label(app.main or 'app').translate(_NOT_IN_QUEUES)}"[:120]


def is_fleet(app: Celery) -> bool:
    """Whether the app is `make_app`'s own, and no host's."""
    return isinstance(app, _FleetApp)


def make_app(settings: Settings, url: str | None) -> Celery:
    """The Celery app of a fleet; a worker installs the tasks.

    Args:
        settings: namespace, queues, slots.
        url: Redis; None: the embedded Valkey, started when the app first connects to its broker.

    Raises:
        UsageError: for a URL that redis-py and kombu would not read alike.
    """
    app = _FleetApp("batchllm", set_as_current=False, amqp=AMQP)
    if url is None:
        app.find_redis = partial(resolve_url, settings)
        app.config_from_object(_EmbeddedBroker(app))
    else:
        app.fleet_broker = broker_url(url)
        tls = broker_tls(url)
        app.conf.update(
            broker_url=app.fleet_broker,
            broker_use_ssl=tls,
            result_backend=app.fleet_broker,
            redis_backend_use_ssl=tls,
        )
    app.conf.update(
        broker_transport_options=_transport_options(settings),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a worker outlives every outage of its Redis
        task_default_queue=DEFAULT_QUEUE,
        task_queues=[Queue(name) for name in settings.queues],
        task_create_missing_queues=True,
        # Of strategies' own tasks (`summarise.delay`): `run_items` and batches store none.
        result_expires=settings.item_ttl_seconds,
        result_backend_transport_options={"global_keyprefix": f"{settings.namespace}:celery:"},
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_track_started=True,
        worker_pool=POOL,
        worker_concurrency=settings.slots,
        # No static prefetch: the pool takes a message whenever it has room for its items.
        worker_prefetch_multiplier=0,
        worker_disable_prefetch=True,
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
    )
    return app


def _transport_options(settings: Settings) -> dict[str, Any]:
    return {
        "global_keyprefix": f"{settings.namespace}:celery:",
        "priority_steps": [0, 3, 6, 9],
        "queue_order_strategy": "priority",
        "visibility_timeout": VISIBILITY_TIMEOUT_SECONDS,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        # A worker killed while it puts messages back keeps all others from it: 300 s by default.
        "unacked_mutex_expire": 30,
        # Without them a publish or a read on a dead link waits for ever.
        "socket_timeout": 30.0,
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
    }


def redis_of(app: Celery, settings: Settings, redis_url: str | None = None) -> str:
    """The Redis of whoever hands in a Celery app of their own: what is said, else the app's broker.

    Raises:
        UsageError: the broker is no single Redis, so nobody can tell where the ledger is to be.
    """
    if said := redis_url or settings.redis_url:
        return said
    broker = app.conf.broker_url or "amqp://"  # Celery's own default
    url = broker if isinstance(broker, str) else ";".join(broker)
    if url.startswith(("redis://", "rediss://")) and not set(url) & {";", ","}:
        return url
    if url.startswith("redis+socket://") and not set(url) & {";", ","}:
        database = parse_qs(urlsplit(url).query).get("virtual_host", ["0"])[0].strip("/") or "0"
        return f"unix{url.removeprefix('redis+socket').partition('?')[0]}?db={database}"
    raise UsageError(
        f"the app's broker {safe_url(url)!r} is no single Redis: give redis_url (or "
        f"BATCHLLM_REDIS_URL), where batches are to be kept"
    )


def publish(
    app: Celery,
    batch_id: str,
    indexes: Sequence[int],
    *,
    queue: str = DEFAULT_QUEUE,
    priority: int = 0,
    give_up: Callable[[], bool] = lambda: False,
    offered: bool = False,
    strategy: str | None = None,
) -> bool:
    """Send one message. While the broker is away, try again until it is back or `give_up()`.

    Flower shows it under the name of its `strategy`.

    Sending again after an uncertain failure is harmless: the claim drops duplicates.

    Returns:
        False where it gave up.

    Raises:
        RedisDeniedError: the broker is a Redis that denies a right, or the password.
        UsageError: the app writes messages of Celery 3.
    """
    if app.conf.task_protocol != 2:
        told = app.conf.task_protocol
        raise UsageError(f"the app's task_protocol is {told!r}: batches need 2, Celery's default")
    backoff, reminder = 0.05, Reminder()
    while True:
        try:
            app.send_task(
                RUN_ITEMS,
                args=(batch_id, list(indexes)),
                task_id=f"{OFFERED}{uuid()}" if offered else None,
                queue=app.conf.task_default_queue if queue == DEFAULT_QUEUE else queue,
                # Celery on Redis serves 0 first; ours is 0 for usual, 9 for urgent.
                priority=9 - priority,
                headers={ITEMS_HEADER: len(indexes)},
                shadow=None if strategy is None else f"{STRATEGY_PREFIX}{strategy}",
                argsrepr=show_items(batch_id, indexes),
                kwargsrepr="",
                compression=NOT_PACKED if app.conf.task_compression else None,
                retry=False,
                ignore_result=True,
            )
            return True
        except (OperationalError, OSError, RedisError) as error:
            cause = error.__cause__ or error
            url = str(app.conf.broker_url)
            if is_denial(cause):
                raise RedisDeniedError(denied_words(cause, url)) from error
            if reminder.due():
                where, why = safe_url(url), describe(error)
                logger.warning("broker.away seconds=%.0f url=%s %s", reminder.seconds, where, why)
            if give_up():
                return False
            time.sleep(backoff)
            backoff = min(backoff * 2, 2.0)


def show_items(batch_id: str, indexes: Sequence[int]) -> str:
    """What Flower shows as arguments: `reviews[0:20]`, `reviews[7]`, `reviews[3,9,…]`."""
    first, last = indexes[0], indexes[-1]
    if len(indexes) == 1:
        return f"{batch_id}[{first}]"
    if last - first + 1 == len(indexes):
        return f"{batch_id}[{first}:{last + 1}]"
    shown = ",".join(str(index) for index in indexes[:5])
    return f"{batch_id}[{shown}{',…' if len(indexes) > 5 else ''}]"


def items_per_task(chosen: int | None, position: int) -> int:
    """How many items the message that starts at item `position` carries.

    Unless chosen: 1 for the first 200 items, so that each shows in Flower, then 10, then 100,
    which costs next to nothing (docs/benchmarks.md).
    """
    if chosen is not None:
        return chosen
    if position < 200:
        return 1
    return 10 if position < 2_000 else 100
