"""Strategies of the tutorial: what a user's own module looks like."""

from __future__ import annotations

from typing import Any

from batchllm_celery import (
    CallableStrategy,
    Completion,
    LLMCallStrategy,
    ProviderError,
    RetryState,
    TokenUsage,
    strategy,
)
from batchllm_celery.errors import FailureKind


async def shout(prompt: str) -> tuple[str, dict[str, int]]:
    return prompt.upper(), {"input_tokens": len(prompt), "output_tokens": len(prompt)}


@strategy("shout")
def build_shout() -> LLMCallStrategy[str]:
    """Any async function will do."""
    return CallableStrategy(shout)


class Moody(LLMCallStrategy[str]):
    """Fails the first attempt at each item, and remembers why in the item's state."""

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[str]:
        assert state is not None
        if attempt == 1:
            raise ProviderError(
                "in no mood", kind=FailureKind.VALIDATION, usage={"input_tokens": 5}
            )
        return Completion(f"{prompt}, after {state.get('mood')!r}", TokenUsage(input_tokens=5))

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        assert state is not None
        state.set("mood", str(exception))


@strategy("moody")
def build_moody() -> Moody:
    """A class of your own, for anything that needs a life of its own."""
    return Moody()


@strategy("stubborn")
def build_stubborn() -> LLMCallStrategy[str]:
    """Refuses what it is not asked politely."""

    async def answer(prompt: str) -> str:
        if "please" not in prompt:
            raise ValueError("say please")
        return "certainly"

    return CallableStrategy(answer)


__all__: list[Any] = []
