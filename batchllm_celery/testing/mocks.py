"""Stand-ins for LLMs in your own tests: no provider, no key, no cost.

strategy = mock_strategy(lambda prompt: prompt.upper(), rate_limit_on_call=3)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.models import RetryState, TokenUsage, TOutput
from batchllm_celery.strategies.base import Answer, LLMCallStrategy

_TOKENS = {"input_tokens": 100, "output_tokens": 50, "total_tokens": 150}


@dataclass(frozen=True, slots=True)
class MockUsage:
    """Tokens under PydanticAI's names."""

    input_tokens: int = 100
    output_tokens: int = 50
    total_tokens: int = 150
    cached_input_tokens: int = 0

    @property
    def request_tokens(self) -> int:
        return self.input_tokens

    @property
    def response_tokens(self) -> int:
        return self.output_tokens


@dataclass(frozen=True, slots=True)
class MockResult(Generic[TOutput]):
    """What `MockAgent.run` returns: `output`, and `usage()` as PydanticAI has it."""

    output: TOutput
    tokens: MockUsage = field(default_factory=MockUsage)

    def usage(self) -> MockUsage:
        """Tokens of the call."""
        return self.tokens

    def all_messages(self) -> list[Any]:
        """No messages are kept."""
        return []


class MockAgent(Generic[TOutput]):
    """An agent that answers by a function, late and wrongly if you like.

    Args:
        response_factory: prompt -> output; may raise.
        latency: seconds per call.
        failure_rate: share of calls that fail, 0 to 1.
        rate_limit_on_call: this call (from 1) is refused with a 429.
        timeout_on_call: this call raises a TimeoutError, as a provider's client would.
        tokens_per_call: default 100 in, 50 out.
    """

    def __init__(
        self,
        response_factory: Callable[[str], TOutput],
        latency: float = 0.1,
        failure_rate: float = 0.0,
        rate_limit_on_call: int | None = None,
        timeout_on_call: int | None = None,
        tokens_per_call: Mapping[str, int] | None = None,
    ) -> None:
        self.response_factory = response_factory
        self.latency = latency
        self.failure_rate = failure_rate
        self.rate_limit_on_call = rate_limit_on_call
        self.timeout_on_call = timeout_on_call
        self.tokens = MockUsage(**dict(TokenUsage.of(tokens_per_call or _TOKENS).items()))
        self.call_count = 0
        """Calls so far, failed ones included."""

    async def run(self, prompt: str, **_: Any) -> MockResult[TOutput]:
        """Answer `prompt`.

        Raises:
            ProviderError: where a 429 was asked for.
            TimeoutError: where a timeout was asked for.
            ConnectionError: for the share of calls that fail.
        """
        self.call_count += 1
        call = self.call_count
        if call == self.rate_limit_on_call:
            raise ProviderError(
                "429 RESOURCE_EXHAUSTED: mock rate limit",
                kind=FailureKind.RATE_LIMITED,
                status=429,
            )
        if call == self.timeout_on_call:
            raise TimeoutError("mock provider timeout")
        await asyncio.sleep(self.latency)
        if random.random() < self.failure_rate:
            raise ConnectionError("mock failure")
        return MockResult(self.response_factory(prompt), self.tokens)


class MockStrategy(LLMCallStrategy[TOutput]):
    """Calls a `MockAgent`."""

    def __init__(self, agent: MockAgent[TOutput]) -> None:
        self.agent = agent

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Answer[TOutput]:
        """Ask the agent."""
        result = await self.agent.run(prompt)
        usage = result.usage()
        return result.output, {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "cached_input_tokens": usage.cached_input_tokens,
        }


def mock_strategy(
    response_factory: Callable[[str], Any] | MockAgent[Any] | None = None, **options: Any
) -> MockStrategy[Any]:
    """A strategy that answers without a provider.

    Args:
        response_factory: prompt -> output, or a `MockAgent`; default answers `Mock: {prompt}`.
        options: `MockAgent`'s; its latency is 0 unless given.
    """
    if isinstance(response_factory, MockAgent):
        return MockStrategy(response_factory)
    options.setdefault("latency", 0.0)
    answer = response_factory or (lambda prompt: f"Mock: {prompt}")
    return MockStrategy(MockAgent(answer, **options))
