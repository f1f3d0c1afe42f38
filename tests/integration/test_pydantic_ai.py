"""PydanticAIStrategy: the real library, its own test model and our clients beneath it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

pytest.importorskip("pydantic_ai", reason="the pydantic-ai extra is not installed")

from pydantic_ai import Agent
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.test import TestModel

from batchllm_celery.errors import FailureKind, UsageError
from batchllm_celery.models import RetryState, StrategySpec
from batchllm_celery.providers import PydanticAIStrategy
from batchllm_celery.providers import pydantic_ai as module
from batchllm_celery.settings import Settings
from batchllm_celery.simulation import SimulatedProvider, answer_to
from batchllm_celery.strategies import (
    ProcessResources,
    Registry,
    as_completion,
    classify_for,
    extract_token_usage,
)

PROMPT = "Describe a lighthouse in ten words."


class City(BaseModel):
    name: str
    people: int


async def registered(
    model: str, provider: SimulatedProvider, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Registry, Any]:
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", provider.url)
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    settings = Settings(openai_base_url=provider.openai_url)
    registry = Registry(ProcessResources(settings=settings))
    strategy = await registry.get(
        StrategySpec(name="pydantic-ai", params={"model": model, **options})
    )
    await registry.prepare(strategy)
    return registry, strategy


async def test_an_agent_is_a_strategy() -> None:
    """Its output and the tokens of all its requests come back."""
    agent = Agent(TestModel(custom_output_args={"name": "Ulm", "people": 5}), output_type=City)
    completion = await PydanticAIStrategy(agent).execute(PROMPT, 1, 9)
    assert completion.output == City(name="Ulm", people=5)
    assert completion.usage.total_tokens > 0


async def test_a_dry_run_builds_the_output_type() -> None:
    """Without a call, and without values for its fields."""
    agent = Agent(TestModel(), output_type=City)
    done = as_completion(await PydanticAIStrategy(agent).dry_run(PROMPT))
    assert type(done.output) is City
    assert done.usage.total_tokens == 150
    text = as_completion(await PydanticAIStrategy(Agent(TestModel())).dry_run(PROMPT)).output
    assert text.startswith("[DRY-RUN]")


@pytest.mark.parametrize("model", ["gemini:m", "openai:m"])
@pytest.mark.parametrize("schema", [None, City.model_json_schema()])
async def test_the_registered_strategy_uses_our_own_clients(
    model: str, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either provider, with the tokens that the provider itself counted."""
    async with SimulatedProvider() as provider:
        registry, strategy = await registered(model, provider, monkeypatch, schema=schema)
        completion = as_completion(await strategy.execute(PROMPT, 1, 9))
        await registry.close()
    stats = provider.stats
    assert stats.calls == 1
    assert completion.usage.total_tokens == stats.input_tokens + stats.output_tokens
    if schema is None:
        assert completion.output == answer_to(PROMPT)
    else:
        City.model_validate(completion.output)


@pytest.mark.parametrize("model", ["gemini:m", "openai:m"])
async def test_a_429_keeps_its_wait_and_is_not_retried_beneath_us(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PydanticAI's error hides the provider's; the translator finds it."""
    async with SimulatedProvider() as provider:
        registry, strategy = await registered(model, provider, monkeypatch)
        provider.refuse(1, retry_after=1.25)
        with pytest.raises(Exception) as caught:
            await strategy.execute(PROMPT, 1, 9)
        await registry.close()
        assert provider.stats.calls == 1
    failure = classify_for(strategy, caught.value)
    assert (failure.kind, failure.retry_after) == (FailureKind.RATE_LIMITED, 1.25)


async def test_tokens_of_a_failed_run_are_counted_and_its_error_fed_back() -> None:
    """A run whose output never validates has cost what it has cost."""
    prompts: list[str] = []

    def answer(messages: Any, info: Any) -> Any:
        from pydantic_ai.messages import ModelResponse, ToolCallPart
        from pydantic_ai.usage import RequestUsage

        prompts.append(messages[0].parts[0].content)
        call = ToolCallPart(info.output_tools[0].name, {"name": "Ulm"})
        return ModelResponse(parts=[call], usage=RequestUsage(input_tokens=10, output_tokens=5))

    agent = Agent(FunctionModel(answer), output_type=City, retries=0)
    strategy, state = PydanticAIStrategy(agent), RetryState()
    for attempt in (1, 2):
        with pytest.raises(Exception) as caught:
            await strategy.execute(PROMPT, attempt, 9, state)
        await strategy.on_error(caught.value, attempt, state)
        assert classify_for(strategy, caught.value).kind is FailureKind.VALIDATION
        assert extract_token_usage(caught.value).total_tokens == 15
    assert prompts[0] == PROMPT
    assert "Your previous answer was rejected" in prompts[1]


def test_a_model_of_another_provider_is_refused() -> None:
    """The message shows how to write it."""
    with pytest.raises(UsageError, match=r"pydantic-ai:gemini:gemini-2\.5-flash"):
        module.PydanticAIModelStrategy("claude")


def test_the_agent_s_model_names_the_quota() -> None:
    """Google's models are known as `gemini` to prices and quotas."""
    agent: Agent[object, str] = Agent("openai:gpt-4.1-mini", defer_model_check=True)
    assert PydanticAIStrategy(agent).model_name == "openai:gpt-4.1-mini"


async def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is optional, and importing ours never imports it."""

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(UsageError, match=r"pip install 'batchllm-celery\[pydantic-ai\]'"):
        await Registry(ProcessResources()).prepare(module.PydanticAIModelStrategy("gemini:m"))
