"""kombu's Redis transport with fewer round trips and less work a message.

Celery apps made by `queue.make_app` have it; others take it by
`Celery(..., amqp="batchllm_celery.worker.broker:Amqp")`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import ConnectionError as RedisConnectionError

logger = logging.getLogger("batchllm_celery")


class _Gathered(threading.local):
    """Acknowledgements of this thread that wait to travel together; None: each goes at once."""

    tags: dict[_QoS, list[str]] | None = None


_gathered = _Gathered()


@contextlib.contextmanager
def acknowledged_together() -> Iterator[None]:
    """Send what is acknowledged inside the block in one round trip at its end.

    Until then a message counts as delivered: if the process dies, it is delivered again. Works
    for apps made with `amqp=batchllm_celery.worker.broker:Amqp`, as `make_app`'s are.
    """
    tags: dict[_QoS, list[str]] = {}
    _gathered.tags = tags
    try:
        yield
    finally:
        _gathered.tags = None
        for qos, ended in tags.items():
            qos.forget(ended)


class _QoS(kombu_redis.QoS):
    def ack(self, delivery_tag: str) -> None:
        if _gathered.tags is None:
            super().ack(delivery_tag)
            return
        _gathered.tags.setdefault(self, []).append(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give back what is in hand, if that can be; what can't is delivered again when its
        visibility timeout is over. kombu would raise, and forbid a second try."""
        try:
            super().restore_unacked_once(stderr)
        except Exception as error:
            name = type(error).__name__
            logger.warning("broker.restore_failed error=%s", name)
            if self._delivered is not None:
                self._delivered.clear()

    def forget(self, tags: list[str]) -> None:
        """What kombu does for one acknowledged message, for many. What can't be forgotten,
        because the connection is lost, is delivered again, as with kombu."""
        try:
            with self.pipe_or_acquire() as pipe:
                pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags).execute()
        except Exception as error:
            name = type(error).__name__
            logger.warning("broker.ack_failed messages=%d error=%s", len(tags), name)


class _Channel(kombu_redis.Channel):
    """kombu makes a redis-py client for every command, a quarter of what a message costs; one
    serves as well, for it takes each command's connection from the same pool."""

    QoS = _QoS
    _kept: Any = None

    def _connparams(self, asynchronous: bool = False) -> Any:
        """A task that ends after the broker was lost acknowledges on the old channel. kombu then
        fails with an AttributeError, at which Celery ends its consumer, but not the process."""
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("this connection to the broker was closed")
        channel: Any = super()
        return channel._connparams(asynchronous)

    def _create_client(self, asynchronous: bool = False) -> Any:
        channel: Any = super()
        if asynchronous:
            return channel._create_client(asynchronous=True)
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = channel._create_client()
        return self._kept


class _Transport(kombu_redis.Transport):
    Channel = _Channel


class _Connection(Connection):
    def get_transport_cls(self) -> Any:
        found = super().get_transport_cls()
        return _Transport if found is kombu_redis.Transport else found


class Amqp(AMQP):
    """Give it to a Celery app of your own on Redis (`Celery(..., amqp=Amqp)`) for the same."""

    Connection = _Connection
