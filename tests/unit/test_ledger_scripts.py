"""The ledger's scripts on fakeredis: what becomes of an item, without a server."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from batchllm_celery.connection import Connection
from batchllm_celery.errors import BatchNotFoundError, FailureKind
from batchllm_celery.keys import BatchKeys
from batchllm_celery.ledger import Ledger, scripts
from batchllm_celery.models import BatchState, RetryState, TokenUsage
from tests.integration.ledger_support import (
    BATCH,
    answer,
    beat,
    call_and_answer,
    failure,
    feed_all,
    ledger,
    lose,
    rows,
    take,
)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
async def one(server: FakeServer) -> AsyncIterator[Ledger]:
    async with _process(server) as opened:
        yield opened


@pytest.fixture
async def two(server: FakeServer) -> AsyncIterator[Ledger]:
    async with _process(server) as opened:
        yield opened


def _process(server: FakeServer) -> Ledger:
    connection = Connection("redis://localhost:1")
    connection.client = FakeAsyncRedis(server=server)
    return ledger(connection, "n")


async def test_an_item_is_one_processes_until_it_is_answered(one: Ledger, two: Ledger) -> None:
    """A claim is exclusive, its outcome final: the second process gets neither."""
    await feed_all(one, 2)
    claims = await take(one, 0, 1)
    assert await take(two, 0, 1) == []
    assert [await call_and_answer(one, claim) for claim in claims] == [True, True]
    assert await one.claims.record(claims[0], answer(claims[0]), spent_tokens=1, cost=None) is False
    progress = await two.batches.progress(BATCH)
    assert (progress.state, progress.succeeded, progress.input_tokens) == ("finished", 2, 10)


async def test_what_is_released_is_taken_by_another(one: Ledger, two: Ledger) -> None:
    """Given back before a call, an item has lost nothing; the retry state moves with it."""
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    assert await one.claims.begin(claim) is None
    await one.claims.save(claim, 1, 0, RetryState({"step": 2}), TokenUsage(input_tokens=7))
    await one.claims.release([claim])
    (again,) = await take(two, 0)
    assert (again.attempts, again.state.data, again.usage.input_tokens) == (1, {"step": 2}, 7)
    assert again.losses == 0


async def test_a_death_in_mid_call_is_counted_and_one_before_it_is_not(
    one: Ledger, two: Ledger
) -> None:
    """Only who dies while it calls may have been killed by the item."""
    await feed_all(one, 2)
    calling, _ = await take(one, 0, 1)
    assert await one.claims.begin(calling) is None
    await beat(two)
    await lose(two, one.process_id)
    assert [claim.losses for claim in await take(two, 0, 1)] == [1, 0]


async def test_no_call_begins_in_a_paused_batch(one: Ledger) -> None:
    """Pausing is decided where calls begin; resuming goes on."""
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    assert await one.batches.pause(BATCH) is BatchState.PAUSED
    assert await one.claims.begin(claim) is BatchState.PAUSED
    await one.batches.resume(BATCH)
    assert await one.claims.begin(claim) is None


async def test_cancelling_gives_each_item_an_outcome(one: Ledger) -> None:
    """What nobody holds is swept at once; what is held ends with its holder's word."""
    await feed_all(one, 3)
    (claim,) = await take(one, 0)
    await one.batches.cancel(BATCH)
    assert await one.claims.begin(claim) is FailureKind.CANCELLED
    stopped = failure(claim, FailureKind.CANCELLED)
    assert await one.claims.record(claim, stopped, spent_tokens=0, cost=None)
    progress = await one.batches.progress(BATCH)
    assert (progress.failed, progress.is_over) == (3, True)


async def test_failed_items_run_again_when_asked_to(one: Ledger) -> None:
    """And nothing that has succeeded does."""
    await feed_all(one, 2)
    good, bad = await take(one, 0, 1)
    assert await call_and_answer(one, good)
    assert await one.claims.begin(bad) is None
    assert await one.claims.record(bad, failure(bad), spent_tokens=0, cost=None)
    assert (await one.batches.retry(BATCH)).items == 1
    assert [claim.index for claim in await take(one, 0, 1)] == [1]


async def test_the_same_rows_again_need_no_message(one: Ledger) -> None:
    """Rows that are known and answered are not fed anew; changed ones are."""
    await feed_all(one, 2)
    for claim in await take(one, 0, 1):
        assert await call_and_answer(one, claim)
    assert await one.feeding.feed(BATCH, 0, rows(2)) == []


async def test_an_unknown_batch_stays_unknown(one: Ledger) -> None:
    """No late word brings a batch to life whose keys are gone."""
    with pytest.raises(BatchNotFoundError):
        await one.batches.progress("nobody")
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    client: Any = one.connection.client
    await client.flushall()
    assert await one.claims.record(claim, answer(claim), spent_tokens=0, cost=None) is False
    assert await client.keys() == []


def test_each_key_of_a_batch_has_a_type() -> None:
    """The list of types in `batch.lua` names as many keys as a batch has."""
    source = (Path(scripts.__file__).parent / "lua" / "batch.lua").read_text()
    listed = re.search(r"local TYPES = \{(.*?)\}", source, re.DOTALL)
    assert listed is not None
    types = dict(
        zip(BatchKeys.__dataclass_fields__, re.findall(r"'(\w+)'", listed[1]), strict=True)
    )
    assert (types["ids"], types["tasks"], types["owed"], types["out"]) == (
        "hash",
        "hash",
        "zset",
        "stream",
    )
