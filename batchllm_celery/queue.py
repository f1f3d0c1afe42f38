"""The Celery side of a fleet: its app, and the one message that work travels in.

A message is a wake-up, not the truth: it names a batch and a few item indexes, never a prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid

from batchllm_celery.connection import broker_url
from batchllm_celery.embedded import resolve_url
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

App: TypeAlias = Celery
"""A Celery app, for those who only hand one on."""

RUN_ITEMS: Final = "batchllm.run_items"
#: How many items a message names: a worker must know before it reads the body.
ITEMS_HEADER: Final = "items"
#: Ids of messages begin so that a worker sent for items which no message had brought.
OFFERED: Final = "offered-"
DEFAULT_QUEUE: Final = "default"
AMQP: Final = "batchllm_celery.worker.broker:Amqp"
POOL: Final = "batchllm_celery.worker.pool:AsyncioPool"

#: A message unacknowledged for so long is delivered again. A duplicate costs one claim, which
#: answers `held`, so this may be shorter than a call lasts.
VISIBILITY_TIMEOUT_SECONDS: Final = 120


class _EmbeddedBroker:
    """Celery settings whose broker is found, and started, when somebody reads its URL."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def broker_url(self) -> str:
        return broker_url(resolve_url(self._settings))


def make_app(settings: Settings, url: str | None) -> Celery:
    """The Celery app of a fleet; a worker installs the tasks.

    Args:
        settings: namespace, lanes, slots.
        url: Redis; None: the embedded Valkey, started when the app first connects to its broker.
    """
    app = Celery("batchllm", set_as_current=False, amqp=AMQP)
    if url is None:
        app.config_from_object(_EmbeddedBroker(settings))
    else:
        app.conf.update(broker_url=broker_url(url))
    app.conf.update(
        broker_transport_options=_transport_options(settings),
        broker_connection_retry_on_startup=True,
        task_default_queue=DEFAULT_QUEUE,
        task_queues=[Queue(name) for name in settings.queues],
        task_create_missing_queues=True,
        task_ignore_result=True,
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


def publish(
    app: Celery,
    batch_id: str,
    indexes: Sequence[int],
    *,
    queue: str = DEFAULT_QUEUE,
    priority: int = 0,
    give_up: Callable[[], bool] = lambda: False,
    offered: bool = False,
) -> bool:
    """Send one message. While the broker is away, try again until it is back or `give_up()`.

    Sending again after an uncertain failure is harmless: the claim drops duplicates.

    Returns:
        False where it gave up.
    """
    backoff = 0.05
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
                argsrepr=show_items(batch_id, indexes),
                kwargsrepr="",
                retry=False,
                ignore_result=True,
            )
            return True
        except (OperationalError, OSError) as error:
            if give_up():
                return False
            logger.debug("queue.publish_failed error=%s", type(error).__name__)
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
