"""The worst case of the seed plan (4.6): all workers are refused at once, again and again.

An item's refusals are counted in its state: a 429 uses up no attempt, so `attempt` stays 1.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.genai import types

from batchllm_celery import (
    BatchResult,
    FailureKind,
    GeminiCachedStrategy,
    LLMCallStrategy,
    LLMWorkItem,
    ParallelBatchProcessor,
    ProcessorConfig,
    ProviderError,
    RateLimitConfig,
    RetryConfig,
)
from batchllm_celery.observability import BaseObserver, ProcessingEvent

SHORT = RateLimitConfig(
    cooldown_seconds=0.1,
    backoff_multiplier=1.0,
    slow_start_items=5,
    slow_start_initial_delay=0.02,
    slow_start_final_delay=0.01,
)


@pytest.fixture(autouse=True)
def own_redis(monkeypatch: pytest.MonkeyPatch, redis_url: str, namespace: str) -> None:
    """The processor reads its Redis from the environment, as a user's would."""
    monkeypatch.setenv("BATCHLLM_REDIS_URL", redis_url)
    monkeypatch.setenv("BATCHLLM_NAMESPACE", namespace)


class Refused(LLMCallStrategy[str]):
    """Refuses each item as often as `refusals(prompt)` says, then answers."""

    def __init__(
        self, refusals: Callable[[str], int], barrier: asyncio.Barrier | None = None
    ) -> None:
        self.refusals = refusals
        self.barrier = barrier
        self.calls: dict[str, int] = {}
        self.attempts: set[int] = set()
        self.starts: list[float] = []
        self.refused = 0
        self.answered = 0

    async def execute(self, prompt: str, attempt: int, timeout: float, state: Any = None) -> Any:
        self.starts.append(time.monotonic())
        self.attempts.add(attempt)
        call = self.calls[prompt] = self.calls.get(prompt, 0) + 1
        if call == 1 and self.barrier is not None:
            await self.barrier.wait()
        if call <= self.refusals(prompt):
            self.refused += 1
            raise ProviderError("RESOURCE_EXHAUSTED", kind=FailureKind.RATE_LIMITED, status=429)
        self.answered += 1
        return f"done {prompt}", {"input_tokens": 10, "output_tokens": 5}


class Cooldowns(BaseObserver):
    """Remembers each cooldown's count in a row."""

    def __init__(self) -> None:
        self.consecutive: list[int] = []

    async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        if event is ProcessingEvent.COOLDOWN_STARTED:
            self.consecutive.append(data["consecutive"])


async def process(
    strategy: LLMCallStrategy[Any],
    items: int,
    workers: int,
    rate_limit: RateLimitConfig | None = SHORT,
    observers: list[Any] | None = None,
) -> tuple[BatchResult[Any, Any], dict[str, Any]]:
    config = ProcessorConfig(max_workers=workers, rate_limit=rate_limit)
    async with ParallelBatchProcessor[str, str, None](
        config=config, observers=observers
    ) as processor:
        for i in range(items):
            await processor.add_work(LLMWorkItem(item_id=f"i{i}", strategy=strategy, prompt=str(i)))
        result = await processor.process_all()
        return result, await processor.get_stats()


async def test_all_workers_refused_at_once_cool_down_together_and_finish() -> None:
    """Ten workers get their 429 at the same moment: one cooldown, no deadlock, 20 calls in all."""
    strategy = Refused(lambda prompt: 1, asyncio.Barrier(10))
    cooldowns = Cooldowns()
    result, stats = await process(strategy, items=10, workers=10, observers=[cooldowns])
    assert result.succeeded == 10
    assert sum(strategy.calls.values()) == 20
    assert strategy.refused == 10
    assert stats["rate_limit_count"] >= 1
    assert cooldowns.consecutive == [1]
    assert strategy.attempts == {1}


async def test_refusals_that_cascade_use_up_no_attempt() -> None:
    """Two refusals of every item, with 5 workers: all 15 end well, after 3 calls each."""
    strategy = Refused(lambda prompt: 2)
    result, stats = await process(strategy, items=15, workers=5)
    assert result.succeeded == 15
    assert stats["rate_limit_count"] >= 2
    assert min(strategy.calls.values()) >= 3
    assert strategy.attempts == {1}


async def test_a_mix_of_refused_and_good_items() -> None:
    """Every second item is refused once: 20 good, exactly 10 refusals."""
    strategy = Refused(lambda prompt: int(prompt) % 2)
    result, stats = await process(strategy, items=20, workers=5)
    assert result.succeeded == 20
    assert strategy.refused == 10
    assert strategy.answered == 20
    assert stats["rate_limit_count"] == 10


async def test_the_adaptive_policy_gets_through_the_worst_case_too() -> None:
    """The same with the default policy, which needs no configuration."""
    strategy = Refused(lambda prompt: 1, asyncio.Barrier(10))
    result, _ = await process(strategy, items=10, workers=10, rate_limit=None)
    assert result.succeeded == 10
    assert sum(strategy.calls.values()) == 20


async def test_retries_after_a_cooldown_start_slowly_too() -> None:
    """After the resume, starts are spaced as the slow start says, retries included (B9)."""
    slow = RateLimitConfig(
        cooldown_seconds=0.2,
        slow_start_items=10,
        slow_start_initial_delay=0.2,
        slow_start_final_delay=0.05,
    )
    strategy = Refused(lambda prompt: 1, asyncio.Barrier(10))
    result, _ = await process(strategy, items=10, workers=10, rate_limit=slow)
    assert result.succeeded == 10
    again = strategy.starts[10:]
    assert again[0] - strategy.starts[9] > 0.15  # the cooldown
    total = again[-1] - again[0]
    wanted = sum(slow.slow_start_delays()[1:])
    assert total > 0.8 * wanted, f"10 retries within {total:.2f} s, {wanted:.2f} s were asked for"


async def test_a_late_429_of_a_call_from_before_the_cooldown_starts_no_second_one() -> None:
    """A slow call's refusal arrives when the cooldown it would have caused is over (B11)."""

    class Late(LLMCallStrategy[str]):
        calls = 0

        async def execute(
            self, prompt: str, attempt: int, timeout: float, state: Any = None
        ) -> Any:
            self.calls += 1
            if self.calls <= 2:
                await asyncio.sleep(0.0 if self.calls == 1 else 0.6)
                raise ProviderError("429", kind=FailureKind.RATE_LIMITED, status=429)
            return prompt, {}

    cooldowns = Cooldowns()
    result, stats = await process(Late(), items=2, workers=2, observers=[cooldowns])
    assert result.succeeded == 2
    assert stats["rate_limit_count"] == 2
    assert cooldowns.consecutive == [1]


async def test_a_429_takes_from_its_own_budget() -> None:
    """Three refusals with a single attempt allowed: the item succeeds (B3)."""
    strategy = Refused(lambda prompt: 3)
    config = ProcessorConfig(rate_limit=SHORT, retry=RetryConfig(max_attempts=1))
    async with ParallelBatchProcessor[str, str, None](config=config) as processor:
        await processor.add_work(LLMWorkItem(item_id="a", strategy=strategy, prompt="a"))
        result = await processor.process_all()
    assert result.succeeded == 1
    assert result.results[0].attempts == 1


# -- 4.6d: a cache that has expired, and many workers that find out together


class FakeGemini:
    """Enough of `genai.Client` for caches and calls; the first cache has expired already."""

    def __init__(self) -> None:
        self.aio = self
        self.caches = self
        self.models = self
        self.created: list[types.CachedContent] = []
        self.used: list[str | None] = []

    async def list(self) -> Any:
        async def none() -> Any:
            for cache in self.created:
                yield cache

        return none()

    async def create(self, *, model: str, config: Any) -> types.CachedContent:
        await asyncio.sleep(0.05)  # long enough for all workers to come and ask
        now = datetime.now(tz=UTC)
        life = timedelta(seconds=-1) if not self.created else timedelta(hours=1)
        cache = types.CachedContent(
            name=f"cachedContents/{len(self.created) + 1}",
            model=model,
            display_name=config.display_name,
            create_time=now,
            expire_time=now + life,
        )
        self.created.append(cache)
        return cache

    async def generate_content(self, *, model: str, contents: Any, config: Any) -> Any:
        self.used.append(config.cached_content)
        await asyncio.sleep(0.01)
        part = types.Part(text="answer")
        candidate = types.Candidate(
            content=types.Content(role="model", parts=[part]),
            finish_reason=types.FinishReason.STOP,
        )
        usage = types.GenerateContentResponseUsageMetadata(
            prompt_token_count=100,
            candidates_token_count=5,
            total_token_count=105,
            cached_content_token_count=90,
        )
        return types.GenerateContentResponse(candidates=[candidate], usage_metadata=usage)


@pytest.mark.parametrize("workers", [5, 10])
async def test_an_expired_cache_is_replaced_once_however_many_workers_notice(workers: int) -> None:
    """Exactly one new cache, and every call uses it."""
    gemini = FakeGemini()
    strategy: GeminiCachedStrategy[str] = GeminiCachedStrategy(
        model="gemini-2.5-flash",
        client=gemini,
        response_parser=lambda response: str(response.text),
        cached_content=["A long context."],
    )
    result, stats = await process(strategy, items=30, workers=workers)
    assert result.succeeded == 30
    assert [cache.name for cache in gemini.created] == ["cachedContents/1", "cachedContents/2"]
    assert gemini.used == ["cachedContents/2"] * 30
    assert stats["total_cached_tokens"] == 30 * 90
