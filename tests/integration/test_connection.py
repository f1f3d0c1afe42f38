"""The connection on a real Valkey: killed, emptied and restarted under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import kombu
import pytest
import redis
from redis.exceptions import ResponseError

from batchllm_celery.connection import Connection, Script, broker_url
from batchllm_celery.events import ConnectionLost, ConnectionRestored, Event, Events
from batchllm_celery.ledger.batching import Coalescer
from tests.support import ValkeyServer, wait_until_async

ADD = Script.of("add.lua", "return {redis.call('INCRBY', KEYS[1], ARGV[1]), ARGV[2]}")


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    """A Valkey that a test may kill."""
    server = ValkeyServer().start()
    yield server
    server.stop()


async def test_a_script_runs_whether_redis_knows_it_or_not(connection: Connection) -> None:
    """A script that Redis has not seen, or has forgotten, runs exactly once all the same."""
    for total in (1, 2):
        assert await ADD(connection.client, ["t:add"], [1, b"\xff"]) == [total, b"\xff"]
    await connection.client.script_flush()
    assert await ADD(connection.client, ["t:add"], [1, 2.5]) == [3, b"2.5"]
    await connection.client.delete("t:add")


async def test_a_script_error_reaches_the_caller(connection: Connection) -> None:
    """What goes wrong inside a script is raised, not retried."""
    broken = Script.of("broken.lua", "return redis.error_reply('ERR no such batch')")
    with pytest.raises(ResponseError, match="no such batch"):
        await connection.patiently(lambda: broken(connection.client, []))


async def test_more_commands_than_sockets_wait_for_one(own_valkey: ValkeyServer) -> None:
    """A thousand commands at once share a few sockets instead of failing."""
    async with Connection(own_valkey.url, max_connections=2) as connection:
        replies = await asyncio.gather(*(connection.client.echo(str(n)) for n in range(1000)))
        clients = await connection.client.client_list()
    assert replies == [str(n).encode() for n in range(1000)]
    assert len(clients) <= 2


async def test_calls_survive_a_killed_and_restarted_redis(own_valkey: ValkeyServer) -> None:
    """Every patient call ends with its answer after an outage; the outage is told once."""
    heard: list[Event] = []
    async with Connection(own_valkey.url, events=Events(heard.append)) as connection:
        await connection.ping()
        await connection.client.set("kept", 1)
        own_valkey.kill()
        calls = [
            asyncio.create_task(connection.patiently(lambda: connection.client.get("kept")))
            for _ in range(50)
        ]
        await wait_until_async(lambda: connection.lost)
        await asyncio.to_thread(own_valkey.start)
        assert await asyncio.wait_for(asyncio.gather(*calls), 10) == [b"1"] * 50
        await ADD(connection.client, ["t:add"], [1, 1])
    assert [type(event) for event in heard] == [ConnectionLost, ConnectionRestored]


async def test_a_cancelled_command_does_not_shift_the_answers(connection: Connection) -> None:
    """A reply that nobody waits for any more is never given to the next command."""
    for number in range(50):
        slow = asyncio.ensure_future(connection.client.blpop(["t:none"], timeout=0.05))
        echo = asyncio.ensure_future(connection.client.echo(f"a{number}"))
        await asyncio.sleep(0)
        slow.cancel()
        echo.cancel()
        assert await connection.client.echo(f"b{number}") == f"b{number}".encode()
    await asyncio.gather(slow, echo, return_exceptions=True)


async def test_a_subscriber_may_wait_longer_than_a_command(redis_url: str) -> None:
    """Silence on a channel is not a timeout."""
    async with (
        Connection(redis_url, socket_timeout=0.2) as connection,
        connection.pubsub() as subscriber,
    ):
        await subscriber.subscribe("t:channel")
        messages = subscriber.listen()
        assert (await anext(messages))["type"] == "subscribe"
        next_message = asyncio.create_task(anext(messages))
        done, _ = await asyncio.wait([next_message], timeout=0.6)
        assert not done
        await connection.client.publish("t:channel", b"news")
        assert (await asyncio.wait_for(next_message, 5))["data"] == b"news"


async def test_coalesced_calls_travel_in_one_script(connection: Connection) -> None:
    """A thousand awaiting callers cost a handful of round trips and get their own answers."""
    trips = 0

    async def flush(items: list[int]) -> list[int]:
        nonlocal trips
        trips += 1
        return [int(reply) for reply in await ECHO(connection.client, [], items)]

    coalescer: Coalescer[int, int] = Coalescer(flush, max_batch=500)
    assert await asyncio.gather(*(coalescer.submit(n) for n in range(1000))) == list(range(1000))
    assert trips == 2


ECHO = Script.of("echo.lua", "return ARGV")


def test_celery_speaks_to_the_same_redis_through_the_broker_url(own_valkey: ValkeyServer) -> None:
    """kombu understands our spelling of a unix socket, database included."""
    with kombu.Connection(broker_url(f"{own_valkey.url}?db=3")) as broker:
        queue = broker.SimpleQueue("q")
        queue.put("hello")
        assert queue.get(timeout=5).payload == "hello"
        queue.put("left")
        queue.close()
    with redis.Redis.from_url(own_valkey.url, db=3) as client:
        assert client.keys("q*") == [b"q"]
