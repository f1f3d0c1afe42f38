"""A message that can't be run is dropped; it ends no worker, and takes no other message with it."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu import Queue

from batchllm_celery import Batch, Producer
from batchllm_celery.connection import broker_url
from batchllm_celery.models import Quota, QuotaLimits
from batchllm_celery.worker.pool.transport import Amqp
from tests.acceptance.fleet import Fleet
from tests.acceptance.odd_messages import odd_messages, right_message
from tests.integration import worker_app  # noqa: F401 - registers its strategy here too
from tests.support import wait_until

ITEMS = 200
WIDE = Quota(name="wide", limits=QuotaLimits(requests_per_minute=1_000_000))
_TROUBLE = re.compile(
    r"Connection to broker lost|Unrecoverable|Traceback|consumer: Cannot connect|Trying again"
)


@pytest.fixture
def producer(redis_url: str, namespace: str) -> Iterator[Producer]:
    with Producer(redis_url=redis_url, namespace=namespace) as opened:
        yield opened


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as opened:
        yield opened


def workers(fleet: Fleet, count: int = 2) -> list[str]:
    fleet.env["BATCHLLM_APP"] = "tests.integration.worker_app"
    names = [f"celery{number}" for number in range(count)]
    for name in names:
        fleet.start_celery_worker(
            "--without-mingle", "--without-gossip", "--loglevel", "INFO", name=name
        )
    wait_until(lambda: all(" ready." in fleet.said(name) for name in names), 60)
    return names


def submit(producer: Producer, items: int = ITEMS) -> Batch:
    rows = [f"question {n}" for n in range(items)]
    return producer.submit(rows, strategy="napping", quota=WIDE)


def assert_answered_once(batch: Batch, items: int = ITEMS) -> None:
    results = list(batch.results())
    assert sorted(result.index for result in results) == list(range(items))
    assert all(result.success for result in results)


def assert_untroubled(fleet: Fleet, names: list[str]) -> None:
    """All live, never lost their broker, and wrote no endless line."""
    assert [process.poll() for process in fleet.processes] == [None] * len(names)
    for name in names:
        said = fleet.said(name)
        assert not _TROUBLE.search(said), said[-3000:]
        assert max(map(len, said.splitlines())) < 1000


def dropped(producer: Producer) -> int:
    """How many messages the workers say they have dropped so far."""
    return sum(worker.dropped_messages for worker in producer.workers())


def assert_queue_is_empty(client: redis.Redis, namespace: str) -> None:
    prefix = f"{namespace}:celery:"
    wait_until(lambda: client.llen(f"{prefix}default") == 0, 60)
    wait_until(lambda: client.hlen(f"{prefix}unacked") == 0, 30)
    assert client.zcard(f"{prefix}unacked_index") == 0


@pytest.mark.timeout(180)
def test_odd_messages_one_by_one_end_no_worker(
    fleet: Fleet, producer: Producer, client: redis.Redis, redis_url: str, namespace: str
) -> None:
    """300 of them, each read before the next one comes, beside 200 items that are answered once."""
    right = right_message(redis_url, namespace)
    names = workers(fleet)
    batch = submit(producer)
    key = f"{namespace}:celery:default"
    for raw in odd_messages(right, 300, seed=1):
        client.lpush(key, raw)
        wait_until(lambda: client.llen(key) == 0, 60, interval=0.002)
    assert_answered_once(batch)
    assert_queue_is_empty(client, namespace)
    assert_untroubled(fleet, names)
    wait_until(lambda: dropped(producer) > 200)


@pytest.mark.timeout(180)
def test_a_flood_of_odd_messages_is_read_through(
    fleet: Fleet, producer: Producer, client: redis.Redis, redis_url: str, namespace: str
) -> None:
    """3,000 of them on both sides of 200 items; the log has a line a second, not a line each."""
    right = right_message(redis_url, namespace)
    flood = list(odd_messages(right, 3000, seed=2))
    key = f"{namespace}:celery:default"
    client.lpush(key, *flood[:1500])
    batch = submit(producer)
    client.lpush(key, *flood[1500:])
    names = workers(fleet)
    assert_answered_once(batch)
    assert_queue_is_empty(client, namespace)
    assert_untroubled(fleet, names)
    lines = sum(fleet.said(name).count("message_dropped") for name in names)
    assert 0 < lines < 300
    wait_until(lambda: dropped(producer) > 2000)


@pytest.mark.timeout(120)
def test_a_queue_that_is_no_list_is_set_aside(
    fleet: Fleet, producer: Producer, client: redis.Redis, namespace: str
) -> None:
    """So are kombu's own keys; what they held stays, under another name."""
    prefix = f"{namespace}:celery:"
    for key in ("default", "default\x06\x163", "unacked_index"):
        client.set(f"{prefix}{key}", "not yours")
    client.lpush(f"{prefix}unacked", "nor yours")
    names = workers(fleet, 1)
    assert_answered_once(submit(producer))
    assert_queue_is_empty(client, namespace)
    assert_untroubled(fleet, names)
    assert client.get(f"{prefix}default.not-a-list") == b"not yours"
    assert client.get(f"{prefix}unacked_index.not-a-zset") == b"not yours"
    assert client.lrange(f"{prefix}unacked.not-a-hash", 0, -1) == [b"nor yours"]


@pytest.mark.timeout(120)
def test_what_can_not_be_put_back_keeps_nothing_else_from_it(
    redis_url: str, namespace: str, client: redis.Redis
) -> None:
    """Garbage among the unacknowledged messages goes; the message behind it returns."""
    prefix = f"{namespace}:celery:"
    options = {"global_keyprefix": prefix, "visibility_timeout": 1}
    right = right_message(redis_url, namespace)
    with Amqp.Connection(broker_url(redis_url), transport_options=options) as connection:
        channel: Any = connection.channel()
        Queue("q", channel=channel).declare()
        client.hset(
            f"{prefix}unacked",
            mapping={"bad": "{not json", "odd": "[5]", "good": json.dumps([right, "", "q"])},
        )
        client.zadd(f"{prefix}unacked_index", {"bad": 1, "odd": 2, "good": 3})
        channel.qos.restore_visible()
    assert client.hlen(f"{prefix}unacked") == 0
    assert client.zcard(f"{prefix}unacked_index") == 0
    assert sum(client.llen(key) for key in client.scan_iter(f"{prefix}q*")) == 1


#: Takes away what our transport needs and kombu's own does not.
_OTHER_KOMBUS = {
    "version": "import kombu; kombu.__version__ = '5.8.0'",
    "attribute": "from kombu.transport import virtual as v; del v.QoS.can_consume_max_estimate",
    "class": "import kombu.transport.redis as r; del r.QoS",
    "signature": (
        "import kombu.transport.redis as r; start = r.Channel._brpop_start\n"
        "def other(self, timeout=None, more=0): return start(self, timeout)\n"
        "r.Channel._brpop_start = other"
    ),
    "our own classes": (
        "import sys; sys.modules['batchllm_celery.worker.pool.redis_transport'] = None"
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("other", _OTHER_KOMBUS.values(), ids=_OTHER_KOMBUS)
def test_under_another_kombu_its_own_transport_works(
    fleet: Fleet, producer: Producer, client: redis.Redis, namespace: str, other: str
) -> None:
    """One warning says so; the items are answered, and a message that is none ends nobody."""
    (fleet.folder / "sitecustomize.py").write_text(other)
    fleet.env["PYTHONPATH"] = f"{fleet.folder}:{fleet.env['PYTHONPATH']}"
    names = workers(fleet, 1)
    client.lpush(f"{namespace}:celery:default", "{not json")
    assert_answered_once(submit(producer, 50), 50)
    assert_queue_is_empty(client, namespace)
    assert [process.poll() for process in fleet.processes] == [None]
    assert fleet.said(names[0]).count("broker.stock_transport") == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_hosts_own_tasks_go_on_beside_odd_messages(
    fleet: Fleet,
    producer: Producer,
    client: redis.Redis,
    redis_url: str,
    namespace: str,
    pool: str,
) -> None:
    """On kombu's own transport too, whose worker may connect anew but does not end."""
    odd = odd_messages(right_message(redis_url, namespace), 200, seed=3)
    note = right_message(redis_url, namespace)
    key = f"{namespace}:celery:default"
    batch = submit(producer, 30)
    for number, raw in enumerate(odd):
        client.lpush(key, raw)
        if number % 10 == 0:
            note["headers"] |= {"task": "note", "id": f"note-{number}"}
            note["properties"]["delivery_tag"] = f"note-{number}"
            body = json.dumps([[number], {}, {}]).encode()
            note["body"] = base64.b64encode(body).decode()
            client.lpush(key, json.dumps(note))
    fleet.env["BATCHLLM_OFFER_SECONDS"] = "1"
    command = ["celery", "-A", "tests.acceptance.host_app", "worker", "-P", pool, "-c", "2"]
    options = ["--without-mingle", "--without-gossip", "--loglevel", "INFO"]
    fleet._popen([sys.executable, "-m", *command, *options], "host")
    assert_answered_once(batch, 30)
    wait_until(lambda: client.scard(f"{namespace}:celery:noted") == 20, 60)
    assert_queue_is_empty(client, namespace)
    assert [process.poll() for process in fleet.processes] == [None]
