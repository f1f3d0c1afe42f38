"""`ParallelBatchProcessor` on a real Valkey: batch-llm's API, its measured defects put right."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery import (
    FailureKind,
    FixedDelayStrategy,
    LLMCallStrategy,
    LLMWorkItem,
    MetricsObserver,
    ParallelBatchProcessor,
    ProcessorConfig,
    ProviderError,
    Quota,
    QuotaLimits,
    RetryConfig,
    Settings,
    UsageError,
    WorkItemResult,
)
from batchllm_celery.compat.middleware import Middleware
from batchllm_celery.compat.observers import BaseObserver, ProcessingEvent
from batchllm_celery.errors import QuotaConflictError, RedisUnavailableError
from batchllm_celery.models import RateLimitConfig
from batchllm_celery.testing import MockAgent, MockStrategy, mock_strategy
from tests.acceptance.fleet import ROOT, assert_nothing_left

FAST = RetryConfig(initial_wait=0.001, max_wait=0.001)


@pytest.fixture
def settings(redis_url: str, namespace: str) -> Settings:
    return Settings(redis_url=redis_url, namespace=namespace)


class Answers(LLMCallStrategy[Any]):
    """Answers by an async function of prompt and attempt."""

    def __init__(self, answer: Callable[[str, int], Awaitable[Any]]) -> None:
        self.answer = answer

    async def execute(self, prompt: str, attempt: int, timeout: float, state: Any = None) -> Any:
        return await self.answer(prompt, attempt)


async def add(processor: ParallelBatchProcessor[Any, Any, Any], strategy: Any, n: int) -> None:
    for i in range(n):
        await processor.add_work(
            LLMWorkItem(item_id=f"i{i}", strategy=strategy, prompt=f"p{i}", context={"n": i})
        )


async def test_each_answer_belongs_to_its_prompt_and_context(settings: Settings) -> None:
    """Results come in completion order; `index` is the order in which items were added."""
    others: set[str] = set()
    all_others = asyncio.Event()

    async def slow_first(prompt: str, attempt: int) -> Any:
        if prompt == "p0":
            await all_others.wait()
        others.add(prompt)
        if len(others) == 9:  # let the ninth of them be recorded first
            asyncio.get_running_loop().call_later(0.1, all_others.set)
        return prompt.upper(), {}

    async with ParallelBatchProcessor[str, str, dict[str, int]](settings=settings) as processor:
        await add(processor, Answers(slow_first), 10)
        result = await processor.process_all()
    assert result.results[-1].item_id == "i0"
    for one in result.results:
        assert one.output == f"P{one.index}"
        assert one.context == {"n": one.index}
        assert one.item_id == f"i{one.index}"


async def test_process_all_again_begins_with_fresh_results_and_statistics(
    settings: Settings,
) -> None:
    """What the first run returned is not touched by the second."""
    async with ParallelBatchProcessor[str, str, None](settings=settings) as processor:
        await add(processor, mock_strategy(), 3)
        first = await processor.process_all()
        await add(processor, mock_strategy(), 2)
        second = await processor.process_all()
        stats = await processor.get_stats()
    assert (first.total_items, second.total_items) == (3, 2)
    assert len(first.results) == 3
    assert sorted(one.index for one in second.results) == [0, 1]
    assert (stats["total"], stats["processed"]) == (2, 2)


async def test_statistics_have_batch_llms_keys_and_a_duration(settings: Settings) -> None:
    """The plan's own snippet, items per second by `stats["duration"]`, works (B5 too)."""

    async def answer(prompt: str, attempt: int) -> Any:
        if prompt == "p1":
            raise ValueError("bad: really")
        return prompt, {"input_tokens": 10, "output_tokens": 5, "cached_input_tokens": 8}

    async with ParallelBatchProcessor[str, str, None](settings=settings) as processor:
        assert (await processor.get_stats())["duration"] == 0
        await add(processor, Answers(answer), 2)
        result = await processor.process_all()
        stats = await processor.get_stats()
    assert result.total_items / stats["duration"] > 0
    assert abs(stats.pop("start_time") - time.time()) < 60
    assert stats.pop("duration") < 30
    assert stats == {
        "total": 2,
        "processed": 2,
        "succeeded": 1,
        "failed": 1,
        "error_counts": {"ValueError": 1},
        "rate_limit_count": 0,
        "total_input_tokens": 10,
        "total_output_tokens": 5,
        "total_tokens": 15,
        "cached_input_tokens": 8,
        "total_cached_tokens": 8,
    }


async def test_a_full_queue_starts_processing_by_itself(settings: Settings) -> None:
    """`add_work` waits for a free place and never for ever."""
    config = ProcessorConfig(max_queue_size=5, max_workers=2)
    async with ParallelBatchProcessor[str, str, None](config, settings=settings) as processor:
        async with asyncio.timeout(30):
            await add(processor, mock_strategy(), 40)
        result = await processor.process_all()
        stats = await processor.get_stats()
    assert result.succeeded == 40
    assert sorted(one.index for one in result.results) == list(range(40))
    assert stats["total"] == 40


async def test_at_most_max_workers_items_run_at_once(settings: Settings) -> None:
    """And that many do."""
    running = peak = 0

    async def answer(prompt: str, attempt: int) -> Any:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.3)
        running -= 1
        return prompt, {}

    config = ProcessorConfig(max_workers=4)
    quota = Quota(name="wide", limits=QuotaLimits(max_concurrency=100))
    async with ParallelBatchProcessor[str, str, None](
        config, quota=quota, settings=settings
    ) as processor:
        await add(processor, Answers(answer), 12)
        await processor.process_all()
    assert peak == 4


async def test_defects_of_batch_llm_stay_out(settings: Settings) -> None:
    """B1: tokens of failed attempts. B2: MetricsObserver counts what failed. B4: a 4290 in a text
    is no 429. B7: the provider's timeout keeps its name. B10: each event once."""
    events: list[ProcessingEvent] = []

    class Hears(BaseObserver):
        async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
            events.append(event)

    async def answer(prompt: str, attempt: int) -> Any:
        usage = {"input_tokens": 10, "output_tokens": 5}
        if prompt == "p0" and attempt == 1:
            raise ProviderError("no JSON", kind=FailureKind.VALIDATION, usage=usage)
        if prompt == "p1":
            raise ConnectionError("reset")
        if prompt == "p2":
            raise ValueError("Expected 4290 tokens")
        if prompt == "p3":
            raise TimeoutError("their timeout")
        return prompt, usage

    metrics = MetricsObserver()
    async with ParallelBatchProcessor[str, str, None](
        ProcessorConfig(retry=FAST), observers=[metrics, Hears()], settings=settings
    ) as processor:
        await add(processor, Answers(answer), 4)
        result = await processor.process_all()
        stats = await processor.get_stats()
    by_id = {one.item_id: one for one in result.results}
    assert by_id["i0"].token_usage.total_tokens == 30
    assert by_id["i0"].attempts == 2
    assert by_id["i1"].error_kind is FailureKind.CONNECTION
    assert by_id["i2"].error_kind is FailureKind.LOGIC_ERROR
    assert by_id["i3"].error == "TimeoutError: their timeout"
    assert stats["rate_limit_count"] == 0
    assert metrics.items_failed == result.failed == 3
    assert metrics.error_counts == {"ConnectionError": 1, "ValueError": 1, "TimeoutError": 1}
    assert events.count(ProcessingEvent.ITEM_STARTED) == 4
    assert events.count(ProcessingEvent.BATCH_STARTED) == 1
    assert events.count(ProcessingEvent.BATCH_COMPLETED) == 1
    assert events[0] is ProcessingEvent.BATCH_STARTED


async def test_middlewares_change_skip_and_rescue(settings: Settings) -> None:
    """A skipped item keeps its id; a rescued one counts as a success."""

    class Shapes(Middleware):
        async def before_process(self, work_item: Any) -> Any:
            if work_item.item_id == "i1":
                return None
            return LLMWorkItem(work_item.item_id, work_item.strategy, work_item.prompt + "!")

        async def after_process(self, result: Any) -> Any:
            return result.model_copy(update={"metadata": {"seen": True}})

        async def on_error(self, work_item: Any, error: Exception) -> Any:
            return WorkItemResult(item_id=work_item.item_id, success=True, output=str(error))

    async def answer(prompt: str, attempt: int) -> Any:
        if prompt == "p2!":
            raise ValueError("rescued")
        return prompt, {}

    async with ParallelBatchProcessor[str, str, None](
        middlewares=[Shapes()], settings=settings
    ) as processor:
        await add(processor, Answers(answer), 3)
        result = await processor.process_all()
    by_id = {one.item_id: one for one in result.results}
    assert by_id["i0"].output == "p0!"
    assert (by_id["i1"].success, by_id["i1"].error) == (False, "Skipped by middleware")
    assert by_id["i2"].output == "rescued"
    assert all(one.metadata == {"seen": True} for one in result.results)


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_post_processor_sees_every_result_and_hurts_none(
    settings: Settings, is_async: bool
) -> None:
    """Failures too; what it raises changes nothing."""
    seen: list[str] = []

    def plain(result: WorkItemResult[Any, Any]) -> None:
        seen.append(result.item_id)
        raise RuntimeError("post-processor is broken")

    async def asynchronous(result: WorkItemResult[Any, Any]) -> None:
        plain(result)

    async def answer(prompt: str, attempt: int) -> Any:
        if prompt == "p1":
            raise ValueError("no")
        return prompt, {}

    async with ParallelBatchProcessor[str, str, None](
        post_processor=asynchronous if is_async else plain, settings=settings
    ) as processor:
        await add(processor, Answers(answer), 3)
        result = await processor.process_all()
    assert sorted(seen) == ["i0", "i1", "i2"]
    assert (result.succeeded, result.failed) == (2, 1)


async def test_progress_is_told_at_each_interval(settings: Settings) -> None:
    """The last call says that all is done."""
    calls: list[tuple[int, int]] = []
    config = ProcessorConfig(progress_interval=10)
    async with ParallelBatchProcessor[str, str, None](
        config,
        progress_callback=lambda done, total, item_id: calls.append((done, total)),
        settings=settings,
    ) as processor:
        await add(processor, mock_strategy(), 25)
        await processor.process_all()
    assert calls == [(10, 25), (20, 25), (25, 25)]


async def test_a_dry_run_calls_nobody(settings: Settings) -> None:
    """Neither prepare nor execute: a provider may be behind both."""

    class Never(LLMCallStrategy[str]):
        async def prepare(self) -> None:
            raise AssertionError("prepared")

        async def execute(
            self, prompt: str, attempt: int, timeout: float, state: Any = None
        ) -> Any:
            raise AssertionError("executed")

    async with ParallelBatchProcessor[str, str, None](
        ProcessorConfig(dry_run=True), settings=settings
    ) as processor:
        await add(processor, Never(), 3)
        result = await processor.process_all()
    assert result.succeeded == 3
    assert result.results[0].output.startswith("[DRY-RUN] Mock output for prompt: p")
    assert result.total_input_tokens == 300


async def test_requests_per_minute_limit_calls_before_they_are_made(settings: Settings) -> None:
    """300 a minute are 5 a second, for all workers together (seed 2.4)."""
    starts: list[float] = []

    async def answer(prompt: str, attempt: int) -> Any:
        starts.append(time.monotonic())
        return prompt, {}

    config = ProcessorConfig(max_workers=10, max_requests_per_minute=300)
    async with ParallelBatchProcessor[str, str, None](config, settings=settings) as processor:
        await add(processor, Answers(answer), 11)
        await processor.process_all()
    assert starts[-1] - starts[0] > 1.7


async def test_a_users_rate_limit_strategy_decides_the_cooldown(settings: Settings) -> None:
    """batch-llm's `rate_limit_strategy=`."""
    starts: list[float] = []

    async def answer(prompt: str, attempt: int) -> Any:
        starts.append(time.monotonic())
        if len(starts) == 1:
            raise ProviderError("429", kind=FailureKind.RATE_LIMITED, status=429)
        return prompt, {}

    strategy = FixedDelayStrategy(cooldown=0.4, delay=0.01)
    async with ParallelBatchProcessor[str, str, None](
        rate_limit_strategy=strategy, settings=settings
    ) as processor:
        await add(processor, Answers(answer), 1)
        result = await processor.process_all()
        stats = await processor.get_stats()
    assert result.succeeded == 1
    assert stats["rate_limit_count"] == 1
    assert 0.35 < starts[1] - starts[0] < 5


async def test_a_refused_key_ends_the_other_items_of_its_strategy(settings: Settings) -> None:
    """A thousand calls with a wrong key help nobody; other strategies go on."""
    calls = 0

    async def refuse(prompt: str, attempt: int) -> Any:
        nonlocal calls
        calls += 1
        raise ProviderError("API key not valid", kind=FailureKind.AUTHENTICATION, status=401)

    config = ProcessorConfig(max_workers=1)
    async with ParallelBatchProcessor[str, str, None](config, settings=settings) as processor:
        await add(processor, Answers(refuse), 20)
        await add(processor, mock_strategy(), 1)
        result = await processor.process_all()
    kinds = [one.error_kind for one in result.results]
    assert calls == 1
    assert kinds.count(FailureKind.AUTHENTICATION) == 1
    assert kinds.count(FailureKind.ABORTED) == 19
    assert result.succeeded == 1


async def test_registered_names_work_in_process_too(settings: Settings) -> None:
    """An item may name its strategy as it does for a fleet; an unknown name is refused at once."""
    async with ParallelBatchProcessor[str, str, None](settings=settings) as processor:
        with pytest.raises(UsageError, match="no strategy 'nobody'"):
            await processor.add_work(LLMWorkItem(item_id="a", strategy="nobody", prompt="x"))
        with pytest.raises(UsageError, match="must be an LLMCallStrategy"):
            await processor.add_work(LLMWorkItem(item_id="a", strategy=object(), prompt="x"))


async def test_processors_share_a_named_quota_and_may_not_change_it(settings: Settings) -> None:
    """A differing limit is refused with both values."""
    sixty = Quota(name="shared", limits=QuotaLimits(requests_per_minute=60_000))
    async with ParallelBatchProcessor[str, str, None](quota=sixty, settings=settings) as processor:
        await add(processor, mock_strategy(), 1)
        assert (await processor.process_all()).succeeded == 1
    other = Quota(name="shared", limits=QuotaLimits(requests_per_minute=10))
    async with ParallelBatchProcessor[str, str, None](quota=other, settings=settings) as processor:
        await add(processor, mock_strategy(), 1)
        with pytest.raises(QuotaConflictError, match="60000"):
            await processor.process_all()


def test_a_quota_with_its_own_limits_takes_no_others(settings: Settings) -> None:
    """Two truths about one limit are a mistake."""
    config = ProcessorConfig(rate_limit=RateLimitConfig())
    with pytest.raises(UsageError, match="its own limits"):
        ParallelBatchProcessor(config, quota=Quota(name="q"), settings=settings)


def test_without_a_context_manager_each_run_opens_and_closes_what_it_needs(
    settings: Settings,
) -> None:
    """Two `asyncio.run` on one processor: no loop is left with an open connection."""
    processor = ParallelBatchProcessor[str, str, None](settings=settings)

    async def once() -> int:
        await add(processor, mock_strategy(), 3)
        return (await processor.process_all()).succeeded

    assert asyncio.run(once()) == 3
    assert asyncio.run(once()) == 3
    assert processor._engine is None


async def test_shutdown_cancels_cleans_up_and_may_be_repeated(settings: Settings) -> None:
    """A run that is cut short leaves no task and no waiting item."""
    cleaned: list[str] = []
    started = asyncio.Event()

    class Slow(LLMCallStrategy[str]):
        async def execute(
            self, prompt: str, attempt: int, timeout: float, state: Any = None
        ) -> Any:
            started.set()
            await asyncio.sleep(60)

        async def cleanup(self) -> None:
            cleaned.append("x")

    before = asyncio.all_tasks()
    async with ParallelBatchProcessor[str, str, None](settings=settings) as processor:
        await add(processor, Slow(), 20)
        running = asyncio.create_task(processor.process_all())
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await processor.cleanup()
        await processor.shutdown()
    assert len(cleaned) >= 1
    assert asyncio.all_tasks() == before


async def test_an_unreachable_redis_is_one_clear_error(tmp_path: Path) -> None:
    """Within seconds, naming the address."""
    nowhere = Settings(redis_url=f"unix://{tmp_path}/absent.sock")
    async with ParallelBatchProcessor[str, str, None](settings=nowhere) as processor:
        await add(processor, mock_strategy(), 1)
        started = time.monotonic()
        with pytest.raises(RedisUnavailableError, match=r"absent\.sock"):
            await processor.process_all()
    assert time.monotonic() - started < 5


NOTEBOOK = """
import asyncio
from batchllm_celery import CallableStrategy, LLMWorkItem, ParallelBatchProcessor

async def shout(prompt):
    return prompt.upper()

async def main():
    async with ParallelBatchProcessor() as processor:
        for n in range(20):
            item = LLMWorkItem(item_id=f"i{n}", strategy=CallableStrategy(shout), prompt=f"p{n}")
            await processor.add_work(item)
        result = await processor.process_all()
    print(sorted(one.output for one in result.results) == sorted(f"P{n}" for n in range(20)))

asyncio.run(main())
"""


def test_without_a_redis_url_it_brings_its_own_server(tmp_path: Path) -> None:
    """A notebook needs nothing installed or started beside it, and leaves nothing running."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCHLLM_")}
    environ = {**kept, "BATCHLLM_STATE_DIR": str(tmp_path / "state"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr
    assert (tmp_path / "state").is_dir()
    assert_nothing_left(tmp_path, timeout=10)


async def test_mock_agents_play_what_a_test_asks_for(settings: Settings) -> None:
    """A 429 on the second call and a timeout on the third cost no item."""
    agent = MockAgent(
        str.upper,
        latency=0.0,
        rate_limit_on_call=2,
        timeout_on_call=3,
        tokens_per_call={"input_tokens": 7},
    )
    config = ProcessorConfig(
        max_workers=1,
        retry=FAST,
        rate_limit=RateLimitConfig(cooldown_seconds=0.05, slow_start_items=0),
    )
    async with ParallelBatchProcessor[str, str, None](config, settings=settings) as processor:
        await add(processor, MockStrategy(agent), 3)
        result = await processor.process_all()
        stats = await processor.get_stats()
    assert result.succeeded == 3
    assert agent.call_count == 5
    assert stats["rate_limit_count"] == 1
    assert {one.output for one in result.results} == {"P0", "P1", "P2"}
    assert result.total_input_tokens == 21
