"""kombu's Redis transport with fewer round trips and less work a message.

Celery apps made by `queue.make_app` have it; others take it by
`Celery(..., amqp="batchllm_celery.worker.broker:Amqp")`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

logger = logging.getLogger("batchllm_celery")

#: A message that came this soon after it was asked for had others behind it, most likely.
BUSY_SECONDS = 0.005
#: Messages fetched together at most: a worker's hub does nothing else until it has passed them on.
MOST_TOGETHER = 32


#: Its type stubs leave out most of what is overridden here.
_KombuChannel: Any = kombu_redis.Channel


class _Gathered(threading.local):
    """What this thread does for many messages in one round trip."""

    tags: dict[_QoS, list[str]] | None = None
    """Acknowledgements that wait to travel together; None: each goes at once."""
    room: Callable[[], int] | None = None
    """How many messages may be fetched now; None: always one, as kombu does."""
    seen: Callable[[dict[str, Any]], None]
    """Told the headers of each message before the next one is thought of; set with `room`."""


_gathered = _Gathered()


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
    _gathered.room, _gathered.seen = room, seen


def gather_acknowledgements() -> None:
    """Keep what this thread acknowledges from now on until `send_acknowledgements`.

    Until then a message counts as delivered: if the process dies, it is delivered again. Works
    for apps made with `amqp=batchllm_celery.worker.broker:Amqp`, as `make_app`'s are.
    """
    if _gathered.tags is None:
        _gathered.tags = {}


def send_acknowledgements() -> None:
    """Send what was gathered, in one round trip; further ones go at once."""
    tags, _gathered.tags = _gathered.tags, None
    for qos, ended in (tags or {}).items():
        qos.forget(ended)


class _QoS(kombu_redis.QoS):
    _arriving: list[Any] | None = None

    @contextlib.contextmanager
    def arriving_together(self) -> Iterator[None]:
        """Note all that is delivered in the block as unacknowledged, in one round trip."""
        self._arriving = []
        try:
            yield
        finally:
            self._note_arrived()
            self._arriving = None

    def append(self, message: Any, delivery_tag: str) -> None:
        if self._arriving is None:
            super().append(message, delivery_tag)
            return
        self._arriving.append(message)
        _gathered.seen(message.headers or {})
        virtual.QoS.append(self, message, delivery_tag)

    def _note_arrived(self) -> None:
        arrived, self._arriving = self._arriving, []
        if not arrived:
            return
        now, bodies = time.time(), {}
        for message in arrived:
            at = message.delivery_info
            bodies[message.delivery_tag] = dumps([message._raw, at["exchange"], at["routing_key"]])
        with self.pipe_or_acquire() as pipe:
            pipe.zadd(self.unacked_index_key, dict.fromkeys(bodies, now))
            pipe.hset(self.unacked_key, mapping=bodies)
            pipe.execute()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self._arriving:  # a message that nobody wants is refused while it is passed on
            self._note_arrived()
        super().reject(delivery_tag, requeue)

    def ack(self, delivery_tag: str) -> None:
        if self._arriving:
            self._note_arrived()
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


class _Channel(_KombuChannel):  # type: ignore[misc]  # an Any is no class for mypy
    """kombu makes a redis-py client for every command, a quarter of what a message costs; one
    serves as well, for it takes each command's connection from the same pool."""

    QoS = _QoS
    _kept: Any = None
    _asked_at = 0.0
    _fetches_many = True

    def _connparams(self, asynchronous: bool = False) -> Any:
        """A task that ends after the broker was lost acknowledges on the old channel. kombu then
        fails with an AttributeError, at which Celery ends its consumer, but not the process."""
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("this connection to the broker was closed")
        return super()._connparams(asynchronous)

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = super()._create_client()
        return self._kept

    def _brpop_start(self, timeout: Any = None) -> None:
        self._asked_at = time.monotonic()
        super()._brpop_start(timeout)

    def _brpop_read(self, **options: Any) -> Any:
        if _gathered.room is None or not isinstance(self.qos, _QoS):
            return super()._brpop_read(**options)
        busy = time.monotonic() - self._asked_at < BUSY_SECONDS
        with self.qos.arriving_together():
            found = super()._brpop_read(**options)
            if busy and self._fetches_many and self.qos.can_consume():
                allowed = self.qos.can_consume_max_estimate()
                count = min(_gathered.room(), MOST_TOGETHER)
                self._fetch_more(count if allowed is None else min(count, allowed))
        return found

    def _fetch_more(self, count: int) -> None:
        """What waits behind the message that came, of the same priority."""
        if count <= 0:
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        prefix = self.global_keyprefix or ""
        keys = [
            prefix + self._q_for_pri(queue, priority)
            for priority in self.priority_steps
            for queue in queues
        ]
        try:
            with self.conn_or_acquire() as client:
                reply = client.execute_command("LMPOP", len(keys), *keys, "RIGHT", "COUNT", count)
        except ResponseError:  # a Redis before 7.0, or a user who may not: one at a time then
            self._fetches_many = False
            return
        if reply:
            self._pass_on(bytes_to_str(reply[0])[len(prefix) :], deque(reply[1]))

    def _pass_on(self, key: str, messages: deque[bytes]) -> None:
        """Deliver while there is room; the others go back to where they were."""
        queue = key.rsplit(self.sep, 1)[0]
        try:
            while messages and self.qos.can_consume():
                self.connection._deliver(loads(bytes_to_str(messages.popleft())), queue)
        finally:
            if messages:
                with self.conn_or_acquire() as client:
                    client.rpush(key, *reversed(messages))


class _Transport(kombu_redis.Transport):
    Channel = _Channel


class _Connection(Connection):
    def get_transport_cls(self) -> Any:
        found = super().get_transport_cls()
        return _Transport if found is kombu_redis.Transport else found


class Amqp(AMQP):
    """Give it to a Celery app of your own on Redis (`Celery(..., amqp=Amqp)`) for the same."""

    Connection = _Connection
