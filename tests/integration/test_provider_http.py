"""Calls to a provider: neither key nor prompt goes where a redirect points, and an answer without
end is not read to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

pytest.importorskip("openai", reason="the openai extra is not installed")
pytest.importorskip("pydantic_ai", reason="the pydantic-ai extra is not installed")

import openai
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from batchllm_celery.errors import FailureKind
from batchllm_celery.models import Failure, StrategySpec
from batchllm_celery.providers import OpenAICompatibleStrategy, PydanticAIStrategy, http
from batchllm_celery.settings import Settings
from batchllm_celery.strategies import ProcessResources, Registry, as_completion, classify_for

PROMPT = "the prompt that stays here"
KEY = "the-key-that-stays-here"
MODELS = ["gemini:m", "openai:m", "pydantic-ai:gemini:m", "pydantic-ai:openai:m"]
ANSWER = {
    "gemini": {
        "candidates": [
            {"content": {"role": "model", "parts": [{"text": "yes"}]}, "finishReason": "STOP"}
        ],
        "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 1},
    },
    "openai": {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop",
                     "message": {"role": "assistant", "content": "yes"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    },
}  # fmt: skip


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


async def serve(stack: AsyncExitStack, handler: Any, host: str = "127.0.0.1") -> TestServer:
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{rest:.*}", handler)
    server = TestServer(app, host=host)
    await stack.enter_async_context(server)
    return server


async def outcome(
    stack: AsyncExitStack, model: str, server: TestServer, monkeypatch: pytest.MonkeyPatch
) -> Failure | str:
    """One call of `model` at `server`: the output, or how it failed."""
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", str(server.make_url("/")))
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = Settings(openai_base_url=str(server.make_url("/v1")))
    registry = Registry(ProcessResources(settings=settings))
    stack.push_async_callback(registry.close)
    name, _, params = model.partition(":")
    strategy = await registry.get(StrategySpec(name=name, params={"model": params}))
    await registry.prepare(strategy)
    try:
        async with asyncio.timeout(30):
            return str(as_completion(await strategy.execute(PROMPT, 1, 9)).output)
    except Exception as error:
        return classify_for(strategy, error)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 300])
async def test_no_redirect_of_a_call_is_followed(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, model: str, status: int
) -> None:
    """The other host, which would answer rightly, sees no request at all; the failure names it."""
    seen: list[web.Request] = []
    answer = ANSWER["gemini" if "gemini" in model else "openai"]

    async def answers(request: web.Request) -> web.Response:
        seen.append(request)
        return web.json_response(answer)

    other = await serve(stack, answers, host="localhost")
    place = str(other.make_url("/v1/elsewhere")).replace("://", "://user:word@")

    async def redirects(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": place})

    failed = await outcome(stack, model, await serve(stack, redirects), monkeypatch)

    assert isinstance(failed, Failure)
    assert not seen
    assert failed.kind is FailureKind.INVALID_REQUEST
    assert f"redirects to http://localhost:{other.port}," in failed.message
    assert "word" not in failed.message


@pytest.mark.parametrize("model", MODELS[:2])
@pytest.mark.parametrize(
    "location", ["/v2/there", "//elsewhere.invalid/x", "https:broken", "?a=1", "http://[::1"]
)
async def test_a_redirect_to_anywhere_is_not_followed(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, model: str, location: str
) -> None:
    """On the same host, too, and wherever a relative address leads."""
    seen: list[str] = []

    async def redirects(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response(status=307, headers={"Location": location})

    failed = await outcome(stack, model, await serve(stack, redirects), monkeypatch)

    assert isinstance(failed, Failure)
    assert failed.kind is FailureKind.INVALID_REQUEST
    assert len(seen) == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("header", ["URI", "Refresh", "Content-Location"])
async def test_no_other_header_redirects_either(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, model: str, header: str
) -> None:
    """HTTP clients follow more than Location: aiohttp an old `URI`."""
    seen: list[web.Request] = []

    async def answers(request: web.Request) -> web.Response:
        seen.append(request)
        return web.json_response({})

    other = await serve(stack, answers, host="localhost")
    place = str(other.make_url("/v1/elsewhere"))

    async def redirects(request: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": "", header: place})

    failed = await outcome(stack, model, await serve(stack, redirects), monkeypatch)

    assert isinstance(failed, Failure)
    assert failed.kind is FailureKind.INVALID_REQUEST
    assert not seen


@pytest.mark.parametrize("model", MODELS)
async def test_a_right_answer_still_comes_through(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Compressed, as providers send it."""
    answer = ANSWER["gemini" if "gemini" in model else "openai"]

    async def answers(request: web.Request) -> web.Response:
        response = web.json_response(answer)
        response.enable_compression()
        return response

    assert await outcome(stack, model, await serve(stack, answers), monkeypatch) == "yes"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", ["announced", "chunked", "gzip", "error"])
async def test_an_answer_without_end_is_given_up(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, model: str, shape: str
) -> None:
    """However it comes: with a length, in chunks, small and compressed, or as an error's body."""
    monkeypatch.setattr(http, "MOST_BYTES", 2**20)

    async def floods(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(status=500 if shape == "error" else 200)
        response.content_type = "application/json"
        if shape == "announced":
            response.content_length = 2**40
        if shape == "gzip":
            response.headers["Content-Encoding"] = "gzip"
        await response.prepare(request)
        chunk = gzip.compress(b" " * 2**23) if shape == "gzip" else b" " * 2**18
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(chunk)
        return response

    failed = await outcome(stack, model, await serve(stack, floods), monkeypatch)

    assert isinstance(failed, Failure)
    assert failed.message == "AnswerTooLarge: the answer is larger than 1 MiB"
    assert failed.kind is FailureKind.UNKNOWN


@pytest.mark.parametrize("kind", ["openai", "agent"])
async def test_a_client_of_ones_own_that_follows_nothing_is_understood_too(
    stack: AsyncExitStack, kind: str
) -> None:
    """The SDK's own error becomes the same failure, which names the host."""

    async def redirects(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "http://elsewhere.invalid:8/x"})

    url = str((await serve(stack, redirects)).make_url("/v1"))
    own = openai.AsyncOpenAI(
        api_key=KEY, base_url=url, max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
    )  # fmt: skip
    stack.push_async_callback(own.close)
    strategy: Any = OpenAICompatibleStrategy("m", own)
    if kind == "agent":
        strategy = PydanticAIStrategy(
            Agent(OpenAIChatModel("m", provider=OpenAIProvider(openai_client=own)))
        )
    with pytest.raises(Exception) as raised:
        await strategy.execute(PROMPT, 1, 9)
    assert isinstance(raised.value, Exception)
    failed = classify_for(strategy, raised.value)
    assert failed.kind is FailureKind.INVALID_REQUEST
    assert "redirects to http://elsewhere.invalid:8," in failed.message


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
async def test_no_proxy_of_the_shell_stands_before_the_simulated_provider(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """It is a server of ours, mostly on this machine: every row of a first try failed."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")

    async def answers(request: web.Request) -> web.Response:
        return web.json_response(ANSWER["gemini"])

    url = str((await serve(stack, answers)).make_url("/")).rstrip("/")
    registry = Registry(ProcessResources(settings=Settings(simulated_url=url)))
    stack.push_async_callback(registry.close)
    strategy = await registry.get(StrategySpec(name="simulated", params={"model": "m"}))
    await registry.prepare(strategy)
    assert as_completion(await strategy.execute(PROMPT, 1, 9)).output == "yes"
