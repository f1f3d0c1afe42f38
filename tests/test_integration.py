"""Real providers (seed plan 4.4): `pytest -m integration -v`. Each needs its provider's key."""

from __future__ import annotations

import os
from typing import Any

import pytest
from pydantic import BaseModel

from batchllm_celery import (
    BatchResult,
    GeminiCachedStrategy,
    GeminiStrategy,
    LLMCallStrategy,
    LLMWorkItem,
    OpenAICompatibleStrategy,
    ParallelBatchProcessor,
    ProcessorConfig,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

MODEL = os.environ.get("BATCHLLM_TEST_GEMINI_MODEL", "gemini-2.5-flash-lite")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not os.environ.get(name), reason=f"{name} is not set")


gemini = needs("GEMINI_API_KEY")


@pytest.fixture(autouse=True)
def own_redis(monkeypatch: pytest.MonkeyPatch, redis_url: str, namespace: str) -> None:
    """The processor reads its Redis from the environment, as a user's would."""
    monkeypatch.setenv("BATCHLLM_REDIS_URL", redis_url)
    monkeypatch.setenv("BATCHLLM_NAMESPACE", namespace)


async def ask(strategy: LLMCallStrategy[Any], *prompts: str) -> BatchResult[Any, Any]:
    config = ProcessorConfig(max_workers=2, timeout_per_item=60)
    async with ParallelBatchProcessor[str, Any, None](config=config) as processor:
        for i, prompt in enumerate(prompts):
            await processor.add_work(LLMWorkItem(item_id=f"i{i}", strategy=strategy, prompt=prompt))
        return await processor.process_all()


@gemini
async def test_gemini_answers() -> None:
    """Text and tokens come back."""
    result = await ask(GeminiStrategy(MODEL), "Reply with the single word: blue")
    assert result.succeeded == 1, result.results
    assert "blue" in result.results[0].output.lower()
    assert result.total_input_tokens > 0


@gemini
async def test_gemini_answers_several_items_by_one_strategy() -> None:
    """Each answer belongs to its prompt, and the cost is known."""
    prompts = [f"What is {n} + {n}? Reply with the number only." for n in (2, 3, 4)]
    result = await ask(GeminiStrategy(MODEL, temperature=0), *prompts)
    answers = {one.index: one.output for one in result.results}
    assert [("4" in answers[0]), ("6" in answers[1]), ("8" in answers[2])] == [True] * 3
    assert result.total_cost is None or result.total_cost > 0


@gemini
async def test_gemini_shares_a_context_cache() -> None:
    """The context is billed as cached tokens, and the cache is deleted afterwards."""
    context = "The secret colour of the archive is ultramarine. " * 500
    strategy: GeminiCachedStrategy[str] = GeminiCachedStrategy(
        MODEL, cached_content=[context], cache_ttl_seconds=120, cache_renewal_buffer_seconds=30
    )
    try:
        result = await ask(strategy, "Which colour?", "Name the secret colour.")
        assert result.succeeded == 2, result.results
        assert result.total_cached_tokens > 0
    finally:
        await strategy.delete_cache()
        await strategy.close()


@gemini
async def test_gemini_gives_safety_ratings() -> None:
    """With `include_metadata` the answer carries what the provider said of it."""
    result = await ask(GeminiStrategy(MODEL, include_metadata=True), "Say hello.")
    assert result.succeeded == 1, result.results
    assert hasattr(result.results[0].output, "safety_ratings")


@gemini
async def test_gemini_retries_until_the_answer_is_valid() -> None:
    """A schema that the first answer may miss: valid in the end, tokens of all attempts counted."""

    class Capital(BaseModel):
        country: str
        capital: str

    result = await ask(GeminiStrategy(MODEL, schema=Capital), "The capital of France, as JSON.")
    assert result.succeeded == 1, result.results
    assert result.results[0].output.capital == "Paris"


@needs("OPENAI_API_KEY")
async def test_openai_answers() -> None:
    """The same through the OpenAI client."""
    model = os.environ.get("BATCHLLM_TEST_OPENAI_MODEL", "gpt-4.1-nano")
    result = await ask(OpenAICompatibleStrategy(model), "Reply with the single word: blue")
    assert result.succeeded == 1, result.results


@needs("ANTHROPIC_API_KEY")
async def test_anthropic_answers() -> None:
    """Through its OpenAI-compatible endpoint, until there is a strategy of its own."""
    pytest.skip("set OPENAI_BASE_URL to Anthropic's endpoint and run the OpenAI test")
