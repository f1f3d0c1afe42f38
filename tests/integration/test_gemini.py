"""GeminiStrategy: the real google-genai client against the simulated provider, and against answers
that it can't be made to give."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import BaseModel

from batchllm_celery.dialects.answers import seconds_to_pacific_midnight
from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import RetryState, StrategySpec, TokenUsage
from batchllm_celery.providers import GeminiResponse, GeminiStrategy, SimulatedStrategy
from batchllm_celery.settings import Settings
from batchllm_celery.simulation import SimulatedProvider, answer_to
from batchllm_celery.strategies import (
    LLMCallStrategy,
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


def resources_for(url: str, **options: Any) -> ProcessResources:
    return ProcessResources(settings=Settings(simulated_url=url), **options)


async def prepared(
    url: str, strategy: LLMCallStrategy[Any] | None = None
) -> tuple[Registry, LLMCallStrategy[Any]]:
    registry = Registry(resources_for(url))
    one = strategy or SimulatedStrategy("m")
    await registry.prepare(one)
    return registry, one


async def test_a_prompt_is_answered_with_its_tokens() -> None:
    """The text, its tokens and the safety ratings come back; thoughts count as output."""
    async with SimulatedProvider(thoughts_tokens=7) as provider:
        registry, strategy = await prepared(provider.url)
        completion = as_completion(await strategy.execute(PROMPT, 1, 9))
        await registry.close()
    stats = provider.stats
    assert completion.output == answer_to(PROMPT)
    assert completion.usage == TokenUsage(
        input_tokens=stats.input_tokens, output_tokens=stats.output_tokens
    )
    assert completion.usage.output_tokens > 7
    assert completion.metadata == {
        "finish_reason": "STOP",
        "safety_ratings": {"HARM_CATEGORY_DANGEROUS_CONTENT": "NEGLIGIBLE"},
        "model": "m",
        "response_id": "simulated",
        "reasoning_tokens": 7,
    }


async def test_the_environment_s_base_url_and_key_are_honoured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GOOGLE_GEMINI_BASE_URL and GEMINI_API_KEY reach the provider; without a registry the
    strategy opens and closes a client of its own."""
    async with SimulatedProvider(api_key="the-key") as provider:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", provider.url)
        monkeypatch.setenv("GEMINI_API_KEY", "the-key")
        strategy: GeminiStrategy[str] = GeminiStrategy("m")
        await strategy.prepare()
        completion = await strategy.execute(PROMPT, 1, 9)
        await strategy.close()
    assert completion.output == answer_to(PROMPT)
    assert strategy.client is None


async def test_a_missing_key_says_where_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an authentication failure: no other item would fare better."""
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    with pytest.raises(ProviderError, match=r"set GEMINI_API_KEY .*https://aistudio") as caught:
        await Registry(ProcessResources()).prepare(GeminiStrategy("m"))
    assert caught.value.kind is FailureKind.AUTHENTICATION


async def test_no_simulated_url_says_what_to_do() -> None:
    """`--model simulated` without a server names the command that starts one."""
    with pytest.raises(UsageError, match="batchllm simulate"):
        await Registry(ProcessResources(settings=Settings(simulated_url=None))).prepare(
            SimulatedStrategy("m")
        )


async def test_strategies_of_one_process_share_one_client() -> None:
    """Parameters that differ cost an instance, not a connection pool."""
    async with SimulatedProvider() as provider:
        registry = Registry(resources_for(provider.url))
        many = [
            await registry.get(
                StrategySpec(name="simulated", params={"model": "m", "system": f"system {n}"})
            )
            for n in range(20)
        ]
        await asyncio.gather(*(registry.prepare(one) for one in many))
        assert len({id(vars(one)["client"]) for one in many}) == 1
        await registry.close()


async def test_more_calls_than_a_hundred_run_at_once() -> None:
    """The connection pool is as large as the slots."""
    async with SimulatedProvider(latency=0.5) as provider:
        registry = Registry(resources_for(provider.url, slots=300))
        strategy = SimulatedStrategy[str]("m")
        await registry.prepare(strategy)
        await asyncio.gather(*(strategy.execute(f"p{n}", 1, 9) for n in range(300)))
        await registry.close()
    assert provider.stats.peak_in_flight > 250


async def test_one_instance_answers_many_prompts_each_with_its_own() -> None:
    """Concurrent calls of one strategy don't mix."""
    async with SimulatedProvider(latency=0.01, jitter=0.01) as provider:
        registry, strategy = await prepared(provider.url)
        prompts = [f"Prompt number {n}" for n in range(200)]
        done = await asyncio.gather(*(strategy.execute(text, 1, 9) for text in prompts))
        await registry.close()
    assert [as_completion(one).output for one in done] == [answer_to(text) for text in prompts]


@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")  # the SDK's own session
async def test_a_parser_of_one_s_own_gets_the_sdk_s_response() -> None:
    """batch-llm's constructor: model, client, parser, config, include_metadata."""
    from google import genai
    from google.genai import types

    async with SimulatedProvider() as provider:
        client = genai.Client(api_key="k", http_options=types.HttpOptions(base_url=provider.url))
        strategy: GeminiStrategy[str] = GeminiStrategy(
            "m", client, lambda response: response.text.upper(), {"temperature": 0.1}, True
        )
        await strategy.prepare()
        completion = await strategy.execute(PROMPT, 1, 9)
        await strategy.close()
        answer = completion.output
        assert isinstance(answer, GeminiResponse)
        assert answer.output == answer_to(PROMPT).upper()
        assert answer.finish_reason == "STOP"
        assert answer.safety_ratings == {"HARM_CATEGORY_DANGEROUS_CONTENT": "NEGLIGIBLE"}
        assert answer.token_usage == completion.usage
        assert "raw_response" not in answer.model_dump()
        assert strategy.client is client  # not ours to close
        await client.aio.aclose()


async def test_a_parser_that_fails_does_not_lose_the_tokens() -> None:
    """They are read before parsing, and travel with whatever the parser raises."""

    def parse(response: Any) -> str:
        raise ValueError("Expected 4290 tokens")

    async with SimulatedProvider() as provider:
        registry, strategy = await prepared(
            provider.url, SimulatedStrategy("m", response_parser=parse)
        )
        with pytest.raises(ValueError, match="4290") as caught:
            await strategy.execute(PROMPT, 1, 9)
        await registry.close()
    failure = classify_for(strategy, caught.value)
    assert failure.kind is FailureKind.LOGIC_ERROR
    assert failure.usage.total_tokens == (
        provider.stats.input_tokens + provider.stats.output_tokens
    )


async def test_options_reach_the_provider_over_the_given_config() -> None:
    """System text, temperature, output limit, thinking budget and schema, in one request."""
    bodies: list[dict[str, Any]] = []

    async with fake(lambda body: (200, GOOD), bodies) as url:
        strategy = SimulatedStrategy[Any](
            "m",
            config={"top_p": 0.5, "temperature": 0.9},
            system="Be brief.",
            temperature=0.0,
            max_output_tokens=100,
            thinking_budget=0,
        )
        registry, _ = await prepared(url, strategy)
        await strategy.execute(PROMPT, 1, 9)
        await registry.close()
    [body] = bodies
    assert body["systemInstruction"]["parts"][0]["text"] == "Be brief."
    settings = body["generationConfig"]
    assert (settings["temperature"], settings["topP"]) == (0.0, 0.5)
    assert settings["maxOutputTokens"] == 100
    assert settings["thinkingConfig"] == {"thinkingBudget": 0} or settings["thinkingConfig"] == {
        "thinking_budget": 0
    }


# -- structured output


@pytest.mark.parametrize("schema", [City, City.model_json_schema()])
async def test_a_schema_gives_checked_objects(schema: Any) -> None:
    """A pydantic model gives instances of it, a JSON Schema plain JSON."""
    async with SimulatedProvider() as provider:
        registry, strategy = await prepared(provider.url, SimulatedStrategy("m", schema=schema))
        output = as_completion(await strategy.execute(PROMPT, 1, 9)).output
        await registry.close()
    assert City.model_validate(output if isinstance(output, dict) else output.model_dump())
    assert isinstance(output, City if schema is City else dict)


async def test_a_fifth_of_malformed_answers_costs_no_item_and_loses_no_token() -> None:
    """Every item ends valid by feedback, and tokens add up to the provider's own count."""
    async with SimulatedProvider(bad_output_rate=0.2) as provider:
        registry, strategy = await prepared(provider.url, SimulatedStrategy("m", schema=City))
        totals = await asyncio.gather(*(run_item(strategy, f"City number {n}") for n in range(100)))
        await registry.close()
        stats = provider.stats
        second = [call.prompt for call in provider.calls if "rejected" in call.prompt]
    assert all(isinstance(output, City) for output, _ in totals)
    assert stats.by_outcome["malformed"] > 5
    assert len(second) == stats.by_outcome["malformed"]
    assert "Your previous answer was rejected: ValidationError: " in second[0]
    spent = sum(usage.total_tokens for _, usage in totals)
    assert spent == stats.input_tokens + stats.output_tokens


async def run_item(
    strategy: LLMCallStrategy[Any], prompt: str, most: int = 8
) -> tuple[Any, TokenUsage]:
    """What the runner does, as far as it matters here."""
    state, usage = RetryState(), TokenUsage()
    for attempt in range(1, most + 1):
        try:
            completion = as_completion(await strategy.execute(prompt, attempt, 9, state))
        except ProviderError as error:
            usage += extract_token_usage(error)
            await strategy.on_error(error, attempt, state)
        else:
            return completion.output, usage + completion.usage
    return None, usage


# -- failures


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"block_rate": 1.0}, FailureKind.CONTENT_BLOCKED),
        ({"truncated_rate": 1.0}, FailureKind.TRUNCATED),
        ({"billing_exhausted": True}, FailureKind.BILLING),
        ({"error_rate": 1.0, "error_statuses": (503,)}, FailureKind.OVERLOADED),
        ({"error_rate": 1.0, "error_statuses": (500,)}, FailureKind.OVERLOADED),
        ({"error_rate": 1.0, "error_statuses": (504,)}, FailureKind.PROVIDER_TIMEOUT),
        ({"error_rate": 1.0, "error_statuses": (400,)}, FailureKind.INVALID_REQUEST),
        ({"drop_rate": 1.0}, FailureKind.CONNECTION),
        ({"api_key": "another"}, FailureKind.AUTHENTICATION),
        ({"models": ("other",)}, FailureKind.INVALID_REQUEST),
    ],
)
async def test_each_kind_of_failure_is_told_apart(
    config: dict[str, Any], kind: FailureKind
) -> None:
    """By what the provider really sends; tokens of blocked and cut answers are counted."""
    async with SimulatedProvider(**config) as provider:
        registry, strategy = await prepared(provider.url)
        with pytest.raises(Exception) as caught:
            await strategy.execute(PROMPT, 1, 9)
        await registry.close()
    failure = classify_for(strategy, caught.value)
    assert failure.kind is kind
    assert PROMPT not in failure.message
    if kind in (FailureKind.CONTENT_BLOCKED, FailureKind.TRUNCATED):
        assert failure.usage.input_tokens == provider.stats.input_tokens > 0


async def test_a_429_carries_the_wait_with_its_fraction_and_is_not_retried_by_the_sdk() -> None:
    """RetryInfo's fraction is better than Retry-After's whole seconds."""
    async with SimulatedProvider() as provider:
        provider.refuse(1, retry_after=1.25)
        registry, strategy = await prepared(provider.url)
        with pytest.raises(ProviderError) as caught:
            await strategy.execute(PROMPT, 1, 9)
        await registry.close()
        assert provider.stats.calls == 1
    failure = classify_for(strategy, caught.value)
    assert (failure.kind, failure.retry_after) == (FailureKind.RATE_LIMITED, 1.25)
    assert failure.message.startswith("RESOURCE_EXHAUSTED: 429 ")


async def test_the_day_s_quota_is_not_a_minute_s() -> None:
    """The violated quota's id tells."""
    async with SimulatedProvider(rpd=1) as provider:
        registry, strategy = await prepared(provider.url)
        await strategy.execute(PROMPT, 1, 9)
        with pytest.raises(ProviderError) as caught:
            await strategy.execute(PROMPT, 1, 9)
        await registry.close()
    assert caught.value.kind is FailureKind.QUOTA_EXHAUSTED
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 60


def test_the_day_ends_at_midnight_pacific() -> None:
    """Also over a change of clocks, when the day has 25 hours."""
    from zoneinfo import ZoneInfo

    pacific = ZoneInfo("America/Los_Angeles")
    evening, change = (
        datetime(2026, 6, 1, 23, 0, tzinfo=pacific),
        datetime(2026, 11, 1, tzinfo=pacific),
    )
    assert seconds_to_pacific_midnight(evening.timestamp()) == 3600
    assert seconds_to_pacific_midnight(change.timestamp()) == 25 * 3600


# -- answers and errors that the simulated provider does not give

GOOD: dict[str, Any] = {
    "candidates": [
        {
            "content": {"role": "model", "parts": [{"text": "fine"}]},
            "finishReason": "STOP",
        }
    ],
    "usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 1, "totalTokenCount": 5},
}


def answer(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "candidates": [{**GOOD["candidates"][0], **changes}]}


def api_error(code: int, message: str = "", *details: dict[str, Any]) -> dict[str, Any]:
    typed = [
        {**detail, "@type": f"type.googleapis.com/google.rpc.{detail['@type']}"}
        for detail in details
    ]
    return {"error": {"code": code, "message": message, "status": "X", "details": typed}}


def violation(**fields: str) -> dict[str, Any]:
    return {"@type": "QuotaFailure", "violations": [fields]}


class fake:
    """A Gemini that answers what it is told, and keeps the bodies it was sent."""

    def __init__(self, reply: Any, bodies: list[dict[str, Any]] | None = None) -> None:
        self.reply = reply
        self.bodies = bodies if bodies is not None else []

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_post("/{path:.*}", self.handle)
        self.server = TestServer(app)
        await self.server.start_server()
        return str(self.server.make_url("/")).rstrip("/")

    async def __aexit__(self, *exc_info: object) -> None:
        await self.server.close()

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        status, content, *headers = self.reply(body)
        return web.json_response(content, status=status, headers=headers[0] if headers else None)


async def failure_of(reply: Any) -> Any:
    async with fake(lambda body: reply) as url:
        registry, strategy = await prepared(url)
        try:
            with pytest.raises(ProviderError) as caught:
                await strategy.execute(PROMPT, 1, 9)
        finally:
            await registry.close()
        return classify_for(strategy, caught.value)


BLOCKED, UNKNOWN, BILLING = FailureKind.CONTENT_BLOCKED, FailureKind.UNKNOWN, FailureKind.BILLING
DAY, MINUTE = FailureKind.QUOTA_EXHAUSTED, FailureKind.RATE_LIMITED
FREE = "generativelanguage.googleapis.com/generate_content_free_tier_requests"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((200, answer(finishReason="SAFETY")), BLOCKED),
        ((200, answer(finishReason="RECITATION")), BLOCKED),
        ((200, answer(finishReason="PROHIBITED_CONTENT")), BLOCKED),
        ((200, {"promptFeedback": {"blockReason": "OTHER"}}), BLOCKED),
        ((200, answer(finishReason="MALFORMED_FUNCTION_CALL")), UNKNOWN),
        ((200, answer(finishReason="OTHER", content={})), UNKNOWN),
        ((200, answer(content={"parts": [{"text": "hm", "thought": True}]})), UNKNOWN),
        ((200, {**GOOD, "candidates": []}), UNKNOWN),
        ((200, {}), UNKNOWN),
        (
            (400, api_error(400, "x", {"@type": "ErrorInfo", "reason": "API_KEY_INVALID"})),
            FailureKind.AUTHENTICATION,
        ),
        ((403, api_error(403, "x", {"@type": "ErrorInfo", "reason": "BILLING_DISABLED"})), BILLING),
        ((400, api_error(400, "Please enable billing on the project")), BILLING),
        ((403, api_error(403, "Permission denied")), BLOCKED),
        ((403, api_error(403, "API key was leaked")), FailureKind.AUTHENTICATION),
        ((429, api_error(429, "check your plan and billing details")), MINUTE),
        ((429, api_error(429, "x", violation(quotaId="RequestsPerMinutePerProject"))), MINUTE),
        ((429, api_error(429, "x", violation(quotaId="RequestsPerDayPerProject"))), DAY),
        ((429, api_error(429, "x", violation(quotaMetric=FREE, quotaValue="0"))), BILLING),
        ((429, api_error(429, f"metric: {FREE}, limit: 0, model: m")), BILLING),
        ((429, api_error(429, f"metric: {FREE}, limit: 0.5, model: m")), MINUTE),
        ((429, api_error(429, f"metric: {FREE}, limit: 15, model: m")), MINUTE),
        ((503, "not even JSON"), FailureKind.OVERLOADED),
    ],
)
async def test_what_gemini_says_in_words_is_understood(reply: Any, kind: FailureKind) -> None:
    """Blocks, empty answers, keys, billing, and which 429 it is."""
    assert (await failure_of(reply)).kind is kind


@pytest.mark.parametrize(
    ("details", "headers", "seconds"),
    [
        (({"@type": "RetryInfo", "retryDelay": "3.25s"},), {"Retry-After": "4"}, 3.25),
        (({"@type": "RetryInfo", "retryDelay": "7s"},), {}, 7.0),
        ((), {"Retry-After": "4"}, 4.0),
        ((), {}, None),
    ],
)
async def test_the_wait_is_read_from_where_it_stands(
    details: Any, headers: dict[str, str], seconds: float | None
) -> None:
    """RetryInfo first, then the header, else none."""
    failure = await failure_of((429, api_error(429, "slow down", *details), headers))
    assert failure.retry_after == seconds


async def test_usage_fields_may_be_absent() -> None:
    """Every one of them can be None; cached and tool tokens are part of the input."""
    usage = {
        "promptTokenCount": 10,
        "toolUsePromptTokenCount": 2,
        "cachedContentTokenCount": 8,
        "thoughtsTokenCount": 3,
    }
    async with fake(lambda body: (200, {**GOOD, "usageMetadata": usage})) as url:
        registry, strategy = await prepared(url)
        full = as_completion(await strategy.execute(PROMPT, 1, 9))
        await registry.close()
    assert full.usage == TokenUsage(input_tokens=12, output_tokens=3, cached_input_tokens=8)
    async with fake(lambda body: (200, {"candidates": GOOD["candidates"]})) as url:
        registry, strategy = await prepared(url)
        assert not as_completion(await strategy.execute(PROMPT, 1, 9)).usage
        await registry.close()


async def test_a_test_double_in_place_of_the_client_will_do() -> None:
    """batch-llm's users hand in objects that only look like the SDK's."""

    async def generate_content(**_: Any) -> Any:
        return SimpleNamespace(text="fine", usage_metadata=None)

    client = SimpleNamespace(
        aio=SimpleNamespace(models=SimpleNamespace(generate_content=generate_content))
    )
    strategy: GeminiStrategy[str] = GeminiStrategy("m", client, lambda response: response.text)
    await strategy.prepare()
    assert (await strategy.execute(PROMPT, 1, 9)).output == "fine"


async def test_a_cancelled_call_leaves_the_client_usable() -> None:
    """The runner's timeout cancels; the next call works."""
    async with SimulatedProvider(latency=5) as provider:
        registry, strategy = await prepared(provider.url)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await strategy.execute(PROMPT, 1, 0.1)
        provider.change(latency=0.0)
        assert as_completion(await strategy.execute(PROMPT, 2, 9)).output == answer_to(PROMPT)
        await registry.close()


async def test_the_registered_strategy_is_the_same_one() -> None:
    """What a message names (`simulated` with parameters) answers as the class does."""
    async with SimulatedProvider() as provider:
        registry = Registry(resources_for(provider.url))
        spec = StrategySpec(name="simulated", params={"schema": City.model_json_schema()})
        strategy = await registry.get(spec)
        await registry.prepare(strategy)
        output = as_completion(await strategy.execute(PROMPT, 1, 9)).output
        await registry.close()
    assert json.dumps(output)
    assert set(output) == {"name", "people"}
