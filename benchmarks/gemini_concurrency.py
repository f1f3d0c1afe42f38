"""1,000 concurrent calls of 1 s through the real google-genai client in one process, against a bare
`asyncio.gather` over the same client, in turns.

    python -m benchmarks.gemini_concurrency [ROUNDS]

in process   ParallelBatchProcessor: item runner and limiter
worker       a worker's runtime without Celery: claims and records in the ledger as well
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from batchllm_celery import (
    GeminiStrategy,
    LLMWorkItem,
    ParallelBatchProcessor,
    ProcessorConfig,
    Producer,
    Quota,
    QuotaLimits,
    Settings,
)
from batchllm_celery.providers.gemini.client import open_client
from batchllm_celery.simulation.client import spawn
from batchllm_celery.strategies import ProcessResources
from batchllm_celery.worker.process import Runtime
from tests.support import ValkeyServer

CALLS = 1_000
SECONDS = 1.0
MODEL = "gemini-2.5-flash"
ALLOWED = 1.15
UNHINDERED = Quota(name="bench", limits=QuotaLimits(requests_per_minute=60e9))

Way = Callable[[], Awaitable[float]]


def prompts() -> list[str]:
    return [f"{uuid.uuid4().hex} {n}" for n in range(CALLS)]


async def bare(client: Any) -> float:
    """Seconds of the calls alone."""
    started = time.perf_counter()
    call = client.aio.models.generate_content
    await asyncio.gather(*(call(model=MODEL, contents=prompt) for prompt in prompts()))
    return time.perf_counter() - started


@asynccontextmanager
async def in_process(settings: Settings, client: Any) -> AsyncIterator[Way]:
    config = ProcessorConfig(max_workers=CALLS)
    strategy: GeminiStrategy[str] = GeminiStrategy(MODEL, client)
    async with ParallelBatchProcessor[str, str, None](
        config, quota=UNHINDERED, settings=settings
    ) as processor:

        async def run() -> float:
            for n, prompt in enumerate(prompts()):
                item = LLMWorkItem(item_id=str(n), strategy=strategy, prompt=prompt)
                await processor.add_work(item)
            started = time.perf_counter()
            result = await processor.process_all()
            assert result.succeeded == CALLS
            return time.perf_counter() - started

        yield run


@asynccontextmanager
async def worker(settings: Settings, runtime: Runtime) -> AsyncIterator[Way]:
    producer = Producer(settings)

    def feed() -> Any:
        return producer.submit(
            prompts(), strategy="gemini", params={"model": MODEL}, quota=UNHINDERED
        )

    async def run() -> float:
        batch = await asyncio.to_thread(feed)
        started = time.perf_counter()
        tally = await runtime.run_items(batch.id, range(CALLS))
        assert tally.succeeded == CALLS, str(tally)
        return time.perf_counter() - started

    try:
        yield run
    finally:
        await asyncio.to_thread(producer.close)


async def measure(settings: Settings, rounds: int) -> None:
    assert settings.redis_url is not None
    runtime = Runtime(settings, settings.redis_url, lambda *_: None, slots=CALLS)
    await runtime.open()
    resources: ProcessResources = runtime.services.resources
    client = await open_client(resources)  # the one that the worker's strategies use
    async with in_process(settings, client) as local, worker(settings, runtime) as ours:
        ways: dict[str, Way] = {
            "bare gather": lambda: bare(client),
            "in process": local,
            "worker": ours,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            await way()  # connections and imports
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(await way())
    await runtime.close()
    show(seconds)


def show(seconds: dict[str, list[float]]) -> None:
    base = statistics.median(seconds["bare gather"])
    print(f"{CALLS:,} concurrent calls of {SECONDS:g} s, median of {len(seconds['worker'])} rounds")
    for name, each in seconds.items():
        median = statistics.median(each)
        spread = f"{min(each):.2f} to {max(each):.2f}"
        print(f"  {name:12} {median:5.2f} s ({spread})   {median / base:.2f} x")
    worst = max(statistics.median(each) for each in seconds.values()) / base
    print(f"  {'fine' if worst <= ALLOWED else 'TOO SLOW'}: at most {ALLOWED} x is allowed")


def main(rounds: int = 5) -> None:
    server = ValkeyServer().start()
    try:
        with spawn(latency=SECONDS, keep_calls=0) as provider:
            os.environ |= {"GOOGLE_GEMINI_BASE_URL": provider.url, "GEMINI_API_KEY": "any"}
            settings = Settings(redis_url=server.url, namespace="bench")
            asyncio.run(measure(settings, rounds))
    finally:
        server.stop()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
