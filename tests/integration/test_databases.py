"""Fleets in several databases of one Redis, with the same names: channels know no database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from batchllm_celery.connection import Connection
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import Heartbeat
from batchllm_celery.ledger.heartbeat import Beat
from batchllm_celery.limiter import CallOutcome, Estimate, Limiter
from batchllm_celery.models import BatchState, Quota, QuotaLimits
from tests.integration.ledger_support import BATCH, feed_all, ledger, take
from tests.support import wait_until_async

ONE = Estimate(1, 1)


@contextlib.asynccontextmanager
async def in_database(
    url: str, namespace: str, database: int
) -> AsyncIterator[tuple[Connection, Limiter]]:
    """One process of the fleet in this database, with a quota that never holds it up."""
    async with Connection(f"{url}?db={database}") as connection:
        keys = Keys(namespace, connection.database)
        async with Limiter(connection, keys, process_id="same") as limiter:
            await limiter.configure(Quota(name="q", limits=QuotaLimits(requests_per_minute=60_000)))
            yield connection, limiter
        await connection.client.flushdb()


async def refuse(limiter: Limiter) -> None:
    permit = await limiter.acquire("q", ONE)
    limiter.settle(permit, CallOutcome.REFUSED, retry_after=0.2)


async def test_a_refusal_stops_its_own_database_only(redis_url: str, namespace: str) -> None:
    """The neighbour with the same namespace and quota hears nothing of it."""
    async with (
        in_database(redis_url, namespace, 1) as (_, here),
        in_database(redis_url, namespace, 2) as (connection, there),
    ):
        before = (await there.state("q")).epoch
        await asyncio.gather(refuse(here), there.acquire("q", ONE))
        await wait_until_async(lambda: _epoch_grew(here))
        permit = await there.acquire("q", ONE)
        assert there.may_start(permit)
        after = await there.state("q")
        assert after.cooldown_remaining == 0
        assert before in (0, after.epoch)
        channels: Any = await connection.client.pubsub_channels(f"{namespace}:*")
        assert {name.decode() for name in channels} == {
            Keys(namespace, number).quota("q").channel for number in (1, 2)
        }


async def _epoch_grew(limiter: Limiter) -> bool:
    return (await limiter.state("q")).consecutive == 1


async def test_whoever_writes_to_the_channel_starts_no_storm(
    redis_url: str, namespace: str
) -> None:
    """Generations of somebody else are answered by one question each at most, never by a message,
    and calls go on starting."""
    async with in_database(redis_url, namespace, 3) as (connection, limiter):
        client: Any = connection.client
        channel = Keys(namespace, 3).quota("q").channel
        await limiter.acquire("q", ONE)
        epoch = (await limiter.state("q")).epoch
        async with connection.pubsub(ignore_subscribe_messages=True) as heard:
            await heard.subscribe(channel)
            foreign = [b"g:%d" % (10**18 + n) for n in range(200)]
            for message in (b"g:", b"g:x", b"g:-1", b"g:" + b"9" * 5_000, b"f:same", b"\xff"):
                await client.publish(channel, message)
            for message in foreign:
                await client.publish(channel, message)
                await limiter.acquire("q", ONE)
            await client.publish(channel, b"end")
            said: list[bytes] = []
            while b"end" not in said:
                if found := await heard.get_message(timeout=5):
                    said.append(found["data"])
        assert len(said) == len(foreign) + 6 + 1  # nobody else has said anything
        assert (await limiter.state("q")).epoch == epoch
        await limiter.acquire("q", ONE)


async def test_a_pause_is_told_in_its_own_database_only(redis_url: str, namespace: str) -> None:
    """A batch id may exist in both; the other fleet is not woken."""
    heard: list[Beat] = []
    async with in_database(redis_url, namespace, 4) as (connection, _):
        keys = Keys(namespace, 4)
        async with ledger(connection, namespace) as worker:
            await feed_all(worker, 1)
            await take(worker, 0)
            heartbeat = Heartbeat(
                connection.url,
                keys,
                process_id=worker.process_id,
                batches=worker.claims.holding.batches,
                notify=heard.extend,
                interval=60,
            )
            heartbeat.start()
            try:
                await wait_until_async(lambda: heard)
                await connection.client.publish(Keys(namespace, 5).control, BATCH)
                await worker.batches.pause(BATCH)
                await wait_until_async(lambda: len(heard) > 1)
            finally:
                heartbeat.stop()
    assert [beat.state for beat in heard] == [BatchState.RUNNING, BatchState.PAUSED]
