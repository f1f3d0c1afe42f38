"""What the workers of test_strategies_fleet.py import: strategies that note every hook in a file.

batchllm worker --app tests.acceptance.strategies_app     STRATEGIES_NOTES: the file
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from batchllm_celery import (
    EscalatingStrategy,
    FailureKind,
    GeminiCachedStrategy,
    GeminiStrategy,
    LLMCallStrategy,
    ProviderError,
    RetryState,
    strategy,
)

FIFTEEN = {"input_tokens": 10, "output_tokens": 5}


def note(tag: str, hook: str, attempt: int = 0) -> None:
    """One line, by one write: lines of several processes never mix."""
    line = json.dumps({"tag": tag, "hook": hook, "pid": os.getpid(), "attempt": attempt})
    file = os.open(os.environ["STRATEGIES_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


class Noting(LLMCallStrategy[str]):
    """Behaves as `what` says, and notes each hook under `tag`."""

    def __init__(self, tag: str, what: str) -> None:
        self.tag = tag
        self.what = what

    async def prepare(self) -> None:
        note(self.tag, "prepare")
        await asyncio.sleep(0.05)
        if self.what == "prepare fails":
            raise RuntimeError("the model is on holiday")

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        note(self.tag, "execute", attempt)
        assert state is not None
        calls = state.get("calls", 0)
        state.set("calls", calls + 1)
        if self.what == "refused thrice" and calls < 3:
            raise ProviderError("slow down", kind=FailureKind.RATE_LIMITED, status=429)
        if self.what == "wrong number":
            raise ValueError("Expected 4290 tokens")
        if self.what == "one bad attempt" and calls == 0:
            raise ProviderError("not JSON", kind=FailureKind.VALIDATION, usage=FIFTEEN)
        await asyncio.sleep(0.1)
        return f"answer to {prompt}", FIFTEEN

    async def cleanup(self) -> None:
        note(self.tag, "cleanup")


@strategy("noting")
def noting(tag: str, what: str = "answers") -> LLMCallStrategy[str]:
    return Noting(tag, what)


class NotingCached(GeminiCachedStrategy[str]):
    """Notes which processes prepare it."""

    tag = ""

    async def prepare(self) -> None:
        note(self.tag, "prepare")
        await super().prepare()


@strategy("cached", quota="cached")
def cached(
    tag: str, tags: dict[str, str] | None = None, buffer: float = 300
) -> LLMCallStrategy[str]:
    built = NotingCached(
        "m",
        cached_content=["The handbook. " * 200],
        cache_tags=tags,
        cache_renewal_buffer_seconds=buffer,
    )
    built.tag = tag
    return built


@strategy("escalating")
def escalating() -> LLMCallStrategy[str]:
    """Short answers by the cheap model, those it has to cut by the good one."""
    cheap: GeminiStrategy[str] = GeminiStrategy("cheap", max_output_tokens=12)
    return EscalatingStrategy([cheap, GeminiStrategy("good")])
