"""Our subclass of kombu's Redis transport: many messages a round trip, none lost or mixed up."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Consumer, Message, Producer, Queue

from batchllm_celery.connection import broker_url
from batchllm_celery.errors import UsageError
from batchllm_celery.queue import publish
from batchllm_celery.worker.pool import bad_messages, redis_transport
from batchllm_celery.worker.pool.transport import MOST_TOGETHER, Amqp, fetch_together

WAITING = 40


@dataclass
class Reader:
    """A queue of numbered messages, and a consumer that keeps what it gets."""

    connection: Any
    channel: Any
    client: redis.Redis
    prefix: str
    got: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Messages that wait in the queue."""
        return int(self.client.llen(f"{self.prefix}q"))

    @property
    def unacknowledged(self) -> int:
        return int(self.client.hlen(f"{self.prefix}unacked"))

    def consume(self, react: Callable[[Message], None] = lambda message: None) -> None:
        def on_message(body: Any, message: Message) -> None:
            self.got.append(body["n"])
            react(message)

        Consumer(self.channel, [Queue("q")], callbacks=[on_message]).consume()

    def fetch(self) -> None:
        """One look at the queue."""
        with suppress(socket.timeout):
            self.connection.drain_events(timeout=1)


@contextmanager
def opened(url: str, namespace: str, **options: Any) -> Iterator[Reader]:
    prefix = f"{namespace}:celery:"
    connection = Amqp.Connection(
        broker_url(url), transport_options={"global_keyprefix": prefix, **options}
    )
    with connection, redis.Redis.from_url(url) as client:
        channel = connection.channel()
        producer = Producer(channel)
        Queue("q", channel=channel).declare()
        for n in range(WAITING):
            producer.publish({"n": n}, routing_key="q", exchange="", headers={"items": n % 2 + 1})
        try:
            yield Reader(connection, channel, client, prefix)
        finally:
            fetch_together(None)
            for key in client.scan_iter(f"{prefix}*"):
                client.delete(key)


@pytest.fixture(autouse=True)
def _always_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, a message that came had others behind it."""
    monkeypatch.setattr(redis_transport, "BUSY_SECONDS", 60.0)


@pytest.fixture
def reader(redis_url: str, namespace: str) -> Iterator[Reader]:
    with opened(redis_url, namespace) as reader:
        yield reader


def test_one_look_brings_many_in_order(reader: Reader) -> None:
    """All of them are noted as unacknowledged, and every header was seen."""
    reader.consume()
    fetch_together(lambda: 1000, lambda headers: reader.sizes.append(headers["items"]))
    reader.fetch()
    assert reader.got == list(range(MOST_TOGETHER + 1))
    assert reader.unacknowledged == len(reader.got)
    assert reader.left == WAITING - len(reader.got)
    assert reader.sizes == [n % 2 + 1 for n in reader.got]


def test_one_at_a_time_unless_it_was_asked_for(reader: Reader) -> None:
    """Apps whose tasks can't do without their message lose no more of them than with kombu."""
    reader.consume()
    reader.fetch()
    assert reader.got == [0]


def test_no_more_than_there_is_room_for(reader: Reader) -> None:
    """What is fetched is bounded by the room and by the prefetch limit."""
    reader.consume()
    fetch_together(lambda: 4)
    reader.fetch()
    assert reader.got == list(range(5))
    reader.channel.basic_qos(0, 7, False)
    fetch_together(lambda: 1000)
    reader.fetch()
    assert reader.got == list(range(7))


def test_what_turns_out_to_be_too_much_goes_back_to_its_place(reader: Reader) -> None:
    """Messages that are larger than the last ones were: the rest stays for the neighbours."""
    qos = reader.channel.qos
    usual = qos.can_consume
    qos.can_consume = lambda: len(reader.got) < 10 and usual()
    reader.consume()
    fetch_together(lambda: 1000)
    reader.fetch()
    assert reader.got == list(range(10))
    assert (reader.left, reader.unacknowledged) == (WAITING - 10, 10)
    qos.can_consume = usual
    reader.fetch()
    assert reader.got == list(range(WAITING))


@pytest.mark.parametrize("broken", ["{not json", "[]", '{"properties": {}}', "1" * 5000])
def test_a_broken_message_takes_no_other_with_it(reader: Reader, broken: str) -> None:
    """It is dropped, wherever among them it comes; the others arrive in their order."""
    reader.client.lset(f"{reader.prefix}q", -6, broken)
    reader.client.lset(f"{reader.prefix}q", -1, broken)
    reader.consume()
    fetch_together(lambda: 1000)
    while reader.left:
        reader.fetch()
    assert reader.got == [n for n in range(WAITING) if n not in (0, 5)]
    assert reader.unacknowledged == len(reader.got)


def test_what_a_consumer_raises_is_raised(reader: Reader) -> None:
    """Only what can't be read is dropped: errors of whoever reads are their own."""

    def refuse(message: Message) -> None:
        raise ValueError("mine")

    reader.consume(refuse)
    with pytest.raises(ValueError, match="mine"):
        reader.fetch()


@pytest.mark.parametrize(
    ("react", "left"),
    [
        (lambda message: message.ack(), WAITING - MOST_TOGETHER - 1),
        (lambda message: message.reject(), WAITING - MOST_TOGETHER - 1),
        (lambda message: message.requeue(), WAITING),
    ],
    ids=["ack", "reject", "requeue"],
)
def test_a_message_may_be_settled_while_it_is_passed_on(
    reader: Reader, react: Callable[[Message], None], left: int
) -> None:
    """Nothing that is settled stays noted as unacknowledged, to come back again and again."""
    reader.consume(react)
    fetch_together(lambda: 1000)
    reader.fetch()
    assert reader.unacknowledged == 0
    assert reader.left == left


def test_without_acknowledgements_it_is_kombus(redis_url: str, namespace: str) -> None:
    """`ack_emulation=False` has no note of what is unacknowledged."""
    with opened(redis_url, namespace, ack_emulation=False) as reader:
        reader.consume()
        fetch_together(lambda: 1000)
        reader.fetch()
        assert reader.got == [0]


@pytest.mark.parametrize(
    "settings",
    [
        {"task_compression": "gzip"},
        {"task_compression": "bzip2"},
        {"task_serializer": "pickle", "accept_content": ["pickle"]},
        {"task_send_sent_event": True, "task_default_priority": 5},
    ],
    ids=str,
)
def test_a_hosts_settings_keep_no_message_of_ours_from_its_worker(
    redis_url: str, namespace: str, settings: dict[str, Any]
) -> None:
    """Ours is short, and never packed: a packed one would be dropped as a bomb."""
    options = {"global_keyprefix": f"{namespace}:celery:"}
    app = Celery("host", set_as_current=False, broker=broker_url(redis_url))
    app.conf.update(settings, broker_transport_options=options, task_default_queue="host")
    publish(app, "b", [0, 1])
    with Amqp.Connection(broker_url(redis_url), transport_options=options) as connection:
        message = Queue("host", channel=connection.channel()).get(accept=["json", "pickle"])
        assert message is not None
        bad_messages.check(message)
        message.ack()


def test_a_host_with_messages_of_celery_3_is_told(redis_url: str) -> None:
    """Its workers would drop each one, and the batch would never run."""
    app = Celery("host", set_as_current=False, broker=broker_url(redis_url))
    app.conf.task_protocol = 1
    with pytest.raises(UsageError, match="task_protocol"):
        publish(app, "b", [0])
