"""The simulated provider as the real google-genai and openai clients see it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from google import genai
from google.genai import errors, types
from pydantic import BaseModel

from batchllm_celery.simulation import (
    SimulatedProvider,
    SimulationClient,
    SimulationConfig,
    answer_to,
    digest_of,
    spawn,
)
from tests.support import wait_until, wait_until_async

MODEL = "gemini-2.5-flash"

#: The SDK's own aiohttp session, made anew for every client.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")


class Verdict(BaseModel):
    label: str
    score: int


@pytest.fixture
async def provider() -> AsyncIterator[SimulatedProvider]:
    async with SimulatedProvider() as provider:
        yield provider


def gemini(url: str, key: str = "test-key", version: str = "v1beta") -> Any:
    """A real client; `Any`, for every field of its answers may be None by type."""
    return genai.Client(
        api_key=key,
        http_options=types.HttpOptions(
            base_url=url, api_version=version, retry_options=types.HttpRetryOptions(attempts=1)
        ),
    )


def chatgpt(url: str, key: str = "test-key") -> Any:
    return openai.AsyncOpenAI(
        base_url=url, api_key=key, max_retries=0, http_client=openai.DefaultAioHttpClient()
    )


async def ask_gemini(url: str, prompt: str = "hello", key: str = "test-key", **config: Any) -> Any:
    async with gemini(url, key).aio as client:
        settings = types.GenerateContentConfig(**config)
        return await client.models.generate_content(model=MODEL, contents=prompt, config=settings)


async def ask_openai(url: str, prompt: str = "hello", key: str = "test-key", **body: Any) -> Any:
    async with chatgpt(url, key) as client:
        messages: Any = [{"role": "user", "content": prompt}]
        return await client.chat.completions.create(model="gpt-x", messages=messages, **body)


@pytest.mark.parametrize("version", ["v1", "v1beta"])
async def test_gemini_answers_its_prompt(provider: SimulatedProvider, version: str) -> None:
    """google-genai gets the answer to its prompt with the tokens that were used."""
    async with gemini(provider.url, version=version).aio as client:
        answer = await client.models.generate_content(model=MODEL, contents="What is a fox?")
        counted = await client.models.count_tokens(model=MODEL, contents="What is a fox?")
    assert answer.text == answer_to("What is a fox?")
    assert answer.candidates[0].finish_reason is types.FinishReason.STOP
    assert answer.usage_metadata.prompt_token_count == counted.total_tokens == 4
    assert (
        answer.usage_metadata.total_token_count == 4 + answer.usage_metadata.candidates_token_count
    )
    assert [call.prompt for call in provider.calls] == ["What is a fox?"]


async def test_gemini_fills_a_response_schema(provider: SimulatedProvider) -> None:
    """A pydantic schema comes back parsed, by either of Gemini's two schema fields."""
    parsed = await ask_gemini(
        provider.url, response_mime_type="application/json", response_schema=Verdict
    )
    assert isinstance(parsed.parsed, Verdict)
    assert digest_of("hello") in parsed.parsed.label
    plain = await ask_gemini(
        provider.url,
        response_mime_type="application/json",
        response_json_schema=Verdict.model_json_schema(),
    )
    assert Verdict.model_validate_json(plain.text) == parsed.parsed


async def test_gemini_calls_the_function_it_must(provider: SimulatedProvider) -> None:
    """With function calling forced, the answer is a call with valid arguments."""
    function = types.FunctionDeclaration(
        name="judge", parameters_json_schema=Verdict.model_json_schema()
    )
    answer = await ask_gemini(
        provider.url,
        tools=[types.Tool(function_declarations=[function])],
        tool_config=types.ToolConfig(
            function_calling_config=types.FunctionCallingConfig(
                mode=types.FunctionCallingConfigMode.ANY
            )
        ),
    )
    assert answer.function_calls[0].name == "judge"
    Verdict.model_validate(answer.function_calls[0].args)


async def test_gemini_reports_thoughts_apart(provider: SimulatedProvider) -> None:
    """Thinking tokens have a count of their own within the total."""
    provider.change(thoughts_tokens=50, output_tokens=7)
    usage = (await ask_gemini(provider.url)).usage_metadata
    assert (usage.thoughts_token_count, usage.candidates_token_count) == (50, 7)
    assert usage.total_token_count == usage.prompt_token_count + 57


async def test_gemini_blocks_without_an_exception(provider: SimulatedProvider) -> None:
    """A blocked prompt has feedback, no candidates, and raises nothing."""
    provider.change(block_rate=1)
    answer = await ask_gemini(provider.url)
    assert answer.prompt_feedback.block_reason is types.BlockedReason.SAFETY
    assert not answer.candidates


async def test_gemini_cuts_at_the_output_limit(provider: SimulatedProvider) -> None:
    """An answer beyond max_output_tokens ends with MAX_TOKENS."""
    answer = await ask_gemini(provider.url, "word " * 50, max_output_tokens=3)
    assert answer.candidates[0].finish_reason is types.FinishReason.MAX_TOKENS
    assert answer.usage_metadata.candidates_token_count == 3


async def test_gemini_s_429_carries_retry_info(provider: SimulatedProvider) -> None:
    """A refusal names the quota and the fraction of a second after which the call fits."""
    provider.change(rpm=60)
    await ask_gemini(provider.url)
    with pytest.raises(errors.ClientError) as caught:
        await ask_gemini(provider.url)
    details = {
        one["@type"].rpartition(".")[2]: one for one in caught.value.details["error"]["details"]
    }
    assert (caught.value.code, caught.value.status) == (429, "RESOURCE_EXHAUSTED")
    assert "PerMinute" in details["QuotaFailure"]["violations"][0]["quotaId"]
    assert 0 < float(details["RetryInfo"]["retryDelay"].removesuffix("s")) <= 1
    assert provider.stats.refused == provider.stats.by_limit["rpm"] == 1


async def test_gemini_s_429_may_carry_whole_seconds_or_nothing(
    provider: SimulatedProvider,
) -> None:
    """The hint can be the Retry-After header alone, or none at all."""
    provider.change(rpm=20, retry_hint="retry-after")
    await ask_gemini(provider.url)
    with pytest.raises(errors.ClientError) as caught:
        await ask_gemini(provider.url)
    assert caught.value.response.headers["Retry-After"] == "3"
    assert "RetryInfo" not in json.dumps(caught.value.details)
    provider.change(retry_hint="none")
    with pytest.raises(errors.ClientError) as caught:
        await ask_gemini(provider.url)
    assert "Retry-After" not in caught.value.response.headers


async def test_gemini_s_day_quota_is_named(provider: SimulatedProvider) -> None:
    """An exhausted day can be told from an exhausted minute by the quota's id."""
    provider.change(rpd=1)
    await ask_gemini(provider.url)
    with pytest.raises(errors.ClientError) as caught:
        await ask_gemini(provider.url)
    assert "PerDay" in json.dumps(caught.value.details)


async def test_gemini_without_money_has_limit_0(provider: SimulatedProvider) -> None:
    """An exhausted bill is a 429 whose limit is 0, with no hint when to come back."""
    provider.change(billing_exhausted=True)
    with pytest.raises(errors.ClientError, match="limit: 0") as caught:
        await ask_gemini(provider.url)
    assert "RetryInfo" not in json.dumps(caught.value.details)


@pytest.mark.parametrize(
    ("ask", "error"), [(ask_gemini, errors.ServerError), (ask_openai, openai.InternalServerError)]
)
@pytest.mark.parametrize("status", [500, 503])
async def test_errors_have_their_status(
    provider: SimulatedProvider, ask: Callable[..., Any], error: type[Exception], status: int
) -> None:
    """A simulated error reaches both clients as their own error of that status."""
    provider.change(error_rate=1, error_statuses=[status])
    with pytest.raises(error) as caught:
        await ask(provider.url if ask is ask_gemini else provider.openai_url)
    assert status in (getattr(caught.value, "code", 0), getattr(caught.value, "status_code", 0))


async def test_a_dropped_connection_is_no_answer(provider: SimulatedProvider) -> None:
    """A dropped call ends as a connection error at the client."""
    provider.change(drop_rate=1)
    with pytest.raises(aiohttp.ClientConnectionError):
        await ask_gemini(provider.url)
    with pytest.raises(openai.APIConnectionError):
        await ask_openai(provider.openai_url)
    assert [call.outcome for call in provider.calls] == ["dropped", "dropped"]


async def test_keys_and_models_are_checked_where_required(provider: SimulatedProvider) -> None:
    """A wrong key and an unknown model get the status and words of the real services."""
    provider.change(api_key="right")
    with pytest.raises(errors.ClientError, match="API key not valid") as wrong:
        await ask_gemini(provider.url)
    assert wrong.value.code == 400
    with pytest.raises(openai.AuthenticationError):
        await ask_openai(provider.openai_url)
    assert (await ask_gemini(provider.url, key="right")).text == answer_to("hello")
    provider.change(models=["other"])
    with pytest.raises(errors.ClientError, match="not found"):
        await ask_gemini(provider.url, key="right")
    with pytest.raises(openai.NotFoundError):
        await ask_openai(provider.openai_url, key="right")


async def test_a_context_cache_lives_until_its_end(provider: SimulatedProvider) -> None:
    """Caches are created, used, listed page by page, prolonged and deleted; a call with a dead
    one fails with 403."""
    async with gemini(provider.url).aio as client:
        made = [
            await client.caches.create(
                model=MODEL,
                config=types.CreateCachedContentConfig(
                    contents="context " * 100, display_name=f"cache {number}", ttl="600s"
                ),
            )
            for number in range(5)
        ]
        listed = [one async for one in await client.caches.list(config={"page_size": 2})]
        assert [one.display_name for one in listed] == [f"cache {number}" for number in range(5)]
        assert made[0].usage_metadata.total_token_count == 200
        longer = await client.caches.update(
            name=made[0].name, config=types.UpdateCachedContentConfig(ttl="7200s")
        )
        assert (longer.expire_time - made[0].expire_time).total_seconds() == pytest.approx(
            6600, abs=5
        )
        answer = await ask_gemini(provider.url, cached_content=made[0].name)
        assert answer.usage_metadata.cached_content_token_count == 200
        assert answer.usage_metadata.prompt_token_count == 202
        await client.caches.delete(name=made[0].name)
        with pytest.raises(errors.ClientError) as caught:
            await client.caches.get(name=made[0].name)
        assert caught.value.code == 403
    provider.change(missing_cache_status=404)
    with pytest.raises(errors.ClientError) as caught:
        await ask_gemini(provider.url, cached_content=made[0].name)
    assert caught.value.code == 404


async def test_a_context_cache_expires(provider: SimulatedProvider) -> None:
    """A cache whose time is over is gone for get, list and calls."""
    async with gemini(provider.url).aio as client:
        config = types.CreateCachedContentConfig(contents="context", ttl="1s")
        cache = await client.caches.create(model=MODEL, config=config)
        await ask_gemini(provider.url, cached_content=cache.name)

        async def is_gone() -> bool:
            return [one async for one in await client.caches.list()] == []

        await wait_until_async(is_gone)
        with pytest.raises(errors.ClientError):
            await ask_gemini(provider.url, cached_content=cache.name)


async def test_a_cache_may_be_too_small_or_of_another_model(provider: SimulatedProvider) -> None:
    """Gemini's own rules for caches hold: a least size, the same model, no system instruction."""
    async with gemini(provider.url).aio as client:
        config = types.CreateCachedContentConfig(contents="context")
        other = await client.caches.create(model="gemini-2.5-pro", config=config)
        same = await client.caches.create(model=MODEL, config=config)
        provider.change(min_cache_tokens=1024)
        with pytest.raises(errors.ClientError, match="too small"):
            await client.caches.create(model=MODEL, config=config)
    with pytest.raises(errors.ClientError, match="differ"):
        await ask_gemini(provider.url, cached_content=other.name)
    with pytest.raises(errors.ClientError, match="system_instruction"):
        await ask_gemini(provider.url, cached_content=same.name, system_instruction="Be brief.")


async def test_openai_answers_its_prompt(provider: SimulatedProvider) -> None:
    """The openai client gets the answer to its prompt with the tokens that were used."""
    answer = await ask_openai(provider.openai_url, "What is a fox?")
    assert answer.choices[0].message.content == answer_to("What is a fox?")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 4 + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_openai_fills_a_response_format(provider: SimulatedProvider) -> None:
    """A JSON Schema response format comes back as a valid instance."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema()},
    }
    answer = await ask_openai(provider.openai_url, response_format=form)
    assert (
        digest_of("hello") in Verdict.model_validate_json(answer.choices[0].message.content).label
    )


async def test_openai_calls_the_function_it_must(provider: SimulatedProvider) -> None:
    """With a required tool, the answer is a tool call with valid arguments."""
    function = {"name": "judge", "parameters": Verdict.model_json_schema()}
    answer = await ask_openai(
        provider.openai_url,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
    )
    called = answer.choices[0].message.tool_calls[0].function
    assert called.name == "judge"
    Verdict.model_validate_json(called.arguments)


async def test_openai_caches_a_long_system_message(provider: SimulatedProvider) -> None:
    """The second call with the same long system message reports cached tokens."""
    async with chatgpt(provider.openai_url) as client:
        usages = []
        for number in range(2):
            messages: Any = [
                {"role": "system", "content": "rule " * 2000},
                {"role": "user", "content": str(number)},
            ]
            answer = await client.chat.completions.create(model="gpt-x", messages=messages)
            usages.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert usages == [0, 2500 - 2500 % 128]


async def test_openai_blocks_and_cuts(provider: SimulatedProvider) -> None:
    """A blocked answer is a refusal; one beyond its limit ends with `length`."""
    cut = await ask_openai(provider.openai_url, "word " * 50, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    provider.change(block_rate=1)
    blocked = await ask_openai(provider.openai_url)
    assert blocked.choices[0].finish_reason == "content_filter"
    assert blocked.choices[0].message.refusal


async def test_openai_s_429_carries_its_hint(provider: SimulatedProvider) -> None:
    """A refusal has the milliseconds header and names the kind of quota; one for want of money
    has its own code."""
    provider.change(rpm=60)
    await ask_openai(provider.openai_url)
    with pytest.raises(openai.RateLimitError, match="requests per min") as caught:
        await ask_openai(provider.openai_url)
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(caught.value.response.headers["retry-after-ms"]) <= 1000
    provider.change(billing_exhausted=True)
    with pytest.raises(openai.RateLimitError) as caught:
        await ask_openai(provider.openai_url)
    assert caught.value.code == "insufficient_quota"


async def test_malformed_json_is_really_malformed(provider: SimulatedProvider) -> None:
    """A bad output is no JSON, and only where JSON was asked for."""
    provider.change(bad_output_rate=1)
    answer = await ask_gemini(provider.url, response_mime_type="application/json")
    with pytest.raises(ValueError, match=r"."):
        json.loads(answer.text)
    assert (await ask_gemini(provider.url)).text == answer_to("hello")


async def test_a_body_that_is_not_json_is_a_bad_request(provider: SimulatedProvider) -> None:
    """Nonsense gets a 400 in the words of the wire, and is counted as rejected."""
    async with aiohttp.ClientSession() as session:
        for path in ("/v1beta/models/m:generateContent", "/v1/chat/completions"):
            async with session.post(provider.url + path, data=b"{nonsense") as response:
                assert response.status == 400
                assert "message" in (await response.json())["error"]
    assert [call.outcome for call in provider.calls] == ["rejected", "rejected"]


async def test_concurrency_is_limited_and_freed_by_hanging_up(
    provider: SimulatedProvider, tmp_path: Path
) -> None:
    """More calls than the limit are refused; a client that hangs up frees its place."""
    provider.change(latency=30, max_concurrency=2)
    waiting = [asyncio.create_task(ask_gemini(provider.url, str(n))) for n in range(2)]
    await wait_until_async(lambda: provider.stats.in_flight == 2)
    with pytest.raises(errors.ClientError):
        await ask_gemini(provider.url)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await wait_until_async(lambda: provider.stats.in_flight == 0)
    provider.change(latency=0)
    await ask_gemini(provider.url)
    assert (provider.stats.aborted, provider.stats.peak_in_flight) == (2, 2)


async def test_injected_refusals_come_first(provider: SimulatedProvider) -> None:
    """A test can order the next calls to be refused, with the hint of its choice."""
    provider.refuse(1, retry_after=2.5)
    with pytest.raises(errors.ClientError, match=r"2\.500s"):
        await ask_gemini(provider.url)
    await ask_gemini(provider.url)


async def test_quotas_hold_under_load(provider: SimulatedProvider) -> None:
    """A storm of calls gets the bucket and its refill, and not one more."""
    provider.change(rpm=600, latency=0.01)
    async with gemini(provider.url).aio as client:

        async def storm(number: int) -> None:
            for attempt in range(20):
                try:
                    await client.models.generate_content(
                        model=MODEL, contents=f"{number} {attempt}"
                    )
                except errors.ClientError:
                    await asyncio.sleep(0.02)

        await asyncio.gather(*(storm(number) for number in range(10)))
    granted = [call.time for call in provider.calls if call.status == 200]
    allowed = 10 + 10 * (granted[-1] - granted[0])
    assert allowed - 3 <= len(granted) <= allowed + 1
    assert provider.stats.refused > 50


def test_sync_code_runs_it_in_a_thread() -> None:
    """`in_thread` serves a synchronous client and stops with its context."""
    with SimulatedProvider.in_thread(SimulationConfig(seed=3), latency=0.01) as provider:
        client = SimulationClient(provider.url)
        assert client.stats()["calls"] == 0
        answer = asyncio.run(ask_gemini(provider.url))
        assert answer.text == answer_to("hello")
        assert client.stats(prompts=True)["prompt_counts"] == {"hello": 1}
    with pytest.raises(OSError, match="refused"):
        client.stats()


def test_a_taken_port_is_an_error_in_the_caller() -> None:
    """A thread that can't listen raises where it was asked for."""
    with (
        SimulatedProvider.in_thread() as provider,
        pytest.raises(OSError, match="in use"),
        SimulatedProvider.in_thread(port=int(provider.url.rpartition(":")[2])),
    ):
        pass


def test_it_is_watched_and_changed_from_outside(tmp_path: Path) -> None:
    """A provider in a process of its own shows counts and calls, takes settings, forgets."""
    with spawn(rpm=60, log_file=str(tmp_path / "calls.jsonl")) as client:
        asyncio.run(ask_gemini(client.url, "first"))
        with pytest.raises(errors.ClientError):
            asyncio.run(ask_gemini(client.url, "second"))
        client.change(rpm=6000)
        asyncio.run(ask_openai(client.openai_url, "third"))
        stats = client.stats(arrivals=True)
        assert (stats["calls"], stats["answered"], stats["refused"]) == (3, 2, 1)
        assert [status for _, status, _ in stats["arrivals"]] == [200, 429, 200]
        assert [call["prompt"] for call in client.calls(after=1)] == ["second", "third"]
        client.refuse(1)
        with pytest.raises(openai.RateLimitError):
            asyncio.run(ask_openai(client.openai_url))
        with pytest.raises(OSError, match="400"):
            client.change(nonsense=1)
        client.reset()
        assert client.stats()["calls"] == 0


def test_the_log_survives_kill_9(tmp_path: Path) -> None:
    """Every call is in the log file when it arrives, in order, whoever dies afterwards."""
    log = tmp_path / "calls.jsonl"
    with spawn(log_file=str(log)) as client:
        asyncio.run(ask_gemini(client.url, "first"))
        asyncio.run(ask_gemini(client.url, "zweite Frage: wäre es möglich?"))
        client.change(latency=60)

        async def give_up() -> None:
            call = asyncio.create_task(ask_gemini(client.url, "hangs"))
            await wait_until_async(lambda: client.stats()["in_flight"] == 1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        asyncio.run(give_up())
        wait_until(lambda: client.stats()["aborted"] == 1)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line.get("prompt") for line in lines[:3]] == [
        "first",
        "zweite Frage: wäre es möglich?",
        "hangs",
    ]
    assert [line["number"] for line in lines] == [1, 2, 3, 3]
    assert lines[0]["status"] == 200
    assert lines[0]["digest"] == digest_of("first")
    assert lines[3]["aborted"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_says_where_it_is_and_stops_cleanly(number: signal.Signals) -> None:
    """`serve` prints one line when it listens and exits 0 on Ctrl-C and SIGTERM, calls in flight
    or not."""
    command = [sys.executable, "-m", "batchllm_celery.simulation", '{"latency": 60}']
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Simulated provider on http://127.0.0.1:")
        client = SimulationClient(line.split()[-1])

        async def hang() -> None:
            task = asyncio.create_task(ask_gemini(client.url))
            await asyncio.to_thread(wait_until, lambda: client.stats()["in_flight"] == 1)
            process.send_signal(number)
            await asyncio.to_thread(process.wait, 10)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(hang())
        assert process.returncode == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
