"""One process of a rival of the limiter: plain scripts that know nothing of each other.

    python quota_rivals.py naive URL FIRST COUNT SLOTS
    python quota_rivals.py async-batch-llm URL FIRST COUNT SLOTS RPM [COOLDOWN]

Runs in `.bench/abl`, a virtual environment with aiohttp and async-batch-llm 0.28; imports nothing
of ours. `quota.py` starts it.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import aiohttp


class Refused(Exception):
    """A 429, with the seconds that it asked for."""

    def __init__(self, wait: float) -> None:
        super().__init__("429 Too Many Requests")
        self.wait = wait


async def call(session: aiohttp.ClientSession, url: str, prompt: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
    async with session.post(f"{url}/chat/completions", json=body) as reply:
        if reply.status == 429:
            raise Refused(float(reply.headers.get("retry-after-ms", 1000)) / 1000)
        reply.raise_for_status()
        await reply.read()


async def naive(url: str, prompts: list[str], slots: int) -> None:
    """Each call by itself: after a 429 it waits 1, 2, 4 ... 60 s, give or take a half."""
    gate = asyncio.Semaphore(slots)
    async with aiohttp.ClientSession() as session:

        async def item(prompt: str) -> None:
            async with gate:
                for tried in range(1_000):
                    try:
                        return await call(session, url, prompt)
                    except Refused:
                        await asyncio.sleep(min(2**tried, 60) * random.uniform(0.5, 1.5))

        await asyncio.gather(*map(item, prompts))


async def async_batch_llm(
    url: str, prompts: list[str], slots: int, rpm: float, cooldown: float = 300.0
) -> None:
    """As it comes: its defaults (300 s of cooldown), and `max_requests_per_minute`."""
    from async_batch_llm import LLMWorkItem, ParallelBatchProcessor, ProcessorConfig
    from async_batch_llm.core.config import RateLimitConfig
    from async_batch_llm.llm_strategies import LLMCallStrategy
    from async_batch_llm.strategies.errors import ErrorClassifier, ErrorInfo

    class Classifier(ErrorClassifier):
        def classify(self, exception: Exception, *_: Any, **__: Any) -> Any:
            limited = isinstance(exception, Refused)
            wait = exception.wait if isinstance(exception, Refused) else None
            return ErrorInfo(
                is_retryable=True,
                is_rate_limit=limited,
                is_timeout=False,
                error_category="rate_limit" if limited else "error",
                suggested_wait=wait,
            )

    async with aiohttp.ClientSession() as session:

        class Strategy(LLMCallStrategy):  # type: ignore[misc]  # untyped here: not in our environment
            async def execute(self, prompt: str, *_: Any, **__: Any) -> Any:
                await call(session, url, prompt)
                return "ok", {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}, None

        config = ProcessorConfig(
            max_workers=slots,
            max_requests_per_minute=rpm,
            rate_limit=RateLimitConfig(cooldown_seconds=cooldown),
        )
        strategy = Strategy()
        async with ParallelBatchProcessor(
            config=config, error_classifier=Classifier()
        ) as processor:
            for prompt in prompts:
                await processor.add_work(
                    LLMWorkItem(item_id=prompt, strategy=strategy, prompt=prompt)
                )
            await processor.process_all()


def main() -> None:
    kind, url, first, count, slots, *rest = sys.argv[1:]
    prompts = [f"{index} ".ljust(40, "x") for index in range(int(first), int(first) + int(count))]
    if kind == "naive":
        asyncio.run(naive(url, prompts, int(slots)))
    else:
        asyncio.run(async_batch_llm(url, prompts, int(slots), *map(float, rest)))


if __name__ == "__main__":
    main()
