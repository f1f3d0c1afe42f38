"""kombu's Redis transport with fewer round trips and less work a message.

Celery apps made by `queue.make_app` have it; others take it by
`Celery(..., amqp="batchllm_celery.worker.broker:Amqp")`. Under a kombu that is not as ours expects
it, the app runs on kombu's own transport, and says so once.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import kombu
from celery import Celery
from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport import redis as kombu_redis

logger = logging.getLogger("batchllm_celery")

#: The minor version of kombu whose private parts `redis_transport` was written against.
TESTED_KOMBU = "5.7"

#: Messages fetched together at most: a worker's hub does nothing else until it has passed them on.
MOST_TOGETHER = 32

#: What it overrides or calls, with the parameters that it relies on.
_NEEDED = {
    "Transport._deliver": "self message queue",
    "Transport.connection_errors": "",
    "Channel.Message": "",
    "Channel._brpop_read": "self options",
    "Channel._brpop_start": "self timeout",
    "Channel._connparams": "self asynchronous",
    "Channel._create_client": "self asynchronous",
    "Channel._q_for_pri": "self queue pri",
    "Channel._size": "self queue",
    "Channel.active_queues": "",
    "Channel.conn_or_acquire": "self client",
    "Channel.global_keyprefix": "",
    "Channel.pool": "",
    "Channel.priority_steps": "",
    "Channel.qos": "",
    "Channel.sep": "",
    "QoS.ack": "self delivery_tag",
    "QoS.append": "self message delivery_tag",
    "QoS.can_consume": "self",
    "QoS.can_consume_max_estimate": "self",
    "QoS.pipe_or_acquire": "self pipe client",
    "QoS.reject": "self delivery_tag requeue",
    "QoS.restore_by_tag": "self tag client leftmost",
    "QoS.restore_unacked_once": "self stderr",
    "QoS.restore_visible": "self start num interval",
    "QoS.unacked_index_key": "",
    "QoS.unacked_key": "",
}


class _Gathered(threading.local):
    """What this thread does for many messages in one round trip."""

    tags: dict[Any, list[str]] | None = None
    """Acknowledgements that wait to travel together, by channel; None: each goes at once."""
    room: Callable[[], int] | None = None
    """How many messages may be fetched now; None: always one, as kombu does."""
    seen: Callable[[dict[str, Any]], None]
    """Told the headers of each message before the next one is thought of; set with `room`."""


gathered = _Gathered()


def fetch_together(
    room: Callable[[], int] | None, seen: Callable[[dict[str, Any]], None] = lambda headers: None
) -> None:
    """Let this thread's consumers fetch as many messages at once as there is room for.

    Only for tasks whose work survives the loss of its message, as a batch's items do: if the
    process dies in this moment, up to `MOST_TOGETHER` messages are gone, where kombu loses one.

    Args:
        room: messages that may be fetched now; None: one at a time again.
        seen: told the headers of each that is passed on; `room` may answer otherwise after it.
    """
    gathered.room, gathered.seen = room, seen


def gather_acknowledgements() -> None:
    """Keep what this thread acknowledges from now on until `send_acknowledgements`.

    Until then a message counts as delivered: if the process dies, it is delivered again. Works
    for apps made with `amqp=batchllm_celery.worker.broker:Amqp`, as `make_app`'s are.
    """
    if gathered.tags is None:
        gathered.tags = {}


def send_acknowledgements() -> None:
    """Send what was gathered, in one round trip; further ones go at once."""
    tags, gathered.tags = gathered.tags, None
    for qos, ended in (tags or {}).items():
        qos.forget(ended)


def differences() -> list[str]:
    """What this kombu has otherwise than our transport needs it; empty where they fit."""
    found = []
    version = str(getattr(kombu, "__version__", "unknown"))
    if version.split(".")[:2] != TESTED_KOMBU.split("."):
        found.append(f"kombu is {version[:20]}, not {TESTED_KOMBU}")
    for path, parameters in _NEEDED.items():
        part: Any = kombu_redis
        for name in path.split("."):
            part = getattr(part, name, _MISSING)
        if part is _MISSING:
            found.append(f"{path} is gone")
        elif parameters and list(inspect.signature(part).parameters) != parameters.split():
            found.append(f"{path} takes other parameters")
    return found


_MISSING = object()


@cache
def redis_transport() -> Any:
    """Our transport class; kombu's own, with one warning, where this kombu is not as we need it."""
    try:
        found = differences()
        if not found:
            module = importlib.import_module("batchllm_celery.worker.pool.redis_transport")
            return module.Transport
    except Exception as error:  # whatever else has changed shows when the classes are made
        found = [type(error).__name__]
    logger.warning(
        "broker.stock_transport reason=%r: more round trips a message; "
        "pip install 'kombu==%s.*' brings the fast transport back",
        "; ".join(found[:3]),
        TESTED_KOMBU,
    )
    return kombu_redis.Transport


class _Connection(Connection):
    """A connection that uses our transport in place of kombu's own for Redis."""

    def get_transport_cls(self) -> Any:
        found = super().get_transport_cls()
        return redis_transport() if found is kombu_redis.Transport else found


def use_in(app: Celery) -> None:
    """Let a worker of any app read through our transport: kombu's own ends at odd messages."""
    amqp: Any = app.amqp
    if amqp.Connection is Connection:
        amqp.Connection = _Connection


class Amqp(AMQP):
    """Give it to a Celery app of your own on Redis (`Celery(..., amqp=Amqp)`) for the same."""

    Connection = _Connection
