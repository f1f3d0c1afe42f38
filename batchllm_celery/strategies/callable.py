"""Any async function as a strategy."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from batchllm_celery.models import Completion, RetryState, TOutput
from batchllm_celery.strategies.base import LLMCallStrategy, as_completion, usage_in


class CallableStrategy(LLMCallStrategy[TOutput]):
    """Calls `function(prompt)`, your own client inside.

        async def ask(prompt: str) -> tuple[str, dict[str, int]]:
            answer = await my_client.complete(prompt)
            return answer.text, {"input_tokens": answer.input, "output_tokens": answer.output}

        CallableStrategy(ask, model_name="openai:gpt-4.1-mini")

    Args:
        function: async; returns the output, `(output, usage)` or a `Completion`. Exceptions are
            classified by their status code, type and text; raise `ProviderError` to say it exactly.
        model_name: `PROVIDER:MODEL`, for prices and the default quota.
        quota: the quota to draw on.
        max_output_tokens: for the limiter's estimate.
        accepts: forms of prompts that the function takes: `str`, `Request`, `NativeRequest`.
    """

    def __init__(
        self,
        function: Callable[[Any], Awaitable[Any]],
        *,
        model_name: str | None = None,
        quota: str | None = None,
        max_output_tokens: int | None = None,
        accepts: tuple[type[Any], ...] = (str,),
    ) -> None:
        self.function = function
        self.model_name = model_name
        self.quota = quota
        self.max_output_tokens = max_output_tokens
        self.accepts = accepts

    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """Await the function. An answer without usage counts no tokens."""
        called = self.function(prompt)
        if not inspect.isawaitable(called):
            raise TypeError("the function of a CallableStrategy must be async")
        answer = await called
        return as_completion(answer) if _has_usage(answer) else Completion(answer)


def _has_usage(answer: Any) -> bool:
    if isinstance(answer, Completion):
        return True
    if not isinstance(answer, tuple) or len(answer) != 2:
        return False
    return usage_in(answer[1]) is not None
