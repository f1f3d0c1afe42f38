"""The ledger's promises on a real Valkey, one history each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest

from batchllm_celery.connection import Connection
from batchllm_celery.errors import (
    BatchConflictError,
    BatchNotFoundError,
    FailureKind,
    RedisDeniedError,
    UsageError,
)
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import (
    Claim,
    Heartbeat,
    Ledger,
    Payload,
    WorkerInfo,
    list_workers,
    scripts,
)
from batchllm_celery.ledger.failure_detector import FailureDetector
from batchllm_celery.ledger.heartbeat import Beat
from batchllm_celery.models import (
    BatchState,
    ProcessorConfig,
    RetryConfig,
    RetryState,
    StrategySpec,
    TokenUsage,
    WorkItemResult,
)
from batchllm_celery.settings import Settings
from tests.integration.ledger_support import (
    BATCH,
    Snapshot,
    StutteringConnection,
    answer,
    beat,
    call_and_answer,
    failure,
    feed_all,
    ledger,
    lose,
    rows,
    spec,
    take,
)
from tests.support import Clock, ValkeyServer, wait_until_async


@pytest.fixture
async def one(connection: Connection, namespace: str) -> AsyncIterator[Ledger]:
    async with ledger(connection, namespace) as opened:
        yield opened


@pytest.fixture
async def two(connection: Connection, namespace: str) -> AsyncIterator[Ledger]:
    async with ledger(connection, namespace) as opened:
        yield opened


async def test_each_item_is_answered_once_and_the_batch_finishes(one: Ledger, two: Ledger) -> None:
    """Two processes share a batch; the stream holds one line for each row, with its context."""
    assert await feed_all(one, 10) == list(range(10))
    for of, indexes in ((one, range(5)), (two, range(10))):
        for claim in await take(of, *indexes):
            assert await call_and_answer(of, claim)
    lines = [json.loads(outcome.line) for outcome in await one.batches.results(BATCH)]
    assert [(line["index"], line["context"]) for line in lines] == [
        (n, {"n": n}) for n in range(10)
    ]
    assert lines[3]["output"] == "answer to say 3"
    progress = await two.batches.progress(BATCH)
    assert (progress.state, progress.succeeded) == (BatchState.FINISHED, 10)
    assert progress.input_tokens == 50
    assert [batch.batch_id for batch in await one.batches.newest()] == [BATCH]


async def test_a_duplicate_message_gets_nothing(one: Ledger, two: Ledger) -> None:
    """Held by itself, held by another, or answered: either way the message has done its work."""
    await feed_all(one, 3)
    first, again = await asyncio.gather(
        one.claims.claim(BATCH, [0, 1]), one.claims.claim(BATCH, [1, 2])
    )
    assert ([c.index for c in first.claims], [c.index for c in again.claims]) == ([0, 1], [2])
    assert again.held == [1]
    await call_and_answer(one, first.claims[0])
    reply = await two.claims.claim(BATCH, [0, 1, 2, 7])
    assert (reply.claims, reply.held, reply.gone) == ([], [1, 2], [0, 7])


async def test_a_claim_whose_caller_was_cancelled_goes_back(one: Ledger, two: Ledger) -> None:
    """Else the process would renew for ever what nobody runs."""
    await feed_all(one, 2)
    asking = asyncio.create_task(one.claims.claim(BATCH, [0, 1]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await wait_until_async(lambda: not one.background.under_way)
    assert [claim.index for claim in await take(two, 0, 1)] == [0, 1]


async def test_retry_state_and_attempts_move_with_the_item(one: Ledger, two: Ledger) -> None:
    """What an earlier process learnt and spent is there for the next one."""
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    await one.claims.begin(claim)
    usage = TokenUsage(input_tokens=7)
    await one.claims.save(claim, 2, 1, RetryState({"level": 3}), usage)
    await lose(two, one.process_id)
    (moved,) = await take(two, 0)
    assert (moved.attempts, moved.refusals, moved.state.data) == (2, 1, {"level": 3})
    assert (moved.usage, moved.losses) == (usage, 0)  # not in mid-call: no suspect
    assert (await two.batches.progress(BATCH)).maybe_billed == 0


async def test_a_late_success_is_taken_and_a_late_failure_refused(one: Ledger, two: Ledger) -> None:
    """A stopped worker comes back: its paid answers count, its failures do not."""
    await feed_all(one, 2)
    paid, failed = await take(one, 0, 1)
    for claim in (paid, failed):
        await one.claims.begin(claim)
    await lose(two, one.process_id)
    taken = await take(two, 0, 1)
    assert await one.claims.record(paid, answer(paid), spent_tokens=5, cost=None)
    assert not await one.claims.record(failed, failure(failed), spent_tokens=5, cost=None)
    assert await two.claims.begin(taken[0]) is BatchState.FINISHED
    assert not await two.claims.record(taken[0], answer(taken[0]), spent_tokens=5, cost=None)
    assert await call_and_answer(two, taken[1])
    progress = await one.batches.progress(BATCH)
    assert (progress.succeeded, progress.failed, progress.maybe_billed) == (2, 0, 2)


async def test_a_process_that_comes_back_keeps_what_nobody_took(one: Ledger, two: Ledger) -> None:
    """Its next heartbeat adopts its items; no living worker's item is given away."""
    await feed_all(one, 3)
    claims = await take(one, 0, 1, 2)
    await beat(one)
    await lose(two, one.process_id)
    (taken,) = await take(two, 1)
    await beat(one)
    assert (await two.claims.claim(BATCH, [0, 2])).held == [0, 2]
    assert await one.claims.begin(claims[0]) is None
    assert await one.claims.begin(claims[1]) is BatchState.FINISHED
    assert await call_and_answer(two, taken)


async def test_only_deaths_in_mid_call_convict(one: Ledger) -> None:
    """At `max_deliveries` the killer is quarantined; what waited beside it is no suspect."""
    await feed_all(one, 2)
    for death in range(5):
        async with ledger(one.connection, one.keys.namespace) as victim:
            reply = await victim.claims.claim(BATCH, [0, 1])
            assert [claim.losses for claim in reply.claims] == [death, 0]
            assert await victim.claims.begin(reply.claims[0]) is None
            await lose(one, victim.process_id)
    reply = await one.claims.claim(BATCH, [0, 1])
    assert ([claim.index for claim in reply.claims], reply.gone) == ([1], [0])
    (outcome,) = await one.batches.results(BATCH)
    error = json.loads(outcome.line)["error"]
    assert error["kind"] == "worker_lost"
    assert (await one.batches.progress(BATCH)).maybe_billed == 5


async def test_what_a_living_process_does_not_run_goes_back(one: Ledger, two: Ledger) -> None:
    """Its heartbeat renews what it holds: an item whose task has ended without a word would be held
    for ever. Two looks, for what has just been claimed runs in a moment."""
    await feed_all(one, 3)
    claims = await take(one, 0, 1, 2)
    for _ in range(2):
        await beat(one)
        assert await take(two, 0, 1, 2) == []
        await one.recovery.reconcile(lambda claim: claim.index == 0)
    assert [claim.index for claim in await take(two, 0, 1, 2)] == [1, 2]
    await one.recovery.reconcile(lambda claim: False)
    claims[0].settled = True  # its outcome is on its way
    await one.recovery.reconcile(lambda claim: False)
    assert await take(two, 0) == []


@pytest.mark.parametrize("failing", ["claim.lua", "record.lua", "release.lua"])
async def test_what_a_failed_call_left_behind_goes_back(
    one: Ledger, two: Ledger, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Redis did what was asked, and its answer was an error all the same: neither side may go on
    believing that the living process has the item."""
    await feed_all(one, 2)
    (other,) = await take(one, 1)  # so that it has a heartbeat
    claim = (await take(one, 0))[0] if failing != "claim.lua" else None
    real = one.runner.run
    done = failing == "claim.lua"

    async def run(script: Any, batch_id: str, args: Any = ()) -> Any:
        if script.name == f"lua/{failing}":
            if done:
                await real(script, batch_id, args)
            raise RedisDeniedError("denied")
        return await real(script, batch_id, args)

    monkeypatch.setattr(one.runner, "run", run)
    asked: Awaitable[object]
    if claim is None:
        asked = one.claims.claim(BATCH, [0])
    elif failing == "record.lua":
        asked = one.claims.record(claim, answer(claim), spent_tokens=0, cost=None)
    else:
        asked = one.claims.release([claim])
    with pytest.raises(RedisDeniedError):
        await asked
    monkeypatch.undo()
    for _ in range(2):
        await beat(one)
        await one.recovery.reconcile(lambda held: held is other)
    assert [claim.index for claim in await take(two, 0, 1)] == [0]


async def test_each_lease_redis_is_asked_what_it_believes(
    connection: Connection, namespace: str
) -> None:
    """Whatever went wrong: what nobody has noticed goes back within a lease too."""
    async with ledger(connection, namespace, lease_seconds=0.05) as worker:
        await feed_all(worker, 2)
        stray, kept = await take(worker, 0, 1)
        worker.claims.holding.discard(stray)

        async def reconciled() -> bool:
            await worker.recovery.reconcile(lambda claim: claim is kept)
            return [claim.index for claim in await take(worker, 0)] == [0]

        await wait_until_async(reconciled)


async def test_a_killer_among_a_thousand_convicts_nobody_else(one: Ledger) -> None:
    """Suspects are spread: slots / 8^losses in a process, so each death accuses fewer."""
    count = 300
    await feed_all(one, count)
    killer, deaths = 137, 0
    for _ in range(2000):
        progress = await one.batches.progress(BATCH)
        if progress.is_over:
            break
        async with ledger(one.connection, one.keys.namespace, slots=count) as worker:
            claims = await take(worker, *range(count))
            for claim in claims:
                assert await worker.claims.begin(claim) is None
            if any(claim.index == killer for claim in claims):
                deaths += 1
                await lose(one, worker.process_id)
                continue
            for claim in claims:
                assert await worker.claims.record(claim, answer(claim), spent_tokens=0, cost=None)
    progress = await one.batches.progress(BATCH)
    assert (progress.succeeded, progress.failed, deaths) == (count - 1, 1, 5)


async def test_pause_and_resume_are_decided_where_items_are(one: Ledger, two: Ledger) -> None:
    """Paused: nothing is claimed or called, given back at no loss; resumed: offered at once."""
    await feed_all(one, 3)
    (held,) = await take(one, 0)
    assert await two.batches.pause(BATCH) is BatchState.PAUSED
    assert await one.claims.begin(held) is BatchState.PAUSED
    await one.claims.release([held])
    reply = await one.claims.claim(BATCH, [1, 2])
    assert (reply.claims, reply.state) == ([], BatchState.PAUSED)
    assert await one.recovery.requeue("default", 9) == []
    assert (await two.batches.resume(BATCH)).state is BatchState.RUNNING
    offered = await wait_until_async(lambda: one.recovery.requeue("default", 9))
    assert offered == [(BATCH, [0, 1, 2])]
    assert (await one.batches.progress(BATCH)).maybe_billed == 0


async def test_a_parked_batch_goes_on_by_itself(one: Ledger) -> None:
    """Until the day's quota is back nothing starts, and nobody needs to wake it."""
    await feed_all(one, 1)
    await one.batches.defer(BATCH, time.time() + 0.3)
    assert (await one.claims.claim(BATCH, [0])).state is BatchState.PARKED
    offered = await wait_until_async(lambda: one.recovery.requeue("default", 9))
    assert offered == [(BATCH, [0])]
    assert len(await take(one, 0)) == 1


async def test_cancel_gives_each_item_its_outcome_and_resume_takes_it_back(
    one: Ledger, two: Ledger
) -> None:
    """A call in flight may still bring its answer; a control stop never counts as finished."""
    await feed_all(one, 2500)
    calling, waiting = await take(one, 0, 1)
    assert await one.claims.begin(calling) is None
    assert await two.batches.cancel(BATCH) is BatchState.CANCELLED
    verdict = await one.claims.begin(waiting)
    assert verdict is FailureKind.CANCELLED
    assert await one.claims.record(waiting, failure(waiting, verdict), spent_tokens=0, cost=None)
    assert await one.claims.record(calling, answer(calling), spent_tokens=5, cost=None)
    progress = await one.batches.progress(BATCH)
    assert (progress.succeeded, progress.failed, progress.is_over) == (1, 2499, True)
    assert progress.state is BatchState.CANCELLED
    published: list[int] = []

    async def publish(indexes: list[int]) -> None:
        published.extend(indexes)

    reopened = await two.batches.resume(BATCH, publish)
    assert (reopened.items, reopened.missing, published) == (2499, 0, list(range(1, 2500)))
    for first in range(0, 2500, 500):
        await asyncio.gather(
            *(call_and_answer(two, c) for c in await take(two, *range(first, first + 500)))
        )
    progress = await one.batches.progress(BATCH)
    assert (progress.state, progress.succeeded) == (BatchState.FINISHED, 2500)
    Snapshot(one.connection.url, one.keys.namespace).check()


async def stopped_and_resumed(one: Ledger, two: Ledger) -> tuple[Claim, FailureKind]:
    """An item whose process has heard that the batch is cancelled, and not that it goes on."""
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    await two.batches.cancel(BATCH)
    verdict = await one.claims.begin(claim)
    assert isinstance(verdict, FailureKind)
    await two.batches.resume(BATCH)
    return claim, verdict


async def test_a_stop_that_comes_after_the_resume_is_no_outcome(one: Ledger, two: Ledger) -> None:
    """Read cancelled, resumed meanwhile: the item runs instead of staying cancelled for ever."""
    claim, verdict = await stopped_and_resumed(one, two)
    assert not await one.claims.record(claim, failure(claim, verdict), spent_tokens=0, cost=None)
    (again,) = await take(two, 0)
    assert await call_and_answer(two, again)


async def test_a_refused_stop_that_was_adopted_meanwhile_goes_back(
    one: Ledger, two: Ledger, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat that takes everything back while the refusal travels: the item stays with nobody
    who does not know of it."""
    claim, verdict = await stopped_and_resumed(one, two)
    run = one.runner.run

    async def slow(script: Any, *arguments: Any) -> Any:
        reply = await run(script, *arguments)
        if script is scripts.RECORD:
            await one.recovery._reclaim(BATCH)
        return reply

    monkeypatch.setattr(one.runner, "run", slow)
    assert not await one.claims.record(claim, failure(claim, verdict), spent_tokens=0, cost=None)
    await wait_until_async(lambda: not len(one.claims.holding))
    assert Snapshot(redis_url, namespace).held == {}
    (again,) = await take(two, 0)
    assert await call_and_answer(two, again)


async def test_a_row_that_cannot_be_read_goes_back_and_its_neighbours_run(
    one: Ledger, redis_url: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Written by a newer version, say: this process neither keeps it nor fails the others."""
    await feed_all(one, 3)
    key, client = one.keys.batch(BATCH).item, one.connection.client
    row = await client.execute_command("HGET", key, 1)
    await client.execute_command("HSET", key, 1, row.replace(b'"v":1', b'"v":9'))
    reply = await one.claims.claim(BATCH, [0, 1, 2])
    assert [claim.index for claim in reply.claims] == [0, 2]
    assert reply.held == [1]
    assert "update this process" in caplog.text
    found = Snapshot(redis_url, namespace)
    assert (set(found.held), found.ready) == ({0, 2}, {1})
    found.check()
    for claim in reply.claims:
        assert await call_and_answer(one, claim)


async def test_unreadable_rows_are_offered_behind_all_others(one: Ledger) -> None:
    """As many of them as a worker has slots do not keep it from the readable ones."""
    await feed_all(one, 8)
    key, client = one.keys.batch(BATCH).item, one.connection.client
    for index in range(4):
        row = await client.execute_command("HGET", key, index)
        await client.execute_command("HSET", key, index, row.replace(b'"v":1', b'"v":9'))
    await asyncio.sleep(0.02)
    ((_, first),) = await one.recovery.requeue("default", 4)
    assert first == [0, 1, 2, 3]
    assert (await one.claims.claim(BATCH, first)).held == first
    ((_, then),) = await one.recovery.requeue("default", 4)
    assert then == [4, 5, 6, 7]


async def test_rows_fed_to_a_cancelled_batch_get_their_outcome_too(one: Ledger) -> None:
    """One line for every row, even for those that the producer was still reading."""
    await feed_all(one, 3)
    await one.batches.cancel(BATCH)
    await one.feeding.feed(BATCH, 3, rows(2, 3))
    await one.feeding.seal(BATCH, 5)
    await wait_until_async(lambda: not one.background.under_way)
    assert len(await one.batches.results(BATCH)) == 5


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        ({"token_budget": 20}, "budget"),
        ({"max_cost": 2.0}, "budget"),
        ({"deadline": 0.2}, "deadline"),
    ],
)
async def test_limits_stop_the_batch_where_calls_begin(
    one: Ledger, limits: dict[str, Any], kind: str
) -> None:
    """Once it is spent, or past, no call starts; every item left gets that outcome."""
    await feed_all(one, 10, **limits)
    claims = await take(one, *range(6))
    for claim in claims[:4]:
        assert await one.claims.begin(claim) is None
    if kind == "deadline":
        await asyncio.sleep(0.25)
    for claim in claims[:4]:
        assert await one.claims.record(claim, answer(claim), spent_tokens=5, cost=0.5)
    for claim in claims[4:]:
        assert await one.claims.begin(claim) is FailureKind(kind)
        result = failure(claim, FailureKind(kind))
        assert await one.claims.record(claim, result, spent_tokens=0, cost=None)
    await wait_until_async(lambda: not one.background.under_way)
    progress = await one.batches.progress(BATCH)
    assert (progress.state.value, progress.succeeded, progress.failed) == (kind, 4, 6)
    if kind == "budget":
        with pytest.raises(UsageError, match="larger --token-budget"):
            await one.batches.resume(BATCH)


async def test_more_budget_continues_a_batch_that_had_spent_its_own(one: Ledger) -> None:
    """The same id with a larger budget: a new round for what was stopped, nothing paid again."""
    await feed_all(one, 4, token_budget=10)
    for claim in await take(one, 0, 1):
        await call_and_answer(one, claim)
    await one.claims.claim(BATCH, [2])
    await wait_until_async(lambda: not one.background.under_way)
    created = await one.feeding.create(spec(token_budget=100))
    assert (created.how, created.round, created.fed) == ("resumed", 1, 4)
    assert await one.feeding.feed(BATCH, 0, rows(4)) == [2, 3]
    await one.feeding.seal(BATCH, 4)
    for claim in await take(one, 0, 1, 2, 3):
        assert await call_and_answer(one, claim)
    assert (await one.batches.progress(BATCH)).succeeded == 4


async def test_a_fatal_failure_aborts_the_batch(one: Ledger) -> None:
    """A wrong key fails one call, not ten million; what waits is `aborted`."""
    await feed_all(one, 5)
    claim, _ = await take(one, 0, 1)
    result = failure(claim, FailureKind.AUTHENTICATION)
    assert await one.claims.record(claim, result, spent_tokens=0, cost=None)
    await wait_until_async(lambda: not one.background.under_way)
    kinds = [json.loads(o.line)["error"]["kind"] for o in await one.batches.results(BATCH)]
    assert sorted(kinds) == ["aborted"] * 3 + ["authentication"]


async def test_retry_failed_runs_failures_again_and_nothing_else(one: Ledger) -> None:
    """A bad row stays failed: there is nothing to run."""
    await one.feeding.create(spec())
    bad: WorkItemResult[Any, Any] = WorkItemResult(
        item_id="line-3",
        index=2,
        success=False,
        error="InputError: line 3",
        error_kind=FailureKind.INVALID_INPUT,
    )
    assert await one.feeding.feed(BATCH, 0, [*rows(2), bad]) == [0, 1]
    await one.feeding.seal(BATCH, 3)
    first, second = await take(one, 0, 1, 2)
    await call_and_answer(one, first)
    await one.claims.record(second, failure(second), spent_tokens=1, cost=None)
    assert (await one.batches.progress(BATCH)).is_over
    reopened = await one.batches.retry(BATCH)
    assert (reopened.items, reopened.missing) == (1, 1)
    (again,) = await take(one, 0, 1, 2)
    assert (again.index, again.round, again.attempts) == (1, 1, 0)
    assert await call_and_answer(one, again)
    progress = await one.batches.progress(BATCH)
    assert (progress.succeeded, progress.failed, progress.state) == (2, 1, BatchState.FINISHED)


async def test_the_same_rows_again_are_not_paid_again_and_changed_ones_are(one: Ledger) -> None:
    """The same batch id: finished items stay, an item whose row changed runs again."""
    await feed_all(one, 4)
    for claim in await take(one, 0, 1, 2, 3):
        await call_and_answer(one, claim)
    assert (await one.feeding.create(spec())).how == "attached"
    changed = rows(4)
    changed[2].prompt = "something else"
    assert await one.feeding.feed(BATCH, 0, changed) == [2]
    await one.feeding.seal(BATCH, 4)
    (claim,) = await take(one, 0, 1, 2, 3)
    assert claim.payload.prompt == "something else"
    assert await call_and_answer(one, claim)


async def test_another_strategy_runs_everything_again_once_the_batch_has_ended(one: Ledger) -> None:
    """While it runs that is a conflict, named; afterwards it is a new job on the same rows."""
    await feed_all(one, 2)
    other = spec().model_copy(update={"strategy": StrategySpec(name="loud")})
    with pytest.raises(BatchConflictError, match="'echo'"):
        await one.feeding.create(other)
    for claim in await take(one, 0, 1):
        await call_and_answer(one, claim)
    await one.feeding.create(other)
    assert await one.feeding.feed(BATCH, 0, rows(2)) == [0, 1]
    assert (await one.claims.claim(BATCH, [0])).spec.strategy.name == "loud"


async def test_feeding_waits_for_room_and_an_uncertain_feed_is_repeated(one: Ledger) -> None:
    """At most `max_outstanding` items are unfinished; a repetition stores nothing twice."""
    await one.feeding.create(spec())
    assert await one.feeding.feed(BATCH, 0, rows(3), max_outstanding=4) == [0, 1, 2]
    assert await one.feeding.feed(BATCH, 0, rows(3), max_outstanding=4) == [0, 1, 2]
    waiting = asyncio.create_task(one.feeding.feed(BATCH, 3, rows(3, 3), max_outstanding=4))
    (claim, *_) = await take(one, 0, 1, 2)
    await call_and_answer(one, claim)
    assert (await one.batches.progress(BATCH)).fed == 3
    for claim in one.claims.holding.of(BATCH):
        await call_and_answer(one, claim)
    assert await waiting == [3, 4, 5]


async def test_unread_results_count_until_the_consumer_has_them(one: Ledger) -> None:
    """Under `keep_results=False` results leave Redis with the acknowledgement, and make room."""
    await feed_all(one, 3, keep_results=False)
    for claim in await take(one, 0, 1, 2):
        await call_and_answer(one, claim)
    waiting = asyncio.create_task(one.feeding.feed(BATCH, 3, rows(1, 3), max_outstanding=3))
    outcomes = await one.batches.results(BATCH)
    with pytest.raises(BatchConflictError, match="another process"):
        await one.batches.trim(BATCH, outcomes[0].stream_id)
    async with one.batches.lock(BATCH, "consumer"):
        assert (await one.batches.progress(BATCH)).unread == 3
        await one.batches.trim(BATCH, outcomes[1].stream_id)
        assert await waiting == [3]
        assert [o.index for o in await one.batches.results(BATCH)] == [2]
    assert (await one.batches.progress(BATCH)).unread == 1


async def test_rows_that_redis_lost_are_fed_again_from_memory(one: Ledger) -> None:
    """The producer keeps the last seconds' rows and rewinds to what Redis knows."""
    await one.feeding.create(spec())
    await one.feeding.feed(BATCH, 0, rows(2))
    await one.feeding.feed(BATCH, 2, rows(2, 2))
    await _forget_rows_after(one, 2)
    assert await one.feeding.feed(BATCH, 4, rows(1, 4)) == [2, 3, 4]
    await _forget_rows_after(one, 0)
    one.feeding._feeding[BATCH].recent.clear()
    with pytest.raises(BatchConflictError, match="feed again from row 0"):
        await one.feeding.feed(BATCH, 5, rows(1, 5))


async def _forget_rows_after(of: Ledger, index: int) -> None:
    client: Any = of.connection.client
    keys = of.keys.batch(BATCH)
    await client.hset(keys.meta, "fed", index)
    for gone in range(index, 10):
        await client.zrem(keys.ready, gone)


async def test_idle_workers_are_offered_what_no_message_brought_and_not_twice(one: Ledger) -> None:
    """Bounded by n; what was lost or given back comes first."""
    await feed_all(one, 5)
    (claim,) = await take(one, 4)
    await one.claims.release([claim])
    await asyncio.sleep(0.02)
    assert await one.recovery.requeue("default", 5, lost_only=True) == [(BATCH, [4])]
    assert await one.recovery.requeue("default", 3) == [(BATCH, [0, 1, 2])]
    assert await one.recovery.requeue("default", 3) == [(BATCH, [3])]
    assert await one.recovery.requeue("elsewhere", 3) == []


async def test_each_of_a_queues_many_batches_is_looked_after(
    one: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look takes some of a very long list, the next one goes on behind them."""
    monkeypatch.setattr("batchllm_celery.ledger.recovery.BATCHES_AT_ONCE", 2)
    for name in ("a", "b", "c", "d", "e"):
        await one.feeding.create(spec(name))
        await one.feeding.feed(name, 0, rows(1))
    await asyncio.sleep(0.02)
    looks = [{batch for batch, _ in await one.recovery.requeue("default", 9)} for _ in range(3)]
    assert sorted(map(len, looks)) == [1, 2, 2]
    assert set().union(*looks) == {"a", "b", "c", "d", "e"}


async def test_a_silent_process_is_found_and_its_items_offered(one: Ledger, two: Ledger) -> None:
    """One heartbeat for all its items: silent for a lease, they are free for others."""
    lease = 0.5
    async with (
        ledger(one.connection, one.keys.namespace, lease_seconds=lease) as observer,
        ledger(one.connection, one.keys.namespace, lease_seconds=lease) as alive,
    ):
        await feed_all(one, 4)
        await take(two, 0, 1)
        await take(alive, 2, 3)
        started = time.monotonic()

        async def offered() -> list[tuple[str, list[int]]]:
            await beat(alive)
            return await observer.recovery.requeue("default", 9, lost_only=True)

        found = await wait_until_async(offered, interval=0.05)
        assert found == [(BATCH, [0, 1])]
        assert lease <= time.monotonic() - started < lease + 1.5
        assert (await observer.claims.claim(BATCH, [2, 3])).held == [2, 3]


async def test_calls_given_up_are_counted_as_maybe_billed(one: Ledger) -> None:
    """An attempt that ran into a time limit, and a last one: both may be on the bill."""
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    assert await one.claims.begin(claim) is None
    claim.given_up += 1
    await one.claims.save(claim, 1, 0, RetryState(), TokenUsage())
    assert (await one.batches.progress(BATCH)).maybe_billed == 1
    assert await one.claims.begin(claim) is None
    claim.given_up += 1
    failed = failure(claim, FailureKind.FRAMEWORK_TIMEOUT)
    assert await one.claims.record(claim, failed, spent_tokens=0, cost=None)
    assert (await one.batches.progress(BATCH)).maybe_billed == 2


async def test_silence_while_holding_nothing_is_not_death(one: Ledger, two: Ledger) -> None:
    """A process that worked, had nothing to do for a lease and has just claimed is alive."""
    clock = Clock()
    two.recovery._detector = FailureDetector(lease=5.0, clock=clock)
    await feed_all(one, 2)
    (first,) = await take(one, 0)
    await beat(one)
    assert await call_and_answer(one, first)
    for _ in range(4):
        await two.recovery.requeue("default", 0)
        clock.now += 1.6
    (second,) = await take(one, 1)
    for _ in range(2):
        await two.recovery.requeue("default", 0)
        clock.now += 1.6
    assert await take(two, 1) == []
    assert await call_and_answer(one, second)


async def test_a_process_given_up_while_idle_is_alive_again(one: Ledger, two: Ledger) -> None:
    """Its next claim is no repetition of the sign of life that the observer saw fall silent."""
    clock = Clock()
    two.recovery._detector = FailureDetector(lease=30.0, clock=clock)
    await feed_all(one, 2)
    (first,) = await take(one, 0)
    assert await call_and_answer(one, first)
    while one.process_id.encode() in look(two).procs:
        await two.recovery.requeue("default", 0)
        clock.now += 3
    (second,) = await take(one, 1)
    assert await one.claims.begin(second) is None
    await two.recovery.requeue("default", 0)
    assert await take(two, 1) == []


async def test_the_death_of_a_process_whose_claim_was_repeated_is_noticed(
    one: Ledger, two: Ledger
) -> None:
    """The reply was lost for longer than a lease, the claim repeated, and then it died."""
    one.runner.process_id = "elsewhere:1:aa"
    await feed_all(one, 1)
    claim: list[str | int] = [one.process_id, "t" * 16, -1, 1, 4, 0, 0, 0]
    await one.runner.run(scripts.CLAIM, BATCH, claim)
    await lose(two, one.process_id)
    await one.runner.run(scripts.CLAIM, BATCH, claim)
    await lose(two, one.process_id)
    assert [claim.index for claim in await take(two, 0)] == [0]


async def test_a_call_that_begins_while_its_process_is_given_up_is_looked_after(
    one: Ledger, two: Ledger
) -> None:
    """Between two steps of the scan that sets its items free."""
    one.runner.process_id = "elsewhere:1:aa"
    await feed_all(one, 3_000)
    for first in range(0, 3_000, 1_000):
        await one.claims.claim(BATCH, list(range(first, first + 1_000)))
    client: Any = one.connection.client
    procs = one.keys.batch(BATCH).procs
    counter = (await client.hget(procs, one.process_id)).decode()
    cursor, _ = await two.runner.run(scripts.EXPIRE, BATCH, [one.process_id, counter, "0"])
    assert cursor != b"0"
    freed = min(look(two).ready)
    begun = next(claim for claim in one.claims.holding if claim.index == freed)
    assert await one.claims.begin(begun) is None
    while cursor != b"0":
        arguments = [one.process_id, counter, cursor.decode()]
        cursor, _ = await two.runner.run(scripts.EXPIRE, BATCH, arguments)
    await lose(two, one.process_id)  # it dies
    assert freed in look(two).ready


async def test_a_stopped_batch_is_reopened_though_the_first_answer_was_lost(
    one: Ledger, redis_url: str, namespace: str
) -> None:
    """Created again, twice: its stopped items run again."""
    await feed_all(one, 5)
    await one.batches.cancel(BATCH)
    async with (
        StutteringConnection(redis_url) as connection,
        ledger(connection, namespace) as again,
    ):
        assert (await again.feeding.create(spec())).how == "resumed"
        assert len(await take(again, *range(5))) == 5


async def test_a_batch_stays_listed_while_it_is_reopened(one: Ledger, two: Ledger) -> None:
    """A worker that looks between the decision and its first step does not strike it off."""
    await feed_all(one, 3)
    await one.batches.cancel(BATCH)
    await one.batches._control(BATCH, "resume")
    await one.batches.announce(await one.batches.spec(BATCH))
    await two.recovery.requeue("default", 0)
    await one.batches.reopen(BATCH)
    assert await two.recovery.requeue("default", 9) == [(BATCH, [0, 1, 2])]


async def test_late_words_to_a_batch_that_is_over_leave_no_key_for_ever(
    one: Ledger, two: Ledger
) -> None:
    """A heartbeat and a record, after the batch was cancelled and its process given up."""
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    assert await one.claims.begin(claim) is None
    await lose(two, one.process_id)
    await two.batches.cancel(BATCH)
    await beat(one)
    assert not await one.claims.record(claim, answer(claim), spent_tokens=1, cost=None)
    assert min(look(two).ttls.values()) > 0


async def test_a_call_given_up_counts_though_its_note_was_dropped(one: Ledger) -> None:
    """Handed back (a drain) while the note of the attempt waited for the one before it."""
    await feed_all(one, 2)
    noted, dropped = await take(one, 0, 1)
    for claim in (noted, dropped):
        assert await one.claims.begin(claim) is None
        claim.given_up += 1
    saves = []
    for claim in (noted, dropped):
        save = one.claims.save(claim, 1, 0, RetryState(), TokenUsage())
        saves.append(asyncio.create_task(save))
        await asyncio.sleep(0.0001)
    saves[1].cancel()
    await asyncio.gather(*saves, return_exceptions=True)
    await one.claims.release([dropped])
    assert (await one.batches.progress(BATCH)).maybe_billed == 2


def look(of: Ledger) -> Snapshot:
    return Snapshot(of.connection.url, of.keys.namespace)


async def test_locks_are_leased_and_refused_with_a_clear_word(one: Ledger, two: Ledger) -> None:
    """One producer and one consumer at a time; released, or after the lease, the next one may."""
    await feed_all(one, 1)
    async with one.batches.lock(BATCH, "consumer"), two.batches.lock(BATCH, "producer"):
        with pytest.raises(BatchConflictError, match="has a consumer already"):
            async with two.batches.lock(BATCH, "consumer"):
                pass
    async with two.batches.lock(BATCH, "consumer"):
        pass


async def test_an_unknown_batch_is_refused_and_never_brought_to_life(one: Ledger) -> None:
    """A late call for expired keys leaves no key behind (the namespace fixture looks)."""
    await feed_all(one, 1)
    (claim,) = await take(one, 0)
    client: Any = one.connection.client
    await client.delete(*[key async for key in client.scan_iter(f"{one.keys.namespace}:*")])
    assert await one.claims.begin(claim) is BatchState.FINISHED
    assert not await one.claims.record(claim, answer(claim), spent_tokens=0, cost=None)
    with pytest.raises(BatchNotFoundError, match="'b1' is unknown"):
        await one.claims.claim(BATCH, [0])
    for asked in (one.batches.progress, one.batches.cancel, one.batches.pause, one.batches.spec):
        with pytest.raises(BatchNotFoundError):
            await asked(BATCH)
    assert [key async for key in client.scan_iter(f"{one.keys.namespace}:*")] == []


async def test_the_heartbeat_renews_and_hears_of_control_at_once(
    one: Ledger, two: Ledger, redis_url: str
) -> None:
    """From a thread: a blocked loop renews all the same, and a cancel is known within a second."""
    await feed_all(one, 2)
    await take(one, 0)
    heard: list[Beat] = []
    heartbeat = Heartbeat(
        redis_url,
        one.keys,
        process_id=one.process_id,
        batches=one.claims.holding.batches,
        notify=heard.extend,
        interval=0.2,
        presence=lambda: WorkerInfo(
            one.process_id, host="h", pid=1, slots=7, running=len(one.claims.holding)
        ),
    )
    heartbeat.start()
    try:
        await wait_until_async(lambda: len(heard) >= 2)
        assert heard[0] == Beat(BATCH, BatchState.RUNNING, True)
        assert heard[1] == Beat(BATCH, BatchState.RUNNING, False)
        time.sleep(0.7)  # the loop is blocked
        assert len(heard) >= 4
        (worker,) = await list_workers(one.connection, one.keys)
        assert (worker.worker_id, worker.slots, worker.running) == (one.process_id, 7, 1)
        await two.batches.cancel(BATCH)
        started = time.monotonic()
        await wait_until_async(lambda: heard[-1].state is BatchState.CANCELLED)
        assert time.monotonic() - started < 1
    finally:
        heartbeat.stop()
    assert await list_workers(one.connection, one.keys) == []


async def test_a_redis_that_lost_its_last_second_is_told_again_what_is_paid_for() -> None:
    """Outcomes are recorded again, running items adopted, ended claims given back."""
    server = ValkeyServer().start()
    try:
        async with Connection(server.url) as connection, ledger(connection, "n") as one:
            await feed_all(one, 4)
            claims = await take(one, 0, 1, 2, 3)
            await one.recovery.requeue("default", 0)
            for claim in claims[:3]:
                assert await one.claims.begin(claim) is None
            assert await one.claims.record(claims[0], answer(claims[0]), spent_tokens=5, cost=None)
            await one.claims.release([claims[3]])
            await _roll_back(one, claims)
            server.kill()
            server.start()
            await one.recovery.requeue("default", 0)
            assert (await one.batches.progress(BATCH)).succeeded == 1
            shot = Snapshot(server.url, "n")
            assert set(shot.held) == {1, 2}
            assert shot.ready == {3}
            shot.check()
            assert await one.claims.record(claims[1], answer(claims[1]), spent_tokens=5, cost=None)
    finally:
        server.stop()


async def _roll_back(of: Ledger, claims: list[Any]) -> None:
    """As Redis would be without its last second: 0 and 3 still held, 1 not even claimed."""
    client: Any = of.connection.client
    keys = of.keys.batch(BATCH)
    for claim in (claims[0], claims[3]):
        await client.hset(keys.held, claim.index, f"c {claim.token} {of.process_id}")
    await client.zrem(keys.ready, 3)
    await client.hdel(keys.held, 1)
    await client.zadd(keys.ready, {"1": 1})
    await client.setbit(keys.done, 0, 0)
    await client.hset(keys.meta, "ok", 0)
    await client.delete(keys.out, keys.procs)
    await client.hset(keys.meta, mapping={"out_count": 0, "out_bytes": 0})
    row = Payload("item-0", "say 0", {"n": 0}).encode()
    await client.hset(keys.item, 0, b"1700000000000" + claims[0].version + row)
    sizes = [await client.hstrlen(keys.item, n) for n in range(4)]
    await client.hset(keys.meta, "item_bytes", sum(sizes))
    for key in (keys.out, keys.procs, keys.held, keys.ready):
        await client.expire(key, 7 * 24 * 3600)


async def test_a_full_redis_takes_no_new_rows_but_every_outcome() -> None:
    """`record` must not fail at maxmemory, or answers are paid for again."""
    server = ValkeyServer().start()
    try:
        async with Connection(server.url) as connection, ledger(connection, "n") as one:
            await feed_all(one, 2)
            client: Any = connection.client
            await client.config_set("maxmemory", 1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await one.feeding.feed(BATCH, 2, rows(1, 2))
            for claim in await take(one, 0, 1):
                assert await call_and_answer(one, claim)
            assert (await one.batches.progress(BATCH)).succeeded == 2
            await client.config_set("maxmemory", 0)
            assert await one.feeding.feed(BATCH, 2, rows(1, 2)) == [2]
    finally:
        server.stop()


async def test_cancelling_many_items_never_blocks_redis_for_long(one: Ledger) -> None:
    """20,000 items, 1,000 a script: each script stays under 50 ms, and all have their outcome."""
    count = 20_000
    await one.feeding.create(spec())
    await one.feeding.feed(BATCH, 0, rows(count, prompt="x" * 1000), max_outstanding=count)
    await one.feeding.seal(BATCH, count)
    client: Any = one.connection.client
    before = await _redis_seconds(client)
    assert await one.batches.cancel(BATCH) is BatchState.CANCELLED
    # CPU seconds: what a script takes by the wall depends on who else is on this machine.
    assert (await _redis_seconds(client) - before) / (count / 1000) < 0.05
    progress = await one.batches.progress(BATCH)
    assert (progress.failed, progress.is_over) == (count, True)
    assert Settings().max_outstanding >= count
    assert (await one.batches.resume(BATCH)).items == count


async def _redis_seconds(client: Any) -> float:
    used = await client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def test_every_key_of_a_batch_is_named_on_one_page() -> None:
    """Scripts take the keys in this order."""
    keys = Keys("ns").batch("b")
    assert keys.meta == "ns:{batch:b}:meta"
    assert keys.stopped == "ns:{batch:b}:stopped"


# -- the bound


async def _calls(of: Ledger) -> list[str]:
    client: Any = of.connection.client
    entry = await client.hget(of.keys.batch(BATCH).calls, "0")
    return entry.decode().split() if entry else []


async def test_an_items_calls_are_counted_and_the_last_one_is_refused(
    one: Ledger, two: Ledger
) -> None:
    """Here and elsewhere, whatever was saved or not; the round after begins anew."""
    config = ProcessorConfig(retry=RetryConfig(max_attempts=2), max_rate_limit_retries=1)
    await feed_all(one, 1, config=config)
    most = config.most_calls + Settings().max_deliveries + 1
    for made in range(most):
        process = (one, two)[made % 2]
        [claim] = await take(process, 0)
        assert await process.claims.begin(claim) is None
        claim.calling = False  # answered, and given back without a word
        await process.claims.release([claim])
    [claim] = await take(one, 0)
    assert await one.claims.begin(claim) is FailureKind.EXHAUSTED
    result = failure(claim, FailureKind.EXHAUSTED)
    assert await one.claims.record(claim, result, spent_tokens=0, cost=None)
    assert await _calls(one) == []
    await one.batches.retry(BATCH)
    [claim] = await take(one, 0)
    assert await one.claims.begin(claim) is None


async def test_a_begin_without_a_call_is_not_counted(one: Ledger) -> None:
    """Its permit went stale, its wait was saved, it was given back, its reply was lost."""
    await feed_all(one, 1)
    [claim] = await take(one, 0)
    assert await one.claims.begin(claim) is None
    assert await one.claims.begin(claim) is None
    assert (await _calls(one))[0] == "1"
    claim.calling, claim.unused = False, True
    await one.claims.save(claim, 0, 0, RetryState(), TokenUsage())
    assert (await _calls(one))[0] == "0"
    assert await one.claims.begin(claim) is None
    claim.calling, claim.unused = False, True
    await one.claims.release([claim])
    assert (await _calls(one))[0] == "0"
    assert (await one.batches.progress(BATCH)).maybe_billed == 0


async def test_calls_cut_off_end_an_item_by_their_own_name(one: Ledger) -> None:
    """Together with deaths in mid-call; its neighbours are no suspects for it."""
    await feed_all(one, 1)
    for _ in range(Settings().max_deliveries):
        [claim] = await take(one, 0)
        assert claim.losses == 0
        assert await one.claims.begin(claim) is None
        claim.cut_by = "drain_seconds=60"
        await one.claims.release([claim])
    assert (await one.claims.claim(BATCH, [0])).gone == [0]
    [outcome] = await one.batches.results(BATCH)
    line = WorkItemResult.from_json(json.loads(outcome.line))
    assert line.error_kind is FailureKind.CUT_OFF
    assert "drain seconds=60" in (line.error or "")
