"""Lifecycle of a strategy that many items share: the seed plan's tests (1.2), and what they imply.

The first three are the plan's own, with only the import names changed.
"""

# mypy: ignore-errors
# The plan's code has no annotations, and stays as it was printed.

import asyncio
import logging
import time

import pytest

from batchllm_celery import LLMCallStrategy, LLMWorkItem, ParallelBatchProcessor, ProcessorConfig


@pytest.fixture(autouse=True)
def own_redis(monkeypatch: pytest.MonkeyPatch, redis_url: str, namespace: str) -> None:
    """The processor reads its Redis from the environment, as a user's would."""
    monkeypatch.setenv("BATCHLLM_REDIS_URL", redis_url)
    monkeypatch.setenv("BATCHLLM_NAMESPACE", namespace)


@pytest.mark.asyncio
async def test_shared_strategy_prepare_called_once():
    """Verify prepare() called exactly once for shared strategy."""
    prepare_count = 0
    cleanup_count = 0
    execute_count = 0

    class CountingStrategy(LLMCallStrategy[str]):
        async def prepare(self):
            nonlocal prepare_count
            prepare_count += 1
            await asyncio.sleep(0.01)  # Simulate slow prepare

        async def cleanup(self):
            nonlocal cleanup_count
            cleanup_count += 1

        async def execute(self, prompt, attempt, timeout, state):
            nonlocal execute_count
            execute_count += 1
            return f"Result: {prompt}", {"input_tokens": 10, "output_tokens": 5}

    strategy = CountingStrategy()  # One instance
    config = ProcessorConfig(max_workers=5, timeout_per_item=10.0)

    async with ParallelBatchProcessor[str, str, None](config=config) as processor:
        # Add 100 items all sharing the same strategy
        for i in range(100):
            await processor.add_work(
                LLMWorkItem(
                    item_id=f"item_{i}",
                    strategy=strategy,  # SHARED
                    prompt=f"Test {i}",
                )
            )

        result = await processor.process_all()

    # Critical assertions
    assert result.total_items == 100
    assert result.succeeded == 100
    assert prepare_count == 1, "prepare() should be called exactly once"
    assert execute_count == 100, "execute() should be called per item"
    assert cleanup_count == 100, "cleanup() should be called per item"


@pytest.mark.asyncio
async def test_shared_strategy_concurrent_prepare():
    """Verify no race condition with concurrent workers."""
    prepare_count = 0
    prepare_lock = asyncio.Lock()

    class ConcurrentStrategy(LLMCallStrategy[str]):
        async def prepare(self):
            nonlocal prepare_count
            async with prepare_lock:
                prepare_count += 1
            await asyncio.sleep(0.1)  # Long prepare to stress test

        async def execute(self, prompt, attempt, timeout, state):
            return "Result", {"input_tokens": 10, "output_tokens": 5}

    strategy = ConcurrentStrategy()
    config = ProcessorConfig(max_workers=20, timeout_per_item=10.0)

    async with ParallelBatchProcessor[str, str, None](config=config) as processor:
        for i in range(100):
            await processor.add_work(
                LLMWorkItem(item_id=f"item_{i}", strategy=strategy, prompt=f"Test {i}")
            )

        result = await processor.process_all()

    assert result.succeeded == 100
    assert prepare_count == 1, "Race condition: prepare() called multiple times"


@pytest.mark.asyncio
async def test_different_strategies_prepare_separately():
    """Verify different strategy instances each get prepare() called."""
    prepare_counts = {}

    class TrackedStrategy(LLMCallStrategy[str]):
        def __init__(self, name: str):
            self.name = name

        async def prepare(self):
            prepare_counts[self.name] = prepare_counts.get(self.name, 0) + 1

        async def execute(self, prompt, attempt, timeout, state):
            return f"{self.name}: {prompt}", {"input_tokens": 10}

    strategy_a = TrackedStrategy("A")
    strategy_b = TrackedStrategy("B")
    strategy_c = TrackedStrategy("C")

    config = ProcessorConfig(max_workers=5, timeout_per_item=10.0)

    async with ParallelBatchProcessor[str, str, None](config=config) as processor:
        # Add items with different strategies
        for i in range(10):
            await processor.add_work(
                LLMWorkItem(item_id=f"a_{i}", strategy=strategy_a, prompt="Test")
            )
        for i in range(10):
            await processor.add_work(
                LLMWorkItem(item_id=f"b_{i}", strategy=strategy_b, prompt="Test")
            )
        for i in range(10):
            await processor.add_work(
                LLMWorkItem(item_id=f"c_{i}", strategy=strategy_c, prompt="Test")
            )

        result = await processor.process_all()

    assert result.total_items == 30
    assert result.succeeded == 30
    assert prepare_counts["A"] == 1
    assert prepare_counts["B"] == 1
    assert prepare_counts["C"] == 1


# -- beyond the plan's own


class Counting(LLMCallStrategy[str]):
    """Counts its calls; the first `failing` prepares raise."""

    def __init__(self, failing: int = 0, prepare_seconds: float = 0.0) -> None:
        self.failing = failing
        self.prepare_seconds = prepare_seconds
        self.prepared = self.executed = self.cleaned = self.closed = 0
        self.ready_at = 0.0

    async def prepare(self):
        self.prepared += 1
        await asyncio.sleep(self.prepare_seconds)
        if self.prepared <= self.failing:
            raise RuntimeError("no model today")
        self.ready_at = time.monotonic()

    async def execute(self, prompt, attempt, timeout, state):
        assert self.prepared > self.failing, "executed without being prepared"
        self.executed += 1
        return prompt, {}

    async def cleanup(self):
        self.cleaned += 1

    async def close(self):
        self.closed += 1


async def run(strategies, workers=5):
    """Run one item per strategy given."""
    config = ProcessorConfig(max_workers=workers)
    async with ParallelBatchProcessor(config=config) as processor:
        for i, strategy in enumerate(strategies):
            await processor.add_work(LLMWorkItem(item_id=f"i{i}", strategy=strategy, prompt="x"))
        return await processor.process_all()


async def test_a_prepare_that_always_fails_fails_each_item_with_its_message():
    """Five items: 5 prepares, 5 cleanups, no execute, 5 failures (seed 2.3)."""
    strategy = Counting(failing=99)
    result = await run([strategy] * 5)
    assert (strategy.prepared, strategy.executed, strategy.cleaned) == (5, 0, 5)
    assert result.failed == 5
    assert {one.error for one in result.results} == {"RuntimeError: no model today"}


async def test_a_failed_prepare_is_tried_again_by_the_next_item():
    """Only the first prepare fails: one item fails, the other succeeds, both are cleaned up."""
    strategy = Counting(failing=1)
    result = await run([strategy] * 2, workers=1)
    assert (result.succeeded, result.failed) == (1, 1)
    assert strategy.cleaned == 2


async def test_a_failing_cleanup_changes_no_result(caplog):
    """It is a warning that names the item (seed 2.3)."""

    class Untidy(Counting):
        async def cleanup(self):
            raise OSError("disk full")

    with caplog.at_level(logging.WARNING):
        result = await run([Untidy()])
    assert result.succeeded == 1
    assert "Cleanup failed for i0: disk full" in caplog.messages


async def test_different_strategies_prepare_in_parallel():
    """Ten strategies that take 0.1 s each are ready in well under a second (B8)."""
    strategies = [Counting(prepare_seconds=0.1) for _ in range(10)]
    async with ParallelBatchProcessor(config=ProcessorConfig(max_workers=10)) as processor:
        for i, strategy in enumerate(strategies):
            await processor.add_work(LLMWorkItem(item_id=f"i{i}", strategy=strategy, prompt="x"))
        result = await processor.process_all()
    ready = [strategy.ready_at for strategy in strategies]
    assert result.succeeded == 10
    assert max(ready) - min(ready) < 0.4  # the last one was ready 0.5 s after the first began


async def test_a_fresh_strategy_for_every_run_is_prepared_every_time():
    """Fifty strategies that come and go are told apart although Python reuses their `id` (B6)."""
    prepared = 0

    class Fresh(LLMCallStrategy[str]):
        ready = False

        async def prepare(self):
            nonlocal prepared
            prepared += 1
            self.ready = True

        async def execute(self, prompt, attempt, timeout, state):
            assert self.ready
            return prompt, {}

    async with ParallelBatchProcessor() as processor:
        for i in range(50):
            await processor.add_work(LLMWorkItem(item_id=f"i{i}", strategy=Fresh(), prompt="x"))
            result = await processor.process_all()
            assert result.succeeded == 1
    assert prepared == 50


async def test_a_strategy_is_closed_once_when_the_processor_is():
    """Cleanup is per item; close is where a client belongs."""
    strategy = Counting()
    async with ParallelBatchProcessor() as processor:
        for _ in range(2):
            await processor.add_work(LLMWorkItem(item_id="i", strategy=strategy, prompt="x"))
            await processor.process_all()
        assert strategy.closed == 0
    assert (strategy.prepared, strategy.cleaned, strategy.closed) == (1, 2, 1)
