"""The seed plan's benchmarks (4.5): `pytest -m benchmark -v -s tests/test_performance.py`.

The quota is wide open here, so the figures are the framework's own.
"""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from typing import Any

import pytest

from batchllm_celery import (
    BatchResult,
    FailureKind,
    LLMCallStrategy,
    LLMWorkItem,
    ParallelBatchProcessor,
    ProcessorConfig,
    ProviderError,
    Quota,
    QuotaLimits,
    RetryConfig,
)
from batchllm_celery.testing import mock_strategy

pytestmark = pytest.mark.benchmark

WIDE = Quota(name="wide", limits=QuotaLimits(requests_per_minute=60_000_000), burst_seconds=1.0)


@pytest.fixture(autouse=True)
def own_redis(monkeypatch: pytest.MonkeyPatch, redis_url: str, namespace: str) -> None:
    """The processor reads its Redis from the environment, as a user's would."""
    monkeypatch.setenv("BATCHLLM_REDIS_URL", redis_url)
    monkeypatch.setenv("BATCHLLM_NAMESPACE", namespace)


async def timed(
    items: int, workers: int, strategy: Any = None, **options: Any
) -> tuple[float, BatchResult[Any, Any]]:
    """Seconds of `process_all` alone, and its result."""
    config = ProcessorConfig(max_workers=workers, **options)
    async with ParallelBatchProcessor[str, str, None](config, quota=WIDE) as processor:
        for i in range(items):
            each = strategy() if isinstance(strategy, type) else strategy or mock_strategy()
            await processor.add_work(LLMWorkItem(item_id=f"i{i}", strategy=each, prompt="x"))
        started = time.perf_counter()
        result = await processor.process_all()
        return time.perf_counter() - started, result


async def test_throughput_of_a_single_worker() -> None:
    """One worker on instant answers is limited by the framework alone."""
    seconds, result = await timed(500, 1)
    print(f"\nsingle worker: {500 / seconds:,.0f} items/s")
    assert result.succeeded == 500
    assert 500 / seconds > 50


async def test_throughput_scales_with_workers() -> None:
    """Answers of 20 ms: ten workers are several times as fast as one."""
    shared = mock_strategy(latency=0.02)
    one, _ = await timed(50, 1, shared)
    ten, _ = await timed(50, 10, shared)
    print(f"\nscaling: 1 worker {50 / one:,.0f}/s, 10 workers {50 / ten:,.0f}/s ({one / ten:.1f}x)")
    assert one / ten > 4


async def test_memory_per_item_is_bounded() -> None:
    """Results are kept, nothing else."""
    await timed(50, 10)  # imports and caches
    gc.collect()
    tracemalloc.start()
    _, result = await timed(2_000, 10, mock_strategy())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"\nmemory: {kept / 2_000:,.0f} bytes kept per result, peak {peak / 2**20:.1f} MiB")
    assert result.succeeded == 2_000
    assert kept / 2_000 < 10_000


async def test_framework_overhead_per_item() -> None:
    """Against a bare gather over the same calls of 100 ms."""

    async def call() -> None:
        await asyncio.sleep(0.1)

    started = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(500)))
    bare = time.perf_counter() - started
    seconds, _ = await timed(500, 500, mock_strategy(latency=0.1))
    overhead = (seconds - bare) / 500
    print(f"\noverhead: {overhead * 1e3:.2f} ms per item ({seconds:.2f} s against {bare:.2f} s)")
    assert overhead < 0.005


async def test_statistics_are_cheap_to_read() -> None:
    """A dashboard may poll them."""
    async with ParallelBatchProcessor[str, str, None](quota=WIDE) as processor:
        await processor.add_work(LLMWorkItem(item_id="a", strategy=mock_strategy(), prompt="x"))
        await processor.process_all()
        started = time.perf_counter()
        for _ in range(1_000):
            await processor.get_stats()
        each = (time.perf_counter() - started) / 1_000
    print(f"\nget_stats: {each * 1e6:.1f} us")
    assert each < 0.001


async def test_a_shared_strategy_is_faster_than_one_per_item() -> None:
    """prepare takes 50 ms: once, or a hundred times."""

    class Slow(LLMCallStrategy[str]):
        async def prepare(self) -> None:
            await asyncio.sleep(0.05)

        async def execute(
            self, prompt: str, attempt: int, timeout: float, state: Any = None
        ) -> Any:
            return prompt, {}

    shared, _ = await timed(100, 5, Slow())
    unique, _ = await timed(100, 5, Slow)
    print(f"\nshared strategy {shared:.2f} s, one per item {unique:.2f} s ({unique / shared:.1f}x)")
    assert shared < unique


async def test_retries_cost_their_wait_and_little_else() -> None:
    """Every item fails once, with a wait of 10 ms."""

    class FailsOnce(LLMCallStrategy[str]):
        async def execute(
            self, prompt: str, attempt: int, timeout: float, state: Any = None
        ) -> Any:
            if attempt == 1:
                raise ProviderError("reset", kind=FailureKind.CONNECTION)
            return prompt, {}

    retry = RetryConfig(initial_wait=0.01, max_wait=0.01, jitter=False)
    seconds, result = await timed(200, 20, FailsOnce(), retry=retry)
    print(f"\nretries: 200 items, 400 calls in {seconds:.2f} s")
    assert result.succeeded == 200
    assert seconds < 5


async def test_summary_of_twenty_workers_and_a_thousand_items() -> None:
    """The plan's own bar (3.1): slow-start delays are data, so workers hold no lock for them."""
    seconds, result = await timed(1_000, 20, mock_strategy(latency=0.01))
    ideal = 1_000 * 0.01 / 20
    print(f"\nsummary: 1,000 items, 20 workers: {seconds:.2f} s (ideal {ideal:.2f} s)")
    assert result.succeeded == 1_000
    assert seconds < 5 * ideal + 1
