"""What the ledger's tests share: a spec, rows, and the invariants of one batch in Redis."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis

from batchllm_celery.connection import Connection
from batchllm_celery.errors import BatchNotFoundError, FailureKind
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import Claim, Ledger, Payload, new_process_id, scripts
from batchllm_celery.ledger.scripts import key_list, text
from batchllm_celery.models import BatchSpec, BatchState, StrategySpec, TokenUsage, WorkItemResult
from batchllm_celery.settings import Settings

T = TypeVar("T")

BATCH = "b1"


class StutteringConnection(Connection):
    """Runs every idempotent call twice, as if the first reply had been lost."""

    stutter = True

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        if self.stutter:
            await super().patiently(call)
        return await super().patiently(call)


def spec(batch_id: str = BATCH, **settings: Any) -> BatchSpec:
    return BatchSpec(batch_id=batch_id, strategy=StrategySpec(name="echo"), **settings)


def rows(count: int, first: int = 0, prompt: str = "say") -> list[Payload]:
    return [Payload(f"item-{n}", f"{prompt} {n}", {"n": n}) for n in range(first, first + count)]


def ledger(connection: Connection, namespace: str, **settings: Any) -> Ledger:
    """The ledger of one more process."""
    return Ledger(
        connection,
        Keys(namespace, connection.database),
        process_id=new_process_id(),
        settings=Settings(**{"offer_seconds": 0.01, **settings}),
    )


def answer(claim: Claim, tokens: int = 5, **fields: Any) -> WorkItemResult[Any, Any]:
    return WorkItemResult(
        item_id=claim.payload.item_id,
        index=claim.index,
        success=True,
        output=f"answer to {claim.payload.prompt}",
        context=claim.payload.context,
        token_usage=TokenUsage(input_tokens=tokens),
        **fields,
    )


def failure(claim: Claim, kind: FailureKind = FailureKind.VALIDATION) -> WorkItemResult[Any, Any]:
    return WorkItemResult(
        item_id=claim.payload.item_id,
        index=claim.index,
        success=False,
        error="Error: it failed",
        error_kind=kind,
        context=claim.payload.context,
    )


async def feed_all(of: Ledger, count: int, **settings: Any) -> list[int]:
    """A sealed batch of `count` rows; the indexes that need a message."""
    await of.feeding.create(spec(**settings))
    wake = await of.feeding.feed(BATCH, 0, rows(count))
    await of.feeding.seal(BATCH, count)
    return wake


async def take(of: Ledger, *indexes: int) -> list[Claim]:
    return (await of.claims.claim(BATCH, list(indexes))).claims


async def call_and_answer(of: Ledger, claim: Claim) -> bool:
    """One successful provider call, recorded."""
    assert await of.claims.begin(claim) is None
    return await of.claims.record(claim, answer(claim), spent_tokens=5, cost=None)


async def beat(of: Ledger) -> None:
    """One heartbeat of a process, on the loop."""
    for batch_id in of.claims.holding.batches():
        try:
            state, lost = await of.runner.run(scripts.BEAT, batch_id, [of.process_id])
        except BatchNotFoundError:
            continue
        await of.recovery.on_heartbeat(batch_id, BatchState(text(state)), lost=bool(lost))


async def lose(of: Ledger, process_id: str) -> None:
    """Give a process up, as after a lease without a heartbeat."""
    client: Any = of.connection.client
    counter = await client.hget(of.keys.batch(BATCH).procs, process_id)
    if counter is not None:
        await of.recovery.expire(BATCH, process_id, counter.decode())


class Snapshot:
    """One batch as it stands in Redis, read by a client of its own."""

    def __init__(self, url: str, namespace: str, batch_id: str = BATCH) -> None:
        keys = Keys(namespace).batch(batch_id)
        with redis.Redis.from_url(url) as client:
            meta: Any = client.hgetall(keys.meta)
            self.meta = {name.decode(): value.decode() for name, value in meta.items()}
            items: Any = client.hgetall(keys.item)
            self.items = {int(index): len(value) for index, value in items.items()}
            self.ready = {int(index) for index in client.zrange(keys.ready, 0, -1)}
            held: Any = client.hgetall(keys.held)
            self.held = {int(index): value.decode() for index, value in held.items()}
            self.procs: Any = set(client.hkeys(keys.procs))
            fed = int(self.meta.get("fed", 0))
            self.done = _bits(client.get(keys.done), fed)
            self.failed = _bits(client.get(keys.failed), fed)
            self.stopped = _bits(client.get(keys.stopped), fed)
            out: Any = client.xrange(keys.out)
            self.outcomes = [int(fields[b"i"]) for _, fields in out]
            names = key_list(Keys(namespace), batch_id)
            self.ttls = {name: client.ttl(name) for name in names if client.exists(name)}

    def number(self, name: str) -> int:
        return int(self.meta.get(name, 0))

    def check(self) -> None:
        """Everything that must hold between any two calls."""
        assert self.number("ok") == len(self.done - self.failed)
        assert self.number("failed") == len(self.failed)
        assert self.number("stopped") == len(self.stopped)
        assert self.stopped <= self.failed <= self.done
        unfinished = set(range(self.number("fed"))) - self.done
        assert unfinished == self.ready | set(self.held), "an item is lost, or has two places"
        for value in self.held.values():
            process = value.split(" ", 2)[2]
            its = {index for index, held in self.held.items() if held.endswith(process)}
            noticed = process.encode() in self.procs or its <= self.ready
            assert noticed, "nobody would ever notice that it is dead"
        assert unfinished <= set(self.items), "an unanswered item has no payload"
        sizes = {index: size for index, size in self.items.items() if index not in self.done}
        assert self.number("item_bytes") == sum(sizes.values())
        assert self.number("kept_bytes") == sum(self.items.values()) - sum(sizes.values())
        assert set(self.items).isdisjoint(self.done - self.failed), "a payload outlived its success"
        assert self.number("out_count") == len(self.outcomes)
        assert all(ttl > 0 for ttl in self.ttls.values()), "a key would stay for ever"
        assert max(self.ttls.values()) - min(self.ttls.values()) <= 1, "keys would expire apart"


def _bits(data: Any, count: int) -> set[int]:
    data = data or b""
    return {n for n in range(count) if n // 8 < len(data) and data[n // 8] >> (7 - n % 8) & 1}
