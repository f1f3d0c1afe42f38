"""How fast the ledger is, in this process and in Redis: `python benchmarks/ledger.py [ITEMS]`."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batchllm_celery.connection import Connection
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import Claim, Ledger, Payload, new_process_id
from batchllm_celery.models import BatchSpec, StrategySpec, TokenUsage, WorkItemResult
from batchllm_celery.settings import Settings
from tests.support import ValkeyServer

BATCH = "bench"
PROMPT = "Summarise this text in one sentence. " * 27  # about 1 kB


class Stopwatch:
    """Wall seconds, and CPU seconds of this process and of Redis, per item."""

    def __init__(self, ledger: Ledger, label: str, items: int) -> None:
        self.client: Any = ledger.connection.client
        self.label, self.items = label, items

    async def __aenter__(self) -> None:
        self.redis = await self._redis_seconds()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    async def __aexit__(self, *exc_info: object) -> None:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        server = await self._redis_seconds() - self.redis
        print(
            f"{self.label:24} {self.items / wall:9,.0f} items/s, CPU per item: "
            f"{cpu / self.items * 1e6:6.1f} us here, {server / self.items * 1e6:6.1f} us in Redis"
        )

    async def _redis_seconds(self) -> float:
        used = await self.client.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


async def answer(ledger: Ledger, claim: Claim) -> None:
    assert await ledger.claims.begin(claim) is None
    result: WorkItemResult[Any, Any] = WorkItemResult(
        item_id=claim.payload.item_id,
        index=claim.index,
        success=True,
        output="An answer of some length. " * 8,
        context=claim.payload.context,
        token_usage=TokenUsage(input_tokens=250, output_tokens=60),
    )
    await ledger.claims.record(claim, result, spent_tokens=310, cost=0.001)


async def message(ledger: Ledger, indexes: list[int]) -> None:
    reply = await ledger.claims.claim(BATCH, indexes)
    await asyncio.gather(*(answer(ledger, claim) for claim in reply.claims))


async def feed(ledger: Ledger, items: int) -> None:
    for first in range(0, items, 1000):
        rows = [Payload(f"item-{n}", PROMPT, {"n": n}) for n in range(first, first + 1000)]
        await ledger.feeding.feed(BATCH, first, rows, max_outstanding=items)
    await ledger.feeding.seal(BATCH, items)


async def work(ledger: Ledger, items: int, per_message: int) -> None:
    """400 items in flight."""
    waiting = iter(range(0, items, per_message))

    async def lane() -> None:
        for first in waiting:
            await message(ledger, list(range(first, min(items, first + per_message))))

    await asyncio.gather(*(lane() for _ in range(400 // per_message)))


async def main(url: str, items: int) -> None:
    async with Connection(url) as connection:
        settings = Settings(slots=400, max_payload_bytes=8 * 2**30)
        ledger = Ledger(connection, Keys("bench"), process_id=new_process_id(), settings=settings)
        client: Any = connection.client
        for per_message in (1, 100):
            await ledger.feeding.create(
                BatchSpec(batch_id=BATCH, strategy=StrategySpec(name="echo"))
            )
            async with Stopwatch(ledger, "feed", items):
                await feed(ledger, items)
            async with Stopwatch(ledger, f"run, {per_message} a message", items):
                await work(ledger, items, per_message)
            assert (await ledger.batches.progress(BATCH)).succeeded == items
            await client.flushall()
        await ledger.feeding.create(BatchSpec(batch_id=BATCH, strategy=StrategySpec(name="echo")))
        await feed(ledger, items)
        await client.config_set("slowlog-log-slower-than", 2_000)
        await client.slowlog_reset()
        async with Stopwatch(ledger, "cancel", items):
            await ledger.batches.cancel(BATCH)
        durations = [entry["duration"] / 1000 for entry in await client.slowlog_get(128)]
        print(f"slowest script of the cancel: {max(durations, default=2.0):.1f} ms")
        async with Stopwatch(ledger, "resume", items):
            assert (await ledger.batches.resume(BATCH)).items == items
        await ledger.close()


if __name__ == "__main__":
    server = ValkeyServer().start()
    try:
        asyncio.run(main(server.url, int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
    finally:
        server.stop()
