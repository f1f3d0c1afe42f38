"""OpenAICompatibleStrategy: the real openai client against the simulated provider."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import BaseModel

pytest.importorskip("openai", reason="the openai extra is not installed")

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import RetryState, StrategySpec, TokenUsage
from batchllm_celery.providers import OpenAICompatibleStrategy
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
Strategy = OpenAICompatibleStrategy[Any]


class City(BaseModel):
    name: str
    people: int


async def prepared(
    url: str, strategy: Strategy | None = None, slots: int = 100
) -> tuple[Registry, Strategy]:
    settings = Settings(openai_base_url=url)
    registry = Registry(ProcessResources(settings=settings, slots=slots))
    one = strategy or Strategy("m")
    await registry.prepare(one)
    return registry, one


async def test_a_prompt_is_answered_with_its_tokens() -> None:
    """As Gemini's is; reasoning tokens are part of the output."""
    async with SimulatedProvider(thoughts_tokens=7) as provider:
        registry, strategy = await prepared(provider.openai_url)
        completion = await strategy.execute(PROMPT, 1, 9)
        await registry.close()
    stats = provider.stats
    assert completion.output == answer_to(PROMPT)
    assert completion.usage == TokenUsage(
        input_tokens=stats.input_tokens, output_tokens=stats.output_tokens
    )


async def test_cached_input_tokens_are_counted() -> None:
    """OpenAI caches long prompts by itself; the strategy reads how much of one."""
    async with SimulatedProvider() as provider:
        system = "You answer questions about the handbook. " * 300
        registry, strategy = await prepared(provider.openai_url, Strategy("m", system=system))
        await strategy.execute(PROMPT, 1, 9)
        completion = await strategy.execute(PROMPT, 1, 9)
        await registry.close()
    usage = completion.usage
    assert usage.input_tokens > usage.cached_input_tokens > 1000


async def test_a_registered_model_string_uses_the_process_s_own_server() -> None:
    """`openai:NAME` and BATCHLLM_OPENAI_BASE_URL; strategies share one client."""
    async with SimulatedProvider() as provider:
        settings = Settings(openai_base_url=provider.openai_url)
        registry = Registry(ProcessResources(settings=settings))
        one = await registry.get(StrategySpec(name="openai", params={"model": "m"}))
        two = await registry.get(
            StrategySpec(name="openai", params={"model": "m", "system": "Be brief."})
        )
        await asyncio.gather(registry.prepare(one), registry.prepare(two))
        assert as_completion(await one.execute(PROMPT, 1, 9)).output == answer_to(PROMPT)
        assert vars(one)["client"] is vars(two)["client"]
        await registry.close()


async def test_code_of_one_s_own_may_name_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`base_url=` in the constructor; without a registry the strategy owns its client."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    async with SimulatedProvider() as provider:
        strategy = Strategy("m", base_url=provider.openai_url)
        await strategy.prepare()
        assert (await strategy.execute(PROMPT, 1, 9)).output == answer_to(PROMPT)
        await strategy.close()
    assert strategy.client is None


async def test_a_missing_key_says_where_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only OpenAI's own server needs one."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ProviderError, match=r"set OPENAI_API_KEY .*https://platform") as caught:
        await Registry(ProcessResources(settings=Settings(openai_base_url=None))).prepare(
            Strategy("m")
        )
    assert caught.value.kind is FailureKind.AUTHENTICATION


async def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is optional."""

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(UsageError, match=r"pip install 'batchllm-celery\[openai\]'"):
        await Registry(ProcessResources()).prepare(Strategy("m", base_url="http://x"))


async def test_more_calls_than_a_hundred_run_at_once() -> None:
    """The connection pool is as large as the slots."""
    async with SimulatedProvider(latency=0.7) as provider:
        registry, strategy = await prepared(provider.openai_url, slots=300)
        await asyncio.gather(*(strategy.execute(f"p{n}", 1, 9) for n in range(300)))
        await registry.close()
    assert provider.stats.peak_in_flight > 250


@pytest.mark.parametrize("schema", [City, City.model_json_schema()])
async def test_a_fifth_of_malformed_answers_costs_no_item_and_loses_no_token(schema: Any) -> None:
    """As with Gemini: feedback in the second prompt, tokens add up to the provider's count."""
    async with SimulatedProvider(bad_output_rate=0.2) as provider:
        registry, strategy = await prepared(provider.openai_url, Strategy("m", schema=schema))
        spent = 0
        for n in range(60):
            state = RetryState()
            for attempt in range(1, 9):
                try:
                    done = await strategy.execute(f"City {n}", attempt, 9, state)
                except ProviderError as error:
                    spent += extract_token_usage(error).total_tokens
                    await strategy.on_error(error, attempt, state)
                else:
                    spent += done.usage.total_tokens
                    assert isinstance(done.output, City if schema is City else dict)
                    break
            else:
                pytest.fail(f"City {n} never became valid")
        await registry.close()
        stats = provider.stats
        assert stats.by_outcome["malformed"] > 3
        assert (
            sum("rejected: Valid" in call.prompt for call in provider.calls)
            == (stats.by_outcome["malformed"])
        )
    assert spent == stats.input_tokens + stats.output_tokens


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"block_rate": 1.0}, FailureKind.CONTENT_BLOCKED),
        ({"truncated_rate": 1.0}, FailureKind.TRUNCATED),
        ({"billing_exhausted": True}, FailureKind.BILLING),
        ({"error_rate": 1.0, "error_statuses": (503,)}, FailureKind.OVERLOADED),
        ({"error_rate": 1.0, "error_statuses": (504,)}, FailureKind.PROVIDER_TIMEOUT),
        ({"error_rate": 1.0, "error_statuses": (400,)}, FailureKind.INVALID_REQUEST),
        ({"drop_rate": 1.0}, FailureKind.CONNECTION),
        ({"api_key": "another"}, FailureKind.AUTHENTICATION),
        ({"models": ("other",)}, FailureKind.INVALID_REQUEST),
    ],
)
async def test_each_kind_of_failure_is_the_same_as_gemini_s(
    config: dict[str, Any], kind: FailureKind
) -> None:
    """One table for all providers; tokens of blocked and cut answers are counted."""
    async with SimulatedProvider(**config) as provider:
        registry, strategy = await prepared(provider.openai_url)
        with pytest.raises(ProviderError) as caught:
            await strategy.execute(PROMPT, 1, 9)
        await registry.close()
        assert provider.stats.calls == 1  # the SDK's own retries are off
    failure = classify_for(strategy, caught.value)
    assert failure.kind is kind
    assert PROMPT not in failure.message
    if kind in (FailureKind.CONTENT_BLOCKED, FailureKind.TRUNCATED):
        assert failure.usage.input_tokens == provider.stats.input_tokens > 0


async def test_an_unreachable_server_is_a_connection_failure() -> None:
    """Nobody listens there."""
    registry, strategy = await prepared("http://127.0.0.1:9/v1")
    with pytest.raises(ProviderError, match="connection failed") as caught:
        await strategy.execute(PROMPT, 1, 9)
    await registry.close()
    assert classify_for(strategy, caught.value).kind is FailureKind.CONNECTION


def refusal(message: str, code: str = "rate_limit_exceeded", kind: str = "requests") -> Any:
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


MINUTE, DAY = FailureKind.RATE_LIMITED, FailureKind.QUOTA_EXHAUSTED
OVER = "Rate limit reached for m on requests per "


@pytest.mark.parametrize(
    ("status", "body", "headers", "kind", "wait"),
    [
        (429, refusal(OVER + "min (RPM): Limit 3."), {}, MINUTE, None),
        (429, refusal(OVER + "min (RPM)."), {"retry-after": "2"}, MINUTE, 2.0),
        (429, refusal(OVER + "min."), {"retry-after": "2", "retry-after-ms": "1250"}, MINUTE, 1.25),
        (429, refusal(OVER + "min. Please try again in 250ms."), {}, MINUTE, 0.25),
        (429, refusal(OVER + "min. Please try again in 1m2.5s."), {}, MINUTE, 62.5),
        (429, refusal(OVER + "day (RPD). Please try again in 7h12m."), {}, DAY, 25920.0),
        (429, refusal("Rate limit reached for m on tokens per day (TPD)."), {}, DAY, None),
        (
            429,
            refusal("You exceeded your current quota", "insufficient_quota"),
            {},
            FailureKind.BILLING,
            None,
        ),
        (429, refusal("x", "y", "insufficient_quota"), {}, FailureKind.BILLING, None),
        (
            429,
            refusal("Request too large for m on tokens per min (TPM): Limit 1000"),
            {},
            FailureKind.INVALID_REQUEST,
            None,
        ),
        (402, refusal("Insufficient credits"), {}, FailureKind.BILLING, None),
        (400, refusal("filtered", "content_filter"), {}, FailureKind.CONTENT_BLOCKED, None),
        (
            400,
            refusal("too long", "context_length_exceeded"),
            {},
            FailureKind.INVALID_REQUEST,
            None,
        ),
        (
            401,
            refusal("Incorrect API key provided: sk-abcdef12***345"),
            {},
            FailureKind.AUTHENTICATION,
            None,
        ),
        (429, {"detail": "another server's words"}, {}, MINUTE, None),
        (200, {"choices": [], "usage": None}, {}, FailureKind.UNKNOWN, None),
    ],
)
async def test_what_openai_says_in_words_is_understood(
    status: int, body: Any, headers: dict[str, str], kind: FailureKind, wait: float | None
) -> None:
    """Which 429 it is, and how long to wait, in milliseconds before seconds before words."""

    async def handle(request: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    server = TestServer(app)
    await server.start_server()
    registry, strategy = await prepared(str(server.make_url("/v1")))
    with pytest.raises(ProviderError) as caught:
        await strategy.execute(PROMPT, 1, 9)
    await registry.close()
    await server.close()
    failure = classify_for(strategy, caught.value)
    assert (failure.kind, failure.retry_after) == (kind, wait)
    assert "sk-" not in failure.message


@pytest.mark.parametrize(
    ("base_url", "name"),
    [
        ("https://api.openai.com/v1", "max_completion_tokens"),
        (None, "max_completion_tokens"),
        ("http://localhost:8000/v1", "max_tokens"),
    ],
)
def test_the_output_limit_has_the_server_s_own_name(
    monkeypatch: pytest.MonkeyPatch, base_url: str | None, name: str
) -> None:
    """OpenAI's newer models refuse `max_tokens`, many other servers know nothing else."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    strategy = Strategy("m", base_url=base_url, max_output_tokens=9, extra={"top_k": 1})
    messages = [{"role": "user", "content": "hello"}]
    body = strategy._asked("hello", None).body
    assert body == {"model": "m", "messages": messages, name: 9, "top_k": 1}
