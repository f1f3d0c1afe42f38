"""A strategy for workers of tests: it answers after a nap."""

from __future__ import annotations

import asyncio
from typing import Any

from batchllm_celery import LLMCallStrategy, RetryState, TokenUsage, strategy


class Napping(LLMCallStrategy[str]):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> tuple[str, TokenUsage]:
        await asyncio.sleep(self.seconds)
        return prompt, TokenUsage(input_tokens=5, output_tokens=5, total_tokens=10)


@strategy("unmetered")
def unmetered() -> LLMCallStrategy[Any]:
    return Napping(0.0)


@strategy("napping", quota="naps")
def napping(seconds: float = 0.01) -> LLMCallStrategy[Any]:
    return Napping(seconds)
