"""The classes of `broker`: they override private parts of kombu, which `broker` looks at first."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from batchllm_celery.queue import NOT_PACKED, RUN_ITEMS
from batchllm_celery.worker.pool.bad_messages import UNREADABLE, BadMessageError, dropped
from batchllm_celery.worker.pool.transport import MOST_TOGETHER, gathered

logger = logging.getLogger("batchllm_celery")

#: A message that came this soon after it was asked for had others behind it, most likely.
BUSY_SECONDS = 0.005

#: Its type stubs leave out most of what is overridden here.
_KombuChannel: Any = kombu_redis.Channel


class _Message(_KombuChannel.Message):
    """A message that has all that kombu takes for granted.

    Raises:
        BadMessageError: when it is made of anything else.
    """

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        _check_envelope(payload)
        try:
            super().__init__(payload, channel=channel, **options)
        except UNREADABLE as error:
            raise BadMessageError(f"its body can't be read: {type(error).__name__}") from None


def _check_envelope(payload: Any) -> None:
    """Whether a message has the parts that kombu reads, each of its type."""
    match payload:
        case {
            "properties": {
                "delivery_tag": str(tag),
                "delivery_info": {"exchange": str(exchange), "routing_key": str(key)},
            }
        }:
            headers = payload.get("headers")
        case _:
            raise BadMessageError("its properties are not those of a message")
    if not f"{tag}{exchange}{key}".isprintable():  # half a surrogate pair has no UTF-8
        raise BadMessageError("its tag or its route is not printable")
    texts = (payload.get(name) for name in ("body", "content-type", "content-encoding"))
    if not all(text is None or isinstance(text, str) for text in texts):
        raise BadMessageError("its body or the type of it is no text")
    if headers is not None and not isinstance(headers, dict):
        raise BadMessageError("its headers are no object")
    # Ours never is: what a small one unpacks to has no bound.
    packed = headers and headers.get("compression") not in (None, "", NOT_PACKED)
    if headers and headers.get("task") == RUN_ITEMS and packed:
        raise BadMessageError("its body is compressed")


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
        gathered.seen(message.headers)
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
        if gathered.tags is None:
            super().ack(delivery_tag)
            return
        gathered.tags.setdefault(self, []).append(delivery_tag)
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

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """The first thing that reads kombu's own keys."""
        try:
            super().restore_visible(*args, **options)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            channel: Any = self.channel
            channel._set_aside_foreign([])

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put an unacknowledged message back; one that can't be read would keep all others from
        it for ever."""
        try:
            super().restore_by_tag(tag, client, leftmost)
        except UNREADABLE as error:
            dropped.add(f"it can't be put back: {type(error).__name__}")
            with self.pipe_or_acquire(client=client) as pipe:
                pipe.zrem(self.unacked_index_key, tag).hdel(self.unacked_key, tag).execute()

    def forget(self, tags: list[str]) -> None:
        """What kombu does for one acknowledged message, for many. What can't be forgotten,
        because the connection is lost, is delivered again, as with kombu."""
        try:
            with self.pipe_or_acquire() as pipe:
                pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags).execute()
        except Exception as error:
            name = type(error).__name__
            logger.warning("broker.ack_failed messages=%d error=%s", len(tags), name)


class _Channel(_KombuChannel):
    """kombu makes a redis-py client for every command, a quarter of what a message costs; one
    serves as well, for it takes each command's connection from the same pool."""

    QoS = _QoS
    Message = _Message
    _kept: Any = None
    _asked_at = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._fetches_many = hasattr(self, "_queue_cycle")

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
        if gathered.room is None or not isinstance(self.qos, _QoS):
            return self._read_one(**options)
        busy = time.monotonic() - self._asked_at < BUSY_SECONDS
        with self.qos.arriving_together():
            found = self._read_one(**options)
            if busy and self._fetches_many and self.qos.can_consume():
                allowed = self.qos.can_consume_max_estimate()
                count = min(gathered.room(), MOST_TOGETHER)
                self._fetch_more(count if allowed is None else min(count, allowed))
        return found

    def _read_one(self, **options: Any) -> Any:
        """What kombu does for one message. One that it can't parse has left the queue already."""
        self.connection.passed_on = False
        try:
            return super()._brpop_read(**options)
        except UNREADABLE as error:
            if self.connection.passed_on:
                raise  # its consumer's own
            dropped.add(f"it is no JSON: {type(error).__name__}")
            return True
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._set_aside_foreign(self.active_queues)
            return True

    def _size(self, queue: str) -> Any:
        """Asked first of all when a queue is declared."""
        try:
            return super()._size(queue)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._set_aside_foreign([queue])
            return super()._size(queue)

    def _set_aside_foreign(self, names: list[str]) -> None:
        """Rename keys that are not of the type that kombu needs: nothing else in any queue could
        be read before somebody did."""
        queues = [self._q_for_pri(name, step) for step in self.priority_steps for name in names]
        types = dict.fromkeys(queues, b"list")
        types |= {self.qos.unacked_key: b"hash", self.qos.unacked_index_key: b"zset"}
        with self.conn_or_acquire() as client:
            for name, kind in types.items():
                key = f"{self.global_keyprefix or ''}{name}"
                found = client.execute_command("TYPE", key)
                if found not in (kind, b"none"):
                    aside = f"{key}.not-a-{kind.decode()}"
                    client.execute_command("RENAME", key, aside)
                    logger.error(
                        "broker.key_set_aside key=%s type=%s renamed_to=%s",
                        *(key, found.decode(), aside),
                    )

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
                item = messages.popleft()
                try:
                    message = loads(bytes_to_str(item))
                except UNREADABLE as error:
                    dropped.add(f"it is no JSON: {type(error).__name__}")
                else:
                    self.connection._deliver(message, queue)
        finally:
            if messages:
                with self.conn_or_acquire() as client:
                    client.rpush(key, *reversed(messages))


class Transport(kombu_redis.Transport):
    """kombu's Redis transport, with the channel above."""

    Channel = _Channel
    #: Whether what was read has reached a consumer: errors are its own from then on.
    passed_on = False

    def _deliver(self, message: Any, queue: str | None) -> None:
        self.passed_on = True
        try:
            super()._deliver(message, queue)
        except BadMessageError as error:
            dropped.add(str(error))
